"""Runs whose seed chose which class gets which count: by rank in count, and by class.

Rank k is the same count under every seed and another class, so seeds come together by rank where
frequency is the question, and by class where the class's own difficulty is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr


def shared_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what the seed shuffled put back in order."""
    settings = dict(config)
    if _is_shuffled(config) and isinstance(counts := config.get("class_counts"), list):
        settings["class_counts"] = sorted(counts)
    return settings


def by_rank(record: xr.Dataset, config: Mapping[str, Any]) -> xr.Dataset:
    """A shuffled run's classes, the rarest first, under names that all seeds share.

    `class_index` says which class has a rank, the attribute `class_names` what it is called. A
    record that was not shuffled, or has as many samples of every class, is returned as it is.
    """
    counts = record["class_count"].values
    if not _is_shuffled(config) or (counts == counts[0]).all():
        return record
    order = np.argsort(counts, kind="stable")
    names = [str(label) for label in record["label"].values]
    ranks = np.array([f"#{k}" for k in range(1, len(order) + 1)], dtype=object)
    ordered = record.isel({"class": order}).assign(class_index=("class", order))
    return ordered.assign_coords(label=("class", ranks)).assign_attrs(class_names=names)


def by_class(group: xr.Dataset) -> xr.Dataset | None:
    """Test accuracy of a group of shuffled runs by class again; None if they were not shuffled."""
    if "class_index" not in group:
        return None
    accuracy = np.empty(group["test_accuracy"].shape)
    np.put_along_axis(accuracy, group["class_index"].values, group["test_accuracy"].values, axis=1)
    return xr.Dataset(
        {"test_accuracy": (("run", "class"), accuracy)},
        coords={
            "weight_decay": group["weight_decay"],
            "seed": group["seed"],
            "label": ("class", group.attrs["class_names"]),
        },
        attrs=group.attrs | {"name": f"{group.attrs['name']}, by class"},
    )


def rank_and_class(group: xr.Dataset) -> list[xr.Dataset]:
    """The views of a group: of shuffled runs by rank and by class, else itself."""
    if (classes := by_class(group)) is None:
        return [group]
    return [group.assign_attrs(name=f"{group.attrs['name']}, by rank"), classes]


def share_explained(values: np.ndarray) -> float:
    """Adjusted R² of the columns' means over the rows' spread; NaN with fewer than two rows.

    values: (seeds, groups). About 0 where the columns differ by chance alone, 1 where the rows
    agree.
    """
    rows, columns = values.shape
    total = float(values.var(ddof=1))
    if rows < 2 or total == 0:
        return float("nan")
    within = float(((values - values.mean(axis=0)) ** 2).sum()) / (columns * (rows - 1))
    return 1 - within / total


def _is_shuffled(config: Mapping[str, Any]) -> bool:
    return config.get("shuffle_classes") is True
