"""Benchmarks on a CPU: the GPU's checks hold, and one part that fails stops no other."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import language as gpu

BENCHMARKS = Path(gpu.__file__).parents[1]


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_a_benchmark_finds_what_it_imports(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("part", ["checks_of_the_parts", "checks_of_ufm", "rates"])
def test_a_part_on_the_cpu(part: str, tmp_path: Path) -> None:
    settings = replace(gpu.DRY, head_tokens=600, tiny_vocab=300)
    record = gpu.Record(tmp_path / "record.json")
    gpu.PARTS[part][0](settings, record)
    record.end("ok")
    written = json.loads((tmp_path / "record.json").read_text())
    assert written["status"] == "ok"
    assert all(check["held"] for check in written["checks"].values())
    assert gpu.lines_of(part, written | {"seconds": 1.0})


def test_the_targets_of_vision(tmp_path: Path) -> None:
    path = tmp_path / "record.json"

    def held(seconds: float, accuracy: float, ratio: float) -> list[bool]:
        gpu.vision_targets(gpu.Record(path), {"a": seconds, "b": 99.0}, {"a": accuracy}, ratio)
        return [check["held"] for check in json.loads(path.read_text())["checks"].values()]

    assert held(14.0, 0.941, 5.1) == [True, True, True]
    assert held(16.0, 0.939, 4.9) == [False, False, False]


def test_a_wrong_head_breaks_its_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu.head_results

    def wrong(*args: torch.Tensor, ours: bool) -> tuple[torch.Tensor, ...]:
        losses, *gradients = right(*args, ours=ours)
        return losses * (1.01 if ours else 1.0), *gradients

    monkeypatch.setattr(gpu, "head_results", wrong)
    gpu.checks_of_the_parts(gpu.DRY, gpu.Record(tmp_path / "record.json"))
    checks = json.loads((tmp_path / "record.json").read_text())["checks"]
    broken = {name for name, check in checks.items() if not check["held"]}
    assert broken == {f"head {precision}, losses: error" for precision in gpu.HALVES}


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
