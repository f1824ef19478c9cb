"""Finished runs as one small text file each, to keep beside the code.

A record of a large vocabulary holds every token's loss in every window, some 20 MB. What the
report shows after the last step fits into less than 1 MB: counts, labels, final losses (of seven
digits) and hits of every class, of images those on the test set too, the scalars, the manifest,
and the windows' losses by bin. The last layer of images is not kept.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from frequency_bins import FrequencyBins, bin_summary
from run_store import Run, read_study, write_atomically
from run_store.shrunken import TEST_WINDOWS

_BIN_BASE = 2


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
        last = {name: record[name].values[-1].tolist() for name in TEST_WINDOWS}
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
