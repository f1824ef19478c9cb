"""The same per-token record out of somebody's own training script with transformers' Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel, TrainerCallback

from frequency_bins import ClassMetrics
from llm_experiments.models.causality import is_causal
from llm_experiments.models.logits import Predictions, next_token_predictions
from llm_experiments.models.loss_head import IGNORE_INDEX


@dataclass(kw_only=True)
class _Pass:
    """A forward pass; part of a step once its backward pass has come to its end."""

    seen: Predictions
    num_classes: int
    done: bool = False

    def begin_backward(self, gradient: Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self.done = True


class TokenMetricsCallback(TrainerCallback):
    """Counts, losses and accuracies of every token, window after window between two logs.

    ``model`` is watched with a forward hook, so nothing else of the script changes::

        callback = TokenMetricsCallback(model, vocab_size=len(tokenizer))
        trainer = Trainer(model, ..., callbacks=[callback])
        trainer.train()
        callback.history[-1].loss     # (V,) nats, NaN where a token was not seen

    A window ends where the Trainer logs its loss (``logging_steps``), and goes to the CPU. Losses
    are those of the training steps, before each update, as in Algorithm 1 of the paper, whatever is
    minimised. A window holds the passes that its steps were made of: those that a gradient went
    through. What an attempt saw that was begun anew (a smaller batch size, a resumed checkpoint) is
    dropped. In a distributed run each process records what it trained on.

    Labels that the Trainer keeps from the model (``compute_loss_func``, ``label_smoothing_factor``)
    are taken from its batches. Where a pass tells no losses of tokens, a warning says why in the
    first step; training goes on in any case.

    Raises:
        ValueError: a vocabulary of less than one token, or a model whose label t is not the token
            after t: an encoder-decoder, or one in which later tokens move earlier logits.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int) -> None:
        if getattr(model.config, "is_encoder_decoder", False) or not _may_be_causal(model):
            raise ValueError(
                f"{type(model).__name__} does not predict the next token: it is an encoder-decoder "
                "or sees the tokens after it; expected a causal language model"
            )
        self.vocab_size = vocab_size
        self.steps: list[int] = []
        self.history: list[ClassMetrics] = []
        self._window = ClassMetrics(vocab_size)
        self._half = model.dtype.itemsize < 4
        self._passes: list[_Pass] = []
        self._labels: Any = WeakTensorKeyDictionary()  # of batches, by their input_ids
        self._unfinished_from: int | None = None  # the windows before the attempt that goes on
        self._warned = False
        # The compiler would trace what the hook does into the model's graph.
        model.register_forward_hook(torch.compiler.disable(self._after_forward), with_kwargs=True)

    @torch.no_grad()
    def _after_forward(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        ends = [getattr(output, name, None) for name in ("loss", "logits", "log_probs")]
        ends = [end for end in ends if isinstance(end, Tensor) and end.requires_grad]
        if not model.training or not ends:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        labels = kwargs.get("labels")
        if labels is None and isinstance(ids, Tensor):
            labels = self._labels.get(ids)
        try:
            seen, num_classes = _predictions(output, labels, half=self._half)
        except Exception as error:  # whatever the model gives, training goes on
            self._warn(str(error))
            return
        record = _Pass(seen=seen, num_classes=max(num_classes, self.vocab_size))
        self._passes.append(record)
        for end in ends:
            end.register_hook(record.begin_backward)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop what an attempt that was broken off did after the step at which this one begins.

        Mixed precision gives logits of half precision, which the Trainer makes float32.
        """
        self._half |= args.fp16 or args.bf16
        if self._unfinished_from is not None:
            old = self._unfinished_from
            kept = old + sum(step <= state.global_step for step in self.steps[old:])
            del self.steps[kept:], self.history[kept:]
        self._unfinished_from = len(self.steps)
        self._window = ClassMetrics(self.vocab_size)
        self._remember_labels(kwargs.get("train_dataloader"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What was seen between the steps belongs to none."""
        self._passes.clear()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A part of an accumulated step is done."""
        self._add_passes()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is done."""
        self._add_passes()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        """Close the window where the training loss is logged; evaluations log without it."""
        if logs is not None and "loss" in logs:
            self._close(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the last window."""
        self._close(state.global_step)
        self._unfinished_from = None

    def _add_passes(self) -> None:
        done = [record for record in self._passes if record.done]
        if not done:
            self._warn("no pass of the model with labels and logits was part of the step")
        for record in done:
            device, size = record.seen.target.device, record.num_classes
            if (self._window.device, self._window.num_classes) != (device, size):
                self._window = _moved(self._window, size, device)
            self._window.update(*record.seen)
        self._passes.clear()

    def _close(self, step: int) -> None:
        window = _moved(self._window, self._window.num_classes, "cpu")
        if int(window.count.sum()):
            if beyond := int(window.count[self.vocab_size :].sum()):
                self._warn(f"{beyond} next tokens are beyond the vocab_size of {self.vocab_size}")
            self.steps.append(step)
            self.history.append(_moved(window, self.vocab_size, "cpu"))
            self._window = ClassMetrics(self._window.num_classes, self._window.device)

    def _remember_labels(self, loader: Any) -> None:
        """Watch the batches of a loader on their way to the Trainer."""
        if loader is None:
            return
        known, kind = self._labels, type(loader)

        def batches(self: Any) -> Iterator[Any]:
            for batch in kind.__iter__(self):
                if isinstance(batch, Mapping) and {"input_ids", "labels"} <= batch.keys():
                    known[batch["input_ids"]] = batch["labels"]
                yield batch

        watched = type(kind.__name__, (kind,), {"__iter__": batches})
        # As `loader.__class__ = watched`, which accelerate's loaders answer by another's class.
        vars(object)["__class__"].__set__(loader, watched)

    def _warn(self, reason: str) -> None:
        """Tell once, in one line."""
        if not self._warned:
            self._warned = True
            line = " ".join(reason.split())
            warnings.warn(f"TokenMetricsCallback records less: {line}", stacklevel=2)


def _predictions(output: Any, labels: Tensor | None, *, half: bool) -> tuple[Predictions, int]:
    """Losses out of what a model gives, and of how many classes; ValueError where it gives none.

    TRL's trainers give log-probabilities of the next labels, and whether each was the largest.
    """
    if labels is None:
        raise ValueError("a pass had no labels, and its batch none either")
    if isinstance(logits := getattr(output, "logits", None), Tensor):
        if logits.shape[:2] != labels.shape:
            found = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"the shapes of logits and labels are {found}; expected the same B, T")
        return next_token_predictions(logits, labels, half=half), logits.shape[-1]
    log_probs, hits = (getattr(output, name, None) for name in ("log_probs", "is_top1"))
    if log_probs is None or hits is None:
        raise ValueError(f"{type(output).__name__} holds neither logits nor log_probs and is_top1")
    target = labels[:, 1:].to(log_probs.device).masked_fill(~output.label_mask, IGNORE_INDEX)
    return Predictions(-log_probs.float().flatten(), target.flatten(), hits.flatten()), 1


def _moved(window: ClassMetrics, num_classes: int, device: torch.device | str) -> ClassMetrics:
    """The same sums on another device, with classes added that were not seen, or left out."""
    moved = ClassMetrics(num_classes, device)
    shared = min(num_classes, window.num_classes)
    state = moved.state_dict()
    for name, sums in window.state_dict().items():
        state[name][:shared] = sums[:shared]
    moved.load_state_dict(state)
    return moved


def _may_be_causal(model: PreTrainedModel) -> bool:
    try:
        return is_causal(model)
    except Exception:  # of a model that wants other inputs; training will show them
        return True
