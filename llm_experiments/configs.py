"""What determines a run: frozen dataclasses that are at once the command line and the run's id."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import OmitArgPrefixes, arg

from llm_experiments.models.model_folder import weights_hash
from llm_experiments.models.presets import MODEL_NAMES, Initialisation, Norm, check_norm
from llm_experiments.text.configs import DataConfig
from run_store.command_line import check_at_least, check_finite
from run_store.executors.command_line import StudyOptions

DecayGroup = Literal[
    "all", "matrices", "no-embeddings", "embeddings", "head", "body", "last-norm", "inner"
]
DecayMode = Literal["decoupled", "l2"]
Optimizer = Literal["adamw", "adam", "sgd", "sign", "muon", "lion", "adamw-cautious"]
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["fp32", "fp16", "bf16"]
Parallel = Literal["ddp", "fsdp"]
Evaluation = Literal["stream", "final", "full"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How every run of a sweep is trained; the defaults are the paper's (section 3)."""

    steps: int = 10_000
    """optimizer steps"""
    batch_size: int = 64
    """sequences of a forward pass"""
    accumulation: int = 1
    """forward passes of a step"""
    learning_rate: float = 5e-5
    """peak learning rate"""
    warmup_steps: int = 10
    """steps of linear warm-up, before the schedule"""
    schedule: Schedule = "cosine"
    """of the learning rate after warm-up: to 0 along a half cosine, to 0 in a line, or constant"""
    evaluate_every: int = 100
    """steps between two records of the per-token metrics"""
    evaluate: Evaluation = "final"
    """stream: the training steps alone, without the final losses that `reports` shows; final: and
    one pass over the training set at the end; full: and such a pass at every evaluation"""
    precision: Precision = "fp32"
    """fp16 (with loss scaling) and bf16 compute in half precision, with weights in fp32"""
    compile: bool = False
    """compile the model with torch.compile"""
    optimizer: Optimizer = "adamw"
    """adamw (with --decay-mode l2, or by the name adam: Adam); adamw-cautious: decay only where it
    has the step's direction; muon: orthogonal steps of AdamW's size for the body's matrices
    (momentum 0.95), AdamW for the rest; lion and sign: steps along the sign of a momentum. These
    take decoupled decay alone; sgd, with momentum, --decay-mode l2 alone"""
    decay_mode: DecayMode = "decoupled"
    """AdamW's decoupled decay, or an L2 term in the gradient"""
    beta1: float = 0.9
    """memory of the mean gradient; of sgd and sign the momentum"""
    beta2: float = 0.999
    """memory of the mean squared gradient (sgd and sign have none); of lion's momentum"""
    decay_exponent: float = 0.0
    """decay a row of embeddings or head by its token's count to this power, scaled so that the sum
    over the rows stays (a token never seen counts as seen once); 0: all rows alike"""
    decay_until: float = 1.0
    """share of the steps after which decay is switched off"""
    clip_gradient: float = 0.0
    """largest norm of a step's whole gradient; 0: none"""
    initialisation: Initialisation = "corenet"
    """corenet: as OpenELM's training code has it (Qwen2: its own); huggingface: N(0, 0.02^2) for
    every matrix, as the transformers format of both has it"""
    tie_embeddings: bool = True
    """one matrix for input embeddings and head, as published; --no-tie-embeddings makes them two"""
    norm: Norm = "rmsnorm"
    """rmsnorm, as published; layernorm, with biases, in its place (OpenELM alone)"""
    dropout: float = 0.0
    """share of the entries of the embeddings and of every layer's attention and feed-forward output
    that training sets to 0; the pass at the end is without"""
    label_smoothing: float = 0.0
    """share of each target's probability that training spreads over the vocabulary; the recorded
    losses are plain cross-entropies all the same"""
    threads: int = 1
    """CPU threads of a run (sums on a CPU depend on it in their last bits)"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "evaluate_every", "threads"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("warmup_steps", self.warmup_steps, 0)
        check_finite("learning_rate", self.learning_rate)
        check_finite("clip_gradient", self.clip_gradient)
        for name in ("dropout", "label_smoothing", "beta1", "beta2"):
            _share(name, getattr(self, name))
        if not 0 < self.decay_until <= 1:
            raise ValueError(
                f"decay_until is {self.decay_until}; expected more than 0 and at most 1"
            )
        if not math.isfinite(self.decay_exponent):
            raise ValueError(f"decay_exponent is {self.decay_exponent}; expected a finite number")
        if self.optimizer == "adam":  # one run, one id
            object.__setattr__(self, "optimizer", "adamw")
            object.__setattr__(self, "decay_mode", "l2")
        name = self.optimizer
        only = {"sgd": "l2", "adamw": self.decay_mode}.get(name, "decoupled")
        if self.decay_mode != only:
            raise ValueError(f"decay_mode is {self.decay_mode!r}; {name} takes {only!r} alone")
        if name in ("sgd", "sign") and self.beta2 != 0.999:
            raise ValueError(f"beta2 is {self.beta2}; {name} has none: expected the default, 0.999")
        for name, plain in (("decay_exponent", 0), ("decay_until", 1)):
            if self.decay_mode == "l2" and getattr(self, name) != plain:
                raise ValueError(f"{name} is {getattr(self, name)}; l2 takes {plain} alone")


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainingConfig):
    """One run: what a sweep shares, and what it varies."""

    # Fields that came later: runs without them keep their ids.
    added: ClassVar = (
        *("schedule", "optimizer", "beta1", "beta2", "clip_gradient", "initialisation"),
        *("norm", "decay_exponent", "decay_until"),
    )

    model: str = "openelm-tiny"
    weight_decay: float = 0.0
    seed: int = 0
    decay: DecayGroup = "all"
    loss_weight_exponent: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model not in MODEL_NAMES:
            raise ValueError(
                f"model {self.model!r} is unknown; expected one of {', '.join(MODEL_NAMES)}"
            )
        check_finite("weight_decay", self.weight_decay)
        check_finite("loss_weight_exponent", self.loss_weight_exponent)
        check_at_least("seed", self.seed, 0)
        check_norm(self.model, self.norm)
        spared = {"body", "last-norm", "inner"} | (
            {"no-embeddings"} if self.tie_embeddings else set()
        )
        if self.decay_exponent and self.decay in spared:
            raise ValueError(
                f"decay_exponent is {self.decay_exponent}; decay {self.decay!r} spares the rows "
                "that it is for: expected 0"
            )
        if not self.weight_decay:  # where nothing decays, how it would is no other run
            object.__setattr__(self, "decay_exponent", 0.0)
            object.__setattr__(self, "decay_until", 1.0)
            if self.optimizer == "adamw-cautious":
                object.__setattr__(self, "optimizer", "adamw")

    def describe(self) -> str:
        """The run in a few words: what a sweep may vary."""
        parts = [self.model, f"weight decay {self.weight_decay:g}", f"seed {self.seed}"]
        parts += [
            f"{name.replace('_', ' ')} {getattr(self, name):g}"
            for name in ("loss_weight_exponent", "dropout", "label_smoothing")
            if getattr(self, name)
        ]
        parts += [f"{name.replace('_', ' ')} {value}" for name, value in self._set().items()]
        parts += [] if self.decay == "all" else [f"decay {self.decay}"]
        parts += [] if self.decay_mode == "decoupled" else [self.decay_mode]
        return ", ".join(parts + ([] if self.tie_embeddings else ["untied"]))

    def resolved(self, data: DataConfig, data_hash: str) -> dict[str, Any]:
        """What the run's id is the hash of: everything that changes its result, no path."""
        described = asdict(data)
        for name in ("data_dir", "text_column", "offline", "checkpoint_dir", "cache_dir"):
            del described[name]
        if data.checkpoint_dir is not None:
            described["checkpoint"] = weights_hash(data.checkpoint_dir)
        own = asdict(self)
        for name in self.added:
            del own[name]
        return {**own, **self._set(), **described, "data_hash": data_hash}

    def _set(self) -> dict[str, Any]:
        """The later fields that are not at their defaults."""
        values = {name: getattr(self, name) for name in self.added}
        defaults = self.__dataclass_fields__
        return {name: v for name, v in values.items() if v != defaults[name].default}


@dataclass(frozen=True, kw_only=True)
class SweepConfig(StudyOptions):
    """A grid of runs over one corpus."""

    models: Annotated[tuple[str, ...], arg(name="model")] = ("openelm-270m",)
    """one or more of the named models"""
    weight_decays: Annotated[tuple[float, ...], arg(name="weight-decay")] = (
        0.0,
        0.1,
        0.3,
        0.5,
        1.0,
    )
    """one or more weight decays"""
    seeds: Annotated[tuple[int, ...], arg(name="seed")] = (0,)
    """one or more seeds, of the weights and of the order of the data"""
    decays: Annotated[tuple[DecayGroup, ...], arg(name="decay")] = ("all",)
    """which parameters are decayed: all; matrices (no norms, no biases); embeddings (of the input)
    or no-embeddings (the rest); head (the output matrix); body (neither embeddings nor head). While
    embeddings are tied, head is embeddings, and body is no-embeddings. last-norm (the gain before
    the head) and inner (the rest) are the two parts of the body"""
    loss_weight_exponents: Annotated[tuple[float, ...], arg(name="loss-weight-exponent")] = (0.0,)
    """weight each token's loss by its count to the minus this power"""
    training: OmitArgPrefixes[TrainingConfig] = field(default_factory=TrainingConfig)
    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    parallel: Parallel = "ddp"
    """under torchrun: every process holds the whole model (ddp) or a part of it (fsdp)"""
    save_model: bool = False
    """keep the trained model in the run's folder, in transformers' format"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parallel == "fsdp" and self.training.optimizer == "muon":
            raise ValueError("muon needs whole matrices, of which fsdp keeps parts: expected ddp")
        for name in ("models", "weight_decays", "seeds", "decays", "loss_weight_exponents"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; expected at least one")
        self.cells()

    def cells(self) -> list[RunConfig]:
        """The runs, the grid's last axis fastest, none twice."""
        cells = [
            RunConfig(
                **asdict(self.training),
                model=model,
                weight_decay=weight_decay,
                seed=seed,
                decay=decay,
                loss_weight_exponent=exponent,
            )
            for model in self.models
            for seed in self.seeds
            for decay in self.decays
            for exponent in self.loss_weight_exponents
            for weight_decay in self.weight_decays
        ]
        return list(dict.fromkeys(cells))


def _share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; expected at least 0 and less than 1")
