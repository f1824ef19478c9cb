"""Where text comes from: a corpus is a named list of documents, always in the same order."""

from __future__ import annotations

import ast
import codecs
import logging
import os
import pydoc_data.topics
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from run_store.input_files import open_regular, read_file

if TYPE_CHECKING:
    from datasets import Dataset

HUB_NAMES = {"imdb": "stanfordnlp/imdb", "imdb-xl": "stanfordnlp/imdb"}
_SPLITS = {"imdb": ("train",), "imdb-xl": ("train", "unsupervised")}
# Folders of the standard library that are tests, generated code or not of the library at all.
_NO_ENGLISH = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "__pycache__",
}
_TEXTS = (".csv", ".tsv", ".json", ".jsonl", ".txt")
_SAVED = ("dataset_dict.json", "state.json")
_MOST_TEXT_BYTES = 2**33
_MOST_EXPANSION = 1000
CORPORA = ("python-docs", "imdb", "imdb-xl", "text")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Which text."""

    corpus: str = "python-docs"
    """python-docs (built in), imdb, imdb-xl, text, or the name of a Hugging Face dataset"""
    data_dir: Path | None = None
    """folder of the corpus; without it a dataset comes from the Hugging Face hub"""
    text_column: str = "text"
    """column of a Hugging Face dataset that holds the text"""
    split: str = "train"
    """part of a Hugging Face dataset (imdb and imdb-xl name theirs)"""
    subset: str | None = None
    """configuration of a Hugging Face dataset that has several"""
    offline: bool = False
    """use no network: a dataset of the hub must be in its cache on this machine"""


def load_corpus(config: CorpusConfig) -> list[str]:
    """The documents of a corpus, always in the same order.

    ``python-docs`` is the English that every Python interpreter carries. ``imdb`` is the 25,000
    training reviews, ``imdb-xl`` those and the 50,000 unsupervised ones (section 3 of the paper);
    both come from ``data_dir`` in the Hugging Face layout, or from the hub without it. ``text`` is
    every ``.txt`` file below ``data_dir``, a paragraph a document. Any other name is a dataset on
    the Hugging Face hub, or whatever name you give to the dataset in ``data_dir``: a folder of
    parquet, csv or json files, or one that ``save_to_disk`` wrote.

    Raises:
        ValueError: a missing folder or column, an empty corpus, or text that is not UTF-8.
    """
    name, data_dir = config.corpus, config.data_dir
    if data_dir is not None and not data_dir.is_dir():
        raise ValueError(
            f"data-dir {str(data_dir)!r} is not a folder; expected the folder of corpus {name!r}"
        )
    if name == "python-docs":
        documents = list(_python_docs())
    elif name == "text":
        if data_dir is None:
            raise ValueError(
                "corpus 'text' has no data-dir; expected --data-dir FOLDER with .txt files"
            )
        documents = list(_text_files(data_dir))
    else:
        documents = _hugging_face(config)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"corpus {name!r} ({data_dir or 'built in'}) holds no text")
    return documents


def _python_docs() -> Iterator[str]:
    """Language reference topics, then the standard library's docstrings, in order of path."""
    for topic in sorted(pydoc_data.topics.topics):
        yield pydoc_data.topics.topics[topic]
    library = Path(sysconfig.get_paths()["stdlib"])
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = sorted(set(subfolders) - _NO_ENGLISH)
        for name in sorted(files):
            if name.endswith(".py"):
                yield from _docstrings(Path(folder, name))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and deliberately broken files
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) > 80:  # one-liners teach no English
                yield docstring


def _text_files(folder: Path) -> Iterator[str]:
    paths = sorted(folder.rglob("*.txt"))
    if not paths:
        raise ValueError(f"data-dir {str(folder)!r} holds no .txt file; expected at least one")
    for path in paths:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} leads out of data-dir {str(folder)!r}; expected a file in it")
        try:
            text = read_file(path, most_bytes=_MOST_TEXT_BYTES).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 (byte {error.start}); expected UTF-8 text"
            ) from None
        # As Python reads lines, so that a text is the same wherever it was written.
        yield from re.split(r"\n\s*\n", re.sub(r"\r\n?", "\n", text))


def _hugging_face(config: CorpusConfig) -> list[str]:
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when `datasets` is imported
    # Imported here: it takes seconds, and a prepared corpus does not need it.
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what went wrong is said here, in one line
    documents: list[str] = []
    for split in _SPLITS.get(config.corpus, (config.split,)):
        if files := _parquet_files(config, split):
            documents += _parquet_texts(files, config)
            continue
        try:
            part = _hub_split(config, split) if config.data_dir is None else _split(config, split)
        except (OSError, ValueError, RuntimeError, KeyError, DatasetsError) as error:
            if config.data_dir is not None:
                _check_utf8(config.data_dir)
            place = "the hub" if config.data_dir is None else repr(str(config.data_dir))
            offline = " (offline)" if datasets.config.HF_HUB_OFFLINE else ""
            raise ValueError(
                f"corpus {config.corpus!r}, split {split!r}, could not be loaded from "
                f"{place}{offline}: {_first_line(error)}; expected one of {', '.join(CORPORA)}, a "
                "hub dataset, or --data-dir with a dataset"
            ) from None
        documents += _column(part, config)
    return documents


def _hub_split(config: CorpusConfig, split: str) -> Dataset:
    from datasets import load_dataset

    return load_dataset(HUB_NAMES.get(config.corpus, config.corpus), config.subset, split=split)


def _split(config: CorpusConfig, split: str) -> Dataset:
    """A split of a local copy: written by `save_to_disk`, in the hub's layout, or plain files."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    folder = config.data_dir
    assert folder is not None
    if any((folder / name).is_file() for name in _SAVED):
        saved = load_from_disk(str(folder))
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise ValueError(f"its splits are {', '.join(sorted(saved))}")
            saved = saved[split]
        if config.subset not in (None, saved.info.config_name):
            raise ValueError(f"its subset is {saved.info.config_name!r}, not {config.subset!r}")
        return saved
    if splits := sorted({name for _, name, _ in _in_hub_layout(folder)}):
        raise ValueError(f"its splits are {', '.join(splits)}")
    if config.corpus in HUB_NAMES:
        raise ValueError(f"it holds no {split}-*.parquet")
    return load_dataset(str(folder), config.subset, split=split)


def _parquet_files(config: CorpusConfig, split: str) -> list[Path]:
    """The files of a split in the hub's layout, unless the folder is one of `save_to_disk`.

    A folder holds one subset, which is called after it.
    """
    folder = config.data_dir
    if folder is None or any((folder / name).is_file() for name in _SAVED):
        return []
    # Named one by one: a folder loaded as a whole silently drops a split such as "unsupervised".
    found = [(subset, path) for subset, name, path in _in_hub_layout(folder) if name == split]
    if not found:
        return []
    subsets = sorted({subset for subset, _ in found})
    wanted = config.subset or (subsets[0] if len(subsets) == 1 else "default")
    if wanted not in subsets:
        raise ValueError(
            f"subset is {config.subset!r}; expected one of those in {str(folder)!r}: "
            f"{', '.join(subsets)}"
        )
    return [path for subset, path in found if subset == wanted]


def _in_hub_layout(folder: Path) -> list[tuple[str, str, Path]]:
    """Subset, split and path of every parquet file that is named as the hub names them."""
    found = []
    for path in sorted(folder.rglob("*-*.parquet")):
        inner = path.relative_to(folder)
        if not any(part.startswith(".") for part in inner.parts):
            subset = "/".join(part for part in inner.parent.parts if part != "data")
            # A split's name holds no hyphen.
            found.append((subset or "default", path.name.partition("-")[0], path))
    return found


def _check_utf8(folder: Path) -> None:
    """ValueError for a file of text that is not UTF-8, which `datasets` does not name."""
    for path in sorted(path for end in _TEXTS for path in folder.rglob(f"*{end}")):
        decoder = codecs.getincrementaldecoder("utf-8")()
        begin, part = 0, b"-"
        with open(path, "rb", opener=open_regular) as file:
            while part:
                part, held = file.read(2**20), len(decoder.getstate()[0])
                try:
                    decoder.decode(part, final=not part)
                except UnicodeDecodeError as error:
                    at = begin - held + error.start
                    raise ValueError(f"{path} is not UTF-8 (byte {at}); expected UTF-8") from None
                begin += len(part)


def _parquet_texts(files: Sequence[Path], config: CorpusConfig) -> Iterator[str]:
    """The texts of parquet files, a few rows at a time: few bytes can stand for very many rows."""
    from pyarrow import parquet

    for path in files:
        try:
            with open(path, "rb", opener=open_regular) as file:
                left = _MOST_EXPANSION * os.fstat(file.fileno()).st_size
                table = parquet.ParquetFile(file)
                _check_column(table.schema_arrow.names, config)
                batches = table.iter_batches(batch_size=64, columns=[config.text_column])
                for text in (text for batch in batches for text in batch.column(0).to_pylist()):
                    left -= len(text) + 1 if isinstance(text, str) else 1
                    if left < 0:
                        raise ValueError(f"it unpacks to {_MOST_EXPANSION} times its size")
                    yield from _texts((text,), config)
        except Exception as error:  # of many kinds
            raise ValueError(f"{path} could not be read: {_first_line(error)}") from None


def _column(part: Dataset, config: CorpusConfig) -> Iterator[str]:
    _check_column(part.column_names, config)
    return _texts(part[config.text_column], config)


def _check_column(names: Sequence[str], config: CorpusConfig) -> None:
    if config.text_column not in names:
        raise ValueError(
            f"{config.corpus!r} has no column {config.text_column!r}; expected one of {names}"
        )


def _texts(values: Iterable[object], config: CorpusConfig) -> Iterator[str]:
    """The texts of a column; rows without any are left out."""
    for text in values:
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(
                f"column {config.text_column!r} of {config.corpus!r} holds "
                f"{type(text).__name__}; expected text"
            )
        yield text


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
