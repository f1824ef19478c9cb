"""Training speed: our loop against transformers' Trainer with Algorithm 1 as the paper writes it.

    python -m benchmarks.llm_training [--model openelm-tiny] [--steps 80] [--threads 2]

Same model, data, precision and steps in one process, in turn. The first steps (memory, lazy
initialisation, compilation) are outside the clock; one evaluation of the whole training set, and
our record and checkpoints, are inside it. The Trainer has its defaults (which clip gradients) but
for the settings below. The last column is the share of the machine's matrix rate (a float32 product
of 1024 x 1024 matrices, measured here) that 6 operations a parameter and training token amount to.

Then, by CPU time of one thread, which other processes disturb little: what the token metrics cost
of a step, and the loss head beside what torch offers, at a small and at the published vocabulary.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from frequency_bins import ClassMetrics, Run, attempt
from llm_experiments.configs import RunConfig
from llm_experiments.loss_head import linear_cross_entropy
from llm_experiments.models.presets import build_model
from llm_experiments.optimization import build_optimizer
from llm_experiments.preparation import PreparedCorpus, prepare
from llm_experiments.recipes import demo
from llm_experiments.training import token_losses, train

WARM_UP = 5


def ours(config: RunConfig, corpus: PreparedCorpus) -> float:
    """Seconds from the end of the warm-up to the published record."""
    started = 0.0

    def report(progress: Any) -> None:
        nonlocal started
        if progress.step == WARM_UP:
            started = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder), {"benchmark": 1})
        with attempt(run) as mine:
            train(config, corpus, mine, device=torch.device("cpu"), report=report)
    return time.perf_counter() - started


class Clock(TrainerCallback):
    """When the warm-up ended."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self.started = time.perf_counter()


class DictionaryTrainer(Trainer):
    """Algorithm 1 to the letter: a dictionary, a loop over tokens, a cross-entropy a token."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        metrics = self.token_metrics
        logits, labels = outputs.logits.detach()[:, :-1], inputs["labels"][:, 1:]
        predictions = logits.argmax(-1)
        for row in range(labels.shape[0]):
            for place in range(labels.shape[1]):
                token = labels[row, place]
                loss = F.cross_entropy(logits[row, place], token)
                entry = metrics[int(token)]
                entry["loss"] += loss.item()
                entry["correct"] += int(predictions[row, place] == token)
                entry["count"] += 1
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def theirs(config: RunConfig, corpus: PreparedCorpus, *, dictionary: bool) -> float:
    """The same for the Trainer, with the paper's dictionary or without any token metrics."""
    tokens = torch.from_numpy(np.array(corpus.tokens)).long()
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=config.batch_size,
            max_steps=config.steps,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=config.warmup_steps,
            logging_steps=config.evaluate_every,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            prediction_loss_only=True,
        )
        model = build_model(config.model, vocab_size=corpus.vocab_size, seed=config.seed)
        trainer_class = DictionaryTrainer if dictionary else Trainer
        trainer = trainer_class(
            model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[clock]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.token_metrics = defaultdict(lambda: {"loss": 0.0, "correct": 0, "count": 0})
        trainer.train()
        trainer.evaluate()
    return time.perf_counter() - clock.started


def matrix_rate() -> float:
    """FLOP/s of a float32 product of 1024 x 1024 matrices: the best of many."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(30):
        begin = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - begin)
    return 2 * 1024**3 / best


def cpu_ms(action: Callable[[], object], repeats: int = 10) -> float:
    """Milliseconds of CPU that one call takes: the least of several."""
    action()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        action()
        times.append(time.process_time() - begin)
    return 1e3 * min(times)


def parts_of_a_step(model: str, vocab_size: int, batch: int, context: int) -> None:
    """Print what the token metrics cost of a step, and the loss head beside torch's."""
    built = build_model(model, vocab_size=vocab_size)
    optimizer = build_optimizer(built, RunConfig(model=model, weight_decay=0.1))
    sequences = torch.randint(5, vocab_size, (batch, context))
    uniform = torch.ones(vocab_size, dtype=torch.float64)
    metrics = ClassMetrics(vocab_size)

    def step() -> None:
        losses, targets = token_losses(built, sequences, uniform)
        losses.objective.backward()
        metrics.update(losses.loss, targets, losses.correct)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    targets = sequences[:, 1:].flatten()
    width = built.config.hidden_size
    loss, correct = torch.rand(len(targets)), torch.rand(len(targets)) < 0.3
    logits = torch.randn(len(targets), vocab_size)
    whole = cpu_ms(step)
    update = cpu_ms(lambda: metrics.update(loss, targets, correct))
    # The head needs the largest logit and the target's anyway; comparing them is for the metrics.
    reached = cpu_ms(lambda: loss == 0)
    where = cpu_ms(lambda: logits.max(-1)) - cpu_ms(lambda: logits.amax(-1))
    print(
        f"{model}, V = {vocab_size}, {batch} x {context}: step {whole:.1f} ms; token metrics: "
        f"update and comparison {update + reached:.3f} ms ({(update + reached) / whole:.2%}); "
        f"argmax beyond max, which is not taken, {where:.2f} ms ({where / whole:.2%})",
        flush=True,
    )
    features = torch.randn(len(targets), width, requires_grad=True)
    weight = torch.randn(vocab_size, width, requires_grad=True)
    share = torch.full((len(targets),), 1 / len(targets))

    def fused() -> None:
        linear_cross_entropy(features, weight, targets, share).objective.backward()

    def plain() -> None:
        logits = features @ weight.T
        losses = F.cross_entropy(logits, targets, reduction="none")
        (logits.detach().argmax(-1) == targets).sum()
        (losses * share).sum().backward()

    def chunked(reduction: str) -> None:
        options = torch.nn.LinearCrossEntropyOptions()
        losses = F.linear_cross_entropy(
            features, weight, targets, reduction=reduction, options=options
        )
        (losses if reduction == "mean" else (losses * share).sum()).backward()

    heads: dict[str, Callable[[], None]] = {"ours": fused, "logits kept": plain}
    if hasattr(F, "linear_cross_entropy"):
        heads["torch's chunked, no accuracy"] = lambda: chunked("none")
        heads["torch's chunked, no token losses"] = lambda: chunked("mean")
    times = ", ".join(f"{name} {cpu_ms(head, 4):.1f} ms" for name, head in heads.items())
    print(f"  loss head, forward and backward: {times}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", nargs="+", default=["openelm-tiny", "qwen2-tiny"])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    grid = demo()[0]
    corpus = prepare(grid.data)
    rate = matrix_rate()
    print(f"{options.threads} threads, {rate / 1e9:.1f} GFLOP/s, torch {torch.__version__}")
    print(f"{'model':14s} {'loop':22s} {'tokens/s':>10s} {'range':>17s}  ratio  share")
    for name in options.model:
        config = RunConfig(
            model=name,
            weight_decay=0.1,
            steps=options.steps,
            batch_size=grid.training.batch_size,
            learning_rate=grid.training.learning_rate,
            evaluate_every=20,
            threads=options.threads,
        )
        parameters = sum(
            p.numel() for p in build_model(name, vocab_size=corpus.vocab_size).parameters()
        )
        tokens = (options.steps - WARM_UP) * config.batch_size * corpus.tokens.shape[1]
        compiled = replace(config, compile=True)
        loops = {
            "ours": lambda: ours(config, corpus),  # noqa: B023
            "ours, compiled": lambda: ours(compiled, corpus),  # noqa: B023
            "Trainer + dictionary": lambda: theirs(config, corpus, dictionary=True),  # noqa: B023
            "Trainer, no metrics": lambda: theirs(config, corpus, dictionary=False),  # noqa: B023
        }
        seconds: dict[str, list[float]] = {loop: [] for loop in loops}
        for _ in range(options.rounds):
            for loop, run in loops.items():
                seconds[loop].append(run())
        reference = statistics.median(seconds["ours"])
        for loop, times in seconds.items():
            speeds = sorted(tokens / time_ for time_ in times)
            median = statistics.median(times)
            share = 6 * parameters * tokens / median / rate
            print(
                f"{name:14s} {loop:22s} {tokens / median:10,.0f} "
                f"{speeds[0]:8,.0f}-{speeds[-1]:8,.0f} {median / reference:6.2f} {share:6.1%}",
                flush=True,
            )
    torch.set_num_threads(1)
    for sizes in (("openelm-tiny", 1024, 16, 64), ("openelm-tiny", 32005, 8, 64)):
        parts_of_a_step(*sizes)


if __name__ == "__main__":
    main()
