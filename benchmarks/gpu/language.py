"""What one GPU does: is it right, how fast, in how much memory. At most ten minutes.

    benchmarks/gpu.sh [FOLDER] [--cifar10 FOLDER] [--counts FILE]
    benchmarks/gpu.sh FOLDER --dry-run                   # tiny, on a CPU: tests this file

Needs the project's dependencies (h5py, h5netcdf and tyro are those that machines set up for torch
alone tend to lack) and no network. Every part runs in a process of its own with a time limit;
one that fails, runs out of memory or of time is recorded as such, with what it had measured, and
the others go on. FOLDER/results.json is rewritten after each part. Exit code 0: every check held
and every part ended.

Language models are trained by `llm_experiments.training.loop.train` itself, on the published
recipes, on random tokens with Zipf counts and from weights that the device draws; steps are timed
between events on the device, after the first ones. Times are in milliseconds: n, mean,
standard deviation.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

HALVES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where to run, and how large; the defaults are for a GPU."""

    device: str = "cuda"
    model: str = "openelm-270m"
    large_model: str = "openelm-3b"
    vocab_size: int = 32005
    tiny_vocab: int = 2000
    head_tokens: int = 8128
    head_width: int = 1280
    batch_size: int | None = None
    context: int | None = None
    warm_up: int = 10
    steps: int = 30
    dictionary_steps: int = 3
    matrix: int = 8192
    problems: int = 4096
    active: int = 2000
    width: int = 2048
    epochs: int = 24
    images: int = 50_000
    image_batch: int = 512
    image_width: int = 64
    workers: int = 14
    cifar10: str = ""
    counts: str = ""


DRY = Settings(
    device="cpu",
    model="openelm-tiny",
    large_model="openelm-tiny",
    vocab_size=500,
    tiny_vocab=300,
    head_tokens=1200,
    head_width=16,
    batch_size=4,
    context=16,
    warm_up=2,
    steps=3,
    dictionary_steps=1,
    matrix=128,
    problems=8,
    active=40,
    width=64,
    epochs=1,
    images=200,
    image_batch=100,
    image_width=1,
    workers=0,
)


class Record:
    """A part's figures and checks, on disk as soon as they are known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content: dict[str, Any] = {"status": "running", "figures": {}, "checks": {}}

    def figure(self, name: str, value: Any) -> None:
        """A number, a text, or a list of step times in milliseconds."""
        if isinstance(value, list):
            spread = statistics.stdev(value) if len(value) > 1 else None
            value = {"n": len(value), "mean_ms": statistics.mean(value), "std_ms": spread}
        self._content["figures"][name] = value
        self._write()

    def check(self, name: str, found: float, limit: float) -> None:
        """A figure that must be at most its limit; NaN is not."""
        found, held = float(found), bool(found <= limit)
        self._content["checks"][name] = {"found": found, "limit": float(limit), "held": held}
        self._write()

    def end(self, status: str, **fields: Any) -> None:
        """ok, failed or skipped."""
        self._content |= {"status": status} | fields
        self._write()

    def _write(self) -> None:
        beside = self._path.with_suffix(".partial")
        beside.write_text(json.dumps(self._content, indent=1))
        beside.replace(self._path)


class Enough(Exception):
    """Leaves a training loop when enough of its steps are timed."""


def moment(device: torch.device) -> Any:
    """A mark in the device's stream of work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def intervals(marks: Sequence[Any]) -> list[float]:
    """Milliseconds between marks."""
    if isinstance(marks[0], float):
        return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def timed(action: Callable[[], object], device: torch.device, warm_up: int, n: int) -> list[float]:
    """Milliseconds of each of ``n`` calls."""
    for _ in range(warm_up):
        action()
    marks = [moment(device)]
    for _ in range(n):
        action()
        marks.append(moment(device))
    return intervals(marks)


def peak_gib(device: torch.device) -> float | None:
    """Most memory that tensors have taken, or None on a CPU; the next peak starts here."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak


def zipf_tokens(vocab_size: int, sequences: int, context: int) -> np.ndarray:
    """(S, T) ids as `prepare` keeps them, special tokens left out."""
    shares = 1 / np.arange(1, vocab_size - 4)
    ids = np.random.default_rng(0).choice(
        np.arange(5, vocab_size), (sequences, context), p=shares / shares.sum()
    )
    return ids.astype(np.min_scalar_type(vocab_size - 1))


def zipf_corpus(vocab_size: int, sequences: int, context: int) -> Any:
    """What `train` reads of a PreparedCorpus."""
    from frequency_bins import class_counts

    tokens = zipf_tokens(vocab_size, sequences, context)
    return SimpleNamespace(
        tokens=tokens,
        held_out=tokens[:0],
        vocab_size=vocab_size,
        class_counts=class_counts(tokens[:, 1:], vocab_size),
        labels=tuple(map(str, range(vocab_size))),
    )


# ------------------------------------------------------------------------------------- checks


def checks_of_the_parts(settings: Settings, record: Record) -> None:
    """The loss head and the metrics, each by itself."""
    device = torch.device(settings.device)
    generator = torch.Generator().manual_seed(0)
    shape = settings.head_tokens, 128
    features = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    weight = torch.randn(settings.vocab_size, 128, generator=generator, dtype=torch.float64)
    weight = (weight / 8).to(device)
    targets = torch.randint(settings.vocab_size, shape[:1], generator=generator).to(device)
    targets[::7] = -100
    exact = head_results(features, weight, targets, ours=False)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        plain = head_results(features.to(dtype), weight.float(), targets, ours=False)
        mine = head_results(features.to(dtype), weight.float(), targets, ours=True)
        for what, want, theirs, found in zip(
            ("losses", "gradient of features", "gradient of classifier"),
            exact,
            plain,
            mine,
            strict=True,
        ):
            limit = 1.1 * distance(theirs, want) + 1e-6
            record.check(f"head {name}, {what}: error", distance(found, want), limit)
    check_metrics(settings, record)


def head_results(
    features: Tensor, weight: Tensor, targets: Tensor, *, ours: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and both gradients of the mean loss, scaled as fp16 needs it."""
    from llm_experiments.models.loss_head import linear_cross_entropy

    features, weight = features.clone().requires_grad_(), weight.clone().requires_grad_()
    share = torch.full(targets.shape, 1024.0 / len(targets), device=features.device)
    if ours:
        result = linear_cross_entropy(features, weight, targets, share)
        losses, objective = result.loss, result.objective
    else:
        logits = F.linear(features, weight.to(features.dtype))
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = F.cross_entropy(logits.to(wide), targets, reduction="none", ignore_index=-100)
        objective = (losses * share).sum()
    objective.backward()
    assert features.grad is not None
    assert weight.grad is not None
    return losses.detach(), features.grad, weight.grad


def distance(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return float((found.double() - wanted).norm() / wanted.norm())


def check_metrics(settings: Settings, record: Record) -> None:
    """ClassMetrics on the device against the CPU's."""
    from frequency_bins import ClassMetrics

    generator = torch.Generator().manual_seed(1)
    on_cpu, there = (ClassMetrics(1000, place) for place in ("cpu", settings.device))
    for _ in range(3):
        loss = 10 * torch.rand(20_000, generator=generator)
        target = (1000 * torch.rand(20_000, generator=generator) ** 3).long()
        target[::9] = -100
        correct = torch.rand(20_000, generator=generator) < 0.3
        for metrics in (on_cpu, there):
            metrics.update(*(batch.to(metrics.device) for batch in (loss, target, correct)))
    expected, found = on_cpu.state_dict(), there.state_dict()
    for name in ("count", "correct"):
        wrong = (found[name].cpu() != expected[name]).sum()
        record.check(f"class metrics, {name}: classes that differ from the CPU's", int(wrong), 0)
    record.check(
        "class metrics, loss: error",
        distance(found["loss_sum"].cpu(), expected["loss_sum"]),
        1e-12,
    )


def checks_of_training(settings: Settings, record: Record) -> None:
    """Tiny models trained by `train`: the device against the CPU, half precision against fp32."""
    from llm_experiments.configs import RunConfig

    device = torch.device(settings.device)
    corpus = zipf_corpus(settings.tiny_vocab, 64, 32)
    config = RunConfig(steps=30, batch_size=8, evaluate_every=10, learning_rate=3e-3)
    model, on_cpu = trained(config, corpus, torch.device("cpu"))
    for precision in HALVES:
        there = replace(config, precision=precision)
        _, losses = trained(there, corpus, device)
        error = abs(losses - on_cpu).mean()
        limit = 1e-3 if precision == "fp32" else 5e-2
        record.check(f"trained in {precision}: token losses off the CPU's fp32, nats", error, limit)
    model = model.to(device)
    exact = step_results(copy.deepcopy(model).double(), corpus, None, ours=False)
    for precision, half in HALVES.items():
        plain = step_results(model, corpus, half, ours=False)
        mine = step_results(model, corpus, half, ours=True)
        for what, want, theirs, found in zip(
            ("losses", "gradient"), exact, plain, mine, strict=True
        ):
            limit = 1.1 * distance(theirs, want) + 1e-6
            record.check(f"step in {precision}, {what}: error", distance(found, want), limit)
    for precision in ("bf16", "fp16"):
        syncs = host_syncs(replace(config, precision=precision), corpus, device)
        record.check(f"step in {precision}: times that the host waits", syncs, 0)


def trained(config: Any, corpus: Any, device: torch.device) -> tuple[Any, np.ndarray]:
    """A whole run: its model, and the final loss of each class that occurs."""
    from llm_experiments.training.loop import train
    from run_store import Run, attempt

    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder), asdict(config))
        with attempt(run) as mine:
            model = train(config, corpus, mine, device=device)
        losses = run.classes()["final_loss"].values
    return model, losses[corpus.class_counts.numpy() > 0]


def step_results(
    model: Any, corpus: Any, half: torch.dtype | None, *, ours: bool
) -> tuple[Tensor, Tensor]:
    """Token losses of a batch and the gradient of their mean, through our path or torch's own."""
    from llm_experiments.training.loop import token_losses

    sequences = torch.from_numpy(corpus.tokens[:8].astype(np.int64)).to(model.device)
    scale = 1024.0
    if ours:
        weights = torch.full((corpus.vocab_size,), scale, device=model.device, dtype=torch.float64)
        result, _ = token_losses(model, sequences, weights, half)
        losses, objective = result.loss, result.objective
    else:
        with torch.autocast(model.device.type, half, enabled=half is not None):
            logits = model(input_ids=sequences, use_cache=False).logits[:, :-1].flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, sequences[:, 1:].flatten(), reduction="none")
        objective = scale * losses.mean()
    model.zero_grad(set_to_none=True)
    objective.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return losses.detach(), gradient


def host_syncs(config: Any, corpus: Any, device: torch.device) -> int:
    """How often the host waits for the device within a step that logs nothing."""
    if device.type != "cuda":
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def watch(step: int) -> None:
            torch.cuda.set_sync_debug_mode("warn" if step == 4 else "default")

        run_steps(config, corpus, device, 5, watch)
    return sum("synchronizing" in str(warning.message) for warning in caught)


def checks_of_ufm(settings: Settings, record: Record) -> None:
    """The solver on the device: certificates, and the closed form."""
    from benchmarks.ufm_solver import batch_problem, zipf_problem
    from ufm import closed_form, solve

    for name, problem in (("32 of V = 10", batch_problem(32)), ("V = 60", zipf_problem(60))):
        solution = solve(problem, device=settings.device, tolerance=1e-9, throw=False)
        gap = (solution.certificate.gap / solution.objective).max()
        record.check(f"UFM, {name}: relative gap", float(gap), 1e-9)
        exact = closed_form(problem).loss
        error = ((solution.loss.cpu() - exact) / exact).abs().max()
        record.check(f"UFM, {name}: relative error of a class's loss", float(error), 1e-6)


# ---------------------------------------------------------------------------- language models


def published(settings: Settings, *, large: bool = False) -> Any:
    """The grid of Table 1, or that of the largest model of Figure 1."""
    from llm_experiments.recipes import figure1, table1

    grid = figure1()[-1] if large else table1()[0]
    assert grid.models == ("openelm-3b" if large else "openelm-270m",)
    training = replace(grid.training, threads=torch.get_num_threads())
    if settings.batch_size is not None:
        training = replace(training, batch_size=settings.batch_size)
    data = replace(grid.data, vocab_size=settings.vocab_size)
    if settings.context is not None:
        data = replace(data, context=settings.context)
    model = settings.large_model if large else settings.model
    return replace(grid, models=(model,), training=training, data=data)


def run_steps(
    config: Any, corpus: Any, device: torch.device, steps: int, watch: Callable[[int], object]
) -> None:
    """``steps`` steps of `train`, which calls ``watch`` after each of them."""
    from llm_experiments.training.loop import train
    from run_store import Run, attempt

    def report(progress: Any) -> None:
        watch(progress.step)
        if progress.step == steps:
            raise Enough

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("llm_experiments.training.loop.build_model", drawn_on_device),
    ):
        try:
            with attempt(Run.create(Path(folder), {})) as mine:
                train(config, corpus, mine, device=device, report=report)
        except Enough:
            return
    raise AssertionError(f"training ended before step {steps}")


def drawn_on_device(name: str, *, vocab_size: int, device: torch.device, **_: Any) -> Any:
    """An OpenELM whose initial weights the device draws: of billions, the CPU takes minutes."""
    from llm_experiments.models.presets import build_model

    model = build_model(name, vocab_size=vocab_size, device="meta").to_empty(device=device)
    with torch.no_grad():
        for module in model.modules():
            model._init_weights(module)
    return model


def measure_training(
    settings: Settings, record: Record, name: str, grid: Any, **changes: Any
) -> None:
    """Step time, tokens a second, the share of the card's matrix rate, and peak memory."""
    from llm_experiments.configs import RunConfig
    from llm_experiments.plan import plan

    device = torch.device(settings.device)
    training = replace(grid.training, **changes)
    config = RunConfig(**asdict(training), model=grid.models[0], weight_decay=0.1)
    corpus = zipf_corpus(settings.vocab_size, 2048, grid.data.context)
    rate = matrix_rate(settings, HALVES[config.precision])
    work = plan([replace(grid, training=training)])[0]
    peak_gib(device)
    begin, marks = time.perf_counter(), []

    def watch(step: int) -> None:
        if step == 1:
            if device.type == "cuda":
                torch.cuda.synchronize()
            record.figure(f"{name}: seconds to the end of step 1", time.perf_counter() - begin)
        if step >= settings.warm_up:
            marks.append(moment(device))

    run_steps(config, corpus, device, settings.warm_up + settings.steps, watch)
    times = intervals(marks)
    seconds = statistics.mean(times) / 1e3
    record.figure(f"{name}: step", times)
    record.figure(f"{name}: tokens/s", work.tokens / training.steps / seconds)
    record.figure(f"{name}: share of the matrix rate", work.flops / training.steps / seconds / rate)
    record.figure(f"{name}: peak memory, GiB", peak_gib(device))
    record.figure(f"{name}: parameters", work.parameters)


def matrix_rate(settings: Settings, half: torch.dtype | None) -> float:
    """FLOP/s of a product of two large square random matrices, its mean time taken."""
    device, size = torch.device(settings.device), settings.matrix
    left, right = (
        torch.randn(size, size, device=device, dtype=half or torch.float32) for _ in range(2)
    )
    seconds = statistics.mean(timed(lambda: left @ right, device, 5, 10)) / 1e3
    return 2 * size**3 / seconds


def rates(settings: Settings, record: Record) -> None:
    """What the card gives: matrix products, that of the classifier too, and copies."""
    device = torch.device(settings.device)
    for precision, half in HALVES.items():
        name = f"{precision} product of {settings.matrix}^2 matrices, TFLOP/s"
        record.figure(name, matrix_rate(settings, half) / 1e12)
    tokens, width = settings.head_tokens, settings.head_width
    features = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    for rows in (settings.vocab_size, math.ceil(settings.vocab_size / 64) * 64):
        weight = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
        logits = features @ weight.T
        for what, product in (
            ("logits", lambda weight=weight: features @ weight.T),
            ("gradient of features", lambda weight=weight, logits=logits: logits @ weight),
            ("gradient of classifier", lambda logits=logits: logits.T @ features),
        ):
            seconds = statistics.mean(timed(product, device, 3, 10)) / 1e3
            record.figure(
                f"bf16 {what}, V = {rows}, TFLOP/s", 2 * tokens * rows * width / seconds / 1e12
            )
    source = torch.rand(4 * settings.matrix**2, device=device)
    target = torch.empty_like(source)
    seconds = statistics.mean(timed(lambda: target.copy_(source), device, 3, 10)) / 1e3
    record.figure("copy, TB/s read and written", 8 * source.numel() / seconds / 1e12)


def eager(settings: Settings, record: Record) -> None:
    """Both half precisions without torch.compile, and what the token metrics cost."""
    grid = published(settings)
    for precision in ("bf16", "fp16"):
        measure_training(settings, record, precision, grid, precision=precision, compile=False)
    without_metrics(settings, record, "bf16", grid, compile=False)
    measure_update(settings, record, grid)


def compiled_bf16(settings: Settings, record: Record) -> None:
    """bf16 with torch.compile, with and without token metrics."""
    grid = published(settings)
    measure_training(settings, record, "bf16", grid, precision="bf16", compile=True)
    without_metrics(settings, record, "bf16", grid, compile=True)


def compiled_fp16(settings: Settings, record: Record) -> None:
    """fp16 with torch.compile: the recipe of Table 1 as it is."""
    measure_training(settings, record, "fp16", published(settings), precision="fp16", compile=True)


def without_metrics(
    settings: Settings, record: Record, precision: str, grid: Any, *, compile: bool
) -> None:
    """The same training with metrics that look at nothing."""
    from frequency_bins import ClassMetrics

    class Blind(ClassMetrics):
        def update(self, *args: Any, **kwargs: Any) -> None:
            pass

    with mock.patch("llm_experiments.training.loop.ClassMetrics", Blind):
        name = f"{precision} without token metrics"
        measure_training(settings, record, name, grid, precision=precision, compile=compile)


def measure_update(settings: Settings, record: Record, grid: Any) -> None:
    """The metrics of a batch by themselves."""
    from frequency_bins import ClassMetrics

    device = torch.device(settings.device)
    ids = zipf_tokens(settings.vocab_size, grid.training.batch_size, grid.data.context - 1)
    target = torch.from_numpy(ids.astype(np.int64)).flatten().to(device)
    loss = torch.rand(target.shape, device=device)
    metrics, correct = ClassMetrics(settings.vocab_size, device), loss < 0.3
    times = timed(lambda: metrics.update(loss, target, correct), device, 5, 50)
    record.figure("one update of the token metrics", times)


def peer(settings: Settings, record: Record) -> None:
    """The step of transformers' Trainer, without and with the dictionary of Algorithm 1."""
    device, grid = torch.device(settings.device), published(settings)
    model = drawn_on_device(settings.model, vocab_size=settings.vocab_size, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.1, fused=True)
    ids = zipf_tokens(settings.vocab_size, 256, grid.data.context).astype(np.int64)
    batches = iter(torch.from_numpy(ids).split(grid.training.batch_size) * 100)
    metrics: dict[int, dict[str, float]] = {}

    def step(dictionary: bool) -> None:
        inputs = next(batches).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            output = model(input_ids=inputs, labels=inputs)
        if dictionary:
            fill_dictionary(metrics, output.logits.detach()[:, :-1], inputs[:, 1:])
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    tokens = grid.training.batch_size * grid.data.context
    for name, dictionary, warm_up, n in (
        ("no metrics", False, settings.warm_up, settings.steps),
        ("with the dictionary", True, 1, settings.dictionary_steps),
    ):
        times = timed(lambda dictionary=dictionary: step(dictionary), device, warm_up, n)
        record.figure(f"bf16, {name}: step", times)
        record.figure(f"bf16, {name}: tokens/s", tokens / statistics.mean(times) * 1e3)
    record.figure("peak memory, GiB", peak_gib(device))


def fill_dictionary(metrics: dict[int, dict[str, float]], logits: Tensor, labels: Tensor) -> None:
    """Algorithm 1 to the letter: a loop over tokens, a cross-entropy a token."""
    predictions = logits.argmax(-1)
    for row in range(labels.shape[0]):
        for place in range(labels.shape[1]):
            token = labels[row, place]
            loss = F.cross_entropy(logits[row, place], token)
            entry = metrics.setdefault(int(token), {"loss": 0.0, "correct": 0, "count": 0})
            entry["loss"] += loss.item()
            entry["correct"] += int(predictions[row, place] == token)
            entry["count"] += 1


def large(settings: Settings, record: Record) -> None:
    """The largest model of the study at its published batch, without torch.compile."""
    shorter = replace(settings, warm_up=2, steps=min(8, settings.steps))
    grid = published(settings, large=True)
    measure_training(shorter, record, "fp16", grid, precision="fp16", compile=False)


# ------------------------------------------------------------------------------ UFM and vision


def ufm_batch(settings: Settings, record: Record) -> None:
    """Thousands of problems at once."""
    from benchmarks.ufm_solver import batch_problem
    from ufm import solve

    solve(batch_problem(16), tolerance=1e-9, device=settings.device)
    problem = batch_problem(settings.problems)
    solution = solve(problem, tolerance=1e-9, device=settings.device, throw=False)
    certified = solution.status.count("certified")
    record.check("problems not certified to 1e-9", settings.problems - certified, 0)
    seconds = solution.stats["seconds"]
    record.check(f"{settings.problems} problems of V = 10: seconds", seconds, 10)


def ufm_vocabulary(settings: Settings, record: Record) -> None:
    """A whole vocabulary, n_c chosen so that some of its classes are learned."""
    from benchmarks.ufm_solver import vocabulary_problem
    from ufm import closed_form, solve
    from ufm.counts_file import read_counts

    if settings.counts:
        counts = read_counts(Path(settings.counts))[1]
    else:
        counts = [max(1, round(1e6 / rank)) for rank in range(1, settings.vocab_size + 1)]
    problem = vocabulary_problem(counts, settings.active)
    exact = closed_form(problem)
    record.figure("counts", settings.counts or "Zipf")
    record.figure("classes", problem.num_classes)
    record.figure("classes learned", int((~exact.collapsed).sum()))
    device = torch.device(settings.device)
    peak_gib(device)
    solution = solve(problem, width=settings.width, device=device, tolerance=1e-8, throw=False)
    record.figure("seconds", solution.stats["seconds"])
    record.figure("status", solution.status)
    record.figure("peak memory, GiB", peak_gib(device))
    gap = float(solution.certificate.gap / solution.objective)
    error = ((solution.loss.cpu() - exact.loss) / exact.loss).abs().max()
    record.check("relative gap", gap, 1e-8)
    record.check("relative error of a class's loss", float(error), 1e-6)


def vision(settings: Settings, record: Record) -> None:
    """ResNet9's full recipe, and images a second beside a plain DataLoader loop."""
    from benchmarks.vision_training import images_per_second, ours, plain, random_images
    from run_store import Run, attempt
    from vision_appendix.configs import DataConfig, RunConfig
    from vision_appendix.imbalanced_cifar10 import load_images
    from vision_appendix.training import train

    device = torch.device(settings.device)
    if settings.cifar10:
        data = load_images(DataConfig(dataset="cifar10", data_dir=Path(settings.cifar10)))
    else:
        data = random_images()
        pixels, labels = data.images[: settings.images], data.labels[: settings.images]
        tests = settings.images // 5
        data = replace(data, images=pixels, labels=labels)
        data = replace(data, test_images=pixels[:tests], test_labels=labels[:tests])
    data = data.to(device)
    record.figure("images", settings.cifar10 or "random: accuracy means nothing")
    seconds, accuracy, speed = {}, {}, {}
    for precision in ("bfloat16", "float32"):
        config = RunConfig(
            width=settings.image_width,
            batch_size=settings.image_batch,
            epochs=settings.epochs,
            precision=precision,
            weight_decay=5e-4,
        )
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            run = Run.create(Path(folder), asdict(config))
            with attempt(run) as mine:
                train(config, data, mine)
            seconds[precision] = time.perf_counter() - begin
            accuracy[precision] = run.scalars()[-1]["test_accuracy"]
        record.figure(
            f"{precision}: seconds of a full run, evaluations included", seconds[precision]
        )
        record.figure(f"{precision}: test accuracy", accuracy[precision])
    steps = settings.warm_up + settings.steps
    for name, loop in (
        ("ours", ours(config, data, steps)),
        ("plain DataLoader loop", plain(config, data, steps, settings.workers)),
    ):
        speed[name] = images_per_second(loop, config, device, settings.warm_up)
        record.figure(f"float32: images/s, {name}", speed[name])
    if device.type == "cuda":
        ratio = speed["ours"] / speed["plain DataLoader loop"]
        vision_targets(record, seconds, accuracy if settings.cifar10 else {}, ratio)


def vision_targets(
    record: Record, seconds: dict[str, float], accuracy: dict[str, float], ratio: float
) -> None:
    """On a GPU: 94 % of CIFAR-10, in 15 s at the faster precision, 5 times the plain loop."""
    for precision, found in accuracy.items():
        record.check(f"{precision}: test error", 1 - found, 0.06)
    record.check("seconds of a full run at the faster precision", min(seconds.values()), 15)
    record.check("images/s of the plain DataLoader loop over ours", 1 / ratio, 1 / 5)


# ------------------------------------------------------------------------------------- the run


# In this order, with the seconds that each may take: more than fit the minutes of them all, so that
# --parts gives a part that was cut short its whole time.
PARTS: dict[str, tuple[Callable[[Settings, Record], None], float]] = {
    "checks_of_the_parts": (checks_of_the_parts, 60),
    "checks_of_training": (checks_of_training, 90),
    "checks_of_ufm": (checks_of_ufm, 60),
    "rates": (rates, 40),
    "compiled_bf16": (compiled_bf16, 180),
    "eager": (eager, 90),
    "peer": (peer, 60),
    "large": (large, 90),
    "ufm_batch": (ufm_batch, 60),
    "vision": (vision, 150),
    "compiled_fp16": (compiled_fp16, 120),
    "ufm_vocabulary": (ufm_vocabulary, 400),
}

# Imported once for all parts.
PRELOAD = ["llm_experiments.models.openelm", "llm_experiments.training.loop", "scipy.optimize"]


def work(name: str, settings: Settings, path: Path) -> None:
    """A part, in a process of its own."""
    if settings.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    record = Record(path)
    try:
        PARTS[name][0](settings, record)
    except Exception as error:  # whatever it is, the other parts go on
        lines = str(error).strip().splitlines()
        record.end("failed", error=f"{type(error).__name__}: {lines[0] if lines else ''}")
        raise
    record.end("ok")


def attempt(name: str, settings: Settings, limit: float) -> dict[str, Any]:
    """What a part measured within its time, and how it ended."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        process = multiprocessing.get_context("forkserver").Process(
            target=work, args=(name, settings, path)
        )
        process.start()
        process.join(limit)
        outcome: dict[str, Any] = {}
        if process.is_alive():
            process.kill()
            process.join()
            outcome = {"status": "out of time", "error": f"stopped after {limit:.0f} s"}
        found = json.loads(path.read_text()) if path.exists() else {"figures": {}, "checks": {}}
    if not outcome and found.get("status") not in ("ok", "failed"):
        error = f"its process died (exit code {process.exitcode})"
        outcome = {"status": "failed", "error": error}
    return found | outcome | {"seconds": round(time.perf_counter() - begin, 1)}


def circumstances(settings: Settings) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": version("transformers"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings),
    }


def lines_of(name: str, part: dict[str, Any]) -> list[str]:
    """A part as rows of the table."""
    lines = [f"{name}: {part['status']}, {part['seconds']} s"]
    if "error" in part:
        lines.append(f"    {part['error']}")
    for check, result in part["checks"].items():
        verdict = "held" if result["held"] else "BROKEN"
        numbers = f"{result['found']:.2e} (limit {result['limit']:.2e})"
        lines.append(f"    {check:66s} {numbers} {verdict}")
    lines += [f"    {figure:66s} {shown(value)}" for figure, value in part["figures"].items()]
    return lines


def shown(value: Any) -> str:
    """A figure for the reader."""
    if isinstance(value, dict):
        spread = "" if value["std_ms"] is None else f" ± {value['std_ms']:.3f}"
        return f"{value['mean_ms']:.3f}{spread} ms (n = {value['n']})"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("gpu-results"))
    parser.add_argument("--cifar10", default="", help="folder of CIFAR-10; without, random images")
    parser.add_argument("--counts", default="", help="counts of a vocabulary; without, Zipf's")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9.5, help="of all parts together")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args(arguments)
    settings = replace(
        DRY if options.dry_run else Settings(), cifar10=options.cifar10, counts=options.counts
    )
    if options.dry_run:
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
    deadline = time.monotonic() + 60 * options.minutes
    results = {**circumstances(settings), "parts": {}}
    if results["gpu"] is None and not options.dry_run:
        print("error: this machine has no usable GPU; expected one, or --dry-run", file=sys.stderr)
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    for name in options.parts:
        limit = min(PARTS[name][1], deadline - time.monotonic())
        if limit > 5:
            part = attempt(name, settings, limit)
        else:
            part = {"status": "skipped", "error": "no time left", "seconds": 0.0}
            part |= {"figures": {}, "checks": {}}
        results["parts"][name] = part
        print(f"{name}: {part['status']} after {part['seconds']} s", flush=True)
        (options.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print()
    print(", ".join(f"{key} {results[key]}" for key in ("gpu", "torch", "cuda", "python", "date")))
    for name, part in results["parts"].items():
        print("\n".join(lines_of(name, part)))
    print(f"figures: {options.folder / 'results.json'}")
    parts = results["parts"].values()
    held = all(check["held"] for part in parts for check in part["checks"].values())
    return 0 if held and all(part["status"] == "ok" for part in parts) else 1
