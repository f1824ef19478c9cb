"""What a sweep will cost, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from frequency_bins import Run, read_study
from llm_experiments.configs import SweepConfig
from llm_experiments.models.presets import build_model

# Dense half-precision matrix rate by the vendor's data sheet, FLOP/s.
CARDS = {"a100": 312e12, "h100": 989e12, "h200": 989e12}
# fp32 weights, gradients and the two moments of AdamW.
_BYTES_PER_PARAMETER = 16


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """The runs of one model in a sweep."""

    study: str
    model: str
    corpus: str
    runs: int
    finished: int
    parameters: int
    tokens: int
    """training tokens of one run"""
    flops: float
    """floating-point operations of one run's training"""

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and optimizer state; activations come on top."""
        return self.parameters * _BYTES_PER_PARAMETER

    def gpu_hours(self, card: str, utilisation: float) -> float:
        """Hours of the runs that are left, if training keeps this share of the card's rate.

        Raises:
            ValueError: an unknown card, or a utilisation outside (0, 1].
        """
        if card not in CARDS:
            raise ValueError(f"card {card!r} is unknown; expected one of {', '.join(CARDS)}")
        if not 0 < utilisation <= 1:
            raise ValueError(f"utilisation is {utilisation}; expected more than 0, at most 1")
        left = self.runs - self.finished
        return left * self.flops / (CARDS[card] * utilisation) / 3600


def plan(grids: Sequence[SweepConfig]) -> list[ModelPlan]:
    """One row a grid and model. Nothing is downloaded, allocated or written."""
    return [_plan(grid, model) for grid in grids for model in grid.models]


def _plan(grid: SweepConfig, name: str) -> ModelPlan:
    training, context = grid.training, grid.data.context
    model = build_model(
        name, vocab_size=grid.data.vocab_size, tied=training.tie_embeddings, device="meta"
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = training.steps * training.batch_size * training.accumulation * context
    # 6 a parameter and token for the matrices (tied embeddings work once, as the classifier), and
    # 6 T a query width for causal attention: scores and mixing, forward and twice that backward.
    per_token = 6 * parameters + 6 * context * _query_width(model.config)
    return ModelPlan(
        study=grid.study,
        model=name,
        corpus=grid.data.corpus,
        runs=len(grid.cells()) // len(grid.models),
        finished=_finished(grid, name),
        parameters=parameters,
        tokens=tokens,
        flops=float(per_token) * tokens,
    )


def _query_width(config: object) -> int:
    """Query heads times head width, summed over the layers."""
    heads = getattr(config, "num_query_heads", None)
    if heads is not None:
        return sum(heads) * config.head_dim  # type: ignore[attr-defined]
    return config.hidden_size * config.num_hidden_layers  # type: ignore[attr-defined]


def _finished(grid: SweepConfig, model: str) -> int:
    """Finished runs of this grid; the data's hash, unknown before it is prepared, is left out."""
    if not grid.study_folder.is_dir():
        return 0
    wanted = [cell.resolved(grid.data, "") for cell in grid.cells() if cell.model == model]
    return sum(_anonymous(run) in wanted for run in read_study(grid.study_folder).runs)


def _anonymous(run: Run) -> dict[str, object]:
    return run.config | {"data_hash": ""}
