"""The history of a run: counts, mean losses and accuracies of each class, window after window."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from frequency_bins.class_metrics import ClassMetrics


class WindowHistory:
    """What happened to V classes in each window between two evaluations."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._rows: list[dict[str, Tensor]] = []

    @property
    def last_step(self) -> int:
        """The step that the last window ended with; 0 before the first."""
        return self._steps[-1] if self._steps else 0

    def append(self, step: int, stream: ClassMetrics, **passes: ClassMetrics) -> dict[str, float]:
        """Close a window: keep what the training steps saw, and passes made at its end.

        Returns the averages over samples: `loss` in nats and `accuracy` of the training steps, and
        `<name>_loss`, `<name>_accuracy` of each pass.
        """
        row: dict[str, Tensor] = {}
        averages: dict[str, float] = {}
        for name, metrics in {"": stream, **passes}.items():
            prefix = f"{name}_" if name else ""
            row |= {prefix + measure: mean for measure, mean in _means(metrics).items()}
            count = metrics.count.sum()
            averages[f"{prefix}loss"] = float(metrics.loss_sum.sum() / count)
            averages[f"{prefix}accuracy"] = float(metrics.correct.sum().double() / count)
        self._steps.append(step)
        self._rows.append(row)
        return averages

    def state_dict(self) -> dict[str, Tensor]:
        """The windows so far: steps (windows,), and every measure (windows, V)."""
        names = self._rows[0] if self._rows else ()
        stacked = {name: torch.stack([row[name] for row in self._rows]) for name in names}
        return {"steps": torch.tensor(self._steps), **stacked}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the windows of a checkpoint."""
        measures = {name: tensor for name, tensor in state.items() if name != "steps"}
        self._steps = state["steps"].tolist()
        self._rows = [
            {name: tensor[window] for name, tensor in measures.items()}
            for window in range(len(self._steps))
        ]

    def arrays(self, final: ClassMetrics) -> dict[str, np.ndarray]:
        """All windows, and the pass over the training set at the end, as a class record has them.

        steps (windows,), every measure (windows, V), and final_count, final_loss, final_accuracy
        (V,).
        """
        last = {f"final_{name}": mean for name, mean in _means(final).items()}
        return {name: tensor.numpy() for name, tensor in {**last, **self.state_dict()}.items()}


def _means(metrics: ClassMetrics) -> dict[str, Tensor]:
    return {
        "count": metrics.count.cpu(),
        "loss": metrics.loss.cpu(),
        "accuracy": metrics.accuracy.cpu(),
    }
