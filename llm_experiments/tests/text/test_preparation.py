"""Corpora, tokenizer and cache, on made text and on the real IMDB reviews."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet
from tokenizers import Tokenizer

from llm_experiments.__main__ import main
from llm_experiments.configs import DataConfig
from llm_experiments.tests.conftest import SHARED, VOCAB_SIZE, needs_shared
from llm_experiments.text import preparation
from llm_experiments.text.corpora import CorpusConfig, load_corpus
from llm_experiments.text.distribution import counts_at, rare_shares
from llm_experiments.text.preparation import PreparedCorpus, load_prepared, prepare
from llm_experiments.text.tokenization import END_ID, PAD_ID, SPECIAL_TOKENS, train_tokenizer


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
    for document in load_corpus(data):
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


def test_special_tokens_that_a_document_spells_out_are_text(
    tmp_path: Path, data: DataConfig
) -> None:
    (tmp_path / "text.txt").write_text("<s> one <pad> two <mask> three </s> <unk>\n\n" * 40)
    trained = train_tokenizer([(tmp_path / "text.txt").read_text()], 270)
    read = prepare(replace(data, data_dir=tmp_path, vocab_size=270, num_sequences=None)).tokenizer()
    for tokenizer in (trained, read):
        ids = tokenizer.encode("a <pad> b").ids
        assert min(ids) >= len(SPECIAL_TOKENS)
        assert tokenizer.decode(ids) == "a <pad> b"


def test_an_interrupt_is_heard_while_the_tokenizer_is_trained(
    tmp_path: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def watched(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return train_tokenizer(*arguments)

    monkeypatch.setattr(preparation, "train_tokenizer", watched)
    prepare(replace(data, cache_dir=tmp_path))
    assert threads[0] is not threading.main_thread()


def test_a_prepared_corpus_is_found_again_without_its_text(
    data: DataConfig, corpus: PreparedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("llm_experiments.text.preparation.load_corpus")
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


@pytest.mark.parametrize("damage", ["flipped", "cut short", "empty", "gone"])
@pytest.mark.parametrize("name", ["tokens.npy", "tokenizer.json", "meta.json"])
def test_a_damaged_entry_is_named_and_built_again(
    data: DataConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: str,
) -> None:
    data = replace(data, cache_dir=tmp_path)
    first = prepare(data)
    path = first.folder / name
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    if damage == "gone":
        path.unlink()
    elif damage == "flipped":
        content[half] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: half if damage == "cut short" else 0])
    again = prepare(data)
    assert again.data_hash == first.data_hash
    assert str(first.folder) in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [first.folder.name]


def test_python_docs_needs_no_download() -> None:
    documents = load_corpus(CorpusConfig(corpus="python-docs"))
    assert sum(map(len, documents)) > 1_000_000
    assert any("comprehension" in document for document in documents)


DOCUMENTS = ["a first review", "a second one", "and a third, déjà vu"]


def write_dataset(folder: Path, form: str) -> None:
    """A local copy of a dataset with a column `review`, in one of the forms that people have."""
    columns = {"review": [*DOCUMENTS, None, "  "], "label": [0, 1, 0, 1, 0]}
    dataset = Dataset.from_dict(columns)
    other = Dataset.from_dict({"review": ["not trained on"], "label": [1]})
    folder.mkdir()
    if form == "saved":
        dataset.save_to_disk(str(folder))
    elif form == "saved with splits":
        DatasetDict({"test": other, "train": dataset}).save_to_disk(str(folder))
    elif form == "csv":
        dataset.to_csv(folder / "reviews.csv")
    elif form == "jsonl":
        dataset.to_json(folder / "reviews.jsonl")
    elif form == "parquet":
        dataset.to_parquet(folder / "reviews.parquet")
    else:
        (folder / "plain_text").mkdir()
        dataset.to_parquet(folder / "plain_text/train-00000-of-00001.parquet")
        other.to_parquet(folder / "plain_text/test-00000-of-00001.parquet")


FORMS = ("saved", "saved with splits", "csv", "jsonl", "parquet", "hub layout")


# pandas 2 leaves an open csv file to the garbage collector.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*/reviews.csv:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("form", FORMS)
def test_any_dataset_is_read_from_a_local_copy(tmp_path: Path, form: str) -> None:
    write_dataset(tmp_path / "copy", form)
    config = CorpusConfig(corpus="someone/reviews", data_dir=tmp_path / "copy")
    assert load_corpus(replace(config, text_column="review")) == DOCUMENTS
    with pytest.raises(ValueError, match=r"no column 'text'; expected one of .*'review'"):
        load_corpus(config)
    with pytest.raises(ValueError, match="holds int; expected text"):
        load_corpus(replace(config, text_column="label"))
    if form in ("saved with splits", "hub layout"):
        test = load_corpus(replace(config, text_column="review", split="test"))
        assert test == ["not trained on"]
    if form not in ("saved",):  # which has no splits
        with pytest.raises(ValueError, match="split 'dev', could not be loaded"):
            load_corpus(replace(config, text_column="review", split="dev"))


@pytest.mark.parametrize("content", [b"", b"PAR1 torn"])
def test_a_torn_copy_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet could not be read"):
        load_corpus(CorpusConfig(corpus="imdb", data_dir=tmp_path))


def test_few_bytes_that_stand_for_very_much_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-00000-of-00001.parquet"
    words = pyarrow.array(["x" * 1000] * 50_000).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": words}), path)
    assert path.stat().st_size < 10_000
    with pytest.raises(ValueError, match="unpacks to 1000 times its size"):
        load_corpus(CorpusConfig(corpus="imdb", data_dir=tmp_path))


def test_a_corpus_is_read_from_its_folder_alone(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "secret.txt").write_text("a secret")
    (data / "a.txt").write_text("some words")
    (data / "b.txt").symlink_to(data / "a.txt")
    config = CorpusConfig(corpus="text", data_dir=data)
    assert load_corpus(config) == ["some words"] * 2
    (data / "c.txt").symlink_to("../secret.txt")
    with pytest.raises(ValueError, match=r"c\.txt leads out of"):
        load_corpus(config)
    (data / "c.txt").unlink()
    os.mkfifo(data / "c.txt")
    with pytest.raises(ValueError, match=r"c\.txt is not a regular file"):
        load_corpus(config)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("tokens.npy", np.full((3, 16), 300, dtype=np.uint16), "ids outside 0 to 299"),
        ("tokens.npy", np.full((3, 16), -1), "ids outside 0 to 299"),
        ("tokens.npy", np.zeros((3, 16)), "float64"),
        ("tokens.npy", np.zeros(16, dtype=np.uint16), r"\(16,\)"),
        ("held_out.npy", np.zeros((3, 1), dtype=np.uint16), r"\(3, 1\)"),
        ("held_out.npy", np.array([[{}, 1]], dtype=object), "Python objects"),
    ],
)
def test_an_entry_whose_hashes_agree_is_not_believed(
    corpus: PreparedCorpus, tmp_path: Path, name: str, array: np.ndarray, message: str
) -> None:
    entry = shutil.copytree(corpus.folder, tmp_path / "entry")
    np.save(entry / name, array)
    meta = json.loads((entry / "meta.json").read_text())
    meta["sha256"][name] = hashlib.sha256((entry / name).read_bytes()).hexdigest()
    (entry / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=f"{name} .*{message}"):
        load_prepared(entry)


def test_offline_means_no_network(tmp_path: Path) -> None:
    """A fresh process whose every connection would fail the test, and which was told by option."""
    program = (
        "import socket, sys\n"
        "def refuse(*_): print('went to the network', flush=True)\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from llm_experiments.__main__ import main\n"
        "sys.exit(main(['prepare', '--corpus', 'nobody/nothing', '--offline']))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert "'nobody/nothing'" in line
    assert "(offline)" in line
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("packing", [False, True])
def test_counts_of_a_smaller_vocabulary_are_those_of_its_own_tokenizer(
    data: DataConfig, packing: bool
) -> None:
    """Figure 3b takes the tokens apart again; here a tokenizer of each size is really trained."""
    corpus = prepare(replace(data, packing=packing, num_sequences=None))
    documents = load_corpus(data)
    for size in (262, 280, 300):
        tokenizer = train_tokenizer(documents, size)
        expected = np.zeros(size, dtype=int)
        if packing:  # the text of the sequences, each without its first token
            large = Tokenizer.from_file(str(corpus.folder / "tokenizer.json"))
            names = [[large.id_to_token(i) for i in row] for row in corpus.tokens.tolist()]
            for row in names:
                small = [part for name in row for part in pieces(tokenizer, name)]
                expected += np.bincount(small[1:], minlength=size)
        else:
            for document in documents:
                expected += np.bincount(tokenizer.encode(document).ids[1:16], minlength=size)
        assert counts_at(corpus, size).tolist() == expected.tolist()
    assert counts_at(corpus, 300).tolist() == corpus.class_counts.tolist()


def pieces(tokenizer: Tokenizer, name: str) -> list[int]:
    """What a token of another vocabulary is in this one: special as it is, or merged anew."""
    if name in SPECIAL_TOKENS:
        return [SPECIAL_TOKENS.index(name)]
    return [token.id for token in tokenizer.model.tokenize(name)]


def test_rare_shares_are_of_sizes_that_can_be_had(corpus: PreparedCorpus) -> None:
    counts = sorted(corpus.class_counts.tolist(), reverse=True)
    most_frequent = next(k for k in range(301) if sum(counts[:k]) >= 0.95 * sum(counts))
    assert rare_shares(corpus) == {300: pytest.approx(1 - most_frequent / 300)}
    for size in (260, 301):
        with pytest.raises(ValueError, match=f"a vocabulary of {size} .* expected 261 to 300"):
            rare_shares(corpus, [size])


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
        load_corpus(CorpusConfig(corpus="text", data_dir=tmp_path))


def test_a_text_is_the_same_wherever_it_was_written(tmp_path: Path) -> None:
    lines = "one line\nand another\n\na second\nparagraph\n \nand a third"
    expected = ["one line\nand another", "a second\nparagraph", "and a third"]
    path = tmp_path / "a.txt"
    for content in (
        lines.encode(),
        lines.replace("\n", "\r\n").encode(),
        lines.replace("\n", "\r").encode(),
        b"\xef\xbb\xbf" + lines.encode(),
    ):
        path.write_bytes(content)
        assert load_corpus(CorpusConfig(corpus="text", data_dir=tmp_path)) == expected


def test_the_subset_that_is_asked_for_is_read(tmp_path: Path) -> None:
    """Local files in the hub's layout: a folder a subset."""
    for place, split, text in (
        ("small", "train", "s"),
        ("large/data", "train", "l"),
        ("data/en", "train", "e"),
        (".cache/large", "train", "hidden"),
        ("other", "test", "o"),
    ):
        (tmp_path / place).mkdir(parents=True)
        path = tmp_path / place / f"{split}-00000-of-00001.parquet"
        parquet.write_table(pa.table({"text": [text]}), path)
    config = CorpusConfig(corpus="someone/two", data_dir=tmp_path, offline=True)
    for subset, text in (("small", "s"), ("large", "l"), ("en", "e")):
        assert load_corpus(replace(config, subset=subset)) == [text]
    assert load_corpus(replace(config, split="test")) == ["o"]
    for unknown in ("nonsense", None):
        with pytest.raises(ValueError, match=f"subset is {unknown!r}; .*: en, large, small$"):
            load_corpus(replace(config, subset=unknown))
    with pytest.raises(ValueError, match="its splits are test, train"):
        load_corpus(replace(config, split="validation", subset="small"))
    parquet.write_table(pa.table({"text": ["d"]}), tmp_path / "train-00000-of-00001.parquet")
    assert load_corpus(config) == ["d"]


def test_a_saved_dataset_names_its_splits(tmp_path: Path) -> None:
    saved = DatasetDict({"training": Dataset.from_dict({"text": ["a"]})})
    saved.save_to_disk(str(tmp_path))
    config = CorpusConfig(corpus="a/b", data_dir=tmp_path, offline=True)
    assert load_corpus(replace(config, split="training")) == ["a"]
    with pytest.raises(ValueError, match="its splits are training"):
        load_corpus(config)
    with pytest.raises(ValueError, match="its subset is None, not 'small'"):
        load_corpus(replace(config, split="training", subset="small"))


@pytest.mark.parametrize("head", [b"", b"x" * 2**20 + b"\n"])
@pytest.mark.parametrize("wrong", [b"\xe9", b"\xe2\x82"])
def test_a_table_that_is_not_utf_8_is_named(
    head: bytes, wrong: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.csv").write_bytes(head + b"text\ncaf" + wrong)
    config = CorpusConfig(corpus="a/b", data_dir=tmp_path, offline=True)
    place = len(head) + 8
    with pytest.raises(ValueError, match=rf"train\.csv is not UTF-8 \(byte {place}\)"):
        load_corpus(config)
    assert capsys.readouterr().err == ""


@needs_shared("data/imdb")
def test_imdb_has_the_counts_of_the_paper(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figure 2 colours tokens by the threshold 1026, the 99th percentile (P99)."""
    options = ["--corpus", "imdb", "--data-dir", str(SHARED / "data/imdb")]
    assert main(["prepare", *options, "--cache-dir", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for line in (
        "25,000 sequences of 128 tokens",
        "3,069,753 tokens, 3,044,753 of them next tokens; 30,513 of 32,005 types occur",
        "1,026.5 of occurrences, 1,023.0 of next tokens",
        "50% of the tokens are the top 0.247 % of the vocabulary",
        "80% of the tokens are the top 4.1 % of the vocabulary",
        "95% of the tokens are the top 30.2 % of the vocabulary",
        "3^0-3^1 2,615 0.13 %",  # Figure 8
        "3^1-3^2 11,211 1.99 %",
        "3^9-3^10 11 13.19 %",
        "32,005 70.0 % of it",  # Figure 3b
    ):
        assert line in shown


@needs_shared("data/imdb")
def test_imdb_xl_is_the_training_and_the_unsupervised_reviews() -> None:
    folder = SHARED / "data/imdb"
    train = load_corpus(CorpusConfig(corpus="imdb", data_dir=folder))
    larger = load_corpus(CorpusConfig(corpus="imdb-xl", data_dir=folder))
    assert (len(train), len(larger)) == (25_000, 75_000)
    assert larger[:25_000] == train
