"""How a table is trained: classes, contexts, optimiser, schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ufm.problem import UFMProblem

OPTIMIZERS = ("sgd", "adam", "adamw")
FEATURES = ("nonnegative", "free", "normalized")
SCHEDULES = ("cosine", "constant")
_LEARNING_RATES = {"sgd": 4.0, "adam": 1e-2, "adamw": 5e-3}


@dataclass(frozen=True, kw_only=True)
class TableTraining:
    """What is trained, and how, but for the weight decay. ValueError naming what is out of range.

    Every pass over the N = sum n_k samples is shuffled; passes follow one another without a gap.
    The samples of class k take its contexts in turn, so that each has its share n_k / contexts.
    """

    class_counts: tuple[int, ...] = tuple(round(256 / rank) for rank in range(1, 33))
    """Samples of each class in one pass."""
    contexts: int = 1
    """Contexts of each class (but at most one a sample)."""
    context_exponent: float = 0.0
    """a: contexts * n_k^a, rounded, in place of contexts alone; 1 is one a sample."""
    width: int | None = None
    """Feature width; default 4 V, so that no class is left without an axis of its own."""
    features: str | None = None
    """nonnegative (set to 0 where a step went below), free, or normalized (free rows brought to
    the length sqrt(width)); default nonnegative for sgd and adam, free for adamw."""
    optimizer: str = "sgd"
    """sgd or adam with L2, or adamw with decoupled decay."""
    learning_rate: float | None = None
    """At the start; default 4 for sgd, 0.01 for adam, 0.005 for adamw."""
    schedule: str = "cosine"
    """cosine, to 0, or constant."""
    steps: int = 40_000
    """Steps."""
    batch_size: int = 32
    """Samples a step."""
    beta1: float = 0.9
    """Of adam and adamw: memory of the mean gradient."""
    beta2: float = 0.999
    """Of adam and adamw: memory of the squared gradient."""
    epsilon: float = 1e-8
    """Of adam and adamw."""
    label_noise: float = 0.0
    """Share of the samples whose label is drawn anew, uniformly, each time they are seen."""
    initial_size: float | None = None
    """Standard deviation of the weights at the start; default 0.3 for sgd and adam, 0.02 for
    adamw."""
    seed: int = 0
    """Of the weights at the start, the order of the samples and the noise."""

    def __post_init__(self) -> None:
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("schedule", self.schedule, SCHEDULES)
        if self.features is not None:
            _check_choice("features", self.features, FEATURES)
        for name in ("contexts", "steps", "batch_size", "width"):
            value = getattr(self, name)
            if value is not None and not (value >= 1 and value % 1 == 0):
                raise ValueError(f"{name} is {value}; expected a whole number >= 1")
        for name in ("learning_rate", "epsilon", "initial_size"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"{name} is {value}; expected a finite number > 0")
        for name in ("beta1", "beta2", "label_noise"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 <= value < 1")
        if not 0.0 <= self.context_exponent <= 1.0:
            raise ValueError(f"context_exponent is {self.context_exponent}; expected 0 to 1")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed is {self.seed}; expected a whole number from 0 to 2^62 - 1")
        if self.counts.ndim != 1:
            raise ValueError(
                f"class_counts has shape {tuple(self.counts.shape)}; expected one a class"
            )

    @cached_property
    def counts(self) -> Int[Tensor, " V"]:
        """n_k."""
        return UFMProblem(class_counts=self.class_counts, lambda_W=1.0, lambda_H=1.0).class_counts

    @cached_property
    def contexts_of_class(self) -> Int[Tensor, " V"]:
        """Rows of the table that belong to each class."""
        wished = self.contexts * self.counts.double() ** self.context_exponent
        return wished.round().long().clamp(min=1).minimum(self.counts)

    @cached_property
    def share_of_steps(self) -> Float[Tensor, " V"]:
        """Share of the steps whose batch holds a given context of the class."""
        drawn = self.counts / (self.contexts_of_class * self.counts.sum()).double()
        return -torch.expm1(self.batch_size * torch.log1p(-drawn))

    @property
    def feature_width(self) -> int:
        """d."""
        return 4 * len(self.counts) if self.width is None else self.width

    @property
    def feature_kind(self) -> str:
        """`features`, or what they are by default."""
        if self.features is not None:
            return self.features
        return "free" if self.optimizer == "adamw" else "nonnegative"

    def generator(self, *, of_weights: bool) -> torch.Generator:
        """The stream of random numbers of the weights at the start, or of the samples."""
        return torch.Generator().manual_seed(2 * self.seed + int(of_weights))

    @property
    def start_size(self) -> float:
        """`initial_size`, or what it is by default."""
        if self.initial_size is not None:
            return self.initial_size
        return 0.02 if self.optimizer == "adamw" else 0.3

    @cached_property
    def learning_rates(self) -> Float[Tensor, " steps"]:
        """The learning rate of each step."""
        rate = self.learning_rate
        peak = _LEARNING_RATES[self.optimizer] if rate is None else rate
        step = torch.arange(self.steps, dtype=torch.float64)
        if self.schedule == "constant":
            return torch.full_like(step, peak)
        return peak * 0.5 * (1.0 + (math.pi * step / self.steps).cos())


def check_decay(weight_decay: float | int) -> float:
    """It as a float; ValueError unless it is a finite number >= 0."""
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay is {weight_decay}; expected a finite number >= 0")
    return float(weight_decay)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
