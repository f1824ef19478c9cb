"""Where text comes from: a corpus is a named list of documents, always in the same order."""

from __future__ import annotations

import ast
import os
import pydoc_data.topics
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

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
CORPORA = ("python-docs", "imdb", "imdb-xl", "text")


def load_corpus(name: str, data_dir: Path | None = None, text_column: str = "text") -> list[str]:
    """The documents of a corpus.

    ``python-docs`` is the English that every Python interpreter carries. ``imdb`` is the 25,000
    training reviews, ``imdb-xl`` those and the 50,000 unsupervised ones (section 3 of the paper);
    both come from ``data_dir`` in the Hugging Face layout, or from the hub without it. ``text`` is
    every ``.txt`` file below ``data_dir``, a paragraph a document. Any other name is a dataset on
    the Hugging Face hub (or a folder that ``datasets`` can load), of which the ``train`` split's
    ``text_column`` is read.

    Raises:
        ValueError: a missing folder or column, an empty corpus, or text that is not UTF-8.
    """
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
        documents = _hugging_face(name, data_dir, text_column)
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
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 (byte {error.start}); expected UTF-8 text"
            ) from None
        yield from re.split(r"\n\s*\n", text)


def _hugging_face(name: str, data_dir: Path | None, text_column: str) -> list[str]:
    # Imported here: it takes seconds, and a prepared corpus does not need it.
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()

    splits = _SPLITS.get(name, ("train",))
    if data_dir is None:
        try:
            parts = [load_dataset(HUB_NAMES.get(name, name), split=split) for split in splits]
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"corpus {name!r} could not be loaded from the hub ({reason}); "
                f"expected one of {', '.join(CORPORA)}, a hub dataset, or --data-dir"
            ) from None
    else:
        parts = []
        for split in splits:
            # Named one by one: a folder loaded as a whole silently drops the unsupervised split.
            files = sorted(str(path) for path in data_dir.rglob(f"{split}-*.parquet"))
            if not files:
                raise ValueError(
                    f"data-dir {str(data_dir)!r} holds no {split}-*.parquet; expected one"
                )
            try:
                parts.append(load_dataset("parquet", data_files=files, split="train"))
            except (OSError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"{files[0]} could not be read as parquet ({type(error).__name__})"
                ) from None
    for part in parts:
        if text_column not in part.column_names:
            raise ValueError(
                f"{name!r} has no column {text_column!r}; expected one of {part.column_names}"
            )
    return [text for part in parts for text in part[text_column]]
