"""What a sweep will cost, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llm_experiments.configs import SweepConfig
from llm_experiments.models.loss_head import held_bytes
from llm_experiments.models.presets import (
    build_model,
    classifier,
    idle_parameters,
    router_parameters,
)
from run_store import Run, read_study

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Dense half-precision matrix rate by the vendor's data sheet, FLOP/s.
CARDS = {"a100": 312e12, "h100": 989e12, "h200": 989e12}
# Share of that rate that an H200 kept below and from 10^9 parameters on: openelm-270m compiled,
# openelm-3b as it is (benchmarks/README.md).
_MEASURED = {True: 0.34, False: 0.18}
# fp32 weights, gradients and the two moments of AdamW.
_BYTES_PER_PARAMETER, _BYTES_PER_GRADIENT = 16, 4


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """The runs of one model in a sweep."""

    study: str
    model: str
    corpus: str
    runs: int
    finished: int
    parameters: int
    router_parameters: int
    """those of them that choose among a mixture's experts"""
    tokens: int
    """training tokens of one run"""
    flops: float
    """floating-point operations of one run's training"""
    activation_bytes: int
    """what a forward pass keeps for the backward pass, see `activation_bytes`"""
    head_bytes: int
    """what the loss head holds on top of it, see `loss_head.held_bytes`"""
    peak_bytes: int
    """the most that a step needs at once, see `peak_bytes`"""

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and AdamW's moments (sgd and sign keep one in place of two)."""
        return self.parameters * _BYTES_PER_PARAMETER

    @property
    def measured_utilisation(self) -> float:
        """The share of its data-sheet rate that an H200 kept with a model of about this size."""
        return _MEASURED[self.parameters < 10**9]

    def gpu_hours(self, card: str, utilisation: float | None = None) -> float:
        """Hours of the runs that are left, if training keeps this share of the card's rate.

        Without one it is `measured_utilisation`.

        Raises:
            ValueError: an unknown card, or a utilisation outside (0, 1].
        """
        if card not in CARDS:
            raise ValueError(f"card {card!r} is unknown; expected one of {', '.join(CARDS)}")
        if utilisation is None:
            utilisation = self.measured_utilisation
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
        name,
        vocab_size=grid.data.vocab_size,
        tied=training.tie_embeddings,
        norm=training.norm,
        device="meta",
    )
    tokens = training.steps * training.batch_size * training.accumulation * context
    half = None if training.precision == "fp32" else torch.bfloat16  # fp16 is as wide
    # A mixture's depend on where its tokens go; as many parameters of the dense model meet each.
    dense = build_model(
        name.replace("-moe", ""),
        vocab_size=grid.data.vocab_size,
        norm=training.norm,
        device="meta",
    )
    kept = activation_bytes(dense, training.batch_size, context, half)
    device_type = "cpu" if grid.device == "cpu" else "cuda"
    head = head_bytes(model, training.batch_size, context, half, device_type)
    return ModelPlan(
        study=grid.study,
        model=name,
        corpus=grid.data.corpus,
        runs=len(grid.cells()) // len(grid.models),
        finished=_finished(grid, name),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        router_parameters=router_parameters(model),
        tokens=tokens,
        flops=float(flops_per_token(model, context)) * tokens,
        activation_bytes=kept,
        head_bytes=head,
        peak_bytes=peak_bytes(model, kept, head, accumulates=training.accumulation > 1),
    )


def peak_bytes(model: PreTrainedModel, activations: int, head: int, *, accumulates: bool) -> int:
    """The most that a training step needs at once, but for what the allocator keeps.

    While the loss head works all activations are there, and gradients only if earlier passes of the
    step left some. At the end of the backward pass all gradients are, that of a tied embedding
    twice, and no activations.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    state = parameters * _BYTES_PER_PARAMETER
    gradients = 0 if accumulates else parameters * _BYTES_PER_GRADIENT
    embedding = model.get_input_embeddings().weight
    twice = embedding.numel() * _BYTES_PER_GRADIENT if classifier(model) is embedding else 0
    return max(state - gradients + activations + head, state + twice)


def head_bytes(
    model: PreTrainedModel,
    batch_size: int,
    context: int,
    half: torch.dtype | None,
    device_type: str,
) -> int:
    """Bytes that the loss head holds at its peak, see `loss_head.held_bytes`."""
    vocab_size, width = classifier(model).shape
    num_targets = batch_size * (context - 1)
    return held_bytes(num_targets, vocab_size, width, half or torch.float32, device_type)


def flops_per_token(model: PreTrainedModel, context: int) -> int:
    """Floating-point operations of training on one token, forward and backward.

    6 for each entry of a matrix that multiplies (the embedding of the input is a look-up), and
    6 T for each entry of the queries: scores and mixing over T/2 tokens on average. Of a mixture,
    the experts that the token goes to.
    """
    matrices = sum(p.numel() for p in model.parameters()) - idle_parameters(model)
    if classifier(model) is not (embedding := model.get_input_embeddings().weight):
        matrices -= embedding.numel()
    return 6 * matrices + 6 * context * _query_width(model.config)


def activation_bytes(
    model: PreTrainedModel, batch_size: int, context: int, half: torch.dtype | None
) -> int:
    """Bytes that a forward pass keeps for the backward pass: what autograd saves, by its shapes.

    Counted in eager mode on tensors without memory (torch.compile keeps less); in half precision
    the weights' half copies are among it.
    """
    body = model.base_model
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # held, so that no other one gets its number
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode():
        weights = {n: torch.empty(p.shape, requires_grad=True) for n, p in body.named_parameters()}
        state = weights | {n: torch.empty(b.shape) for n, b in body.named_buffers()}
        inputs = {"input_ids": torch.zeros(batch_size, context, dtype=torch.int64)}
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", half, enabled=half is not None),
        ):
            torch.func.functional_call(body, state, kwargs=inputs | {"use_cache": False})
        own = {weight.untyped_storage()._cdata for weight in weights.values()}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


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
