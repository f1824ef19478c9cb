"""One run: train a model and record the loss of every token as it goes.

The loop is `train`; what it needs stands below it. B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from frequency_bins import ClassMetrics, WindowHistory
from llm_experiments.configs import RunConfig
from llm_experiments.models.dropout import add_dropout, seed_dropout
from llm_experiments.models.loss_head import IGNORE_INDEX, TokenLosses, linear_cross_entropy
from llm_experiments.models.presets import build_model, classifier, features
from llm_experiments.models.starting_point import load_weights
from llm_experiments.text.preparation import PreparedCorpus
from llm_experiments.text.tokenization import PAD_ID, SPECIAL_TOKENS
from llm_experiments.training.distributed import ALONE, Follower, Group
from llm_experiments.training.memory import keep_freed_memory
from llm_experiments.training.optimization import build_optimizer, loss_weights, set_step
from run_store import Attempt, Diverged, Stopped, checkpoints, class_record
from run_store.checkpoint_writer import CheckpointWriter
from run_store.clock import Clock

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HALF = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
Writer = Attempt | Follower
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
    attempt: Writer,
    *,
    device: torch.device,
    report: Callable[[Progress], None] = lambda progress: None,
    checkpoint: Path | None = None,
    keep_model: bool = False,
    group: Group = ALONE,
) -> PreTrainedModel:
    """Train one run to its end, or on from its last checkpoint, and publish its record.

    It starts from random weights, or from those in the folder ``checkpoint``. Returns the trained
    model; ``keep_model`` publishes it too. On a CPU the record is bit-identical
    however often the run was interrupted.

    Raises:
        Diverged: the loss is not finite; nothing is published.
        Stopped: the attempt should stop, and there is a checkpoint to go on from.
    """
    torch.set_num_threads(config.threads)
    keep_freed_memory()
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
        initialisation=config.initialisation,
        norm=config.norm,
        device="cpu" if group.shards else device,  # which may not have room for all of it
    )
    if checkpoint is not None:
        load_weights(model, checkpoint, corpus)
    add_dropout(model, config.dropout)
    if config.compile:
        compile_body(model, by_layer=group.shards)
    head = LanguageModelLoss(model, half, config.label_smoothing)
    step_loss = group.wrap(head, model.base_model.layers, device)
    optimizer = build_optimizer(model, config, corpus.class_counts)
    scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16)
    metrics = ClassMetrics(corpus.vocab_size, device)
    windows = WindowHistory()
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    state |= {"metrics": metrics, "windows": windows}
    step = checkpoints.resume(attempt, state, group.scattered)
    if not group.leads:
        metrics.reset()  # what was pending counts once
    clock = Clock(tokens.shape[1] * config.batch_size * config.accumulation, step)
    first, sequences_of = step, {"full": tokens} if config.evaluate == "full" else {}
    sequences_of |= {"held_out": held_out} if len(held_out) else {}

    def copy() -> dict[str, Any]:
        parts = {**state, "metrics": group.total(metrics)}
        return {name: group.copied(part.state_dict()) for name, part in parts.items()}

    def look(due: bool = False) -> None:
        """Whether to stop, or a checkpoint is due; every process has to ask."""
        wish = group.most(2 if attempt.should_stop() else int(due))
        if wish:
            writer.take(step)
        if wish == 2:
            writer.wait()
            raise Stopped(f"stopped after step {step}")

    def evaluate_on(sequences: Tensor) -> ClassMetrics:
        with clock.paused():
            return evaluate(step_loss, sequences, class_weights, config.batch_size, group, look)

    with CheckpointWriter(attempt if group.leads else None, step, config.steps, copy) as writer:
        while True:
            ends_window = step % config.evaluate_every == 0 or step == config.steps
            if ends_window and step > windows.last_step:
                synchronise(device)
                passes = {name: evaluate_on(sequences) for name, sequences in sequences_of.items()}
                averages = windows.append(step, group.total(metrics), **passes)
                metrics.reset()
                check_finite(step, averages["loss"], scaler)
                attempt.append_scalars(
                    {
                        "step": step,
                        "loss": averages["loss"],
                        "learning_rate": optimizer.param_groups[0]["lr"],
                        "tokens_per_second": clock.per_second(step),
                    }
                )
            if step > first:
                look(due=step == config.steps or (group.leads and writer.is_due(step)))
            if step == config.steps:
                break
            set_step(optimizer, config, step)
            for part in range(config.accumulation):
                batch = step * config.accumulation + part
                rows = batch_rows(config, len(tokens), batch)
                if config.dropout:
                    seed_dropout(config.seed, batch * group.size + group.rank)
                if device.type == "cuda":  # a copy from pageable memory would wait for the device
                    rows = rows.pin_memory().to(device, non_blocking=True)
                # Weights carry the loss scale, so that it is there where the head forms gradients.
                # DDP and FSDP average gradients over the processes, which have parts of a sum each.
                weights = scaler.scale(class_weights * group.size / config.accumulation)
                whole = tokens[rows]
                losses, targets = step_loss(group.share(whole), weights, count_targets(whole))
                losses.objective.backward()
                metrics.update(losses.loss, targets, losses.correct, ignore_index=IGNORE_INDEX)
            if config.clip_gradient:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_gradient)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            report(Progress(step=step, tokens_per_second=clock.per_second(step)))

        # Compiled are the passes that are made again and again: a graph of theirs takes 17 s.
        again = sequences_of or not config.compile
        with nullcontext() if again else torch.compiler.set_stance("force_eager"):
            final = evaluate_on(tokens if config.evaluate != "stream" else tokens[:0])
        weights = group.copied(model.state_dict()) if keep_model else {}
        if group.leads:
            if keep_model:
                synchronise(device)
                save_model(model, corpus, attempt.folder / "model", weights)
            record = class_record(
                class_counts=corpus.class_counts.numpy(),
                labels=corpus.labels,
                **windows.arrays(final),
            )
            files = ("model",) if keep_model else ()
            speed = {"tokens_per_second": clock.per_second(step)} if step > first else {}
            attempt.publish(record, files=files, **speed)
            writer.discard()
    return model


def save_model(
    model: PreTrainedModel,
    corpus: PreparedCorpus,
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write model and tokenizer in transformers' format, as `audit` and others read it."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()  # which leaves a semaphore behind when this process is ended
    special = dict(zip(("bos", "pad", "eos", "unk", "mask"), SPECIAL_TOKENS, strict=True))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=corpus.tokenizer(),
        **{f"{role}_token": token for role, token in special.items()},
    )
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


class LanguageModelLoss(nn.Module):
    """A model with its loss, as one module: what DDP and FSDP wrap."""

    def __init__(
        self, model: PreTrainedModel, half: torch.dtype | None, label_smoothing: float
    ) -> None:
        super().__init__()
        self.model, self.half, self.label_smoothing = model, half, label_smoothing

    def forward(
        self, sequences: Tensor, class_weights: Tensor, num_targets: Tensor
    ) -> tuple[TokenLosses, Tensor]:
        """See `token_losses`."""
        smoothing = self.label_smoothing if self.training else 0.0
        return token_losses(self.model, sequences, class_weights, self.half, smoothing, num_targets)


def token_losses(
    model: PreTrainedModel,
    sequences: Tensor,
    class_weights: Tensor,
    half: torch.dtype | None = None,
    label_smoothing: float = 0.0,
    num_targets: Tensor | None = None,
) -> tuple[TokenLosses, Tensor]:
    """Losses of the B * (T - 1) next tokens of sequences (B, T), and those targets.

    The objective is the sum over the targets of class weight times (smoothed) cross-entropy, over
    ``num_targets`` (scalar; that of these sequences, so that it is a mean, unless they are only a
    part of a batch). With ``half`` the matrix products are done in that type; losses are float32 in
    any case.
    """
    if num_targets is None:
        num_targets = count_targets(sequences)
    sequences = sequences.long()
    targets = sequences[:, 1:].flatten()
    targets = targets.masked_fill(targets == PAD_ID, IGNORE_INDEX)
    with torch.autocast(sequences.device.type, half, enabled=half is not None):
        outputs = features(model, sequences)[:, :-1].flatten(0, 1)
    token_weight = class_weights[targets.clamp(min=0)] / num_targets
    if half is not None:
        outputs = outputs.to(half)
    losses = linear_cross_entropy(
        outputs, classifier(model), targets, token_weight, label_smoothing
    )
    return losses, targets


def count_targets(sequences: Tensor) -> Tensor:
    """How many next tokens sequences (B, T) have: a scalar that stays on the device."""
    return (sequences[:, 1:] != PAD_ID).sum()


@torch.no_grad()
def evaluate(
    step_loss: nn.Module,
    sequences: Tensor,
    class_weights: Tensor,
    batch_size: int,
    group: Group,
    look: Callable[[], object] = lambda: None,
) -> ClassMetrics:
    """One pass over sequences (S, T): the loss and accuracy of every token.

    `look` is called after every batch, and may raise.
    """
    metrics = ClassMetrics(len(class_weights), sequences.device)
    step_loss.eval()
    for batch in sequences.split(batch_size) if len(sequences) else ():
        losses, targets = step_loss(group.share(batch), class_weights, count_targets(batch))
        metrics.update(losses.loss, targets, losses.correct, ignore_index=IGNORE_INDEX)
        look()
    step_loss.train()
    return group.total(metrics)


def compile_body(model: PreTrainedModel, *, by_layer: bool) -> None:
    """Compile all but the loss head, at the first forward pass: as a whole, or layer by layer."""
    layers = model.base_model.layers
    # OpenELM's layers differ: each has a graph, in training and in evaluation one of its own. Of
    # the same code torch compiles 8 by default, and runs the others as they are.
    limit = max(torch._dynamo.config.recompile_limit, 4 * len(layers))
    torch._dynamo.config.recompile_limit = limit
    for module in layers if by_layer else [model.base_model]:
        module.compile()


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock counts work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_finite(step: int, loss: float, scaler: torch.amp.GradScaler) -> None:
    """Raise Diverged where the loss or, in fp16, the loss scale is of no more use."""
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss} at step {step}")
    if scaler.is_enabled() and scaler.get_scale() < _SMALLEST_LOSS_SCALE:
        fell = f"the loss scale fell to {scaler.get_scale():g} at step {step}"
        raise Diverged(f"{fell}: gradients overflow in fp16 at every scale; bf16 has more range")


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
