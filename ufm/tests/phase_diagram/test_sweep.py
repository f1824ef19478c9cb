"""A phase diagram in runs of a study: the bytes of `phase`, whatever happens on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from run_store import Run, read_study, run_id
from run_store.status import settled_states
from run_store.tests.executors.inline_pool import use_inline_pool
from ufm.__main__ import main
from ufm.phase_diagram import grid as phase
from ufm.phase_diagram import sweep as sweeps

CLASSES = tuple(range(1, 41))
GRID = ["--class-counts", *map(str, CLASSES), "--points", "50"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stem of a diagram's files, made by `phase`."""
    stem = tmp_path_factory.mktemp("whole") / "d"
    assert main(["phase", *GRID, "--output", str(stem)]) == 0
    return stem


def command(folder: Path, *more: str) -> list[str]:
    options = ["--runs-dir", str(folder), "--output", str(folder / "d"), "--blocks-per-run", "1"]
    return ["sweep", *GRID, *options, *more]


def assert_same_files(stem: Path, other: Path) -> None:
    for suffix in (".csv", ".png"):
        assert stem.with_suffix(suffix).read_bytes() == other.with_suffix(suffix).read_bytes()


def test_child_processes_make_the_bytes_of_one_process(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, "--runs-in-parallel", "1")) == 0
    assert "2 finished\n50 certified solves; 0 of 2000 cells" in capsys.readouterr().out
    assert_same_files(tmp_path / "d", whole)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "phase").rglob("*")}
    assert main(command(tmp_path)) == 0
    assert "2 finished earlier" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "phase").rglob("*")} == before
    assert main(["status", str(tmp_path / "phase")]) == 0
    shown = capsys.readouterr().out
    assert "2 runs: 2 finished" in shown
    assert "42/42" in shown
    for run in read_study(tmp_path / "phase").runs:
        assert run.classes()["class_count"].values.tolist() == list(CLASSES)
        assert run.manifest["versions"]["torch"]


def test_a_run_that_fails_is_done_again(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_inline_pool(monkeypatch)
    solve = phase.solve
    with monkeypatch.context() as broken:

        def fail_in_the_end(problem, **options):
            if len(problem.class_counts) == 8:
                raise ValueError("the machine is on fire")
            return solve(problem, **options)

        broken.setattr(phase, "solve", fail_in_the_end)
        assert main(command(tmp_path)) == 1
    assert "1 finished, 1 failed" in capsys.readouterr().out
    assert not (tmp_path / "d.csv").exists()
    (failed,) = [s for s in settled_states(tmp_path / "phase") if s.status == "failed"]
    assert failed.note == "the machine is on fire"
    assert main(["retry", str(tmp_path / "phase")]) == 0
    assert failed.run.status == "finished"
    assert main(command(tmp_path)) == 0
    assert_same_files(tmp_path / "d", whole)


def test_runs_made_before_features_could_be_shared_keep_their_ids() -> None:
    def piece(**fields: float) -> sweeps.Piece:
        grid = phase.PhaseGrid(**fields)  # type: ignore[arg-type]
        return sweeps.Piece(grid=grid, first=0, last=60, device="cpu", threads=1, command="")

    assert run_id(piece().config()) == "c6441e411ecb"
    assert run_id(piece(feature_sharing=0.5).config()) != "c6441e411ecb"


def test_a_sweep_at_a_sharing_is_retried_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_inline_pool(monkeypatch)
    shared = ["--points", "6", "--class-counts", "1", "20", "--feature-sharing", "1"]
    with monkeypatch.context() as broken:
        broken.setattr(phase, "solve", lambda problem, **options: 1 / 0)
        assert main(command(tmp_path, *shared)) == 1
    assert main(["retry", str(tmp_path / "phase")]) == 0
    assert main(command(tmp_path, *shared)) == 0
    assert main(["phase", *shared, "--output", str(tmp_path / "p")]) == 0
    assert_same_files(tmp_path / "d", tmp_path / "p")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--blocks-per-run", "0"], "blocks_per_run is 0"),
        (["--threads", "0"], "threads is 0"),
        (["--device", "moon"], "device is 'moon'"),
        (["--output", "no/such"], "expected a folder that exists"),
        (["--points", "1"], "points is 1"),
        (["--feature-sharing", "1.2"], "feature_sharing is 1.2"),
        (["--class-counts", "5"], "at least two classes"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    more: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, *more)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert named in said
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_another_kind_is_not_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.create(tmp_path / "s", {"model": "tiny"})
    monkeypatch.setattr(sweeps, "unfinished_business", lambda study: [run])
    assert main(["retry", str(tmp_path / "s")]) == 2
    assert "is no part of a phase diagram" in capsys.readouterr().err
