"""A store from hostile hands: no path in it leads out of it, and nothing in it waits for ever."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from run_store import Run, attempt, publish, read_study
from run_store.attempts import complete
from run_store.leases import Watch, kernel_id
from run_store.status import show_status, study_states
from run_store.tests.test_runs import CONFIG, files, record

WRITTEN = ("manifest.json", "scalars.jsonl", "classes.nc")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    (folder / "inner").mkdir(parents=True)
    (folder / "precious").write_text('{"secret": 1}')
    (folder / "inner" / "precious").write_text("secret")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "study", CONFIG)
    with attempt(run) as first:
        first.append_scalars({"step": 1})
        first.publish(record())
    return run


def _linked(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def _piped(path: Path, _: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _endless(path: Path, _: Path) -> None:
    _linked(path, Path("/dev/zero"))


def _folder(path: Path, _: Path) -> None:
    path.unlink()
    path.mkdir()


def _huge(path: Path, _: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(2**40)


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("trap", [_linked, _piped, _endless, _folder, _huge])
def test_a_file_that_is_no_file_of_its_own(
    name: str, trap: Callable[[Path, Path], None], run: Run, outside: Path
) -> None:
    read = run.scalars if name == "scalars.jsonl" else run.classes
    trap(run.folder / name, outside / "precious")
    before = files(outside)
    with pytest.raises(ValueError, match=name) as caught:
        read()
    assert "secret" not in str(caught.value)
    assert len(read_study(run.folder.parent).problems) == (name != "scalars.jsonl")
    assert files(outside) == before


def test_a_run_that_is_a_link_is_a_problem(run: Run, outside: Path) -> None:
    target = outside / "inner"
    (run.folder.parent / ("0" * 12)).symlink_to(target)
    (problem,) = read_study(run.folder.parent).problems
    assert "symbolic link" in problem[1]


def _withdraw(run: Run) -> None:
    with attempt(run) as new:
        new.withdraw()


def _complete(run: Run) -> None:
    path = run.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "new"}))
    complete(run)


@pytest.mark.parametrize("name", ["..", ".", "", "../outside", "attempts", "lease.json", 7, None])
@pytest.mark.parametrize(
    ("where", "act"), [("manifest.json", _withdraw), ("attempts/0001/manifest.json", _complete)]
)
def test_names_in_a_manifest_move_and_remove_nothing_else(
    name: Any, where: str, act: Callable[[Run], None], run: Run, outside: Path
) -> None:
    path = run.folder / where
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": [name]}))
    with pytest.raises(ValueError, match="is not the name of a file"):
        act(run)
    assert len(files(outside)) == 2
    assert (run.folder / "classes.nc").exists()
    assert (run.folder / "attempts" / "0001" / "lease.json").exists()


def test_attempts_that_are_links_are_not_followed(tmp_path: Path, outside: Path) -> None:
    run = Run.create(tmp_path / "study", CONFIG)
    (run.folder / "attempts").mkdir()
    (run.folder / "attempts" / "0001").symlink_to(outside)
    before = files(outside)
    with pytest.raises(OSError, match="0001"):
        publish(run, record())
    assert files(outside) == before
    (run.folder / "attempts" / "0001").rename(run.folder / "attempts" / "0003")
    publish(run, record())
    assert files(outside) == before
    assert run.status == "finished"


def test_a_folder_of_attempts_that_is_a_link_is_refused(tmp_path: Path, outside: Path) -> None:
    run = Run.create(tmp_path / "study", CONFIG)
    (run.folder / "attempts").symlink_to(outside)
    with pytest.raises(ValueError, match="symbolic link"):
        publish(run, record())
    assert len(files(outside)) == 2


def test_a_lease_that_is_a_pipe_or_no_json_does_not_hold_anyone_up(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "study", CONFIG)
    for number, content in enumerate((None, b"", b"[]", b"[" * 2000, b'{"status": {}}'), start=1):
        lease = run.folder / "attempts" / f"{number:04d}" / "lease.json"
        lease.parent.mkdir(parents=True)
        os.mkfifo(lease) if content is None else lease.write_bytes(content)
        assert run.status == "running"
        assert run.scalars() == []
    publish(run, record())
    assert run.status == "finished"


def test_status_shows_whatever_a_store_says(
    tmp_path: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "study"
    label = "[/red] \x1b]0;title\x07 \ud800 " + "x" * 5000
    for seed, changes in enumerate(
        ({"label": label}, {"error": {"a": [1]}, "status": "failed"}, {"steps": True}, {"error": 3})
    ):
        run = Run.create(study, CONFIG | {"seed": seed})
        path = run.folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    run = Run.create(study, CONFIG | {"seed": 9, "steps": 10**19})
    lease = run.folder / "attempts" / "0001" / "lease.json"
    lease.parent.mkdir(parents=True)
    state = {"status": "running", "steps_per_second": 5e-324, "host": label[:100], "pid": []}
    lease.write_text(json.dumps(state | {"kernel": kernel_id(), "flock": False, "beat": 0}))
    (study / ("0" * 12)).symlink_to(outside)
    states = study_states(study, Watch(patience=0.0))
    assert [s.status for s in states].count("unreadable") == 1
    lease.write_text(json.dumps(state | {"kernel": kernel_id(), "flock": True}))
    assert show_status(study) == 1
    shown = capsys.readouterr().out
    assert "[/red]" in shown
    assert "\\x1b" in shown
    assert "\x1b" not in shown
    assert "x" * 900 not in shown
