"""Bad input: one clear line with the value and what was expected, exit code 2, nothing left."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llm_experiments.__main__ import main
from llm_experiments.configs import DataConfig, SweepConfig
from llm_experiments.sweep import create_tasks
from run_store import Run, read_study
from run_store.attempts import Attempt
from run_store.executors.tasks import Task, do

SMALL = ["sweep", "--corpus", "text", "--vocab-size", "300", "--context", "16"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["swep"], ["swep", "sweep"]),
        (["sweep", "--recipe", "fig9"], ["fig9", "demo"]),
        (["sweep", "--recipe"], ["--recipe"]),
        (["sweep", "--weight-decay", "-0.1"], ["weight_decay", "-0.1", "at least 0"]),
        (["sweep", "--weight-decay", "nan"], ["weight_decay", "nan"]),
        (["sweep", "--weight-decay", "inf"], ["weight_decay", "inf"]),
        (["sweep", "--weight-decay", "much"], ["much"]),
        (["sweep", "--weight-decay"], ["weight_decay", "at least one"]),
        (["sweep", "--model", "gpt-9"], ["gpt-9", "openelm-tiny"]),
        (["sweep", "--steps", "0"], ["steps", "0"]),
        (["sweep", "--steps", "1.5"], ["1.5"]),
        (["sweep", "--seed", "-1"], ["seed", "-1"]),
        (["sweep", "--vocab-size", "100"], ["vocab_size", "100", "261"]),
        (["sweep", "--context", "1"], ["context", "1", "2"]),
        (["sweep", "--decay", "some"], ["some"]),
        (["sweep", "--dropout", "1"], ["dropout", "1", "less than 1"]),
        (["sweep", "--beta2", "1"], ["beta2", "1", "less than 1"]),
        (["sweep", "--clip-gradient", "nan"], ["clip_gradient", "nan", "finite"]),
        (["sweep", "--schedule", "steps"], ["schedule", "steps"]),
        (["sweep", "--optimizer", "sgd"], ["decay_mode", "'decoupled'", "sgd takes 'l2'"]),
        (["sweep", "--optimizer", "sign", "--decay-mode", "l2"], ["sign takes 'decoupled'"]),
        (["sweep", "--optimizer", "sign", "--beta2", "0.9"], ["beta2", "0.9", "sign has none"]),
        (["sweep", "--optimizer", "lion", "--decay-mode", "l2"], ["lion takes 'decoupled'"]),
        (["sweep", "--optimizer", "muon", "--parallel", "fsdp"], ["muon", "fsdp", "expected ddp"]),
        (["sweep", "--optimizer", "shampoo"], ["shampoo", "muon"]),
        (["sweep", "--decay-until", "0"], ["decay_until", "0", "more than 0"]),
        (["sweep", "--decay-exponent", "nan"], ["decay_exponent", "nan", "finite"]),
        (["sweep", "--decay-exponent", "1", "--decay", "body"], ["decay_exponent", "'body'"]),
        (["sweep", "--optimizer", "adam", "--decay-exponent", "1"], ["decay_exponent", "l2"]),
        (["sweep", "--norm", "layernorm", "--model", "qwen2-tiny"], ["layernorm", "qwen2-tiny"]),
        (["sweep", "--label-smoothing", "-0.1"], ["label_smoothing", "-0.1", "at least 0"]),
        (["sweep", "--device", "tpu"], ["tpu", "cuda"]),
        (["sweep", "--device", "cuda"], ["cuda", "no usable GPU"]),
        (["sweep", "--study", "../x"], ["../x"]),
        (["sweep", "--no-such-option"], ["--no-such-option"]),
        (["sweep", "--corpus", "text"], ["--data-dir"]),
        (["sweep", "--corpus", "imdb", "--data-dir", "/nowhere"], ["/nowhere"]),
        (["train", "--weight-decay", "-2"], ["-2"]),
        (["train", "--model", "gpt-9"], ["gpt-9"]),
        (["prepare", "--corpus", "text", "--data-dir", "/nowhere"], ["/nowhere"]),
        (["status", "/nowhere"], ["/nowhere"]),
        (["status"], ["STUDY"]),
    ],
)
def test_one_line_and_exit_code_2(
    arguments: list[str],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for word in expected:
        assert word.lower() in lines[0].lower()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["loss-weight-exponent", "decay-exponent"])
def test_an_exponent_that_overflows(
    name: str, data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data.data_dir is not None
    places = ("--data-dir", str(data.data_dir), "--runs-dir", str(tmp_path / "runs"))
    cache = ("--cache-dir", str(tmp_path / "cache"))
    assert main([*SMALL, *places, *cache, f"--{name}", "1000"]) == 2
    said = f"error: {name.replace('-', '_')} is 1000; expected one whose powers float64 can hold"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_decay_that_would_turn_a_rows_sign(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data.data_dir is not None
    places = ("--data-dir", str(data.data_dir), "--runs-dir", str(tmp_path / "runs"))
    decay = ("--decay-exponent", "2", "--learning-rate", "0.5", "--weight-decay", "1")
    assert main([*SMALL, *places, "--cache-dir", str(tmp_path / "cache"), *decay]) == 2
    said = capsys.readouterr().err
    assert "decay_exponent 2 decays a row by" in said
    assert "expected less than 1" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", [b"", b"   \n\n", b"\xff\xfe text"])
def test_a_text_folder_without_text(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_bytes(content)
    runs, cache = tmp_path / "runs", tmp_path / "cache"
    paths = ["--data-dir", str(folder), "--runs-dir", str(runs), "--cache-dir", str(cache)]
    assert main([*SMALL, *paths]) == 2
    assert "error: " in capsys.readouterr().err
    assert not runs.exists()
    assert not cache.exists()


@pytest.mark.parametrize("option", ["--runs-dir", "--cache-dir"])
def test_an_output_folder_that_cannot_be_written(
    tmp_path: Path, text_folder: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    paths = {"--runs-dir": tmp_path / "runs", "--cache-dir": tmp_path / "cache"}
    paths[option] = tmp_path / "file" / "below"
    given = [word for name, path in paths.items() for word in (name, str(path))]
    assert main([*SMALL, "--num-sequences", "24", "--data-dir", str(text_folder), *given]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert str(tmp_path / "file") in error
    assert (tmp_path / "file").read_text() == "in the way"


def more_than_there_is(attempt: Attempt, argument: object) -> None:
    torch.empty(2**50)


def test_out_of_memory_says_which_setting_to_lower(tmp_path: Path) -> None:
    run = Run.create(tmp_path, {"model": "m"})
    task = Task(folder=run.folder, work=more_than_there_is, argument=None, steps=1, label="m")
    outcome = do(task)
    assert (outcome.status, outcome.is_users) == ("failed", True)
    assert outcome.error.startswith("out of memory: lower --batch-size")
    assert len(outcome.error.splitlines()) == 1
    assert run.status == "failed"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk))
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(("umount", "--lazy", str(disk)), check=True)


@pytest.mark.parametrize("option", ["--runs-dir", "--cache-dir"])
def test_a_full_disk_leaves_nothing_half_written(
    small_disk: Path,
    tmp_path: Path,
    text_folder: Path,
    option: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = {"--runs-dir": tmp_path / "runs", "--cache-dir": tmp_path / "cache"}
    paths[option] = small_disk / "here"
    # Of the runs' disk, there is room for the manifests alone.
    room = 16_384 if option == "--runs-dir" else 0
    with contextlib.suppress(OSError), (small_disk / "filling").open("wb", 0) as file:
        while True:
            file.write(b"x" * 4096)
    os.truncate(small_disk / "filling", (small_disk / "filling").stat().st_size - room)
    given = [word for name, path in paths.items() for word in (name, str(path))]
    size = ["--num-sequences", "24", "--steps", "4", "--batch-size", "2", "--evaluate-every", "1"]
    one = ["--model", "openelm-tiny", "--weight-decay", "0", "--loss-weight-exponent", "0"]
    assert main([*SMALL, *size, *one, "--data-dir", str(text_folder), *given]) != 0
    said = capsys.readouterr()
    assert "No space left on device" in said.err + said.out
    assert str(small_disk) in said.err + said.out
    left = [path.name for path in paths[option].rglob("*")] if paths[option].exists() else []
    assert not [name for name in left if "partial" in name or name == "classes.nc"]
    if (tmp_path / "runs").exists() or option == "--runs-dir":
        study = paths["--runs-dir"] / "demo-text"
        assert not study.exists() or not read_study(study).runs


def test_a_changed_corpus_is_another_run(tmp_path: Path, text_folder: Path) -> None:
    """So nothing is added to a run of the old text, finished or not."""
    shutil.copytree(text_folder, tmp_path / "text")
    text = {"corpus": "text", "data_dir": tmp_path / "text", "vocab_size": 300, "context": 16}
    grid = SweepConfig(
        study="s",
        runs_dir=tmp_path / "runs",
        models=("openelm-tiny",),
        weight_decays=(0.0,),
        data=DataConfig(**text, cache_dir=tmp_path / "cache"),
    )
    (old,) = create_tasks(grid)
    before = (old.folder / "manifest.json").read_bytes()
    with (tmp_path / "text/part-0.txt").open("a") as file:
        file.write("\n\nanother paragraph, written afterwards, of a few words more")
    (new,) = create_tasks(grid)
    assert new.folder != old.folder
    hashes = {Run(task.folder).config["data_hash"] for task in (old, new)}
    assert len(hashes) == 2
    assert (old.folder / "manifest.json").read_bytes() == before
