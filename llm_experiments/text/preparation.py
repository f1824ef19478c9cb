"""From text to token ids, once: training reads the result and needs neither text nor tokenizer.

    <cache>/<key>/tokenizer.json   the trained tokenizer
    <cache>/<key>/tokens.npy       (S, T) ids in the smallest integer type, padded with <pad>
    <cache>/<key>/held_out.npy     (H, T) the same for what is not trained on
    <cache>/<key>/meta.json        what it was made of, and the SHA-256 of each file

The key is a hash of the source and of every setting, so a changed corpus is another entry.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import secrets
import shutil
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from frequency_bins import class_counts
from llm_experiments.text.configs import DataConfig
from llm_experiments.text.corpora import HUB_NAMES, load_corpus
from llm_experiments.text.tokenization import (
    END_ID,
    PAD_ID,
    read_tokenizer,
    token_labels,
    train_tokenizer,
)
from run_store import write_atomically
from run_store.input_files import open_regular, parse_json, read_file
from run_store.runs import naming
from run_store.signals import interruptible

_FORMAT = 4
_AT_A_TIME = 1000  # documents whose encodings, which hold more than ids, are kept at once
_FILES = ("tokenizer.json", "tokens.npy", "held_out.npy")
Ids = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, kw_only=True)
class PreparedCorpus:
    """Token ids ready for training. S sequences of T tokens, V vocabulary entries."""

    folder: Path
    vocab_size: int
    data_hash: str
    packed: bool
    """whether the sequences are cut from joined documents, instead of one from each"""
    tokens: Ids
    """(S, T), memory-mapped; <pad> where a document is shorter than the context"""
    held_out: Ids
    """(H, T) sequences that are not trained on"""

    @cached_property
    def class_counts(self) -> torch.Tensor:
        """(V,) int64: how often each token is the next token, which is what a model predicts."""
        return class_counts(self.tokens[:, 1:], self.vocab_size, ignore_index=PAD_ID)

    @cached_property
    def occurrence_counts(self) -> torch.Tensor:
        """(V,) int64: how often each token occurs at any position, the first included."""
        return class_counts(self.tokens, self.vocab_size, ignore_index=PAD_ID)

    @cached_property
    def labels(self) -> list[str]:
        """(V,) the text of each token."""
        return token_labels(self.tokenizer())

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids."""
        return read_tokenizer(self.folder / "tokenizer.json", self.vocab_size)


def prepare(config: DataConfig) -> PreparedCorpus:
    """The prepared corpus of a config, from the cache where it is there and whole.

    Raises:
        ValueError: a corpus that cannot be read, or a vocabulary larger than it supports.
        OSError: a cache folder that cannot be written.
    """
    folder = config.cache_dir / _cache_key(config)
    if folder.exists():
        try:
            return load_prepared(folder)
        except ValueError as error:
            print(f"rebuilding the prepared corpus: {error}", file=sys.stderr)
            shutil.rmtree(folder)
    _store(folder, config, *_tokenize(config))
    return load_prepared(folder)


def load_prepared(folder: Path) -> PreparedCorpus:
    """Open an entry of the cache.

    Raises ValueError where a file is missing, was changed, or is not what `prepare` writes.
    """
    try:
        path = folder / "meta.json"
        meta = parse_json(read_file(path, most_bytes=2**20), str(path))
        hashes = {name: _sha256_of(folder / name) for name in _FILES}
        if meta["format"] != _FORMAT or meta["sha256"] != hashes:
            raise ValueError(f"{folder} was changed since it was written")
        vocab_size, packed = meta["config"]["vocab_size"], meta["config"]["packing"]
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is not a prepared corpus ({type(error).__name__})") from None
    if type(vocab_size) is not int or type(packed) is not bool:
        raise ValueError(f"{path}: vocab_size is {vocab_size!r}, packing {packed!r}")
    read_tokenizer(folder / "tokenizer.json", vocab_size)
    tokens, held_out = (_read_ids(folder / name, vocab_size) for name in _FILES[1:])
    return PreparedCorpus(
        folder=folder,
        vocab_size=vocab_size,
        data_hash=hashes["tokens.npy"],
        packed=packed,
        tokens=tokens,
        held_out=held_out,
    )


def _read_ids(path: Path, vocab_size: int) -> Ids:
    """(S, T) ids below ``vocab_size``, memory-mapped; ValueError for any other file."""
    try:
        # Not np.load, which takes archives too.
        ids = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # of many kinds: numpy evaluates the header as a Python literal
        raise ValueError(f"{path} is not an array ({type(error).__name__}: {error})") from None
    if ids.ndim != 2 or ids.shape[1] < 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"{path} is {ids.dtype} of shape {ids.shape}; expected rows of ids")
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise ValueError(f"{path} holds ids outside 0 to {vocab_size - 1}")
    return ids


def write_counts(corpus: PreparedCorpus) -> Path:
    """Write the next-token counts of the tokens that occur, for ``python -m ufm predict``."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("token", "count"))
    counted = zip(corpus.labels, corpus.class_counts.tolist(), strict=True)
    writer.writerows((label, count) for label, count in counted if count)
    path = corpus.folder / "class_counts.csv"
    write_atomically(path, text.getvalue().encode("utf-8"))
    return path


def _tokenize(config: DataConfig) -> tuple[Tokenizer, Ids, Ids]:
    documents = load_corpus(config)
    # IMDB-xl keeps the tokenizer of IMDB (section 3): the tokens stay comparable.
    is_xl = config.corpus == "imdb-xl"
    own = load_corpus(replace(config, corpus="imdb")) if is_xl else documents
    tokenizer = interruptible(lambda: train_tokenizer(own, config.vocab_size))
    ids = [
        encoding.ids
        for start in range(0, len(documents), _AT_A_TIME)
        for encoding in tokenizer.encode_batch_fast(documents[start : start + _AT_A_TIME])
    ]
    sequences = _packed(ids, config.context) if config.packing else _truncated(ids, config.context)
    trained, held_out = _split(sequences, config)
    smallest = np.min_scalar_type(config.vocab_size - 1)
    return tokenizer, trained.astype(smallest), held_out.astype(smallest)


def _split(sequences: Ids, config: DataConfig) -> tuple[Ids, Ids]:
    """What is trained on and what is held out: both a fixed random choice, in the text's order."""
    available = len(sequences) - config.held_out
    wanted = available if config.num_sequences is None else config.num_sequences
    if not 1 <= wanted <= available:
        raise ValueError(
            f"num_sequences is {config.num_sequences}, held_out {config.held_out}; corpus "
            f"{config.corpus!r} gives {len(sequences)} sequences of {config.context} tokens"
        )
    order = np.random.default_rng(0).permutation(len(sequences))
    held_out = order[len(order) - config.held_out :]
    return sequences[np.sort(order[:wanted])], sequences[np.sort(held_out)]


def _truncated(ids: list[list[int]], context: int) -> Ids:
    """Each document cut at the context; one of a single token predicts nothing and is left out."""
    kept = [document[:context] for document in ids if len(document) > 1]
    sequences = np.full((len(kept), context), PAD_ID, dtype=np.int64)
    for row, document in zip(sequences, kept, strict=True):
        row[: len(document)] = document
    if not len(sequences):
        raise ValueError("the corpus has no document of two tokens; expected at least one")
    return sequences


def _packed(ids: list[list[int]], context: int) -> Ids:
    """All documents in a row, </s> after each, cut every ``context`` tokens; a rest is dropped."""
    stream = np.concatenate([np.array([*document, END_ID], dtype=np.int64) for document in ids])
    if len(stream) < context:
        raise ValueError(
            f"the corpus has {len(stream)} tokens; expected at least one context of {context}"
        )
    return stream[: len(stream) // context * context].reshape(-1, context)


def _store(
    folder: Path, config: DataConfig, tokenizer: Tokenizer, tokens: Ids, held_out: Ids
) -> None:
    """Write the whole entry beside and rename it into place."""
    beside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    contents = (tokenizer.to_str(pretty=True).encode("utf-8"), _npy(tokens), _npy(held_out))
    files = dict(zip(_FILES, contents, strict=True))
    meta = {
        "format": _FORMAT,
        "config": {
            "corpus": config.corpus,
            "vocab_size": config.vocab_size,
            "context": config.context,
            "packing": config.packing,
        },
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    files["meta.json"] = json.dumps(meta, indent=2).encode("ascii")
    try:
        beside.mkdir(parents=True)
        for name, content in files.items():
            (beside / name).write_bytes(content)
        if not folder.exists():  # else another process was faster, with the same content
            beside.rename(folder)
    except OSError as error:
        raise naming(error, folder) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _npy(array: Ids) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _cache_key(config: DataConfig) -> str:
    """First 16 hex digits of the hash of the source and of every setting that shapes the tokens."""
    described = {
        "format": _FORMAT,
        "source": _source(config),
        "text_column": config.text_column,
        "split": config.split,
        "subset": config.subset,
        "vocab_size": config.vocab_size,
        "context": config.context,
        "packing": config.packing,
        "num_sequences": config.num_sequences,
        "held_out": config.held_out,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _source(config: DataConfig) -> list[Any]:
    """What the text is, cheap to find out: the interpreter, the hub's name, or the files' bytes."""
    if config.data_dir is None:
        return [
            config.corpus,
            sys.version if config.corpus == "python-docs" else HUB_NAMES.get(config.corpus),
        ]
    suffix = {"text": ".txt", "imdb": ".parquet", "imdb-xl": ".parquet"}.get(config.corpus, "")
    files = sorted(path for path in config.data_dir.rglob(f"*{suffix}") if path.is_file())
    return [
        config.corpus,
        [[str(path.relative_to(config.data_dir)), _sha256_of(path)] for path in files],
    ]


def _sha256_of(path: Path) -> str:
    with open(path, "rb", opener=open_regular) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
