"""Finished runs as one small text file each, to keep beside the code.

A record of a large vocabulary holds every token's loss in every window, some 20 MB. What the
report shows after the last step fits into less than 1 MB: counts, labels, final losses (of seven
digits) and hits of every class, of images those on the test set too, the scalars, the manifest,
and the windows' losses by bin. The last layer of images is not kept.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from frequency_bins import FrequencyBins, bin_summary
from run_store import Run, class_record, read_study, run_id, write_atomically
from run_store.input_files import is_integer, is_number, parse_json, read_file

_NAME = re.compile(r"[0-9a-f]{12}\.json")
_MOST_BYTES = 2**24
_BIN_BASE = 2
_TEST = ("test_count", "test_loss", "test_accuracy")


def shrink(study: Path, out: Path) -> list[Path]:
    """Write a file for each finished run of a study into the folder `out`; returns their paths.

    Raises:
        ValueError: a study without a finished run, or without a final loss.
        OSError: the folder cannot be written.
    """
    runs = read_study(study).runs
    if not runs:
        raise ValueError(f"{study} has no finished run; nothing to shrink")
    contents = {out / f"{run.id}.json": _content(run) for run in runs}
    out.mkdir(parents=True, exist_ok=True)
    for path, content in contents.items():
        write_atomically(path, content)
    return list(contents)


def _content(run: Run) -> bytes:
    record = run.classes()
    counts, final = record["class_count"].values, record["final_count"].values
    if not final.any():
        raise ValueError(f"{run.folder} has no final loss; nothing to shrink")
    hits = np.rint(np.nan_to_num(record["final_accuracy"].values * final)).astype(int)
    bins = FrequencyBins.powers(counts, base=_BIN_BASE)
    windows = bin_summary(bins, record["loss"].values, record["count"].values).mean
    document: dict[str, Any] = {
        "manifest": run.manifest,
        "scalars": run.scalars(),
        "labels": record["label"].values.tolist(),
        "class_count": counts.tolist(),
        "final_count": final.tolist(),
        "final_loss": [_short(loss) for loss in record["final_loss"].values],
        "final_correct": hits.tolist(),
        "windows": {
            "step": record["step"].values.tolist(),
            "bin_low": list(bins.edges[:-1]),
            "loss": [[_short(loss) for loss in row] for row in windows],
        },
    }
    if "test_count" in record:
        # Integers stay integers; what a class without test images does not have is null.
        last = {name: record[name].values[-1].tolist() for name in _TEST}
        document |= {
            name: [None if math.isnan(value) else value for value in values]
            for name, values in last.items()
        }
    lines = (f"{json.dumps(key)}: {_compact(value)}" for key, value in document.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("ascii")


def _compact(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _short(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.7g}")


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
        **{name: [_numbers(document, name, len(labels))] for name in _TEST if name in document},
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
