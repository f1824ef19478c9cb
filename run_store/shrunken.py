"""The small file of a finished run, as `reports.shrunken` writes it, read like a run."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from run_store.input_files import is_integer, is_number, parse_json, read_file
from run_store.records import class_record
from run_store.runs import run_id

_NAME = re.compile(r"[0-9a-f]{12}\.json")
_MOST_BYTES = 2**24
TEST_WINDOWS = ("test_count", "test_loss", "test_accuracy")


def shrunken_runs(folder: Path) -> list[ShrunkenRun]:
    """The runs that `shrink` wrote into a folder, by id."""
    names = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    return [ShrunkenRun(path) for path in names]


class ShrunkenRun:
    """Such a file, with the names that a report reads of a `Run`."""

    def __init__(self, path: Path) -> None:
        self.folder = path
        self.id = path.stem

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the run. ValueError, naming the file, for one that is not ours."""
        manifest = self._document().get("manifest")
        if not isinstance(manifest, dict) or not isinstance(manifest.get("config"), dict):
            raise ValueError(f"{self.folder}: no manifest with a config")
        if manifest.get("status") != "finished" or run_id(manifest["config"]) != self.id:
            raise ValueError(f"{self.folder}: not the finished run of that id")
        return manifest

    def classes(self, only: Collection[str] | None = None) -> xr.Dataset:
        """Its record, with a single window that saw no class: what they saw is not kept by class.

        Raises ValueError, naming the file, for what `shrink` would not write.
        """
        document = self._document()
        try:
            return _record(document)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{self.folder}: not a shrunken run: {error}") from None

    def _document(self) -> dict[str, Any]:
        content = read_file(self.folder, most_bytes=_MOST_BYTES, follow_links=False)
        return parse_json(content, str(self.folder))


def _record(document: Mapping[str, Any]) -> xr.Dataset:
    labels = document["labels"]
    counts, seen, hits = (
        _numbers(document, name, len(labels))
        for name in ("class_count", "final_count", "final_correct")
    )
    loss = _numbers(document, "final_loss", len(labels))
    with np.errstate(invalid="ignore"):
        accuracy = hits / seen
    nothing = np.full((1, len(labels)), math.nan)
    return class_record(
        steps=document["windows"]["step"][-1:],
        class_counts=counts,
        labels=labels,
        count=np.zeros(nothing.shape, dtype=np.int64),
        loss=nothing,
        accuracy=nothing,
        final_count=seen,
        final_loss=loss,
        final_accuracy=accuracy,
        **{
            name: [_numbers(document, name, len(labels))]
            for name in TEST_WINDOWS
            if name in document
        },
    )


def _numbers(document: Mapping[str, Any], name: str, classes: int) -> np.ndarray:
    """(V,) of a document; NaN for null, which only losses and accuracies may have."""
    values = document[name]
    real = name.endswith(("loss", "accuracy"))
    fits = all(is_integer(v) or (real and (v is None or is_number(v))) for v in values)
    if len(values) != classes or not fits:
        raise ValueError(f"{name} are not {classes} numbers")
    return np.array(
        [math.nan if v is None else v for v in values], dtype=np.float64 if real else None
    )
