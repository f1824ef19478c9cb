"""The audit against sums taken by hand."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from frequency_bins import ClassMetrics
from llm_experiments.__main__ import main
from llm_experiments.audit import load, measure, next_token_counts, tokenize
from llm_experiments.configs import DataConfig
from llm_experiments.models.logits import next_token_predictions
from llm_experiments.models.presets import build_model
from llm_experiments.tests.conftest import SHARED, needs_shared
from llm_experiments.text.corpora import load_corpus
from llm_experiments.text.preparation import PreparedCorpus
from llm_experiments.training.loop import save_model


@pytest.fixture(scope="module", params=["openelm-tiny", "qwen2-tiny"])
def checkpoint(
    request: pytest.FixtureRequest, corpus: PreparedCorpus, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(build_model(request.param, vocab_size=corpus.vocab_size), corpus, folder)
    return folder


def summed_by_hand(model: PreTrainedModel, sequences: Iterable[torch.Tensor]) -> ClassMetrics:
    """Algorithm 1 of the paper to the letter, one sequence and one token at a time."""
    size = model.get_input_embeddings().num_embeddings
    metrics: dict[int, list[tuple[float, bool]]] = {token: [] for token in range(size)}
    for sequence in sequences:
        logits = model(input_ids=sequence[None]).logits[0, :-1].double()
        for row, target in zip(logits, sequence[1:].tolist(), strict=True):
            loss = float(row.logsumexp(0) - row[target])
            metrics[target].append((loss, int(row.argmax()) == target))
    summed = ClassMetrics(size)
    for target, entries in metrics.items():
        losses = torch.tensor([loss for loss, _ in entries], dtype=torch.float64)
        correct = torch.tensor([right for _, right in entries], dtype=torch.bool)
        summed.update(losses, torch.full((len(entries),), target), correct)
    return summed


@pytest.mark.parametrize("max_logits", [1, 300 * 50, 2**26])
def test_audit_is_algorithm_1(
    checkpoint: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch, max_logits: int
) -> None:
    monkeypatch.setattr("llm_experiments.models.logits._CHUNK_ELEMENTS", 300 * 7)
    model, tokenizer = load(checkpoint)
    sequences = tokenize(tokenizer, load_corpus(data)[:9], 20)
    sequences.append(sequences[0][:7])
    done: list[int] = []
    metrics = measure(model, sequences, max_logits=max_logits, report=done.append).metrics
    with torch.no_grad():
        expected = summed_by_hand(model, sequences)
    assert metrics.count.tolist() == expected.count.tolist()
    assert metrics.correct.tolist() == expected.correct.tolist()
    np.testing.assert_allclose(metrics.loss_sum, expected.loss_sum, rtol=1e-5)
    assert done[-1] == len(sequences)
    assert (len(done) == len(sequences)) == (max_logits == 1)


@pytest.mark.parametrize("half", [True, False])
def test_of_equal_logits_the_first_is_the_prediction_in_half_precision(half: bool) -> None:
    """As in the loss head; what is no target is no prediction either."""
    logits = torch.tensor([[2.0, 2.0, 1.0]]).expand(1, 5, 3)
    seen = next_token_predictions(logits, torch.tensor([[0, 0, 1, 2, -100]]), half=half)
    assert seen.correct.tolist() == [True, not half, False, False]


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=40)
    return GPT2LMHeadModel(config)


def llama() -> PreTrainedModel:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=320, intermediate_size=64, **shape))


@pytest.mark.parametrize("make", [gpt2, llama])
def test_any_causal_model_is_audited(
    make: Callable[[], PreTrainedModel], corpus: PreparedCorpus, data: DataConfig, tmp_path: Path
) -> None:
    """Written by transformers and read back; Llama's vocabulary is padded beyond the tokenizer."""
    torch.manual_seed(0)
    save_model(make(), corpus, tmp_path)
    model, tokenizer = load(tmp_path)
    sequences = tokenize(tokenizer, load_corpus(data)[:5], 16)
    metrics = measure(model, sequences).metrics
    with torch.no_grad():
        expected = summed_by_hand(model, sequences)
    assert metrics.count.tolist() == expected.count.tolist()
    np.testing.assert_allclose(metrics.loss_sum, expected.loss_sum, rtol=1e-5)


@needs_shared("reference/openelm_tiny.safetensors")
def test_an_official_openelm_checkpoint_is_audited(tmp_path: Path) -> None:
    """Config and weights as the original implementation names them; its loss comes out."""
    with safe_open(SHARED / "reference/openelm_tiny.safetensors", "pt") as file:
        notes, names = file.metadata(), [n for n in file.keys() if n.startswith("weight:")]  # noqa: SIM118
        weights = {name.removeprefix("weight:"): file.get_tensor(name) for name in names}
        ids = file.get_tensor("input_ids")
    config = json.loads(notes["config"]) | {"model_type": "openelm"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(257)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    model, _ = load(tmp_path)
    metrics = measure(model, list(ids)).metrics
    average = float(metrics.loss_sum.sum() / metrics.count.sum())
    assert average == pytest.approx(float(notes["loss"]), rel=1e-5)


def test_the_command_prints_bins_and_writes_every_token(
    checkpoint: Path, data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tokens.csv"
    corpus = ["--corpus", "text", "--data-dir", str(data.data_dir), "--documents", "5"]
    assert main(["audit", "--checkpoint", str(checkpoint), *corpus, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "3^0-3^1" in shown
    assert "token-balanced" in shown
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["token"] for row in rows}) == 300
    spaced = [row["text"] for row in rows if row["token"][0] == "\u0120"]
    assert len(spaced) > 5
    assert all(text[0] == " " for text in spaced)
    assert sum(int(row["count"]) for row in rows) > 0


def test_what_cannot_be_audited(
    checkpoint: Path, tmp_path: Path, data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(folder: Path, *words: str) -> None:
        text = ["--corpus", "text", "--data-dir", str(data.data_dir)]
        assert main(["audit", "--checkpoint", str(folder), *text]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        for word in (str(folder), *words):
            assert word in line

    refused(tmp_path / "nowhere", "config.json")
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "config.json").write_text("{")
    refused(broken)

    silent = tmp_path / "silent"  # as OpenELM's official folders are
    shutil.copytree(checkpoint, silent, ignore=shutil.ignore_patterns("tokenizer*"))
    refused(silent, "no tokenizer", "tokenizer.json")

    torn = tmp_path / "torn"
    shutil.copytree(checkpoint, torn)
    weights = torn / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(torn)
    # Weights that are not there would be drawn at random, and measured as if they were the model's.
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        kept = {name: file.get_tensor(name) for name in sorted(file.keys())}
    for name in [name for name in kept if "layers.1" in name]:
        del kept[name]
    save_file(kept, weights, metadata={"format": "pt"})
    refused(torn, "no weights for", "layers.1")


def test_a_model_that_is_worse_than_guessing_is_questioned(
    checkpoint: Path, tmp_path: Path, data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is with the tokenizer of another model of the same size; here it is sure and wrong."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    text = ["--corpus", "text", "--data-dir", str(data.data_dir), "--documents", "9"]
    arguments = ["audit", "--checkpoint", str(folder), *text]
    for factor, is_worse in ((0.01, False), (100.0, True)):
        model, _ = load(checkpoint)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(factor)
        model.save_pretrained(folder)
        assert main(arguments) == 0
        assert ("belong together" in capsys.readouterr().out) == is_worse


def test_a_context_beyond_the_models_positions_is_refused(
    corpus: PreparedCorpus, data: DataConfig, tmp_path: Path
) -> None:
    save_model(gpt2(), corpus, tmp_path)
    model, tokenizer = load(tmp_path)
    sequences = tokenize(tokenizer, ["word " * 200], 64)
    with pytest.raises(ValueError, match=r"the longest sequence has 64 tokens; .* at most 40"):
        measure(model, sequences)


def test_an_id_that_the_model_has_no_embedding_for_is_refused(
    corpus: PreparedCorpus, data: DataConfig, tmp_path: Path
) -> None:
    """By the ids that occur: a tokenizer with more tokens than the model may be sound."""
    save_model(build_model("qwen2-tiny", vocab_size=280), corpus, tmp_path)
    model, tokenizer = load(tmp_path)
    small = [ids for ids in tokenize(tokenizer, load_corpus(data), 9) if int(ids.max()) < 280]
    assert int(measure(model, small).metrics.count.sum()) == sum(len(ids) - 1 for ids in small)
    beyond = torch.tensor([5, 291, 7])
    for use in (measure, lambda _, rows: next_token_counts(rows, 280)):
        with pytest.raises(ValueError, match="a token of id 291, the model 280 embeddings"):
            use(model, [*small, beyond])


def test_a_loss_that_is_no_number_is_refused(checkpoint: Path) -> None:
    model, _ = load(checkpoint)
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = torch.nan
    with pytest.raises(
        ValueError, match=r"the loss of a token of id 6 is nan; .* weights hold NaN"
    ):
        measure(model, [torch.tensor([5, 6])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--documents", "-1"], "documents is -1; expected at least 1"),
        (["--context", "1"], "context is 1; expected at least 2"),
        (["--out", "nowhere/tokens.csv"], "out is 'nowhere/tokens.csv'; expected a file"),
        (["--out", "."], "out is '.'; expected a file"),
    ],
)
def test_what_is_said_before_the_measurement(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the checkpoint is looked at, which is not there."""
    assert main(["audit", "--checkpoint", "nowhere", *options]) == 2
    assert message in capsys.readouterr().err
