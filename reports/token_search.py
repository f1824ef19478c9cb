"""What the page's token search reads: labels, counts and losses, packed small and inert.

The packed text is base64 of gzip of a JSON header, a newline and little-endian arrays, so no token
text can be taken for markup or script.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence

import numpy as np
import xarray as xr

from reports.groups import display_label, display_text, over_seeds

NO_LOSS, NO_SPEED = 65535, 255
TRAJECTORY_CELLS = 250_000
"""Above this many (group, weight decay, class) cells the page leaves loss trajectories out."""


def pack(groups: Sequence[xr.Dataset]) -> str:
    """Labels, counts, bins and, by group and weight decay, means over seeds for every class.

    Final loss in thousandths of a nat (uint16), learning speed in hundredths (uint8), the loss
    over training in twentieths of a nat (uint8, only up to TRAJECTORY_CELLS) and, by group alone,
    the share of the windows that saw a class in hundredths (uint8).
    """
    cells = sum(g.sizes["class"] * len(np.unique(g["weight_decay"].values)) for g in groups)
    with_trajectory = cells <= TRAJECTORY_CELLS
    vocabularies: dict[tuple[str, bytes], int] = {}
    header: dict[str, list[dict[str, object]]] = {"vocabularies": [], "groups": []}
    arrays: list[bytes] = []
    for group in groups:
        labels = [display_label(label) for label in group["label"].values]
        counts = np.minimum(group["class_count"].values, 2**32 - 1).astype("<u4")
        key = ("\n".join(labels), counts.tobytes())
        if key not in vocabularies:
            vocabularies[key] = len(vocabularies)
            header["vocabularies"].append({"labels": labels})
            arrays.insert(len(vocabularies) - 1, counts.tobytes())
        loss = over_seeds(group, "loss")
        speed = over_seeds(group, "learning_speed")["mean"].values
        trajectory = over_seeds(group, "trajectory")["mean"].values if with_trajectory else None
        header["groups"].append(
            {
                "name": display_text(group.attrs["name"]),
                "vocabulary": vocabularies[key],
                "decays": loss["weight_decay"].values.tolist(),
                "runs": loss["n"].values.tolist(),
                "steps": group["step"].values.tolist() if with_trajectory else [],
            }
        )
        arrays.append(_quantised(loss["mean"].values, 1000, "<u2"))
        arrays.append(_quantised(speed, 100, "<u1"))
        if trajectory is not None:
            arrays.append(_quantised(trajectory, 20, "<u1"))
        arrays.append(_quantised(group["windows_seen"].values.mean(axis=0), 100, "<u1"))
    return _packed(header, arrays)


def pack_losses(
    name: str, labels: Sequence[str], counts: np.ndarray, losses: dict[str, np.ndarray]
) -> str:
    """The same of one model: labels, counts and, by column, a loss for each of V tokens."""
    none = np.full(len(labels), NO_SPEED, dtype="<u1")
    shown = [display_label(label) for label in labels]
    group = {"name": display_text(name), "vocabulary": 0, "decays": list(range(len(losses)))}
    group |= {"columns": list(losses), "runs": [1] * len(losses), "steps": []}
    header = {"vocabularies": [{"labels": shown}], "groups": [group]}
    arrays = [np.minimum(counts, 2**32 - 1).astype("<u4").tobytes()]
    arrays += [_quantised(loss, 1000, "<u2") for loss in losses.values()]
    arrays += [none.tobytes()] * (len(losses) + 1)
    return _packed(header, arrays)


def _packed(header: dict[str, list[dict[str, object]]], arrays: Sequence[bytes]) -> str:
    packed = json.dumps(header).encode("ascii") + b"\n" + b"".join(arrays)
    return base64.b64encode(gzip.compress(packed, mtime=0)).decode("ascii")


def _quantised(values: np.ndarray, scale: int, dtype: str) -> bytes:
    """round(values * scale), with the dtype's largest number for NaN."""
    none = np.iinfo(dtype).max
    codes = np.clip(np.round(values * scale), 0, none - 1)
    return np.where(np.isnan(values), none, codes).astype(dtype).tobytes()
