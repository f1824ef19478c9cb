"""Tasks against loops by hand: words, counts, ranks, the classifier's data, files and intervals."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.numpy import save_file

from frequency_bins import paired_band
from llm_experiments.__main__ import main
from llm_experiments.configs import DataConfig
from llm_experiments.downstream.items import Counts, counts_of_corpus, encode
from llm_experiments.downstream.measure import measure
from llm_experiments.downstream.results import (
    FILE,
    Downstream,
    differences,
    measures,
    read_downstream,
    scores,
    write_downstream,
)
from llm_experiments.models.presets import build_model
from llm_experiments.text.corpora import CorpusConfig
from llm_experiments.text.labelled import labelled_texts
from llm_experiments.text.preparation import PreparedCorpus, prepare

MOOD = ("splendid", "dreadful")


@pytest.fixture(scope="module")
def reviews(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """IMDB's layout: 60 reviews a split, of which those of class 1 hold another word."""
    folder = tmp_path_factory.mktemp("reviews")
    generator = np.random.default_rng(3)
    paragraphs = "\n\n".join(p.read_text() for p in sorted(text_folder.iterdir())).split("\n\n")
    for split in ("train", "test"):
        labels = generator.integers(0, 2, 60)
        chosen = generator.integers(0, len(paragraphs), 60)
        texts = [
            f"{MOOD[label]} {MOOD[label]} {paragraphs[place]}"
            for label, place in zip(labels, chosen, strict=True)
        ]
        table = pa.table({"text": texts, "label": labels})
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def labelled(reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(
        corpus="imdb",
        data_dir=reviews,
        vocab_size=300,
        context=24,
        cache_dir=tmp_path_factory.mktemp("cache"),
    )


def test_words_are_those_of_the_text(corpus: PreparedCorpus, text_folder: Path) -> None:
    text = (text_folder / "part-0.txt").read_text().split("\n\n")[0]
    tokenizer = corpus.tokenizer()
    (whole,) = encode(tokenizer, [text], 10**6)
    found = [tokenizer.decode(whole.ids[begin:end].tolist()) for begin, end in whole.words]
    split = [word for word in re.findall(r" ?\w+", text) if len(tokenizer.encode(word).ids) > 1]
    assert found == split
    (cut,) = encode(tokenizer, [text], 20)
    assert cut.ids.tolist() == whole.ids[:20].tolist()
    assert cut.words == tuple(word for word in whole.words if word[1] <= 20)


def test_what_a_run_was_trained_on_is_counted(labelled: DataConfig, reviews: Path) -> None:
    """One review a sequence, so that the words are those of the cut texts."""
    corpus = prepare(replace(labelled, context=400))
    tokenizer = corpus.tokenizer()
    texts, _ = labelled_texts(labelled, "train")
    words = Counter(w.lower() for text in texts for w in re.findall(r" ?\w+", text))
    counted = counts_of_corpus(corpus)
    assert counted.tokens.tolist() == corpus.class_counts.tolist()
    by_text = Counter({tokenizer.decode(list(word)): n for word, n in counted.words.items()})
    assert by_text == Counter(
        {word: n for word, n in words.items() if len(tokenizer.encode(word).ids) > 1}
    )


@torch.no_grad()
def by_hand(model: object, ids: np.ndarray) -> tuple[list[int], list[float]]:
    """Ranks and losses of the tokens after the first, one sequence at a time, by sorting."""
    logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0]  # type: ignore[operator]
    ranks, losses = [], []
    for row, target in zip(logits[:-1].double(), ids[1:].tolist(), strict=True):
        ranks.append(1 + row.argsort(descending=True).tolist().index(target))
        losses.append(-float(row.log_softmax(0)[target]))
    return ranks, losses


@pytest.mark.parametrize("model_name", ["openelm-tiny", "qwen2-moe-tiny"])
def test_ranks_losses_and_words_are_those_of_a_loop(
    model_name: str, labelled: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = prepare(labelled)
    sides = []
    for split in ("train", "test"):
        texts, classes = labelled_texts(labelled, split, number=40)
        sides.append((list(encode(corpus.tokenizer(), texts, 24)), classes))
    short = sides[1][0]
    short[0] = replace(short[0], ids=short[0].ids[:5], words=())  # padded in its batch
    counts = counts_of_corpus(corpus)
    model = build_model(model_name, vocab_size=300).eval()
    # Words drawn so that the true ones are not all last.
    monkeypatch.setattr("llm_experiments.downstream.measure._MOST_LOGITS", 300 * 24 * 7)
    found = measure(model, counts, sides[0], sides[1])
    place = words = 0
    for number, review in enumerate(short):
        ranks, losses = by_hand(model, review.ids)
        own = found.token_review == number
        assert np.flatnonzero(own).tolist() == list(range(place, place + len(ranks)))
        apart = abs(found.token_rank[own] - np.array(ranks))
        assert apart.max() <= 1  # where two logits are all but equal
        assert (apart == 0).mean() > 0.9
        np.testing.assert_allclose(found.token_loss[own], losses, rtol=1e-4)
        counted = [int(corpus.class_counts[token]) for token in review.ids[1:]]
        assert found.token_count[own].tolist() == counted
        logs = np.log(np.maximum(corpus.class_counts.numpy()[review.ids], 1))
        assert found.sentiment_rarity[number] == pytest.approx(logs.mean(), rel=1e-6)
        for begin, end in review.words:
            assert found.word_review[words] == number
            assert found.word_rank[words] == found.token_rank[own][begin : end - 1].max()
            assert found.word_count[words] == counts.words[tuple(review.ids[begin:end].tolist())]
            words += 1
        place += len(ranks)
    assert (place, words) == (len(found.token_rank), len(found.word_rank))
    assert words > 10
    # The two moods are two tokens' worth of difference: even random features tell them.
    assert found.sentiment_correct.mean() > 0.9


def made(seed: int, correct: float = 0.5) -> Downstream:
    generator = np.random.default_rng(seed)
    items = np.random.default_rng(0)  # the same for every seed
    tokens = np.sort(items.integers(0, 20, 300))
    return Downstream(
        sentiment_correct=(generator.random(20) < correct).astype(np.uint8),
        sentiment_rarity=items.random(20).astype(np.float32),
        token_review=tokens.astype(np.int32),
        token_count=items.integers(0, 40, 300),
        token_rank=generator.integers(1, 30, 300).astype(np.int32),
        token_loss=generator.random(300).astype(np.float32),
        word_review=tokens[::3].astype(np.int32),
        word_count=items.integers(0, 6, 100),
        word_rank=generator.integers(1, 30, 100).astype(np.int32),
    )


def test_scores_are_means_over_the_items_that_they_name(tmp_path: Path) -> None:
    model = made(1)
    write_downstream(tmp_path, model)
    again = read_downstream(tmp_path)
    assert again is not None
    assert again.same_items(model)
    found = {measure.name: value for measure, value in scores(again).items()}
    seen = (model.token_count >= 3) & (model.token_count <= 8)
    rank, loss = model.token_rank[seen], model.token_loss[seen]
    assert found["next token, seen 3–8×: mean reciprocal rank"] == pytest.approx((1 / rank).mean())
    assert found["next token, seen 3–8×: recall at 10"] == pytest.approx((rank <= 10).mean())
    assert found["next token, seen 3–8×: loss (nats)"] == pytest.approx(loss.mean())
    few = (model.word_count >= 1) & (model.word_count <= 3)
    assert found["word, seen 1–3×: recall at 1"] == pytest.approx(
        (model.word_rank[few] == 1).mean()
    )
    rare = model.sentiment_rarity <= np.quantile(model.sentiment_rarity, 0.25)
    assert found["sentiment, rarest quarter: accuracy"] == model.sentiment_correct[rare].mean()
    parts = [
        m.part for m, _ in measures(model) if (m.task, m.score) == ("next token", "loss (nats)")
    ]
    assert parts == ["all", "never seen", "seen 1–2×", "seen 3–8×", "seen 9–26×", "seen 27–80×"]


def test_differences_are_paired_by_seed_and_item() -> None:
    first, second = [made(1), made(2)], [made(3, 0.9), made(4, 0.9)]
    found = {d.measure.name: d for d in differences(first, second)}
    difference = found["sentiment, all: accuracy"]
    pairs = zip(first, second, strict=True)
    apart = np.stack([b.sentiment_correct * 1.0 - a.sentiment_correct for a, b in pairs])
    assert difference.band == paired_band(apart, np.arange(20))
    assert (difference.items, difference.seeds) == (20, 2)
    assert difference.second - difference.first == pytest.approx(apart.mean())
    other = replace(made(5), token_count=made(5).token_count + 1)
    with pytest.raises(ValueError, match="different items"):
        differences(first, [second[0], other])
    with pytest.raises(ValueError, match="2 and 1 models"):
        differences(first, second[:1])


@pytest.mark.parametrize(
    "changed",
    [
        {"token_rank": np.zeros(300, dtype=np.int32)},
        {"token_count": -np.ones(300, dtype=np.int64)},
        {"token_review": np.full(300, 20, dtype=np.int32)},
        {"token_loss": np.full(300, np.nan, dtype=np.float32)},
        {"token_loss": np.zeros(300, dtype=np.float64)},
        {"word_rank": np.ones(7, dtype=np.int32)},
        {"word_rank": None},
    ],
)
def test_a_file_that_anyone_may_have_written(
    changed: dict[str, np.ndarray | None], tmp_path: Path
) -> None:
    arrays = {k: v for k, v in (vars(made(1)) | changed).items() if v is not None}
    save_file(arrays, tmp_path / FILE)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / FILE))):
        read_downstream(tmp_path)
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is not a file of results"):
        read_downstream(tmp_path)


def sweep(labelled: DataConfig, runs: Path, *more: str) -> list[str]:
    return [
        *("sweep", "--study", "s", "--runs-dir", str(runs), "--model", "openelm-tiny", "--steps"),
        *("4", "--batch-size", "4", "--device", "cpu", "--corpus", "imdb", "--data-dir"),
        *(str(labelled.data_dir), "--cache-dir", str(labelled.cache_dir), "--vocab-size", "300"),
        *("--context", "24", "--no-packing", "--num-sequences", "40", "--weight-decay", "0", "1"),
        *("--loss-weight-exponent", "0", "--runs-in-parallel", "1", *more),
    ]


def test_the_models_of_a_study_and_of_a_folder(
    labelled: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(sweep(labelled, tmp_path, "--save-model")) == 0
    study = tmp_path / "s"
    assert main(["downstream", "--study", str(study), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "λ = 1" in shown
    folders = sorted(path.parent for path in study.glob(f"*/{FILE}"))
    assert len(folders) == 2
    found = [read_downstream(folder) for folder in folders]
    assert all(f is not None and len(f.sentiment_correct) == 60 for f in found)
    times = [(folder / FILE).stat().st_mtime_ns for folder in folders]
    assert main(["downstream", "--study", str(study), "--device", "cpu"]) == 0
    assert [(folder / FILE).stat().st_mtime_ns for folder in folders] == times  # nothing to do
    # The folder of one of them, with counts of the corpus's first tokens.
    options = ["--data-dir", str(labelled.data_dir), "--context", "24", "--device", "cpu"]
    model = ["downstream", "--checkpoint", str(folders[0] / "model")]
    assert main([*model, *options, "--out", str(tmp_path / "out")]) == 0
    alone = read_downstream(tmp_path / "out")
    assert alone is not None
    assert found[0] is not None
    np.testing.assert_array_equal(alone.token_rank, found[0].token_rank)


def test_bad_input_is_one_line(
    labelled: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(*arguments: str) -> str:
        assert main(["downstream", *arguments]) == 2
        (said,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error: ")]
        return said

    assert "either --study or --checkpoint" in line()
    assert "no finished run" not in line("--study", str(tmp_path / "nowhere"))
    assert main(sweep(labelled, tmp_path)) == 0
    assert "has kept its model" in line("--study", str(tmp_path / "s"))
    folder = ("--checkpoint", str(tmp_path), "--data-dir", str(labelled.data_dir))
    assert "python-docs" in line("--checkpoint", str(tmp_path), "--corpus", "python-docs")
    assert "no column 'mood'" in line(*folder, "--label-column", "mood")
    assert "expected two" in line(*folder, "--label-column", "text")
    assert "61 reviews" in line(*folder, "--reviews", "61")
    assert "no labelled split 'train'" in line(*folder[:3], str(tmp_path))
    assert "context is 1" in line(*folder, "--context", "1")


def test_too_few_reviews_to_choose_a_penalty(labelled: DataConfig) -> None:
    corpus = prepare(labelled)
    texts, classes = labelled_texts(labelled, "train", number=8)
    side = (list(encode(corpus.tokenizer(), texts, 24)), classes)
    model = build_model("openelm-tiny", vocab_size=300)
    with pytest.raises(ValueError, match="more --reviews"):
        measure(model, Counts(tokens=np.ones(300, dtype=np.int64), words=Counter()), side, side)


def test_other_labels_than_two(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b", "c"], "label": [0, 1, -1]})
    parquet.write_table(table, tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match="holds the labels -1, 0, 1; expected two"):
        labelled_texts(CorpusConfig(corpus="imdb", data_dir=tmp_path), "train")
