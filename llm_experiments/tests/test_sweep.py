"""The command line as a user has it: real processes, really killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_experiments.__main__ import main
from llm_experiments.configs import DataConfig, RunConfig, SweepConfig, TrainingConfig
from llm_experiments.models.presets import build_model
from llm_experiments.recipes import recipe
from llm_experiments.sweep import sweep
from llm_experiments.text.preparation import PreparedCorpus
from llm_experiments.training.loop import save_model
from run_store import attempt, read_study
from run_store.executors import ExecutorConfig

ROOT = Path(__file__).parents[2]


def sweep_arguments(data: DataConfig, runs_dir: Path, *more: str) -> list[str]:
    return [
        *("sweep", "--study", "s", "--runs-dir", str(runs_dir), "--cache-dir", str(data.cache_dir)),
        *("--corpus", "text", "--data-dir", str(data.data_dir), "--vocab-size", "300"),
        *("--context", "16", "--num-sequences", "24", "--batch-size", "4", "--steps", "60"),
        *("--evaluate-every", "5", "--model", "openelm-tiny", "--weight-decay", "0", "1"),
        *("--loss-weight-exponent", "0", "--runs-in-parallel", "1", *more),
    ]


def started(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "llm_experiments", *arguments],
        cwd=ROOT,
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "FREQUENCY_BINS_MOST_LOST": "0.1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def records(study: Path) -> dict[str, bytes]:
    return {run.id: (run.folder / "classes.nc").read_bytes() for run in read_study(study).runs}


@pytest.fixture(scope="module")
def undisturbed(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs_dir = tmp_path_factory.mktemp("undisturbed")
    assert main(sweep_arguments(data, runs_dir)) == 0
    return runs_dir / "s"


def test_a_killed_sweep_goes_on_to_the_same_bytes(
    data: DataConfig, tmp_path: Path, undisturbed: Path
) -> None:
    arguments = sweep_arguments(data, tmp_path)
    study = tmp_path / "s"
    for kill in (signal.SIGKILL, signal.SIGINT):
        process = started(arguments)
        before = newest_step(study)
        # Wait until a checkpoint later than any so far is there, then pull the plug.
        while runs_on(process) and newest_step(study) <= before:
            pass
        os.killpg(process.pid, kill)
        process.communicate()
    process = started(arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert records(study) == records(undisturbed)
    for run in read_study(study).runs:
        twin = undisturbed / run.id / "scalars.jsonl"
        assert [row["step"] for row in run.scalars()] == list(range(5, 61, 5))
        assert len(run.scalars()) == len(twin.read_text().splitlines())
        kept = {path.name for path in run.folder.iterdir()}
        assert kept == {"attempts", "classes.nc", "manifest.json", "scalars.jsonl"}
        left = {path.name for path in (run.folder / "attempts").glob("0*/*")}
        assert left == {"lease.json", "manifest.json"}


def runs_on(process: subprocess.Popen[str]) -> bool:
    """Whether a process still runs, having given it a moment to go on."""
    try:
        process.wait(timeout=0.1)
    except subprocess.TimeoutExpired:
        return True
    return False


def newest_step(study: Path) -> tuple[int, int]:
    """(finished runs, step of the newest checkpoint): grows as a sweep goes on."""
    # Not glob: it fails where a folder is renamed while it looks.
    names = [name for _, _, files in os.walk(study) for name in files]
    steps = [int(name.split("-")[1]) for name in names if name.startswith("checkpoint-")]
    return names.count("classes.nc"), max(steps, default=0)


def test_children_die_with_their_parent(data: DataConfig, tmp_path: Path) -> None:
    process = started(sweep_arguments(data, tmp_path, "--steps", "100000"))
    while newest_step(tmp_path) == (0, 0):
        assert runs_on(process)
    os.kill(process.pid, signal.SIGKILL)  # the parent alone: a child must notice by itself
    # The child holds our end of stderr, so this returns when it is gone.
    process.communicate(timeout=60)


def test_a_second_sweep_does_nothing(
    data: DataConfig, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    assert main(sweep_arguments(data, undisturbed.parent)) == 0
    assert "2 finished earlier" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_a_damaged_record_is_made_again(
    data: DataConfig, tmp_path: Path, undisturbed: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "s")
    damaged = next((tmp_path / "s").glob("*/classes.nc"))
    damaged.write_bytes(damaged.read_bytes()[:1000])
    assert main(sweep_arguments(data, tmp_path)) == 0
    assert records(tmp_path / "s") == records(undisturbed)


def test_a_run_that_diverges_does_not_stop_the_others(
    data: DataConfig,
    corpus: PreparedCorpus,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By a loss that is no number, and by a loss scale that no scale is small enough for.

    The latter starts from queries at 0 under a steep norm: a finite loss whose gradient is beyond
    fp16, but not beyond fp32.
    """
    model = build_model("openelm-tiny", vocab_size=corpus.vocab_size)
    with torch.no_grad():
        attention = model.base_model.layers[0].attn
        attention.qkv_proj.weight[: attention.num_q_heads * attention.head_dim] = 0
        attention.q_norm.weight.fill_(6e4)
        attention.k_norm.weight.fill_(1e4)
    save_model(model, corpus, tmp_path / "steep")
    still = TrainingConfig(steps=30, batch_size=4, evaluate_every=15, learning_rate=0)
    finishes = SweepConfig(
        study="s",
        runs_dir=tmp_path,
        models=("openelm-tiny",),
        weight_decays=(0.0,),
        training=still,
        data=replace(data, checkpoint_dir=tmp_path / "steep"),
        device="cpu",
        execution=ExecutorConfig(runs_in_parallel=1),
    )
    collapses = replace(finishes, training=replace(still, precision="fp16"))
    explodes = replace(finishes, data=data, training=replace(still, learning_rate=1e20))
    grids = (collapses, explodes, finishes)
    assert sweep(*grids) == {"finished earlier": 0, "diverged": 2, "finished": 1}
    assert sweep(*grids) == {"finished earlier": 3}
    study = read_study(tmp_path / "s")
    assert [run.config["precision"] for run in study.runs] == ["fp32"]
    said = {run.config["precision"]: run.manifest["error"] for run in study.unfinished}
    assert said["fp32"] == "the loss is nan at step 15"
    assert said["fp16"].startswith("the loss scale fell to 6.10352e-05 at step 30: gradients")
    assert not any((run.folder / "classes.nc").exists() for run in study.unfinished)
    assert main(["status", str(tmp_path / "s")]) == 0
    assert "2 diverged, 1 finished" in capsys.readouterr().out


def test_the_id_of_a_run_holds_all_that_changes_it(data: DataConfig) -> None:
    base = RunConfig().resolved(data, "hash")
    assert {field.name for field in fields(RunConfig)} - set(RunConfig.added) < set(base)
    assert "data_hash" in base
    assert not any(isinstance(value, Path) for value in base.values())


def test_no_two_runs_of_a_recipe_are_called_alike() -> None:
    for name in ("repair", "regularisers"):
        called = [cell.describe() for grid in recipe(name) for cell in grid.cells()]
        assert len(set(called)) == len(called)


def test_status_shows_every_run(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(undisturbed)]) == 0
    shown = capsys.readouterr().out
    assert "2 runs: 2 finished" in shown
    assert shown.count("60/60") == 2


def test_weight_decay_costs_the_rare_tokens_most(undisturbed: Path) -> None:
    """Too short a run to show it well; what the demo shows is in reports."""
    dataset = read_study(undisturbed).dataset()
    assert dataset["weight_decay"].values.tolist() != [0, 0]
    assert np.isfinite(dataset["final_loss"].values[:, dataset["class_count"][0] > 0]).all()


def test_retry_does_what_failed_and_nothing_else(
    data: DataConfig,
    tmp_path: Path,
    undisturbed: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(undisturbed, tmp_path / "s")
    good, bad = read_study(tmp_path / "s").runs
    manifest = json.loads((bad.folder / "manifest.json").read_text())
    # As it was before the run: created, with nothing published.
    kept = {name: manifest[name] for name in ("format_version", "run_id", "study", "config")}
    kept |= {name: manifest[name] for name in ("label", "steps", "data", "save_model")}
    for path in ("attempts", "classes.nc", "scalars.jsonl"):
        target = bad.folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    (bad.folder / "manifest.json").write_text(json.dumps(kept | {"status": "new"}))
    with pytest.raises(RuntimeError, match="the disk caught fire"), attempt(bad):
        raise RuntimeError("the disk caught fire")
    assert main(["status", str(tmp_path / "s")]) == 0
    shown = capsys.readouterr().out
    assert "1 failed, 1 finished" in shown
    assert "caught fire" in shown  # folded to the width of the screen
    before = (good.folder / "classes.nc").stat().st_mtime_ns
    assert main(["retry", str(tmp_path / "s"), "--device", "cpu"]) == 0
    assert records(tmp_path / "s") == records(undisturbed)
    assert (good.folder / "classes.nc").stat().st_mtime_ns == before
    assert main(["retry", str(tmp_path / "s")]) == 0


def test_retry_under_torchrun_says_what_to_do_instead(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["retry", str(undisturbed)]) == 2
    assert "not in 2 of torchrun" in capsys.readouterr().err
