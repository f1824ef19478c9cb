"""Corpora, tokenizer and cache, on made text and on the real IMDB reviews."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from frequency_bins import percentile
from llm_experiments.__main__ import main
from llm_experiments.configs import DataConfig
from llm_experiments.corpora import load_corpus
from llm_experiments.preparation import PreparedCorpus, prepare
from llm_experiments.tests.conftest import SHARED, VOCAB_SIZE, needs_shared
from llm_experiments.tokenization import END_ID, PAD_ID, SPECIAL_TOKENS, train_tokenizer


def counted_slowly(tokens: np.ndarray, first: int) -> list[int]:
    counts = [0] * VOCAB_SIZE
    for row in tokens.tolist():
        for token in row[first:]:
            if token != PAD_ID:
                counts[token] += 1
    return counts


def test_counts_are_those_of_the_tokens(corpus: PreparedCorpus) -> None:
    assert corpus.tokens.shape == (24, 16)
    assert corpus.tokens.dtype == np.uint16
    assert corpus.class_counts.tolist() == counted_slowly(corpus.tokens, 1)
    assert corpus.occurrence_counts.tolist() == counted_slowly(corpus.tokens, 0)


def test_packing_joins_documents_with_an_end_token(data: DataConfig) -> None:
    packed = prepare(replace(data, num_sequences=None))
    tokenizer = Tokenizer.from_file(str(packed.folder / "tokenizer.json"))
    stream: list[int] = []
    for document in load_corpus("text", data.data_dir):
        stream += [*tokenizer.encode(document).ids, END_ID]
    expected = np.array(stream[: len(stream) // 16 * 16]).reshape(-1, 16)
    assert np.array_equal(packed.tokens, expected)


def test_truncation_cuts_and_pads_each_document(tmp_path: Path, data: DataConfig) -> None:
    text = (data.data_dir / "part-0.txt").read_text()
    (tmp_path / "a.txt").write_text(text + "\n\nab ab")
    truncated = prepare(replace(data, data_dir=tmp_path, packing=False, num_sequences=None))
    tokenizer = Tokenizer.from_file(str(truncated.folder / "tokenizer.json"))
    last = tokenizer.encode("ab ab").ids
    assert truncated.tokens[-1].tolist() == last + [PAD_ID] * (16 - len(last))
    first = tokenizer.encode(text.split("\n\n")[0]).ids
    assert truncated.tokens[0].tolist() == first[:16]


def test_labels_are_the_text_of_the_tokens(corpus: PreparedCorpus) -> None:
    assert tuple(corpus.labels[:5]) == SPECIAL_TOKENS
    tokenizer = Tokenizer.from_file(str(corpus.folder / "tokenizer.json"))
    space_e = tokenizer.token_to_id("Ġe")
    assert space_e is None or corpus.labels[space_e] == " e"
    assert len(corpus.labels) == VOCAB_SIZE


def test_the_tokenizer_lower_cases_and_round_trips() -> None:
    tokenizer = train_tokenizer(["Hello hello HELLO wörld 🙂"] * 3, 270)
    text = "héllo 🙂 wörld\n\tnew"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("HELLO").ids == tokenizer.encode("hello").ids


def test_a_prepared_corpus_is_found_again_without_its_text(
    data: DataConfig, corpus: PreparedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("llm_experiments.preparation.load_corpus")
    assert prepare(data).folder == corpus.folder


def test_the_counts_file_is_what_the_theory_reads(
    corpus: PreparedCorpus, data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--corpus", "text", "--data-dir", str(data.data_dir), "--vocab-size", "300"]
    options += ["--context", "16", "--packing", "--num-sequences", "24"]
    assert main(["prepare", *options, "--cache-dir", str(data.cache_dir)]) == 0
    shown = capsys.readouterr().out
    assert "99th percentile" in shown
    assert f"{24 * 15:,} of them next tokens" in shown
    with (corpus.folder / "class_counts.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["count"]) for row in rows] == [n for n in corpus.class_counts.tolist() if n]
    assert len({row["token"] for row in rows}) == len(rows)


def test_a_changed_corpus_is_another_entry(tmp_path: Path, data: DataConfig) -> None:
    text = (data.data_dir / "part-0.txt").read_text()
    (tmp_path / "a.txt").write_text(text)
    before = prepare(replace(data, data_dir=tmp_path))
    (tmp_path / "a.txt").write_text(text + "\n\n" + text)
    after = prepare(replace(data, data_dir=tmp_path))
    assert before.folder != after.folder
    assert before.data_hash != after.data_hash


@pytest.mark.parametrize("name", ["tokens.npy", "tokenizer.json", "meta.json"])
def test_a_damaged_entry_is_named_and_built_again(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    data = replace(data, cache_dir=tmp_path)
    first = prepare(data)
    content = bytearray((first.folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (first.folder / name).write_bytes(content)
    again = prepare(data)
    assert again.data_hash == first.data_hash
    assert str(first.folder) in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [first.folder.name]


def test_python_docs_needs_no_download() -> None:
    documents = load_corpus("python-docs")
    assert sum(map(len, documents)) > 1_000_000
    assert any("comprehension" in document for document in documents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 30_000}, "vocab_size is 30000; the text supports at most"),
        ({"num_sequences": 10_000}, "num_sequences is 10000, held_out 0"),
        ({"data_dir": Path("/nowhere")}, "'/nowhere' is not a folder"),
        ({"data_dir": None}, "expected --data-dir"),
        ({"corpus": "imdb"}, "holds no train-"),
    ],
)
def test_a_corpus_that_cannot_be_prepared(
    data: DataConfig, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(replace(data, cache_dir=tmp_path, **change))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"caf\xe9 " * 50, "not UTF-8"), (b" \n\n \n", "holds no text"), (None, "holds no .txt file")],
)
def test_text_that_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus("text", tmp_path)


@needs_shared("data/imdb")
def test_imdb_has_the_counts_of_the_paper(tmp_path: Path) -> None:
    """Figure 2 colours tokens by the threshold 1026, the 99th percentile (P99)."""
    imdb = prepare(DataConfig(corpus="imdb", data_dir=SHARED / "data/imdb", cache_dir=tmp_path))
    assert imdb.tokens.shape == (25_000, 128)
    assert round(percentile(imdb.occurrence_counts, 99), 1) == 1026.5
    assert round(percentile(imdb.class_counts, 99), 1) == 1023.0
