"""Training speed: our loop against transformers' Trainer with Algorithm 1 as the paper writes it.

    python -m benchmarks.llm_training [--model openelm-tiny] [--steps 80] [--threads 2]

Same model, data, precision and steps, in turn: a run alone with all threads, and the way of a sweep
to use as many cores, a run with one thread on each. The first steps and an evaluation (memory, lazy
initialisation, compilation) are outside the clock; another evaluation of the whole training set,
and our record and checkpoints, are inside it. The Trainer has its defaults (which clip gradients)
but for the settings below, and Qwen2 has transformers' own attention there. The last column is the
share of the machine's matrix rate (a float32 product of 1024 x 1024 matrices, measured here) that
6 operations a parameter and training token amount to.

Then, by CPU time of one thread, which other processes disturb little: what the token metrics cost
of a step, and the loss head beside what torch offers, at a small and at the published vocabulary.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from frequency_bins import ClassMetrics, Run, attempt
from llm_experiments import training
from llm_experiments.configs import RunConfig
from llm_experiments.distributed import ALONE
from llm_experiments.loss_head import linear_cross_entropy
from llm_experiments.models.presets import build_model
from llm_experiments.optimization import build_optimizer
from llm_experiments.preparation import PreparedCorpus, load_prepared, prepare
from llm_experiments.recipes import demo
from llm_experiments.training import token_losses

WARM_UP = 5


Ready = Callable[[], object]


def ours(config: RunConfig, corpus: PreparedCorpus, ready: Ready) -> float:
    """Seconds from the end of the warm-up, which `ready` prolongs, to the published record."""
    started = 0.0
    built: list[Any] = []

    def build(*arguments: Any, **options: Any) -> Any:
        built.append(build_model(*arguments, **options))
        return built[-1]

    def report(progress: Any) -> None:
        nonlocal started
        if progress.step == WARM_UP:
            head = training.LanguageModelLoss(built[-1], None, 0.0)
            tokens = torch.from_numpy(corpus.tokens.astype(np.int32))
            uniform = torch.ones(corpus.vocab_size, dtype=torch.float64)
            training.evaluate(head, tokens, uniform, config.batch_size, ALONE)
            ready()
            started = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(training, "build_model", build):
        run = Run.create(Path(folder), {"benchmark": 1})
        with attempt(run) as mine:
            training.train(config, corpus, mine, device=torch.device("cpu"), report=report)
    return time.perf_counter() - started


class Clock(TrainerCallback):
    """When the warm-up ended."""

    def __init__(self, ready: Ready) -> None:
        self.ready = ready
        self.trainer: Trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self.trainer.evaluate()
            self.ready()
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


def theirs(config: RunConfig, corpus: PreparedCorpus, ready: Ready, *, dictionary: bool) -> float:
    """The same for the Trainer, with the paper's dictionary or without any token metrics."""
    tokens = torch.from_numpy(np.array(corpus.tokens)).long()
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    torch.set_num_threads(config.threads)
    clock = Clock(ready)
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
        model.set_attn_implementation("sdpa")
        trainer_class = DictionaryTrainer if dictionary else Trainer
        trainer = trainer_class(
            model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[clock]
        )
        clock.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        trainer.token_metrics = defaultdict(lambda: {"loss": 0.0, "correct": 0, "count": 0})
        trainer.train()
        trainer.evaluate()
    return time.perf_counter() - clock.started


LOOPS: dict[str, Callable[[RunConfig, PreparedCorpus, Ready], float]] = {
    "ours": ours,
    "ours, compiled": lambda config, *rest: ours(replace(config, compile=True), *rest),
    "Trainer + dictionary": functools.partial(theirs, dictionary=True),
    "Trainer, no metrics": functools.partial(theirs, dictionary=False),
}


def at_once(loop: str, config: RunConfig, corpus: PreparedCorpus, runs: int) -> float:
    """Seconds of as many runs side by side, a process each, which leave the warm-up together."""
    context = multiprocessing.get_context("spawn")
    barrier, seconds = context.Barrier(runs), context.Queue()
    arguments = (loop, config, corpus.folder, barrier, seconds)
    processes = [context.Process(target=_one_of, args=arguments) for _ in range(runs)]
    for process in processes:
        process.start()
    slowest = max(seconds.get() for _ in processes)
    for process in processes:
        process.join()
    return slowest


def _one_of(loop: str, config: RunConfig, corpus: Path, barrier: Any, seconds: Any) -> None:
    seconds.put(LOOPS[loop](config, load_prepared(corpus), barrier.wait))


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


def compare(config: RunConfig, corpus: PreparedCorpus, rounds: int, rate: float) -> None:
    """Print a table of all loops, each alone with all threads and in a sweep of one a thread."""
    built = build_model(config.model, vocab_size=corpus.vocab_size)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    tokens = (config.steps - WARM_UP) * config.batch_size * corpus.tokens.shape[1]
    runs, single = config.threads, replace(config, threads=1)
    ways: dict[tuple[str, str], Callable[[], float]] = {}
    for loop in LOOPS:
        ways[loop, "alone"] = functools.partial(at_once, loop, config, corpus, 1)
        ways[loop, f"{runs} at once"] = functools.partial(at_once, loop, single, corpus, runs)
    speeds = defaultdict(list)
    for _ in range(rounds):
        for way, measure in ways.items():
            trained = tokens * (1 if way[1] == "alone" else runs)
            speeds[way].append(trained / measure())
    reference = statistics.median(speeds["Trainer + dictionary", "alone"])
    for (loop, runs_at_once), measured in speeds.items():
        median = statistics.median(measured)
        print(
            f"{config.model:14s} {loop:20s} {runs_at_once:10s} {median:10,.0f} "
            f"{min(measured):8,.0f}-{max(measured):8,.0f} {median / reference:6.2f} "
            f"{6 * parameters * median / rate:6.1%}",
            flush=True,
        )


def main() -> None:
    """Print the tables."""
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
    head = ("model", "loop", "runs", "tokens/s", "range", "ratio", "share")
    print("{:14s} {:20s} {:10s} {:>10s} {:>17s} {:>6s} {:>6s}".format(*head))
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
        compare(config, corpus, options.rounds, rate)
    torch.set_num_threads(1)
    for sizes in (("openelm-tiny", 1024, 16, 64), ("openelm-tiny", 32005, 8, 64)):
        parts_of_a_step(*sizes)


if __name__ == "__main__":
    main()
