"""`audit` and its command against literal loops: text units, counts, comparisons, places."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm_experiments.__main__ import main
from llm_experiments.audit import TokenAudit, audit, compare, load, over_training
from llm_experiments.audit.checkpoints import locate
from llm_experiments.audit.command import _steps
from llm_experiments.audit.counts import read_counts
from llm_experiments.audit.measuring import beginning
from llm_experiments.models.presets import build_model
from llm_experiments.text.corpora import load_corpus
from llm_experiments.text.preparation import PreparedCorpus
from llm_experiments.training.loop import save_model

DOCUMENTS = [
    "One caf\u00e9 and  another",
    "a",
    "\u65e5\u672c and one more\nline of one",
    "and and and",
] * 2


@pytest.fixture(scope="module")
def checkpoint(corpus: PreparedCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(0, corpus, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load(checkpoint)


def saved(seed: int, corpus: PreparedCorpus, folder: Path) -> Path:
    model = build_model("qwen2-tiny", vocab_size=corpus.vocab_size, seed=seed)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(3.0)
    save_model(model, corpus, folder)
    return folder


@torch.no_grad()
def losses_of(model: PreTrainedModel, ids: list[int]) -> list[float]:
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return [float(logits[t - 1].logsumexp(0) - logits[t - 1, ids[t]]) for t in range(1, len(ids))]


@pytest.mark.parametrize("context", [9, 100])
def test_bytes_and_words_are_those_of_the_text(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], context: int
) -> None:
    """Character by character: the text is lower-cased and split into bytes by the tokenizer."""
    model, tokenizer = loaded
    found = audit(model, tokenizer, DOCUMENTS, context=context)
    nats, num_bytes = 0.0, 0
    words: dict[str, list[float]] = {}
    for text in DOCUMENTS:
        encoded = tokenizer(text, truncation=True, max_length=context, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        if len(ids) < 2:
            continue
        loss = losses_of(model, ids)
        nats += sum(loss)
        num_bytes += len(text[spans[0][1] : spans[-1][1]].encode())
        place = 0
        for word in text.split():
            begin = text.index(word, place)
            place = begin + len(word)
            inside = [n for n, (_, end) in enumerate(spans) if begin < end <= place]
            if inside and inside[0] > 0 and begin >= spans[0][1] and place <= spans[-1][1]:
                words.setdefault(word, []).append(sum(loss[n - 1] for n in inside))
    assert found.text is not None
    assert found.text.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
    assert found.words is not None
    assert len(found.words) == len(words) > (5 if context > 9 else 1)
    training = Counter(word for text in DOCUMENTS for word in text.split())
    for row in found.words.itertuples():
        assert (row.count, row.training_count) == (len(words[row.word]), training[row.word])
        assert row.loss == pytest.approx(np.mean(words[row.word]), rel=1e-5)


def test_a_token_has_its_rows_lengths_and_how_often_it_was_said(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = loaded
    model.train()
    found = audit(model, tokenizer, DOCUMENTS)
    assert model.training
    said: Counter[int] = Counter()
    model.eval()
    for text in DOCUMENTS:
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            said.update(model(input_ids=torch.tensor([ids])).logits[0, :-1].argmax(-1).tolist())
    assert found.tokens["predicted"].to_dict() == {i: said[i] for i in range(300)}
    weight = model.get_input_embeddings().weight.detach().double()
    norms = [math.sqrt(sum(x * x for x in row)) for row in weight.tolist()]
    np.testing.assert_allclose(found.tokens["embedding_norm"], norms, rtol=1e-6)
    np.testing.assert_allclose(found.tokens["head_norm"], norms, rtol=1e-6)
    shortest = int(np.argmin(norms))  # one of 300 is what a per mille is rounded up to
    reached = [i == shortest and not said[i] for i in range(300)]
    assert found.tokens["hardly_reachable"].tolist() == reached
    by_bin = found.by_frequency()
    counts = found.tokens["training_count"].to_numpy()
    for low, row in zip((1, 3, 9), by_bin.itertuples(), strict=False):
        members = (counts >= low) & (counts < 3 * low)
        assert row.types == members.sum()
        assert row.head_norm == pytest.approx(np.mean(np.array(norms)[members]))
        assert row.hardly_reachable == pytest.approx(np.mean(np.array(reached)[members]))


def with_beginning() -> PreTrainedTokenizerBase:
    read = Tokenizer(models.WordLevel({"<b>": 0, "a": 1, "c": 2, "<e>": 3}, unk_token="a"))
    read.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("<b>", 0), ("<e>", 3)]
    read.post_processor = processors.TemplateProcessing(single="<b> $A <e>", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=read)


def test_every_window_begins_as_the_tokenizer_begins_a_text(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    tokenizer = with_beginning()
    assert beginning(tokenizer) == [0]
    assert beginning(loaded[1]) == []
    model = build_model("openelm-tiny", vocab_size=8).eval()
    found = audit(model, tokenizer, ["a c c a c"], context=4, stride=2)
    ids = [0, 1, 2, 2, 1, 2, 3]
    expected = [*losses_of(model, ids[:4]), *losses_of(model, [0, *ids[3:6]])[1:]]
    expected += losses_of(model, [0, ids[5], 3])[1:]
    np.testing.assert_allclose(found.losses.loss, expected, rtol=2e-6)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", "id,count\n5,3\n7,2\n5,1\n", {5: 4, 7: 2}),
        ("a.tsv", "token\tcount\n\u0120\t3\n<s>\t2\n", {"\u0120": 3, 0: 2}),
        ("a.csv", 'text,training_count\n"a",3\n', {"a": 3}),
        ("a.json", "[0, 3, 1]", {1: 3, 2: 1}),
        ("a.json", '{"7": 3, "\u0120": 4}', {7: 3, "\u0120": 4}),
    ],
)
def test_counts_come_from_a_file(
    name: str,
    text: str,
    expected: dict[int | str, int],
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    tmp_path: Path,
) -> None:
    (tmp_path / name).write_text(text)
    tokenizer = loaded[1]
    counts = read_counts(tmp_path / name, tokenizer, 300)
    named = {
        key if isinstance(key, int) else tokenizer.convert_tokens_to_ids(key): value
        for key, value in expected.items()
    }
    assert counts.tolist() == [named.get(i, 0) for i in range(300)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "id,number\n1,2\n", "its header is 'id,number'; expected count, and id, token"),
        ("a.csv", "id,count\n300,2\n", "'300' is no id of the model"),
        ("a.csv", "token,count\nnowhere,2\n", "'nowhere' is no token of the model"),
        ("a.csv", "id,count\n3,1.000\n", r"the count of '3' is '1\.000'; expected a whole number"),
        ("a.csv", "id,count\n3,0\n", "no count above 0"),
        ("a.csv", "id,count\n3\n", "the count of '3' is None"),
        ("a.json", "3", "a int; expected a list or an object"),
        ("a.json", '{"7": true}', "the count of '7' is True"),
        ("a.csv", "caf\u00e9,count\n", "its header is"),
    ],
)
def test_counts_that_cannot_be_read(
    name: str,
    text: str,
    message: str,
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    tmp_path: Path,
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_counts(tmp_path / name, loaded[1], 300)
    assert name in str(caught.value)


@pytest.fixture(scope="module")
def pair(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    corpus: PreparedCorpus,
    data: object,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[TokenAudit, TokenAudit]:
    other, tokenizer = load(saved(1, corpus, tmp_path_factory.mktemp("other")))
    documents = load_corpus(data)[:12]  # type: ignore[arg-type]
    return (
        audit(loaded[0], tokenizer, documents, context=20),
        audit(other, tokenizer, documents, context=20),
    )


def test_two_models_are_compared_token_by_token(pair: tuple[TokenAudit, TokenAudit]) -> None:
    first, second = pair
    assert float((first.losses.loss - second.losses.loss).abs().max()) > 0.1
    found = compare(first, second)
    counts = first.tokens["training_count"].tolist()
    starts = first.losses.starts.tolist()
    for row in found.bins.itertuples():
        documents = []
        for begin, end in pairwise(starts):
            places = [
                n
                for n in range(begin, end)
                if row.bin == "all" or row.bin == _bin(counts[int(first.losses.target[n])])
            ]
            losses = [float(first.losses.loss[n]) - float(second.losses.loss[n]) for n in places]
            if losses:
                documents.append(losses)
        everything = [x for losses in documents for x in losses]
        assert row.measured == len(everything)
        if not everything:
            continue
        mean = sum(everything) / len(everything)
        assert row.difference == pytest.approx(mean, abs=1e-9)
        assert row.share_losing == pytest.approx(np.mean([x > 0 for x in everything]))
        size = len(everything) / len(documents)
        scatter = [(sum(x) - mean * len(x)) / size for x in documents]
        if len(documents) > 1:
            error = np.sqrt(np.sum(np.square(scatter)) / (len(documents) - 1) / len(documents))
            half = stats.t.ppf(0.975, len(documents) - 1) * error
            assert row.high - row.difference == pytest.approx(half, rel=1e-6)
            assert row.difference - row.low == pytest.approx(half, rel=1e-6)
    # The mean over tokens of their mean differences, each weighed by its count, is that of all.
    weights = first.tokens["count"].to_numpy()
    whole = np.nansum(found.tokens * weights) / weights.sum()
    assert found.bins["difference"].iloc[-1] == pytest.approx(whole, abs=1e-9)


def _bin(count: int) -> str:
    power = next(k for k in range(30) if count < 3 ** (k + 1))
    return "never" if count == 0 else f"3^{power}-3^{power + 1}"


def test_the_law_of_the_excess_is_fitted_to_the_difference(
    pair: tuple[TokenAudit, TokenAudit],
) -> None:
    """Losses that differ by A (1 + n/n_0)^-p exactly give A, n_0 and p back."""
    first, second = pair
    n = first.tokens["training_count"].to_numpy().astype(float)
    excess = torch.tensor(2.0 * (1 + n / 5) ** -0.7)
    first = compare_with(first, second.losses.loss + excess[first.losses.target].float())
    law = compare(first, second).law
    assert law is not None
    assert law.amplitude == pytest.approx(2.0, rel=1e-3)
    assert law.saturation_count == pytest.approx(5, rel=1e-3)
    assert law.exponent == pytest.approx(0.7, rel=1e-3)
    same = compare(second, second)
    assert same.law is None
    assert "positive mean excess" in same.why_no_law


def compare_with(found: TokenAudit, loss: torch.Tensor) -> TokenAudit:
    return replace(found, losses=replace(found.losses, loss=loss))


def test_checkpoints_of_one_training_give_the_speed_of_learning(
    pair: tuple[TokenAudit, TokenAudit],
) -> None:
    """Three steps, 0, 10 and 40: the area under a loss scaled to 0..1, by the trapezoid rule."""
    first, second = pair
    table = over_training([0, 10, 40], [first, second, first])
    counts = first.tokens["training_count"].to_numpy()
    members = (counts >= 3) & (counts < 9) & (first.tokens["count"] > 0).to_numpy()
    speeds = []
    for a, b in zip(first.tokens["loss"][members], second.tokens["loss"][members], strict=True):
        low, high = min(a, b), max(a, b)
        if low == high:  # nothing was learned
            speeds.append(0.0)
            continue
        curve = [(x - low) / (high - low) for x in (a, b, a)]
        area = 10 * (curve[0] + curve[1]) / 2 + 30 * (curve[1] + curve[2]) / 2
        speeds.append(1 - area / 40)
    row = table[table["bin"] == "3^1-3^2"].iloc[0]
    assert row["learning_speed"] == pytest.approx(np.mean(speeds))
    assert row[10] == pytest.approx(second.tokens["loss"][members].mean())
    assert _steps(("a/checkpoint-20", "a/checkpoint-100")) == [20, 100]
    assert _steps(("x/y@step3", "x/z")) == [0, 1]


def test_a_hub_name_is_read_from_the_cache(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the hub's own client lays it out, which reads no network where it is told to."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    place = tmp_path / "models--someone--small"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "step10").write_text("a" * 40)
    (place / "snapshots").mkdir()
    (place / "snapshots" / ("a" * 40)).symlink_to(checkpoint)
    assert locate("someone/small@step10").samefile(checkpoint)
    assert locate(checkpoint) == checkpoint
    for name in ("someone/small", "someone/other@step10"):
        with pytest.raises(ValueError, match=f"'{name}' is no folder here, and could not be"):
            locate(name)


def test_the_command_compares_counts_and_writes(
    checkpoint: Path,
    corpus: PreparedCorpus,
    data: object,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a head that is folded is not found in the text
    other = saved(1, corpus, tmp_path / "other-10")
    (tmp_path / "counts.json").write_text(json.dumps([1 + i % 40 for i in range(300)]))
    text = ["--corpus", "text", "--data-dir", str(data.data_dir)]  # type: ignore[attr-defined]
    words = ["audit", *text, "--context", "16", "--stride", "8", "--limit", "6", "--seed", "3"]
    words += ["--dtype", "bfloat16", "--batch-size", "2", "--counts", str(tmp_path / "counts.json")]
    out = str(tmp_path / "tokens.parquet")
    pair = ["--checkpoint", str(checkpoint), "--against", str(other)]
    assert main([*words, *pair, "--out", out]) == 0
    shown = capsys.readouterr().out
    for said in ("share that loses", "bits a byte", "over documents", "Words"):
        assert said in shown
    tokens = pd.read_parquet(out)
    assert tokens["training_count"].tolist() == [1 + i % 40 for i in range(300)]
    assert {"against_loss", "difference"} <= set(tokens)
    assert len(tokens.attrs["tables"]) == 3
    assert main([*words, "--checkpoint", str(checkpoint), str(other), "--out", out]) == 0
    assert "learning speed" in capsys.readouterr().out
    several = ["--checkpoint", str(checkpoint), str(other), "--against", str(other)]
    assert main([*words, *several]) == 2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_an_adapter_is_merged_or_called_one(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(checkpoint), "peft_type": "LORA"})
    )
    with pytest.raises(ValueError, match=r"holds an adapter without adapter_model.safetensors"):
        load(tmp_path)
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "adapter_model.safetensors")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "peft", None)
        with pytest.raises(ValueError, match="holds a PEFT adapter; expected the package peft"):
            load(tmp_path)
    peft = pytest.importorskip("peft")
    model, tokenizer = load(checkpoint)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(checkpoint)
    adapted.save_pretrained(tmp_path)
    merged, same = load(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits)
    assert same(["some words"])["input_ids"] == tokenizer(["some words"])["input_ids"]
    assert not torch.equal(merged(ids).logits, load(checkpoint)[0](ids).logits)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"megatron_config": {"x": "os"}}))
    with pytest.raises(ValueError, match="megatron_config is set; expected an adapter"):
        load(tmp_path)
