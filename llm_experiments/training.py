"""One run: train a model from scratch and record the loss of every token as it goes.

The loop is `train`; what it needs stands below it. B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from frequency_bins import Attempt, ClassMetrics, Diverged, Stopped
from frequency_bins.saved_state import restore
from llm_experiments.checkpoints import load_latest, save
from llm_experiments.clock import Clock
from llm_experiments.configs import RunConfig
from llm_experiments.dropout import add_dropout, seed_dropout
from llm_experiments.loss_head import IGNORE_INDEX, TokenLosses, linear_cross_entropy
from llm_experiments.models.presets import build_model, classifier, features
from llm_experiments.optimization import build_optimizer, learning_rate, loss_weights
from llm_experiments.preparation import PreparedCorpus
from llm_experiments.tokenization import PAD_ID, SPECIAL_TOKENS
from llm_experiments.windows import WindowHistory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HALF = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
# It starts at 2^16 and is halved at every overflow.
_SMALLEST_LOSS_SCALE = 2.0**-10


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: its step, and its training tokens a second."""

    step: int
    tokens_per_second: float


def train(
    config: RunConfig,
    corpus: PreparedCorpus,
    attempt: Attempt,
    *,
    device: torch.device,
    report: Callable[[Progress], None] = lambda progress: None,
    keep_model: bool = False,
) -> PreTrainedModel:
    """Train one run to its end, or on from its last checkpoint, and publish its record.

    Returns the trained model; ``keep_model`` publishes it too. On a CPU the record is bit-identical
    however often the run was interrupted.

    Raises:
        Diverged: the loss is not finite; nothing is published.
        Stopped: the attempt should stop, and there is a checkpoint to go on from.
    """
    torch.set_num_threads(config.threads)
    # int32: CUDA cannot index a tensor of uint16.
    tokens = torch.from_numpy(corpus.tokens.astype(np.int32)).to(device)
    held_out = torch.from_numpy(corpus.held_out.astype(np.int32)).to(device)
    class_weights = loss_weights(corpus.class_counts, config.loss_weight_exponent).to(device)
    half = HALF[config.precision]
    model = build_model(
        config.model,
        vocab_size=corpus.vocab_size,
        seed=config.seed,
        tied=config.tie_embeddings,
        device=device,
    )
    add_dropout(model, config.dropout)
    if config.compile:
        model.base_model.compile()
    optimizer = build_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16)
    metrics = ClassMetrics(corpus.vocab_size, device)
    windows = WindowHistory()
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    state |= {"metrics": metrics, "windows": windows}
    step = resume(attempt, state)
    clock = Clock(tokens.shape[1] * config.batch_size * config.accumulation, step)

    while step < config.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        for part in range(config.accumulation):
            batch = step * config.accumulation + part
            rows = batch_rows(config, len(tokens), batch)
            if config.dropout:
                seed_dropout(config.seed, batch)
            if device.type == "cuda":  # a copy from pageable memory would wait for the device
                rows = rows.pin_memory().to(device, non_blocking=True)
            # Weights carry the loss scale, so that it is there where the head forms gradients.
            weights = scaler.scale(class_weights / config.accumulation)
            losses, targets = token_losses(
                model, tokens[rows], weights, half, config.label_smoothing
            )
            losses.objective.backward()
            metrics.update(losses.loss, targets, losses.correct, ignore_index=IGNORE_INDEX)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        report(Progress(step=step, tokens_per_second=clock.tokens_per_second(step)))

        if step % config.evaluate_every == 0 or step == config.steps:
            synchronise(device)
            with clock.paused():
                passes = {"full": tokens} if config.evaluate == "full" else {}
                passes |= {"held_out": held_out} if len(held_out) else {}
                measured = {
                    name: evaluate(model, sequences, class_weights, half, config.batch_size)
                    for name, sequences in passes.items()
                }
                average = windows.append(step, metrics, **measured)
            check_finite(step, average, scaler)
            attempt.append_scalars(
                {
                    "step": step,
                    "loss": average,
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    "tokens_per_second": clock.tokens_per_second(step),
                }
            )
            if step < config.steps and clock.checkpoint_is_due():
                with clock.checkpointing():
                    save(attempt.folder, step, state, attempt.folders()[1:])
        if attempt.should_stop():
            save(attempt.folder, step, state, attempt.folders()[1:])
            raise Stopped(f"stopped after step {step}")

    training_set = tokens if config.evaluate != "stream" else tokens[:0]
    with clock.paused():
        final = evaluate(model, training_set, class_weights, half, config.batch_size)
        record = windows.record(corpus, final)
    if keep_model:
        save_model(model, corpus, attempt.folder / "model")
    files = ("model",) if keep_model else ()
    attempt.publish(record, files=files, tokens_per_second=clock.tokens_per_second(step))
    return model


def save_model(model: PreTrainedModel, corpus: PreparedCorpus, folder: Path) -> None:
    """Write model and tokenizer in transformers' format, as `audit` and others read it."""
    from transformers import PreTrainedTokenizerFast

    special = dict(zip(("bos", "pad", "eos", "unk", "mask"), SPECIAL_TOKENS, strict=True))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=corpus.tokenizer(),
        **{f"{role}_token": token for role, token in special.items()},
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def token_losses(
    model: PreTrainedModel,
    sequences: Tensor,
    class_weights: Tensor,
    half: torch.dtype | None = None,
    label_smoothing: float = 0.0,
) -> tuple[TokenLosses, Tensor]:
    """Losses of the B * (T - 1) next tokens of sequences (B, T), and those targets.

    The objective is the mean over the targets of class weight times (smoothed) cross-entropy. With
    ``half`` the matrix products are done in that type; losses are float32 in any case.
    """
    sequences = sequences.long()
    targets = sequences[:, 1:].flatten()
    targets = targets.masked_fill(targets == PAD_ID, IGNORE_INDEX)
    with torch.autocast(sequences.device.type, half, enabled=half is not None):
        outputs = features(model, sequences)[:, :-1].flatten(0, 1)
    valid = targets != IGNORE_INDEX
    token_weight = class_weights[targets.clamp(min=0)] / valid.sum()
    if half is not None:
        outputs = outputs.to(half)
    losses = linear_cross_entropy(
        outputs, classifier(model), targets, token_weight, label_smoothing
    )
    return losses, targets


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    sequences: Tensor,
    class_weights: Tensor,
    half: torch.dtype | None,
    batch_size: int,
) -> ClassMetrics:
    """One pass over sequences (S, T): the loss and accuracy of every token."""
    metrics = ClassMetrics(len(class_weights), sequences.device)
    model.eval()
    for batch in sequences.split(batch_size) if len(sequences) else ():
        losses, targets = token_losses(model, batch, class_weights, half)
        metrics.update(losses.loss, targets, losses.correct, ignore_index=IGNORE_INDEX)
    model.train()
    return metrics


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock counts work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_finite(step: int, loss: float, scaler: torch.amp.GradScaler) -> None:
    """Raise Diverged where the loss or, in fp16, the loss scale is of no more use."""
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss} at step {step}")
    if scaler.is_enabled() and scaler.get_scale() < _SMALLEST_LOSS_SCALE:
        raise Diverged(f"the loss scale fell to {scaler.get_scale():g} at step {step}")


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


def resume(attempt: Attempt, parts: Mapping[str, Any]) -> int:
    """Load the latest whole checkpoint, if there is one, and return the step to go on from."""
    checkpoint = load_latest(*attempt.folders())
    if checkpoint is None:
        attempt.resume(0)
        return 0
    state = checkpoint.state
    # Early versions kept no metrics, and none were pending.
    kept = {name: part for name, part in parts.items() if name != "metrics" or name in state}
    restore(kept, state, checkpoint.path)
    attempt.resume(checkpoint.step, checkpoint.path.parent)
    return checkpoint.step
