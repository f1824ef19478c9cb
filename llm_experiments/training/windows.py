"""The history of a run: counts, mean losses and accuracies of each token, window after window."""

from __future__ import annotations

import torch
import xarray as xr
from torch import Tensor

from frequency_bins import ClassMetrics
from llm_experiments.text.preparation import PreparedCorpus
from run_store import class_record


class WindowHistory:
    """What happened to V tokens in each window between two evaluations."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._rows: list[dict[str, Tensor]] = []

    def append(self, step: int, stream: ClassMetrics, **passes: ClassMetrics) -> float:
        """Close a window: keep what the training steps saw, and passes made at its end.

        Returns the average loss of the training steps in nats.
        """
        row = _means(stream)
        for name, metrics in passes.items():
            row |= {f"{name}_{measure}": mean for measure, mean in _means(metrics).items()}
        self._steps.append(step)
        self._rows.append(row)
        return float(stream.loss_sum.sum() / stream.count.sum())

    def state_dict(self) -> dict[str, Tensor]:
        """The windows so far: steps (windows,), and every measure (windows, V)."""
        names = self._rows[0] if self._rows else ()
        stacked = {name: torch.stack([row[name] for row in self._rows]) for name in names}
        return {"steps": torch.tensor(self._steps), **stacked}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the windows of a checkpoint."""
        measures = {name: tensor for name, tensor in state.items() if name != "steps"}
        self._steps = state["steps"].tolist()
        self._rows = [
            {name: tensor[window] for name, tensor in measures.items()}
            for window in range(len(self._steps))
        ]

    def record(self, corpus: PreparedCorpus, final: ClassMetrics) -> xr.Dataset:
        """The run's class record: all windows, and the pass over the training set at the end."""
        return class_record(
            class_counts=corpus.class_counts.numpy(),
            labels=corpus.labels,
            **{f"final_{name}": mean.numpy() for name, mean in _means(final).items()},
            **{name: tensor.numpy() for name, tensor in self.state_dict().items()},
        )


def _means(metrics: ClassMetrics) -> dict[str, Tensor]:
    return {
        "count": metrics.count.cpu(),
        "loss": metrics.loss.cpu(),
        "accuracy": metrics.accuracy.cpu(),
    }
