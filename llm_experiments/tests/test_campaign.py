"""The campaign: the order of its runs, what it leaves out, and how it ends."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import campaign
from reports.reading import collect
from run_store.tests.executors.inline_pool import use_inline_pool


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Of a dry run whose corpus is this file."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(Path(__file__).read_text())
    folders = {"imdb": "text", "runs": "runs", "out": "small", "cache": "cache"}
    paths = [part for name, path in folders.items() for part in (f"--{name}", str(tmp_path / path))]
    return ["1", "--dry-run", *paths]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of text and two of images are all that is wanted."""
    whole = campaign.grids

    def two_grids(options: Any) -> list[Any]:
        texts, images, *_ = whole(options)
        texts = replace(texts, weight_decays=texts.weight_decays[:2], seeds=(0,))
        return [texts, replace(images, imbalances=("paper",), weight_decays=(0.0, 0.01))]

    monkeypatch.setattr(campaign, "grids", two_grids)
    use_inline_pool(monkeypatch)


def test_the_most_telling_runs_come_first() -> None:
    options = campaign.parser().parse_args(["60"])
    table1, images, *others, repair = campaign.grids(options)
    first = [(cell.weight_decay, cell.seed) for cell in table1.cells()[:6]]
    assert first == [(1.0, 0), (0.0, 0), (0.3, 0), (0.1, 0), (0.5, 0), (1.0, 1)]
    assert (table1.study, images.study) == ("table1", "figure9")
    assert (len(table1.cells()), len(images.cells())) == (25, 50)
    assert [other.models[0] for other in others] == ["qwen2-0.5b", "qwen2-1.5b", "openelm-3b"]
    assert [cell.loss_weight_exponent for cell in repair.cells()] == [0.25, 0.5]


@pytest.mark.usefixtures("short")
def test_what_has_a_small_file_is_not_done_again(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert campaign.main(arguments) == 0
    assert "4 finished" in capsys.readouterr().out
    small = tmp_path / "small"
    assert [len(list((small / study).glob("*.json"))) for study in ("table1", "figure9")] == [2, 2]
    (group,) = collect([small / "figure9"]).groups
    assert group["test_accuracy"].notnull().all()
    next((small / "table1").glob("*.json")).unlink()
    elsewhere = [*arguments, "--runs", str(tmp_path / "other")]
    assert campaign.main(elsewhere) == 0
    assert "other: 1 finished" in capsys.readouterr().out


@pytest.mark.usefixtures("short")
def test_data_that_are_not_there_leave_out_their_runs_alone(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere(data: object) -> None:
        raise OSError("no such archive")

    monkeypatch.setattr(campaign, "load_images", nowhere)
    assert campaign.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "figure9 is left out: no such archive" in printed
    assert "2 finished" in printed
    monkeypatch.setattr(campaign, "prepare", nowhere)
    with pytest.raises(ValueError, match="the data of no grid"):
        campaign.main(arguments)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("is_ours", [True, False])
def test_time_that_is_up_is_no_failure_and_keeps_what_is_finished(
    is_ours: bool, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_work(*_: Any, **__: Any) -> dict[str, int]:
        if not is_ours:
            os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
        raise AssertionError("it went on")

    kept: list[object] = []
    monkeypatch.setattr(campaign, "sweep_by", at_work)
    monkeypatch.setattr(campaign, "keep", lambda *_: kept)
    arguments[0] = "0.001" if is_ours else "10"
    if is_ours:
        assert campaign.main(arguments) == 0
    else:
        with pytest.raises(SystemExit, match="143"):
            campaign.main(arguments)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("more", "said"), [(["0.5"], "minutes is 0.5"), (["nan"], "minutes is nan"), (["5"], "cuda")]
)
def test_bad_input_is_one_line(more: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        campaign.main(more)
