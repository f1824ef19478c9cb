"""Texts with a label each, such as IMDB's reviews with their sentiment."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from llm_experiments.text.corpora import HUB_NAMES, CorpusConfig
from run_store.command_line import one_line
from run_store.input_files import open_regular

_MOST_ROWS_A_BYTE = 10  # few bytes of parquet can stand for very many rows


def labelled_texts(
    config: CorpusConfig, split: str, *, label_column: str = "label", number: int | None = None
) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Texts of a split, and the class of each: 0 or 1, as their labels are ordered.

    `number` of them, a fixed random choice that keeps the order; None for all. From the files
    <split>-*.parquet below ``data_dir``, or from the hub without it.

    Raises:
        ValueError: a corpus without labels, files that cannot be read, fewer texts than `number`,
            or other than two labels.
    """
    if config.corpus in ("python-docs", "text"):
        raise ValueError(
            f"corpus {config.corpus!r} has no labels for sentiment; expected imdb, imdb-xl, or a "
            f"dataset with a column {label_column!r} in splits train and test"
        )
    columns = (config.text_column, label_column)
    rows = _hub_rows if config.data_dir is None else _parquet_rows
    pairs = [
        (text, label)
        for text, label in rows(config, split, columns)
        if isinstance(text, str) and text.strip()
    ]
    kinds = sorted({label for _, label in pairs}, key=str)
    if len(kinds) != 2:
        shown = ", ".join(map(str, kinds[:5])) or "none"
        raise ValueError(
            f"column {label_column!r} of corpus {config.corpus!r}, split {split!r}, holds the "
            f"labels {shown:.80}; expected two"
        )
    if number is not None:
        if not 1 <= number <= len(pairs):
            raise ValueError(
                f"{number} reviews are asked for; split {split!r} of corpus {config.corpus!r} has "
                f"{len(pairs)}"
            )
        chosen = np.random.default_rng(0).permutation(len(pairs))[:number]
        pairs = [pairs[place] for place in np.sort(chosen)]
    texts = [text for text, _ in pairs]
    return texts, np.array([kinds.index(label) for _, label in pairs], dtype=np.int64)


def _parquet_rows(
    config: CorpusConfig, split: str, columns: tuple[str, str]
) -> Iterator[tuple[object, object]]:
    from pyarrow import parquet

    folder = config.data_dir
    assert folder is not None
    files = sorted(folder.rglob(f"{split}-*.parquet"))
    if not files:
        raise ValueError(
            f"corpus {config.corpus!r} has no labelled split {split!r}: {str(folder)!r} holds no "
            f"{split}-*.parquet"
        )
    for path in files:
        try:
            with open(path, "rb", opener=open_regular) as file:
                table = parquet.ParquetFile(file)
                if table.metadata.num_rows > _MOST_ROWS_A_BYTE * os.fstat(file.fileno()).st_size:
                    raise ValueError(f"{table.metadata.num_rows} rows are too many for its size")
                _check(table.schema_arrow.names, columns)
                for batch in table.iter_batches(batch_size=64, columns=list(columns)):
                    yield from zip(*(batch[name].to_pylist() for name in columns), strict=True)
        except Exception as error:  # of many kinds
            raise ValueError(f"{path} could not be read: {one_line(error)}") from None


def _hub_rows(
    config: CorpusConfig, split: str, columns: tuple[str, str]
) -> Iterator[tuple[object, object]]:
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when `datasets` is imported
    import datasets

    datasets.disable_progress_bars()
    name = HUB_NAMES.get(config.corpus, config.corpus)
    try:
        part = datasets.load_dataset(name, config.subset, split=split)
        _check(part.column_names, columns)
    except Exception as error:  # of many kinds
        raise ValueError(
            f"corpus {config.corpus!r}, split {split!r}, could not be loaded from the hub: "
            f"{one_line(error)}; expected --data-dir, or a dataset of the hub"
        ) from None
    return zip(*(part[name] for name in columns), strict=True)


def _check(names: list[str], columns: tuple[str, str]) -> None:
    for name in columns:
        if name not in names:
            raise ValueError(f"no column {name!r}; expected one of {names}")
