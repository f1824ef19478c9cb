"""Training speed: our loop against transformers' Trainer with Algorithm 1 as the paper writes it.

    python -m benchmarks.llm_training [--model openelm-tiny] [--turns 8] [--threads 2]

Same model, data, precision and steps: a run alone with all threads, and the way of a sweep to use
as many cores, a run with one thread on each. All are there from the start and take turns at the
machine, 20 steps each, so that what else happens on it happens to all of them. The first steps
and an evaluation (memory, lazy initialisation, compilation) are outside the clock; another
evaluation of the whole training set, and our record and checkpoints, are inside it. The Trainer has
its defaults (which clip gradients) but for the settings below, and Qwen2 has transformers' own
attention there. The ratio is to the Trainer with the dictionary, alone: of all the time, and the
quartiles of single turns. The last column is the share of the machine's matrix rate (a float32
product of 1024 x 1024 matrices, measured here) that 6 operations a parameter and training token
amount to.

Then, by CPU time of one thread, which other processes disturb little: what the token metrics cost
of a step, and the loss head beside what torch offers, at a small and at the published vocabulary.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.dictionary import fill_dictionary
from benchmarks.gpu.parts import temporary_attempt
from benchmarks.gpu.timing import timed
from frequency_bins import ClassMetrics
from llm_experiments.configs import RunConfig
from llm_experiments.models.loss_head import linear_cross_entropy
from llm_experiments.models.presets import build_model
from llm_experiments.recipes import demo
from llm_experiments.text.preparation import PreparedCorpus, load_prepared, prepare
from llm_experiments.training import loop as training
from llm_experiments.training.distributed import ALONE
from llm_experiments.training.loop import token_losses
from llm_experiments.training.optimization import build_optimizer

WARM_UP = 5
TURN = 20


class Turns:
    """When a process may work: all of one place do, while those of the other places wait.

    `seconds` are those of its own turns.
    """

    def __init__(self, barrier: Any, place: int, places: int) -> None:
        self._barrier, self._place, self._places = barrier, place, places
        self.seconds: list[float] = []

    def begin(self) -> None:
        """Wait for the first turn, which begins when all are there."""
        self._wait(1 + self._place)

    def after(self, step: int, last: int) -> None:
        """Let the others have their turns where a step ends one's own, but after the last."""
        if WARM_UP < step < last and (step - WARM_UP) % TURN == 0:
            self._stop(self._places)

    def abort(self) -> None:
        """Let the others end, too."""
        self._barrier.abort()

    def end(self) -> None:
        """Let the others have theirs after the last."""
        self._stop(self._places - self._place)

    def _stop(self, turns: int) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        self._wait(turns)

    def _wait(self, turns: int) -> None:
        for _ in range(turns):
            self._barrier.wait()
        self._began = time.perf_counter()


def ours(config: RunConfig, corpus: PreparedCorpus, turns: Turns) -> None:
    """A run from its warm-up to the published record."""
    built: list[Any] = []

    def build(*arguments: Any, **options: Any) -> Any:
        built.append(build_model(*arguments, **options))
        return built[-1]

    def report(progress: Any) -> None:
        if progress.step == WARM_UP:
            head = training.LanguageModelLoss(built[-1], None, 0.0)
            tokens = torch.from_numpy(corpus.tokens.astype(np.int32))
            uniform = torch.ones(corpus.vocab_size, dtype=torch.float64)
            training.evaluate(head, tokens, uniform, config.batch_size, ALONE)
            turns.begin()
        turns.after(progress.step, config.steps)

    with temporary_attempt({}) as mine, mock.patch.object(training, "build_model", build):
        training.train(config, corpus, mine, device=torch.device("cpu"), report=report)


class Clock(TrainerCallback):
    """Turns of a Trainer."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.trainer: Trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self.trainer.evaluate()
            self.turns.begin()
        self.turns.after(state.global_step, args.max_steps)


class DictionaryTrainer(Trainer):
    """The Trainer with Algorithm 1; its `token_metrics` are those of the dictionary."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        logits, labels = outputs.logits.detach()[:, :-1], inputs["labels"][:, 1:]
        fill_dictionary(self.token_metrics, logits, labels)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def theirs(config: RunConfig, corpus: PreparedCorpus, turns: Turns, *, dictionary: bool) -> None:
    """The same for the Trainer, with the paper's dictionary or without any token metrics."""
    tokens = torch.from_numpy(np.array(corpus.tokens)).long()
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    torch.set_num_threads(config.threads)
    clock = Clock(turns)
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
        trainer.token_metrics = {}
        trainer.train()
        trainer.evaluate()


LOOPS: dict[str, Callable[[RunConfig, PreparedCorpus, Turns], None]] = {
    "ours": ours,
    "ours, compiled": lambda config, *rest: ours(replace(config, compile=True), *rest),
    "Trainer + dictionary": functools.partial(theirs, dictionary=True),
    "Trainer, no metrics": functools.partial(theirs, dictionary=False),
}


def in_turn(ways: Sequence[tuple[str, RunConfig, int]], corpus: PreparedCorpus) -> list[np.ndarray]:
    """Seconds of each turn of each way, which is a loop and how many runs of it work at once."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(sum(runs for _, _, runs in ways)), context.Queue()
    processes = []
    for place, (loop, config, runs) in enumerate(ways):
        turns = Turns(barrier, place, len(ways))
        arguments = (loop, config, corpus.folder, turns, place, results)
        processes += [context.Process(target=_work, args=arguments) for _ in range(runs)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return [
        np.max([seconds for place, seconds in found if place == wanted], 0)
        for wanted in range(len(ways))
    ]


def _work(
    loop: str, config: RunConfig, corpus: Path, turns: Turns, place: int, results: Any
) -> None:
    try:
        LOOPS[loop](config, load_prepared(corpus), turns)
        turns.end()
    except BaseException:
        turns.abort()
        raise
    finally:
        results.put((place, turns.seconds))


def matrix_rate() -> float:
    """FLOP/s of a float32 product of 1024 x 1024 matrices: the best of many."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    milliseconds = min(timed(lambda: left @ right, torch.device("cpu"), 0, 30))
    return 2 * 1024**3 / milliseconds * 1e3


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


def compare(config: RunConfig, corpus: PreparedCorpus, rate: float) -> None:
    """Print a table of all loops, each alone with all threads and in a sweep of one a thread."""
    built = build_model(config.model, vocab_size=corpus.vocab_size)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    tokens = (config.steps - WARM_UP) * config.batch_size * corpus.tokens.shape[1]
    single = replace(config, threads=1)
    ways = [way for loop in LOOPS for way in ((loop, config, 1), (loop, single, config.threads))]
    seconds = in_turn(ways, corpus)
    reference = seconds[ways.index(("Trainer + dictionary", config, 1))]
    for (loop, _, runs), mine in zip(ways, seconds, strict=True):
        speed = runs * tokens / mine.sum()
        quartiles = np.quantile(runs * reference / mine, (0.25, 0.75))
        print(
            f"{config.model:14s} {loop:20s} {f'{runs} at once' if runs > 1 else 'alone':10s} "
            f"{speed:10,.0f} {runs * reference.sum() / mine.sum():6.2f} "
            f"{quartiles[0]:6.2f}-{quartiles[1]:4.2f} {6 * parameters * speed / rate:6.1%}",
            flush=True,
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", nargs="+", default=["openelm-tiny", "qwen2-tiny"])
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    grid = demo()[0]
    corpus = prepare(grid.data)
    rate = matrix_rate()
    print(f"{options.threads} threads, {rate / 1e9:.1f} GFLOP/s, torch {torch.__version__}")
    head = ("model", "loop", "runs", "tokens/s", "ratio", "of turns", "share")
    print("{:14s} {:20s} {:10s} {:>10s} {:>6s} {:>11s} {:>6s}".format(*head))
    for name in options.model:
        config = RunConfig(
            model=name,
            weight_decay=0.1,
            steps=WARM_UP + TURN * options.turns,
            batch_size=grid.training.batch_size,
            learning_rate=grid.training.learning_rate,
            threads=options.threads,
        )
        compare(config, corpus, rate)
    torch.set_num_threads(1)
    for sizes in (("openelm-tiny", 1024, 16, 64), ("openelm-tiny", 32005, 8, 64)):
        parts_of_a_step(*sizes)


if __name__ == "__main__":
    main()
