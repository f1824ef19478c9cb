"""Benchmarks on a CPU: the GPU's checks hold, and one part that fails stops no other."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import checks, images, language, theory
from benchmarks.gpu.parts import DRY, Record, Settings

BENCHMARKS = Path(language.__file__).parents[1]


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_a_benchmark_finds_what_it_imports(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("part", [checks.checks_of_the_parts, theory.checks_of_ufm, language.rates])
def test_a_part_on_the_cpu(part: Callable[[Settings, Record], None], tmp_path: Path) -> None:
    record = Record(tmp_path / "record.json")
    part(replace(DRY, head_tokens=600, tiny_vocab=300), record)
    record.end("ok")
    written = json.loads((tmp_path / "record.json").read_text())
    assert written["status"] == "ok"
    assert all(check["held"] for check in written["checks"].values())
    assert gpu.lines_of("part", written | {"seconds": 1.0})


def test_the_targets_of_vision(tmp_path: Path) -> None:
    path = tmp_path / "record.json"

    def held(seconds: float, accuracy: float, ratio: float) -> list[bool]:
        images.vision_targets(Record(path), {"a": seconds, "b": 99.0}, {"a": accuracy}, ratio)
        return [check["held"] for check in json.loads(path.read_text())["checks"].values()]

    assert held(14.0, 0.941, 5.1) == [True, True, True]
    assert held(16.0, 0.939, 4.9) == [False, False, False]


def test_a_wrong_head_breaks_its_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = checks.head_results

    def wrong(*args: torch.Tensor, ours: bool) -> dict[str, torch.Tensor]:
        found = right(*args, ours=ours)
        return found | {"losses": found["losses"] * (1.01 if ours else 1.0)}

    monkeypatch.setattr(checks, "head_results", wrong)
    checks.checks_of_the_parts(DRY, Record(tmp_path / "record.json"))
    written = json.loads((tmp_path / "record.json").read_text())["checks"]
    broken = {name for name, check in written.items() if not check["held"]}
    assert broken == {f"head {precision}, losses: error" for precision in ("fp32", "bf16", "fp16")}


def test_parts_run_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # as main sets it, and back again
    monkeypatch.setattr(gpu, "PRELOAD", ["torch"])
    parts = ("--parts", "vision", "ufm_batch")
    code = gpu.main([str(tmp_path), "--dry-run", "--cifar10", str(tmp_path / "no"), *parts])
    results = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert code == 1
    assert results["vision"]["status"] == "failed"
    assert "holds no CIFAR-10" in results["vision"]["error"]
    assert results["ufm_batch"]["status"] == "ok"
    assert all(check["held"] for check in results["ufm_batch"]["checks"].values())
    assert "holds no CIFAR-10" in capsys.readouterr().out
