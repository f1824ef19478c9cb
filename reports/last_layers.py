"""Neural-collapse geometry of the last layers that image runs left beside their records."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from run_store import Run
from ufm import UFMProblem, neural_collapse
from ufm.geometry import mean_cosine
from vision_appendix.last_layer import read_last_layer

MEASURES = {
    "within_class": "NC1",
    "equinorm": "NC2, norms",
    "equiangle": "NC2, angles",
    "self_duality": "NC3",
    "rare_cosine": "cosine, 3 rarest",
    "frequent_cosine": "cosine, 3 most frequent",
}
NORMS = {"feature_norm": "class mean", "classifier_norm": "classifier"}


def end_classes(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the three rarest and the three most frequent classes; of fewer if V < 6.

    Equal counts keep the order of the classes.
    """
    order = np.argsort(counts, kind="stable")
    ends = min(3, len(order) // 2)
    return order[:ends], order[len(order) - ends :]


def geometry_variables(run: Run, counts: np.ndarray, class_index: np.ndarray) -> dict[str, Any]:
    """What a run's group holds of its last layer: MEASURES by run, and by class NORMS.

    counts: (V,) of the classes as the group orders them; class_index: (V,) which class of the
    file each is. `feature_norm` is the norm of a class mean less the global mean, and
    `classifier_norm` that of a class's classifier, both over their mean. NaN without such a file.

    Raises ValueError for one that is damaged, or not of V classes.
    """
    layer = read_last_layer(run.folder, len(counts))
    if layer is None or (counts == 0).any():
        none = np.full(len(counts), math.nan)
        return dict.fromkeys(MEASURES, math.nan) | dict.fromkeys(NORMS, ("class", none))
    W, means, variance = (
        layer[name][torch.from_numpy(class_index)]
        for name in ("classifier", "class_means", "within_class_variance")
    )
    problem = UFMProblem(class_counts=counts, lambda_W=1.0, lambda_H=1.0)  # only V and n matter
    measured = neural_collapse(problem, W, means.T, within_class_variance=variance)
    rare, frequent = (torch.from_numpy(places) for places in end_classes(counts))
    values = {name: getattr(measured, name, math.nan) for name in MEASURES}
    values |= {"rare_cosine": mean_cosine(W[rare]), "frequent_cosine": mean_cosine(W[frequent])}
    norms = {
        "feature_norm": (means - means.mean(dim=0)).norm(dim=1),
        "classifier_norm": W.norm(dim=1),
    }
    # A network that was decayed to nothing has no norms to compare.
    return values | {name: ("class", (norm / norm.mean()).numpy()) for name, norm in norms.items()}
