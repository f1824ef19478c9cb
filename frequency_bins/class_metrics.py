"""Loss and accuracy of every class over a stream of predictions (paper, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


class ClassMetrics:
    """Counts, summed losses and correct predictions of V classes, kept on the device.

    Counts are int64 and sums float64, so a count is exact and a sum over 10^9 float32 losses keeps
    about 7 digits more than its terms. `update` never waits for the device and uses O(V + B)
    memory. On a CPU every class adds its losses in the order of the stream, so the state does not
    depend on where the stream is cut into batches. (CUDA adds them atomically, in any order.)
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; expected at least 1")
        self.num_classes = num_classes
        self.device = torch.device(device)
        # One slot more than classes: ignored targets go there, which needs neither a mask over the
        # classes nor a selection of unknown size, for which the host would have to wait.
        shape = (num_classes + 1,)
        self._count = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self._loss_sum = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self._correct = torch.zeros(shape, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def update(
        self,
        loss: Float[Tensor, "*B"],
        target: Int[Tensor, "*B"],
        correct: Shaped[Tensor, "*B"],
        ignore_index: int = -100,
    ) -> None:
        """Add one batch: cross-entropy in nats, true class and whether the prediction was right.

        Any shape, the same for all three. Positions whose target is `ignore_index` do not count.
        Raises ValueError for a target outside [0, V) on a CPU; a GPU fails with a device assertion.
        """
        target = target.flatten().long()
        ignored = target == ignore_index
        if target.device.type == "cpu" and target.numel():
            _check_range(target[~ignored], self.num_classes)
        # A target of V must not land in the slot of the ignored ones: move it out of range.
        index = (target + (target >= self.num_classes)).masked_fill(ignored, self.num_classes)
        self._count.index_add_(0, index, torch.ones_like(index))
        self._loss_sum.index_add_(0, index, loss.flatten().double())
        self._correct.index_add_(0, index, correct.flatten().long())

    @property
    def count(self) -> Int[Tensor, " V"]:
        """Targets seen of each class, int64."""
        return self._count[:-1].clone()

    @property
    def loss_sum(self) -> Float[Tensor, " V"]:
        """Summed loss of each class in nats, float64."""
        return self._loss_sum[:-1].clone()

    @property
    def correct(self) -> Int[Tensor, " V"]:
        """Correct predictions of each class, int64."""
        return self._correct[:-1].clone()

    @property
    def loss(self) -> Float[Tensor, " V"]:
        """Mean loss of each class in nats, float64; NaN for a class not seen."""
        return self.loss_sum / self.count

    @property
    def accuracy(self) -> Float[Tensor, " V"]:
        """Share of correct predictions of each class, float64; NaN for a class not seen."""
        return self.correct.double() / self.count

    def reset(self) -> None:
        """Forget everything seen."""
        for state in (self._count, self._loss_sum, self._correct):
            state.zero_()

    def merge(self, other: ClassMetrics) -> None:
        """Add what another accumulator has seen. ValueError if its number of classes differs."""
        self._check_size("other", other.num_classes)
        self._count += other._count.to(self.device)
        self._loss_sum += other._loss_sum.to(self.device)
        self._correct += other._correct.to(self.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of count, loss_sum and correct, (V,) each."""
        return {"count": self.count, "loss_sum": self.loss_sum, "correct": self.correct}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state_dict. Raises ValueError where a tensor is missing or does not fit."""
        own = {"count": self._count, "loss_sum": self._loss_sum, "correct": self._correct}
        if set(state) != set(own):
            raise ValueError(f"state holds {sorted(state)}; expected {sorted(own)}")
        for name, tensor in state.items():
            self._check_size(name, len(tensor))
            if tensor.dtype != own[name].dtype:
                raise ValueError(f"{name} is {tensor.dtype}; expected {own[name].dtype}")
        for name, tensor in state.items():
            own[name][:-1].copy_(tensor)

    def _check_size(self, name: str, size: int) -> None:
        if size != self.num_classes:
            raise ValueError(f"{name} has {size} classes; expected {self.num_classes}")


def _check_range(target: Int[Tensor, " N"], num_classes: int) -> None:
    wrong = target[(target < 0) | (target >= num_classes)]
    if len(wrong):
        raise ValueError(f"target {wrong[0].item()} is not a class; expected 0..{num_classes - 1}")
