"""What determines a run: frozen dataclasses that are at once the command line and the run's id."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import OmitArgPrefixes, arg

from run_store.command_line import check_at_least, check_finite
from run_store.executors.command_line import StudyOptions

DecayGroup = Literal["all", "matrices", "head", "body"]
DecayMode = Literal["l2", "decoupled"]
Precision = Literal["float32", "bfloat16"]
PAPER_COUNTS = (91, 142, 222, 347, 541, 845, 1317, 2055, 3205, 5000)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images."""

    dataset: Literal["digits", "cifar10"] = "digits"
    """digits (8x8, built in) or cifar10"""
    data_dir: Path | None = None
    """folder of the original CIFAR-10 batches, or their archive; without it they are downloaded"""
    cache_dir: Path = Path("cache")
    """where a download is kept"""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How every run of a sweep is trained; the defaults are the DAWNBench recipe."""

    epochs: int = 24
    """passes over the training images"""
    batch_size: int = 512
    """images of a step"""
    learning_rate: float = 0.4
    """peak learning rate of SGD with Nesterov momentum, for the mean loss of a batch"""
    warmup: float = 5 / 24
    """share of the run that is linear warm-up, before the linear descent to 0"""
    momentum: float = 0.9
    """Nesterov momentum"""
    decay_mode: DecayMode = "l2"
    """an L2 term in the gradient, as in the original recipe, or decoupled as in AdamW"""
    width: int = 64
    """channels of the first convolution; the others follow"""
    crop_padding: int = 4
    """pixels that a random crop may be off centre"""
    flip: bool = True
    """mirror half of the images"""
    cutout: int = 8
    """side of the square that is blanked; 0 for none"""
    evaluate_every: int = 1
    """epochs between two records of the per-class metrics"""
    precision: Precision = "float32"
    """arithmetic of the convolutions"""
    compile: bool = False
    """compile a step's network with torch.compile; on a GPU as CUDA graphs, too"""
    threads: int = 1
    """CPU threads of a run (sums on a CPU depend on it in their last bits)"""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "width", "evaluate_every", "threads"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("crop_padding", "cutout"):
            check_at_least(name, getattr(self, name), 0)
        check_finite("learning_rate", self.learning_rate)
        for name in ("momentum", "warmup"):
            if not 0 < (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; expected between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainingConfig):
    """One run: what a sweep shares, and what it varies."""

    added: ClassVar = ("compile",)  # came later: runs without it keep their ids

    imbalance: str = "balanced"
    """balanced[:RATIO], paper, exponential:RATIO, step:RATIO or zipf:EXPONENT (rarest first)"""
    class_counts: tuple[int, ...] = ()
    """training images of each class; instead of --imbalance"""
    shuffle_classes: bool = False
    """let the seed choose which class gets which count, instead of the class's number"""
    weight_decay: float = 0.0
    seed: int = 0
    """of the weights, the choice of the images, their order and their augmentation"""
    decay: DecayGroup = "all"
    """which parameters are decayed"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite("weight_decay", self.weight_decay)
        check_at_least("seed", self.seed, 0)
        if self.class_counts:
            object.__setattr__(self, "imbalance", "counts")
            for count in self.class_counts:
                check_at_least("class count", count, 1)
        else:
            parse_imbalance(self.imbalance)

    def counts(self, available: int, num_classes: int) -> tuple[int, ...]:
        """Images of each class, of the `available` ones; ValueError where they do not suffice."""
        counts = self.class_counts
        if not counts:
            shares = parse_imbalance(self.imbalance)(num_classes)
            # A product such as 5000 * (91 / 5000) may fall short of its integer by rounding.
            counts = tuple(max(1, math.floor(available * share + 1e-9)) for share in shares)
        if len(counts) != num_classes:
            found = f"class_counts are {len(counts)} numbers"
            raise ValueError(f"{found}; expected {num_classes}, one for each class")
        return counts

    def resolved(
        self, data: DataConfig, class_counts: tuple[int, ...], data_hash: str
    ) -> dict[str, Any]:
        """What the run's id is the hash of: everything that changes its result, no path."""
        described = asdict(self) | {"class_counts": list(class_counts), "model": "resnet9"}
        if not self.compile:
            del described["compile"]
        return described | {"dataset": data.dataset, "data_hash": data_hash}


@dataclass(frozen=True, kw_only=True)
class SweepConfig(StudyOptions):
    """A grid of runs over one set of images."""

    imbalances: Annotated[tuple[str, ...], arg(name="imbalance")] = ("balanced", "paper")
    """one or more of balanced[:RATIO], paper, exponential:RATIO, step:RATIO, zipf:EXPONENT"""
    class_counts: tuple[int, ...] = ()
    """training images of each class; instead of --imbalance"""
    shuffle_classes: bool = False
    """let the seed choose which class gets which count, instead of the class's number"""
    weight_decays: Annotated[tuple[float, ...], arg(name="weight-decay")] = (
        0.0,
        5e-4,
        2e-3,
        5e-3,
        1e-2,
    )
    """one or more weight decays"""
    seeds: Annotated[tuple[int, ...], arg(name="seed")] = (0,)
    """one or more seeds: of the weights, the choice of the images, their order, augmentation"""
    decays: Annotated[tuple[DecayGroup, ...], arg(name="decay")] = ("all",)
    """which parameters are decayed"""
    training: OmitArgPrefixes[TrainingConfig] = field(default_factory=TrainingConfig)
    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("imbalances", "weight_decays", "seeds", "decays"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; expected at least one")
        self.cells()

    def cells(self) -> list[RunConfig]:
        """The runs, the grid's last axis fastest, none twice."""
        imbalances = ("counts",) if self.class_counts else self.imbalances
        cells = [
            RunConfig(
                **asdict(self.training),
                imbalance=imbalance,
                class_counts=self.class_counts,
                shuffle_classes=self.shuffle_classes,
                weight_decay=weight_decay,
                seed=seed,
                decay=decay,
            )
            for seed in self.seeds
            for imbalance in imbalances
            for decay in self.decays
            for weight_decay in self.weight_decays
        ]
        return list(dict.fromkeys(cells))


def parse_imbalance(spec: str) -> Callable[[int], list[float]]:
    """What share of the largest class each of V classes has, the rarest class first.

    balanced[:R]   R, by default 1
    paper          91, 142, 222, ... of 5000 (Appendix D; ten classes)
    exponential:R  R^((V-1-k)/(V-1))
    step:R         R for the first half of the classes, 1 for the others
    zipf:S         (V-k)^-S

    Raises ValueError for another name, a ratio outside (0, 1] or an exponent below 0.
    """
    name, _, number = spec.partition(":")
    try:
        value = 1.0 if spec == "balanced" else float(number)
    except ValueError:
        value = math.nan
    shares: dict[str, Callable[[int], list[float]]] = {
        "balanced": lambda v: [value] * v,
        "paper": lambda v: [count / PAPER_COUNTS[-1] for count in PAPER_COUNTS],
        "exponential": lambda v: [value ** ((v - 1 - k) / max(1, v - 1)) for k in range(v)],
        "step": lambda v: [value if k < v // 2 else 1.0 for k in range(v)],
        "zipf": lambda v: [(v - k) ** -value for k in range(v)],
    }
    is_ratio, is_exponent = 0 < value <= 1, 0 <= value < math.inf
    allowed = {"paper": spec == "paper", "zipf": is_exponent}
    if name not in shares or not allowed.get(name, is_ratio):
        raise ValueError(
            f"imbalance {spec!r} is unknown; expected paper, balanced, balanced:RATIO, "
            "exponential:RATIO or step:RATIO with a ratio in (0, 1], or zipf:EXPONENT with an "
            "exponent of at least 0"
        )
    return shares[name]
