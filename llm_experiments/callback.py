"""The same per-token record out of somebody's own training script with transformers' Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback

from frequency_bins import ClassMetrics
from llm_experiments.loss_head import IGNORE_INDEX


class TokenMetricsCallback(TrainerCallback):
    """Counts, losses and accuracies of every token, window after window between two logs.

    ``model`` is watched with a forward hook, so nothing else of the script changes::

        callback = TokenMetricsCallback(model, vocab_size=len(tokenizer))
        trainer = Trainer(model, ..., callbacks=[callback])
        trainer.train()
        callback.history[-1].loss     # (V,) nats, NaN where a token was not seen

    A window ends where the Trainer logs (``logging_steps``). Losses are those of the training
    steps, before each update, as in Algorithm 1 of the paper.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.steps: list[int] = []
        self.history: list[ClassMetrics] = []
        self._window = ClassMetrics(vocab_size, model.device)
        model.register_forward_hook(self._after_forward, with_kwargs=True)

    @torch.no_grad()
    def _after_forward(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        labels: Tensor | None = kwargs.get("labels")
        if not model.training or labels is None:
            return
        logits, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        if self._window.device != targets.device:
            self._window = ClassMetrics(self.vocab_size, targets.device)
        losses = F.cross_entropy(
            logits.float(), targets, reduction="none", ignore_index=IGNORE_INDEX
        )
        self._window.update(losses, targets, logits.argmax(-1) == targets)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the window."""
        if int(self._window.count.sum()):
            self.steps.append(state.global_step)
            self.history.append(self._window)
            self._window = ClassMetrics(self.vocab_size, self._window.device)
