"""The unconstrained ReLU-features model (UFM) with imbalanced classes: what is to be minimised."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Numbers: TypeAlias = float | int | Sequence[Any] | np.ndarray | Tensor
LossName: TypeAlias = Literal["cross_entropy", "mse"]


@dataclass(frozen=True, init=False, eq=False)
class UFMProblem:
    """V classes with n_k samples each, every sample a free feature h_ki, one linear classifier W.

        F(W, H) = (1/N) sum_k a_k sum_i CE(W h_ki, q_k)
                  + 1/2 sum_j lambda_W[j] |w_j|^2 + 1/2 sum_k lambda_H[k] n_k^-s sum_i |h_ki|^2

    over W and H >= 0, with N = sum_k n_k and s the feature_sharing. Source: Eq. (1) of the paper
    (s = 0) with the 1/2 that its (c) needs (Dang et al., 2024). A leading batch dimension of
    `class_counts` makes a batch of problems; everything else broadcasts against it, so one scalar a
    problem has shape (B, 1).

    class_counts: (..., V) samples of each class, whole numbers >= 1, V >= 2.
    lambda_W: decay of the classifier, > 0; a scalar, or (..., V) one a row.
    lambda_H: decay of the features, > 0; a scalar, or (..., V) one a class.
    feature_sharing: s in [0, 1]. 0 is the paper's model, which decays every sample's feature; 1 is
        a network's, which decays weights: a class pays for its feature once (ufm/THEORY.md,
        section 6).
    loss_weights: (..., V) weights a_k > 0, scaled here so that sum_k a_k n_k = N; None is all ones.
    label_smoothing: e in [0, 1); the target is q_k = (1 - e) e_k + e / V.
    loss: "cross_entropy", or "mse" for |W h - e_k|^2 / 2.
    nonnegative: False lifts H >= 0 (free features).
    bias: True adds a free, undecayed bias b to the logits W h + b.
    width: feature width d; None is V.

    Raises ValueError naming the value that is out of range.
    """

    class_counts: Int[Tensor, "*batch V"]
    lambda_W: float | Float[Tensor, "*#batch #V"]
    lambda_H: float | Float[Tensor, "*#batch #V"]
    feature_sharing: float
    loss_weights: Float[Tensor, "*batch V"] | None
    label_smoothing: float
    loss: LossName
    nonnegative: bool
    bias: bool
    width: int | None

    def __init__(
        self,
        *,
        class_counts: Numbers,
        lambda_W: Numbers,
        lambda_H: Numbers,
        feature_sharing: float | int = 0.0,
        loss_weights: Numbers | None = None,
        label_smoothing: float | int = 0.0,
        loss: str = "cross_entropy",
        nonnegative: bool = True,
        bias: bool = False,
        width: float | int | None = None,
    ) -> None:
        counts = _whole_counts(class_counts)
        shape = counts.shape
        weights = (
            None
            if loss_weights is None
            else _positive("loss_weights", loss_weights, shape, counts.device)
        )
        if weights is not None:
            weights = weights.expand(shape)
            total = (weights * counts).sum(-1, keepdim=True)
            weights = weights * (counts.sum(-1, keepdim=True) / total)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {label_smoothing}; expected 0 <= value < 1")
        if loss not in ("cross_entropy", "mse"):
            raise ValueError(f"loss is {loss!r}; expected 'cross_entropy' or 'mse'")
        if loss == "mse" and label_smoothing:
            raise ValueError(f"label_smoothing is {label_smoothing}; with loss='mse' expected 0")
        if width is not None and not (width >= 1 and width % 1 == 0):
            raise ValueError(f"width is {width}; expected a whole number >= 1")
        fields = {
            "class_counts": counts,
            "lambda_W": _scalar_or_tensor("lambda_W", lambda_W, shape, counts.device),
            "lambda_H": _scalar_or_tensor("lambda_H", lambda_H, shape, counts.device),
            "feature_sharing": checked_sharing(feature_sharing),
            "loss_weights": weights,
            "label_smoothing": float(label_smoothing),
            "loss": loss,
            "nonnegative": bool(nonnegative),
            "bias": bool(bias),
            "width": None if width is None else int(width),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        strength = self.pull.square()
        tiny, huge = np.finfo(np.float64).tiny, np.finfo(np.float64).max
        if not bool(((strength > tiny) & (strength < huge)).all()):
            raise ValueError(
                f"lambda_W = {lambda_W} and lambda_H = {lambda_H} put the critical count outside "
                "the range of float64; expected values nearer to 1"
            )

    @property
    def num_classes(self) -> int:
        """V."""
        return self.class_counts.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        """Shape in front of the class dimension: () for one problem."""
        return self.class_counts.shape[:-1]

    @property
    def feature_width(self) -> int:
        """d: `width`, or V where it is None."""
        return self.num_classes if self.width is None else self.width

    @cached_property
    def counts(self) -> Float[Tensor, "*batch V"]:
        """n_k in float64."""
        return self.class_counts.to(torch.float64)

    @cached_property
    def num_samples(self) -> Int[Tensor, "*batch"]:
        """N, the sum of the class counts."""
        return self.class_counts.sum(-1)

    @cached_property
    def row_decay(self) -> Float[Tensor, "*batch V"]:
        """lambda_W of each row of W."""
        return _spread(self.lambda_W, self.class_counts)

    @cached_property
    def unshared_decay(self) -> Float[Tensor, "*batch V"]:
        """lambda_H of each class, as given."""
        return _spread(self.lambda_H, self.class_counts)

    @cached_property
    def feature_decay(self) -> Float[Tensor, "*batch V"]:
        """What the feature of one sample of each class costs: lambda_H[k] n_k^-s."""
        return self.unshared_decay * self.counts**-self.feature_sharing

    @cached_property
    def mass(self) -> Float[Tensor, "*batch V"]:
        """a_k n_k / N: the weight of class k in the loss; sums to one."""
        mass = self.counts / self.num_samples.unsqueeze(-1)
        return mass if self.loss_weights is None else mass * self.loss_weights

    @cached_property
    def pull(self) -> Float[Tensor, "*batch V"]:
        """a_k sqrt(n_k) / (N sqrt(lambda_W feature_decay[k])): loss gradient per unit of decay.

        With r_k of ufm/THEORY.md, section 1, it is r_k sqrt((V-1)/V). Row-wise lambda_W enters by
        its smallest value.
        """
        decay = self.row_decay.amin(-1, keepdim=True).sqrt() * self.feature_decay.sqrt()
        return self.mass / (decay * self.counts.sqrt())

    def replace(self, **changes: Any) -> UFMProblem:
        """A problem with these fields in place of its own."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return UFMProblem(**(fields | changes))

    def to(self, device: str | torch.device) -> UFMProblem:
        """The same problem on another device. ValueError if there is no such device here."""
        return self.replace(class_counts=self.class_counts.to(usable_device(device)))

    def flattened(self) -> UFMProblem:
        """The same problems in exactly one batch dimension."""
        classes, weights = self.num_classes, self.loss_weights
        return self.replace(
            class_counts=self.class_counts.reshape(-1, classes),
            lambda_W=self.row_decay.reshape(-1, classes),
            lambda_H=self.unshared_decay.reshape(-1, classes),
            loss_weights=None if weights is None else weights.reshape(-1, classes),
        )

    def take(self, index: Tensor) -> UFMProblem:
        """The problems at `index` of a `flattened` batch."""
        weights = self.loss_weights
        return self.replace(
            class_counts=self.class_counts[index],
            lambda_W=self.row_decay[index],
            lambda_H=self.unshared_decay[index],
            loss_weights=None if weights is None else weights[index],
        )

    @property
    def is_rowwise(self) -> bool:
        """Whether lambda_W differs between the rows of W."""
        return bool((self.row_decay != self.row_decay[..., :1]).any())


def checked_sharing(feature_sharing: float | int) -> float:
    """s as a float; ValueError unless it is a number in [0, 1]."""
    try:
        inside = 0.0 <= float(feature_sharing) <= 1.0
    except (TypeError, ValueError):
        inside = False
    if not inside:
        raise ValueError(f"feature_sharing is {feature_sharing!r}; expected 0 <= value <= 1")
    return float(feature_sharing)


def usable_device(device: str | torch.device) -> torch.device:
    """The device of this name; ValueError where none works here."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device is {str(device)!r}; expected one that works here ({reason})"
        ) from error
    return torch.device(device)


def check_allocation(what: str, *shape: int, device: torch.device) -> None:
    """Raise ValueError if a float64 array of this shape exceeds the memory of its device."""
    needed = 8 * math.prod(shape)
    if device.type == "cuda":
        installed = torch.cuda.get_device_properties(device).total_memory
    else:
        installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > installed:
        size = " x ".join(str(length) for length in shape)
        raise ValueError(
            f"{what} ({size}) is too large to allocate: {needed / 2**30:.1f} GiB; "
            f"expected at most the {installed / 2**30:.1f} GiB of {device}"
        )


@contextlib.contextmanager
def allocation(what: str) -> Iterator[None]:
    """Turn running out of memory within the block into a ValueError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        out = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not out and "allocate memory" not in str(error):
            raise
        reason = str(error).partition(". ")[0].splitlines()
        raise ValueError(
            f"{what} is too large to allocate: {reason[0] if reason else 'out of memory'}"
        ) from error


def as_tensor(name: str, value: Numbers) -> Tensor:
    """A tensor of what the user gave, Python floats in float64; ValueError if not numbers."""
    try:
        return value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} is {value!r}; expected numbers ({error})") from error


def _whole_counts(class_counts: Numbers) -> Int[Tensor, "*batch V"]:
    counts = as_tensor("class_counts", class_counts)
    if counts.ndim == 0 or counts.shape[-1] < 2:
        raise ValueError(
            f"class_counts has shape {tuple(counts.shape)}; expected at least two classes"
        )
    if counts.is_complex() or counts.dtype == torch.bool:
        raise ValueError(f"class_counts has dtype {counts.dtype}; expected whole numbers >= 1")
    bad = ~((counts >= 1) & (counts < 2**53))
    if counts.is_floating_point():
        bad |= counts != counts.floor()
    if bool(bad.any()):
        raise ValueError(
            f"class_counts holds {counts[bad][0].item()}; expected whole numbers >= 1 (and < 2^53)"
        )
    return counts.to(torch.int64)


def _positive(
    name: str, value: Numbers, shape: torch.Size, device: torch.device
) -> Float[Tensor, ...]:
    given = as_tensor(name, value)
    if given.is_complex():
        raise ValueError(f"{name} has dtype {given.dtype}; expected real numbers")
    values = given.to(device, torch.float64)
    bad = ~((values > 0) & torch.isfinite(values))
    if bool(bad.any()):
        raise ValueError(f"{name} is {values[bad][0].item()}; expected a finite number > 0")
    trailing = shape[len(shape) - values.ndim :] if values.ndim <= len(shape) else None
    if trailing is None or any(
        a not in (1, b) for a, b in zip(values.shape, trailing, strict=True)
    ):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}; expected a scalar or one value a class, "
            f"{tuple(shape)}"
        )
    return values


def _scalar_or_tensor(
    name: str, value: Numbers, shape: torch.Size, device: torch.device
) -> float | Tensor:
    values = _positive(name, value, shape, device)
    return float(values) if values.ndim == 0 else values


def _spread(
    value: float | Tensor, class_counts: Int[Tensor, "*batch V"]
) -> Float[Tensor, "*batch V"]:
    values = torch.as_tensor(value, dtype=torch.float64, device=class_counts.device)
    return values.expand(class_counts.shape)
