"""train, sweep and plan as a user types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from run_store import Run, read_study
from run_store.tests.executors.inline_pool import use_inline_pool
from vision_appendix import sweep as sweeps
from vision_appendix.__main__ import main
from vision_appendix.recipes import RECIPES

TINY = ["--epochs", "2", "--width", "2", "--batch-size", "32"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_plan_sweep_and_sweep_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = [*TINY, "--weight-decay", "0", "0.5", "--seed", "0"]
    grid += ["--runs-dir", str(tmp_path), "--study", "s"]
    assert main(["plan", *grid]) == 0
    out = capsys.readouterr().out
    assert "exponential:0.1, weight decay 0.5, seed 0" in out
    assert "4 runs" in out
    assert list(tmp_path.iterdir()) == []
    assert main(["sweep", *grid]) == 0
    assert "4 finished" in capsys.readouterr().out
    before = files(tmp_path)
    assert main(["sweep", *grid]) == 0
    assert "4 finished earlier" in capsys.readouterr().out
    assert files(tmp_path) == before
    assert main(["plan", *grid]) == 0
    assert "0 s of training steps yet to do" in capsys.readouterr().out
    study = read_study(tmp_path / "s")
    assert len(study.runs) == 4
    assert not study.problems
    configs = [run.config for run in study.runs]
    assert {(sum(c["class_counts"]), c["weight_decay"]) for c in configs} == {
        (n, w) for n in (450, 461) for w in (0, 0.5)
    }
    manifest = study.runs[0].manifest
    assert manifest["parameters"] > 0
    assert manifest["versions"]["torch"]
    assert manifest["command"]


@pytest.mark.parametrize(
    ("options", "study"),
    [([], "digits"), (["--shuffle-classes"], "digits-shuffled"),
     (["--shuffle-classes", "--study", "mine"], "mine"),
     (["--recipe", "figure9", "--shuffle-classes"], "figure9-shuffled")],
)  # fmt: skip
def test_shuffled_classes_are_a_study_of_their_own(
    monkeypatch: pytest.MonkeyPatch, options: list[str], study: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(sweeps, "sweep", lambda config: asked.append(config.study) or {})
    main(["sweep", *options])
    assert asked == [study]


def test_train_does_one_run_with_its_own_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = [str(n) for n in range(3, 13)]
    where = ["--runs-dir", str(tmp_path), "--seed", "3", "--shuffle-classes"]
    assert main(["train", *TINY, *where, "--class-counts", *counts]) == 0
    (run,) = read_study(tmp_path / "single").runs
    assert sorted(run.config["class_counts"]) == list(range(3, 13))
    assert run.config["class_counts"] != list(range(3, 13))
    assert run.config["imbalance"] == "counts"
    assert run.classes()["class_count"].values.tolist() == run.config["class_counts"]


@pytest.mark.parametrize("command", ["train", "sweep", "plan"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--class-counts", "1", "2"], "2 numbers; expected 10"),
        (["--class-counts", *["500"] * 10], "500 images of class '0'; expected at most 118"),
        (["--class-counts", *["0"] * 10], "class count is 0; expected at least 1"),
        (["--imbalance", "linear:2"], "imbalance 'linear:2' is unknown"),
        (["--weight-decay", "-1"], "weight_decay is -1.0"),
        (["--weight-decay", "nan"], "weight_decay is nan"),
        (["--data-dir", "/nowhere"], "/nowhere holds no CIFAR-10"),
        (["--dataset", "digits", "--data-dir", "/nowhere"], "expected none with dataset digits"),
        (["--epochs", "0"], "epochs is 0"),
        (["--epochs", "many"], "'many'"),
        (["--device", "tpu"], "'tpu'"),
        (["--crop-padding", "8"], "crop_padding is 8"),
        (["--recipe", "imagenet"], "'imagenet' is unknown; expected one of digits, figure9"),
        (["--study", "../x"], "'../x' is not a plain folder name"),
        (["--momentum", "1"], "momentum is 1.0"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    command: str,
    options: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([command, "--runs-dir", str(tmp_path / "runs"), *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert not (tmp_path / "runs").exists()


def test_unknown_commands_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["swep"]) == 2
    assert "expected one of train, sweep, status, retry, plan" in capsys.readouterr().err
    assert main([]) == 0
    assert "train | sweep | status | retry | plan" in capsys.readouterr().out


def test_an_unwritable_place_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("")
    assert main(["sweep", *TINY, "--runs-dir", str(tmp_path / "runs")]) == 2
    assert "runs" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_distinct(name: str) -> None:
    cells = RECIPES[name]().cells()
    assert len(cells) == len(set(cells)) > 1
    names = {cell.imbalance.partition(":")[0] for cell in cells}
    assert len(names) == 2
    assert "balanced" in names


def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    def command(study: str) -> list[str]:
        grid = ["--imbalance", "paper", "--weight-decay", "0", "0.1", "--epochs", "12"]
        size = ["--width", "2", "--batch-size", "32", "--evaluate-every", "1"]
        where = ["--runs-dir", str(tmp_path), "--study", study]
        return [sys.executable, "-m", "vision_appendix", "sweep", *grid, *size, *where]

    root = Path(__file__).parents[2]
    process = subprocess.Popen(command("killed"), cwd=root, stderr=subprocess.PIPE)
    with process:
        while not list(tmp_path.glob("killed/*/attempts/*/checkpoint-*.pt")):
            with pytest.raises(subprocess.TimeoutExpired):  # it must not end before
                process.wait(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert main(command("killed")[3:]) == 0
    assert main(command("whole")[3:]) == 0
    for run in read_study(tmp_path / "whole").runs:
        other = Run(tmp_path / "killed" / run.id)
        for name in ("classes.nc", "last_layer.safetensors"):
            assert (other.folder / name).read_bytes() == (run.folder / name).read_bytes()
        assert json.loads((other.folder / "manifest.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    "counts",
    [
        ["--imbalance", "paper"],
        ["--imbalance", "paper", "--shuffle-classes"],
        ["--class-counts", *map(str, range(3, 13)), "--shuffle-classes"],
    ],
)
def test_retry_does_what_failed(
    counts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_inline_pool(monkeypatch)
    arguments = ["sweep", "--runs-dir", str(tmp_path), "--study", "s", *counts, *TINY]
    arguments += ["--epochs", "1", "--weight-decay", "0", "--seed", "3"]
    with monkeypatch.context() as broken:
        broken.setattr(sweeps, "train", lambda *_, **__: 1 / 0)
        assert main(arguments) == 1
    assert "1 failed" in capsys.readouterr().out
    assert main(["status", str(tmp_path / "s")]) == 0
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert main(["retry", str(tmp_path / "s")]) == 0
    assert "1 finished" in capsys.readouterr().out
    (run,) = read_study(tmp_path / "s").runs
    assert run.manifest["attempt"] == 2
    record = run.classes()
    assert record["class_count"].values.tolist() == run.config["class_counts"]
    assert main(arguments) == 0
    assert "1 finished earlier" in capsys.readouterr().out
