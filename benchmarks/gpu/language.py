"""Language models on a GPU: what the card gives, a step of `train`, and the peer's.

Models are trained by `llm_experiments.training.loop.train` itself, on the published recipes, on
random tokens with Zipf counts and from weights that the device draws; steps are timed between
events on the device, after the first ones. Times are in milliseconds: n, mean, std.
"""

from __future__ import annotations

import contextlib
import math
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.dictionary import fill_dictionary
from benchmarks.gpu.parts import Record, Settings, temporary_attempt
from benchmarks.gpu.timing import intervals, matrix_rate, mean_seconds, moment, peak_gib, timed
from frequency_bins import ClassMetrics, class_counts
from llm_experiments.configs import RunConfig, SweepConfig
from llm_experiments.models.presets import build_model
from llm_experiments.plan import plan
from llm_experiments.recipes import figure1, table1
from llm_experiments.training.loop import HALF, Progress, synchronise, train
from run_store.checkpoint_writer import CheckpointWriter


def rates(settings: Settings, record: Record) -> None:
    """What the card gives: matrix products, that of the classifier too, and copies."""
    device = settings.device
    for precision, half in HALF.items():
        rate = matrix_rate(settings.matrix, half or torch.float32, device)
        record.figure(f"{precision} product of {settings.matrix}^2 matrices, TFLOP/s", rate / 1e12)
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
            rate = 2 * tokens * rows * width / mean_seconds(product, device)
            record.figure(f"bf16 {what}, V = {rows}, TFLOP/s", rate / 1e12)
    source = torch.rand(4 * settings.matrix**2, device=device)
    target = torch.empty_like(source)
    rate = 8 * source.numel() / mean_seconds(lambda: target.copy_(source), device)
    record.figure("copy, TB/s read and written", rate / 1e12)


def eager(settings: Settings, record: Record) -> None:
    """Both half precisions without torch.compile, and what the token metrics cost."""
    bf16, fp16 = (published(settings, precision=p, compile=False) for p in ("bf16", "fp16"))
    measure_training(settings, record, bf16)
    measure_training(settings, record, fp16)
    without_metrics(settings, record, bf16)
    measure_update(settings, record, bf16)


def compiled_bf16(settings: Settings, record: Record) -> None:
    """bf16 with torch.compile, with and without token metrics."""
    grid = published(settings, precision="bf16", compile=True)
    measure_training(settings, record, grid)
    without_metrics(settings, record, grid)


def compiled_fp16(settings: Settings, record: Record) -> None:
    """fp16 with torch.compile: the recipe of Table 1 as it is."""
    measure_training(settings, record, published(settings, precision="fp16", compile=True))


def large(settings: Settings, record: Record) -> None:
    """The largest model of the study at its published batch, without torch.compile."""
    grid = published(settings, large=True, precision="fp16", compile=False)
    measure_training(replace(settings, warm_up=2, steps=min(8, settings.steps)), record, grid)


def checkpoints(settings: Settings, record: Record) -> None:
    """What two checkpoints cost, one after the other, while training goes on."""
    device, grid = settings.device, published(settings, precision="bf16", compile=False)
    config = RunConfig(**asdict(grid.training), model=grid.models[0], weight_decay=0.1)
    corpus = zipf_corpus(settings.vocab_size, 2048, grid.data.context)
    marks: list[Any] = []
    spans: list[tuple[int, int]] = []  # the first mark of each, and that at which it was whole
    begun, next_at = 0, settings.warm_up + settings.steps

    def is_due(writer: CheckpointWriter, step: int) -> bool:
        nonlocal begun, next_at
        marks.append(moment(device))
        if begun and not writer.writing:
            writer.wait()
            record.figure(f"checkpoint {len(spans) + 1}: seconds until whole", writer.seconds)
            (file,) = writer.folder.glob("checkpoint-*")
            record.figure("size of one, GB", file.stat().st_size / 1e9)
            spans.append((begun, step))
            begun, next_at = 0, step + settings.steps
        if len(spans) == 2:
            raise Enough
        if step == next_at:
            begun = step
        return step == next_at

    run_steps(config, corpus, device, config.steps, lambda step: None, is_due)
    times = intervals(marks)  # the first is that of step 2
    quiet = times[settings.warm_up : spans[0][0] - 1] + times[spans[0][1] : spans[1][0] - 1]
    record.figure("bf16, eager: step", quiet)
    for number, (first, last) in enumerate(spans, start=1):
        during = times[first - 1 : last - 1]
        record.figure(f"checkpoint {number}: steps while it is written", during)
        extra = sum(during) - len(during) * statistics.mean(quiet)
        record.figure(f"checkpoint {number}: ms of training time that it took", extra)
    record.figure("host memory at its most, GiB", resident_gib())


def resident_gib() -> float:
    """The most memory that this process has taken on the host, pinned memory included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def published(settings: Settings, *, large: bool = False, **changes: Any) -> SweepConfig:
    """The grid of Table 1, or of the largest model of Figure 1, with changes to its training."""
    grid = figure1()[-1] if large else table1()[0]
    assert grid.models == ("openelm-3b" if large else "openelm-270m",)
    batch_size = settings.batch_size or grid.training.batch_size
    changes |= {"threads": torch.get_num_threads(), "batch_size": batch_size}
    context = settings.context or grid.data.context
    data = replace(grid.data, vocab_size=settings.vocab_size, context=context)
    model = settings.large_model if large else settings.model
    return replace(grid, models=(model,), training=replace(grid.training, **changes), data=data)


def measure_training(
    settings: Settings, record: Record, grid: SweepConfig, *, named: str = ""
) -> None:
    """Step time, tokens a second, the share of the card's matrix rate, and peak memory."""
    training, device = grid.training, settings.device
    name = training.precision + named
    config = RunConfig(**asdict(training), model=grid.models[0], weight_decay=0.1)
    corpus = zipf_corpus(settings.vocab_size, 2048, grid.data.context)
    rate = matrix_rate(settings.matrix, HALF[training.precision] or torch.float32, device)
    work = plan([grid])[0]
    record.figure(f"{name}: parameters", work.parameters)
    peak_gib(device)
    begin, marks = time.perf_counter(), []

    def watch(step: int) -> None:
        if step == 1:
            synchronise(device)
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


def without_metrics(settings: Settings, record: Record, grid: SweepConfig) -> None:
    """The same training with metrics that look at nothing."""

    def blind(*_: Any, **__: Any) -> None:
        pass

    with mock.patch.object(ClassMetrics, "update", blind):
        measure_training(settings, record, grid, named=" without token metrics")


def measure_update(settings: Settings, record: Record, grid: SweepConfig) -> None:
    """The metrics of a batch by themselves."""
    device = settings.device
    ids = zipf_tokens(settings.vocab_size, grid.training.batch_size, grid.data.context - 1)
    target = torch.from_numpy(ids.astype(np.int64)).flatten().to(device)
    loss = torch.rand(target.shape, device=device)
    metrics, correct = ClassMetrics(settings.vocab_size, device), loss < 0.3
    times = timed(lambda: metrics.update(loss, target, correct), device, 5, 50)
    record.figure("one update of the token metrics", times)


class Enough(Exception):
    """Leaves a training loop when enough of its steps are timed."""


def run_steps(
    config: RunConfig,
    corpus: Any,
    device: torch.device,
    steps: int,
    watch: Callable[[int], object],
    is_due: Callable[[CheckpointWriter, int], bool] = lambda writer, step: False,
) -> None:
    """``steps`` steps of `train`, which calls ``watch`` after each of them.

    Checkpoints are taken after the steps that ``is_due`` names.
    """

    def report(progress: Progress) -> None:
        watch(progress.step)
        if progress.step == steps:
            raise Enough

    with (
        contextlib.suppress(Enough),
        mock.patch("llm_experiments.training.loop.build_model", drawn_on_device),
        mock.patch.object(CheckpointWriter, "is_due", is_due),
        temporary_attempt({}) as mine,
    ):
        train(config, corpus, mine, device=device, report=report)
        raise AssertionError(f"training ended before step {steps}")


def drawn_on_device(name: str, *, vocab_size: int, device: torch.device, **_: Any) -> Any:
    """An OpenELM whose initial weights the device draws: of billions, the CPU takes minutes."""
    model = build_model(name, vocab_size=vocab_size, device="meta").to_empty(device=device)
    with torch.no_grad():
        for module in model.modules():
            model._init_weights(module)
    return model


def zipf_tokens(vocab_size: int, sequences: int, context: int) -> np.ndarray:
    """(S, T) ids as `prepare` keeps them, special tokens left out."""
    shares = 1 / np.arange(1, vocab_size - 4)
    ids = np.random.default_rng(0).choice(
        np.arange(5, vocab_size), (sequences, context), p=shares / shares.sum()
    )
    return ids.astype(np.min_scalar_type(vocab_size - 1))


def zipf_corpus(vocab_size: int, sequences: int, context: int) -> SimpleNamespace:
    """What `train` reads of a PreparedCorpus."""
    tokens = zipf_tokens(vocab_size, sequences, context)
    return SimpleNamespace(
        tokens=tokens,
        held_out=tokens[:0],
        vocab_size=vocab_size,
        class_counts=class_counts(tokens[:, 1:], vocab_size),
        labels=tuple(map(str, range(vocab_size))),
    )


def peer(settings: Settings, record: Record) -> None:
    """The step of transformers' Trainer, without and with the dictionary of Algorithm 1."""
    device, grid = settings.device, published(settings)
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
