"""One run: train a model from scratch and record the loss of every token as it goes.

The loop is `train`; what it needs stands below it. B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor, nn

from frequency_bins import ClassMetrics, Run, class_record
from llm_experiments.checkpoints import load_latest, remove_all, save
from llm_experiments.configs import RunConfig
from llm_experiments.loss_head import IGNORE_INDEX, TokenLosses, linear_cross_entropy
from llm_experiments.models.presets import build_model, classifier, features
from llm_experiments.preparation import PreparedCorpus
from llm_experiments.tokenization import PAD_ID

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A checkpoint is written when the last one's cost is at most this share of the time since.
_CHECKPOINT_SHARE = 0.05


class Diverged(Exception):
    """The loss is no longer finite."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: its step, and its training tokens a second."""

    step: int
    tokens_per_second: float


def train(
    config: RunConfig,
    corpus: PreparedCorpus,
    run: Run,
    *,
    device: torch.device,
    report: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Train one run to its end, or on from its last checkpoint, and publish its record.

    On a CPU the record is bit-identical however often the run was interrupted.

    Raises:
        Diverged: the loss is not finite; nothing is published.
    """
    torch.set_num_threads(config.threads)
    tokens = torch.from_numpy(np.array(corpus.tokens)).to(device)
    class_weights = loss_weights(corpus.class_counts, config.loss_weight_exponent).to(device)
    model = build_model(config.model, vocab_size=corpus.vocab_size, seed=config.seed, device=device)
    optimizer = build_optimizer(model, config)
    metrics = ClassMetrics(corpus.vocab_size, device)
    windows = WindowHistory()
    step = resume(run, model, optimizer, windows)
    clock = Clock(tokens.shape[1] * config.batch_size * config.accumulation, step)

    while step < config.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        for part in range(config.accumulation):
            rows = batch_rows(config, len(tokens), step * config.accumulation + part)
            losses, targets = token_losses(model, tokens[rows.to(device)], class_weights)
            (losses.objective / config.accumulation).backward()
            metrics.update(losses.loss, targets, losses.correct, ignore_index=IGNORE_INDEX)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        report(Progress(step=step, tokens_per_second=clock.tokens_per_second(step)))

        if step % config.evaluate_every == 0 or step == config.steps:
            average = windows.append(step, metrics)
            if not math.isfinite(average):
                raise Diverged(f"the loss is {average} at step {step}")
            run.append_scalars(
                {
                    "step": step,
                    "loss": average,
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    "tokens_per_second": clock.tokens_per_second(step),
                }
            )
            if clock.checkpoint_is_due():
                with clock.checkpointing():
                    save(run.folder, step, model, optimizer, windows.state_dict())

    final = evaluate(model, tokens, class_weights, config.batch_size)
    run.publish(windows.record(corpus, final), tokens_per_second=clock.tokens_per_second(step))
    remove_all(run.folder)


def token_losses(
    model: PreTrainedModel, sequences: Tensor, class_weights: Tensor
) -> tuple[TokenLosses, Tensor]:
    """Losses of the B * (T - 1) next tokens of sequences (B, T), and those targets.

    The objective is the mean over the targets of class weight times cross-entropy.
    """
    sequences = sequences.long()
    targets = sequences[:, 1:].flatten()
    targets = targets.masked_fill(targets == PAD_ID, IGNORE_INDEX)
    outputs = features(model, sequences)[:, :-1].flatten(0, 1)
    valid = targets != IGNORE_INDEX
    token_weight = class_weights[targets.clamp(min=0)] / valid.sum()
    return linear_cross_entropy(outputs, classifier(model), targets, token_weight), targets


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, tokens: Tensor, class_weights: Tensor, batch_size: int
) -> ClassMetrics:
    """One pass over all sequences: the loss and accuracy of every token."""
    metrics = ClassMetrics(len(class_weights), tokens.device)
    model.eval()
    for sequences in tokens.split(batch_size):
        losses, targets = token_losses(model, sequences, class_weights)
        metrics.update(losses.loss, targets, losses.correct, ignore_index=IGNORE_INDEX)
    model.train()
    return metrics


def learning_rate(config: RunConfig, step: int) -> float:
    """Linear warm-up from 0, then a cosine to 0, as in transformers' cosine schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def batch_rows(config: RunConfig, num_sequences: int, batch: int) -> Tensor:
    """Indices (B,) of a batch: a pure function of the seed and the batch's number.

    Every epoch is a permutation of its own; a batch may span two.
    """
    positions = np.arange(batch * config.batch_size, (batch + 1) * config.batch_size)
    epochs, places = np.divmod(positions, num_sequences)
    rows = [
        _epoch_order(config.seed, int(epoch), num_sequences)[places[epochs == epoch]]
        for epoch in np.unique(epochs)
    ]
    return torch.from_numpy(np.concatenate(rows))


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_sequences: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(num_sequences)


def loss_weights(class_counts: Tensor, exponent: float) -> Tensor:
    """Weights (V,) float64, a_k = count_k^-exponent scaled so that sum a_k count_k = sum count_k.

    A token that never occurs has no loss to weigh; its weight is 1.
    """
    counts = class_counts.double()
    weights = torch.where(counts > 0, counts.clamp(min=1) ** -exponent, 1)
    return weights * (counts.sum() / (weights * counts).sum())


def build_optimizer(model: PreTrainedModel, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW (or Adam with L2) with two groups: decayed and not; every parameter is in one."""
    embedding = model.get_input_embeddings().weight
    decays: dict[str, Callable[[nn.Parameter], bool]] = {
        "all": lambda parameter: True,
        "matrices": lambda parameter: parameter.ndim > 1,
        "embeddings": lambda parameter: parameter is embedding,
        "no-embeddings": lambda parameter: parameter is not embedding,
    }
    decayed = [p for p in model.parameters() if decays[config.decay](p)]
    free = [p for p in model.parameters() if not decays[config.decay](p)]
    assert len(decayed) + len(free) == len(list(model.parameters()))
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW if config.decay_mode == "decoupled" else torch.optim.Adam
    return optimizer(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )


def resume(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, windows: WindowHistory
) -> int:
    """Load the latest whole checkpoint, if there is one, and return the step to go on from."""
    checkpoint = load_latest(run.folder)
    if checkpoint is None:
        run.truncate_scalars(0)
        return 0
    model.load_state_dict(checkpoint.model)
    optimizer.load_state_dict(checkpoint.optimizer)
    windows.load_state_dict(checkpoint.windows)
    run.truncate_scalars(checkpoint.step)
    return checkpoint.step


class WindowHistory:
    """Counts, mean losses and accuracies of each token, window after window."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._count: list[Tensor] = []
        self._loss: list[Tensor] = []
        self._accuracy: list[Tensor] = []

    def append(self, step: int, metrics: ClassMetrics) -> float:
        """Close a window: keep its means, clear it, and return its average loss in nats."""
        self._steps.append(step)
        self._count.append(metrics.count.cpu())
        self._loss.append(metrics.loss.cpu())
        self._accuracy.append(metrics.accuracy.cpu())
        average = float(metrics.loss_sum.sum() / metrics.count.sum())
        metrics.reset()
        return average

    def state_dict(self) -> dict[str, Tensor]:
        """The windows so far, (windows,) and (windows, V)."""
        return {
            "steps": torch.tensor(self._steps),
            "count": torch.stack(self._count),
            "loss": torch.stack(self._loss),
            "accuracy": torch.stack(self._accuracy),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the windows of a checkpoint."""
        self._steps = state["steps"].tolist()
        self._count, self._loss = list(state["count"]), list(state["loss"])
        self._accuracy = list(state["accuracy"])

    def record(self, corpus: PreparedCorpus, final: ClassMetrics) -> xr.Dataset:
        """The run's class record: all windows, and the pass over the training set at the end."""
        state = self.state_dict()
        return class_record(
            class_counts=corpus.class_counts.numpy(),
            labels=corpus.labels,
            final_count=final.count.cpu().numpy(),
            final_loss=final.loss.cpu().numpy(),
            final_accuracy=final.accuracy.cpu().numpy(),
            **{name: tensor.numpy() for name, tensor in state.items()},
        )


class Clock:
    """Training time without checkpoints, and when the next checkpoint has earned its cost."""

    def __init__(self, tokens_per_step: int, first_step: int) -> None:
        self._tokens_per_step, self._first_step = tokens_per_step, first_step
        self._start = self._last_checkpoint = time.perf_counter()
        self._checkpoint_cost = self._checkpoint_total = 0.0

    def tokens_per_second(self, step: int) -> float:
        """Tokens of the steps since the start, over the time that they took."""
        seconds = time.perf_counter() - self._start - self._checkpoint_total
        return (step - self._first_step) * self._tokens_per_step / max(seconds, 1e-9)

    def checkpoint_is_due(self) -> bool:
        """Whether a checkpoint as dear as the last would keep to its share of the time."""
        elapsed = time.perf_counter() - self._last_checkpoint
        return self._checkpoint_cost <= _CHECKPOINT_SHARE * elapsed

    @contextlib.contextmanager
    def checkpointing(self) -> Iterator[None]:
        """Context in which a checkpoint is written."""
        begin = time.perf_counter()
        yield
        self._last_checkpoint = time.perf_counter()
        self._checkpoint_cost = self._last_checkpoint - begin
        self._checkpoint_total += self._checkpoint_cost
