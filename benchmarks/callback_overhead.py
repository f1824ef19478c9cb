"""What `TokenMetricsCallback` costs a training script that uses transformers' Trainer.

    python -m benchmarks.callback_overhead [--rounds 3]

CPU time of one thread a step, which other processes disturb little: the Trainer by itself, with the
callback, and with Algorithm 1 as the paper writes it. Same model, data and steps, in turn; the
first steps are outside the clock. Median and range of the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import PrinterCallback, Trainer, TrainingArguments

from benchmarks.llm_training import WARM_UP, DictionaryTrainer
from llm_experiments.callback import TokenMetricsCallback
from llm_experiments.models.presets import build_model

# Model, vocabulary, sequences of a step, tokens of a sequence, steps in the clock.
SIZES = (("openelm-tiny", 1024, 16, 64, 20), ("openelm-tiny", 32005, 8, 64, 6))
LOOPS = ("Trainer", "with the callback", "with the dictionary")


class Clock(transformers.TrainerCallback):
    """CPU seconds from the end of the warm-up on."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self.started = time.process_time()


def milliseconds(
    loop: str, name: str, vocab_size: int, batch: int, context: int, steps: int
) -> float:
    """CPU time of a training step in ms."""
    model = build_model(name, vocab_size=vocab_size)
    tokens = torch.randint(5, vocab_size, (batch * (WARM_UP + steps), context))
    clock = Clock()
    callbacks: list[Any] = [clock]
    if loop == "with the callback":
        callbacks.append(TokenMetricsCallback(model, vocab_size=vocab_size))
    trainer_class = DictionaryTrainer if loop == "with the dictionary" else Trainer
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=WARM_UP + steps,
            logging_steps=WARM_UP + steps,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        rows = [{"input_ids": row, "labels": row} for row in tokens]
        trainer = trainer_class(model, arguments, train_dataset=rows, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.token_metrics = {}
        trainer.train()
    return 1e3 * (time.process_time() - clock.started) / steps


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, one thread")
    for size in SIZES:
        times: dict[str, list[float]] = {loop: [] for loop in LOOPS}
        for _ in range(options.rounds):
            for loop in LOOPS:
                times[loop].append(milliseconds(loop, *size))
        alone = statistics.median(times["Trainer"])
        name, vocab_size, batch, context, _ = size
        for loop, found in times.items():
            median = statistics.median(found)
            print(
                f"| {name}, V = {vocab_size}, {batch} x {context} | {loop} | {median:.1f} ms "
                f"| {min(found):.1f}-{max(found):.1f} | {median / alone:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
