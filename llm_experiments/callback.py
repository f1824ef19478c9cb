"""The same per-token record out of somebody's own training script with transformers' Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from frequency_bins import ClassMetrics
from llm_experiments.models.logits import next_token_predictions


class TokenMetricsCallback(TrainerCallback):
    """Counts, losses and accuracies of every token, window after window between two logs.

    ``model`` is watched with a forward hook, so nothing else of the script changes::

        callback = TokenMetricsCallback(model, vocab_size=len(tokenizer))
        trainer = Trainer(model, ..., callbacks=[callback])
        trainer.train()
        callback.history[-1].loss     # (V,) nats, NaN where a token was not seen

    A window ends where the Trainer logs its loss (``logging_steps``). Losses are those of the
    training steps, before each update, as in Algorithm 1 of the paper, whatever is minimised. A
    Trainer that keeps the labels from the model (``label_smoothing_factor``) leaves nothing to
    record, of which a warning tells. In a distributed run each process records what it trained on.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.steps: list[int] = []
        self.history: list[ClassMetrics] = []
        self._window = ClassMetrics(vocab_size, model.device)
        self._half = model.dtype.itemsize < 4
        model.register_forward_hook(self._after_forward, with_kwargs=True)

    @torch.no_grad()
    def _after_forward(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        labels: Tensor | None = kwargs.get("labels")
        if not model.training or labels is None:
            return
        seen = next_token_predictions(output.logits, labels, half=self._half)
        if self._window.device != seen.target.device:
            self._window = ClassMetrics(self.vocab_size, seen.target.device)
        self._window.update(*seen)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mixed precision gives logits of half precision, which the Trainer makes float32."""
        self._half |= args.fp16 or args.bf16

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        """Close the window where the training loss is logged; evaluations log without it."""
        if logs is not None and "loss" in logs:
            self._close(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the last window, and tell of a run in which no labels came by."""
        self._close(state.global_step)
        if not self.history:
            warnings.warn(
                "TokenMetricsCallback saw no labels: the Trainer gave none to the model",
                stacklevel=2,
            )

    def _close(self, step: int) -> None:
        if int(self._window.count.sum()):
            self.steps.append(step)
            self.history.append(self._window)
            self._window = ClassMetrics(self.vocab_size, self._window.device)
