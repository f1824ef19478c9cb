"""Benchmarks on a CPU: the GPU's checks hold, and one part that fails stops no other."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import select
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import vision_training
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import checks, images, language, theory
from benchmarks.gpu.parts import DRY, Record, Settings, attempt, write
from llm_experiments.configs import RunConfig

WAITED = "called a synchronizing CUDA operation"  # torch's c10/cuda/CUDAFunctions.cpp
BENCHMARKS = Path(language.__file__).parents[1]


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_a_benchmark_finds_what_it_imports(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A results.json without parts."""
    path = tmp_path / "results.json"
    write(path, {"parts": {}})
    return path


def written(results: Path) -> dict[str, Any]:
    """What the one part that was recorded has on disk."""
    (part,) = json.loads(results.read_text())["parts"].values()
    return part


@pytest.mark.parametrize(
    "part",
    [
        checks.checks_of_the_parts,
        theory.checks_of_ufm,
        language.rates,
        language.checkpoints,
    ],
)
def test_a_part_on_the_cpu(part: Callable[[Settings, Record], None], results: Path) -> None:
    record = Record(results, "part")
    part(replace(DRY, head_tokens=600, tiny_vocab=300), record)
    record.end(status="ok", seconds=1.0)
    assert written(results)["status"] == "ok"
    assert all(check["held"] for check in written(results)["checks"].values())
    assert gpu.lines_of("part", written(results))


@pytest.mark.parametrize(
    ("accuracy", "seconds", "speed", "held"), [(0.941, 14, 5.1, True), (0.939, 16, 4.9, False)]
)
def test_the_targets_of_vision(
    accuracy: float,
    seconds: float,
    speed: float,
    held: bool,
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is checked as soon as its figure is known, those of the recipe before the plain loop."""

    @contextlib.contextmanager
    def run(config: dict[str, Any]) -> Iterator[object]:
        shifted = accuracy + (config["seed"] - 2) / 1000 * config["compile"]  # of 5 seeds
        yield SimpleNamespace(run=SimpleNamespace(scalars=lambda: [{"test_accuracy": shifted}]))

    def images_per_second(loop: str, *_: object) -> float:
        known.append(sorted(written(results)["checks"]))
        return {"ours": speed, "plain": 1.0}[loop]

    known: list[list[str]] = []
    ours_or_plain = {name: lambda *_, name=name: name for name in ("ours", "plain")}
    fakes = ours_or_plain | {"images_per_second": images_per_second, "temporary_attempt": run}
    fakes |= {name: lambda *_: mock.MagicMock() for name in ("load_images", "train")}
    fakes["time"] = SimpleNamespace(perf_counter=itertools.count(step=seconds).__next__)
    for name, fake in fakes.items():
        monkeypatch.setattr(images, name, fake)
    settings = replace(DRY, device=torch.device("cuda"), cifar10="folder")
    images.vision(settings, Record(results, "vision"))
    errors = [f"{how}: test error" for how in ("bfloat16, compiled", "bfloat16", "float32")]
    assert known == 2 * [[*errors, "seconds of a full run in the fastest way"]]
    assert [check["held"] for check in written(results)["checks"].values()] == 5 * [held]
    figures = written(results)["figures"]
    name = "bfloat16, compiled: test accuracy"
    assert figures[f"{name}, mean of seeds"] == pytest.approx(accuracy)
    assert figures[f"{name}, std"] == pytest.approx(0.001 * 2.5**0.5)
    assert figures["bfloat16, compiled, seed 4: test accuracy"] == pytest.approx(accuracy + 0.002)


def test_no_worker_of_the_plain_loop_is_sent_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """As each would be with the start method that a part finds."""

    def refuse(images: object, protocol: int) -> None:
        raise AssertionError("pickled")

    monkeypatch.setattr(vision_training.PlainImages, "__reduce_ex__", refuse)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        config = vision_training.RunConfig(width=1, batch_size=10)
        loop = vision_training.plain(config, vision_training.random_images(40), 3, workers=1)
        assert len(list(loop)) == 3
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_a_wrong_head_breaks_its_check(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = checks.head_results

    def wrong(*args: torch.Tensor, ours: bool) -> dict[str, torch.Tensor]:
        found = right(*args, ours=ours)
        return found | {"losses": found["losses"] * (1.01 if ours else 1.0)}

    monkeypatch.setattr(checks, "head_results", wrong)
    checks.checks_of_the_parts(DRY, Record(results, "head"))
    broken = {name for name, check in written(results)["checks"].items() if not check["held"]}
    assert broken == {f"head {precision}, losses: error" for precision in ("fp32", "bf16", "fp16")}


@pytest.mark.skipif(
    not hasattr(torch._C, "_cuda_set_sync_debug_mode"), reason="torch is built without CUDA"
)
def test_what_the_host_waits_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own notice of the mode is none of it, and a wait outside the step neither."""

    def steps(config: object, corpus: object, device: object, last: int, watch: Any) -> None:
        for step in range(1, last + 1):
            if torch.cuda.get_sync_debug_mode():
                warnings.warn(WAITED, stacklevel=1)
            watch(step)

    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(checks, "run_steps", steps)
    torch.set_warn_always(True)
    try:
        calls = checks.host_waits(RunConfig(), SimpleNamespace(), torch.device("cuda"))
    finally:
        torch.set_warn_always(False)
    assert [call.rpartition(":")[0] for call in calls] == [__file__]


def leaves_a_worker(settings: Settings, record: Record) -> None:
    """A part whose worker sleeps for ever and holds a pipe open, as a DataLoader's holds stdout."""
    os.open(settings.cifar10, os.O_WRONLY)
    worker = os.fork()
    if not worker:
        while True:
            signal.pause()
    record.figure("worker", worker)
    how, parent = settings.counts.split()
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "interrupts":
        os.kill(int(parent), signal.SIGINT)
    while how != "returns":
        signal.pause()


@pytest.mark.parametrize("how", ["sleeps", "interrupts", "dies", "returns"])
def test_a_part_ends_with_all_that_it_started(how: str, results: Path) -> None:
    pipe = results.with_name("pipe")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    settings = replace(DRY, cifar10=str(pipe), counts=f"{how} {os.getpid()}")
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    # What a shell starts in the background ignores it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    for limit in (0.5, 5, 50):  # the first in which this machine comes as far as the worker
        with contextlib.suppress(KeyboardInterrupt):
            attempt(__name__, "leaves_a_worker", settings, limit, results)
        in_time = how == "sleeps" or written(results)["status"] != "out of time"
        if in_time and "worker" in written(results)["figures"]:
            break
    signal.signal(signal.SIGINT, handler)
    status = {"sleeps": "out of time", "interrupts": "running", "dies": "failed"}
    assert written(results)["status"] == status.get(how, "ok")
    ended, _, _ = select.select([reader], [], [], 10)
    if not ended:
        os.kill(written(results)["figures"]["worker"], signal.SIGKILL)
    assert ended
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_parts_run_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # as main sets it, and back again
    monkeypatch.setattr(gpu, "PRELOAD", ["torch"])
    parts = ("--parts", "vision", "ufm_batch")
    code = gpu.main([str(tmp_path), "--dry-run", "--cifar10", str(tmp_path / "no"), *parts])
    path = tmp_path / "results.json"
    results = json.loads(path.read_text())["parts"]
    assert code == 1
    assert results["vision"]["status"] == "failed"
    assert "holds no CIFAR-10" in results["vision"]["error"]
    assert results["ufm_batch"]["status"] == "ok"
    assert all(check["held"] for check in results["ufm_batch"]["checks"].values())
    assert "holds no CIFAR-10" in capsys.readouterr().out


def test_a_second_call_keeps_the_parts_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(
        call: int, module: str, name: str, settings: Settings, limit: float, path: Path
    ) -> Any:
        record = Record(path, name)
        record.figure("call", call)
        record.end(status="ok", seconds=1.0)
        return record.part

    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # as main sets it, and back again
    for call, parts in ((1, ("eager", "rates")), (2, ("rates", "vision"))):
        monkeypatch.setattr(gpu, "attempt", partial(attempt, call))
        assert gpu.main([str(tmp_path), "--dry-run", "--parts", *parts]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    calls = {name: part["figures"]["call"] for name, part in results["parts"].items()}
    assert calls == {"eager": 1, "rates": 2, "vision": 2}
    write(tmp_path / "results.json", results | {"torch": "1.0"})
    with pytest.raises(ValueError, match=r"results.json: torch was 1.0; expected"):
        gpu.main([str(tmp_path), "--dry-run", "--parts", "rates"])
    assert json.loads((tmp_path / "results.json").read_text())["torch"] == "1.0"
