"""python -m reports build: where the page goes and what the exit code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from reports.__main__ import main
from reports.prompt import split
from reports.tests.studies import make_run
from run_store import read_study

pytestmark = pytest.mark.usefixtures("one_figure")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    make_run(tmp_path / "small", weight_decay=0.0, seed=0, vocab_size=60)
    make_run(tmp_path / "small", weight_decay=1.0, seed=0, vocab_size=60)
    return tmp_path / "small"


def test_build_writes_the_page_beside_the_runs(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(small)]) == 0
    assert capsys.readouterr().out == f"{small / 'report.html'}\n"
    assert (small / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert len(read_study(small).runs) == 2
    assert not list(small.glob(".*"))


def test_a_damaged_store_is_named_and_exits_1(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = read_study(small).runs[0].folder / "classes.nc"
    damaged.write_bytes(b"not a record")
    out = tmp_path / "page.html"
    assert main(["build", str(small), "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert damaged.parent.name in said.err
    assert damaged.parent.name in out.read_text(encoding="utf-8")
    assert damaged.read_bytes() == b"not a record"


def test_a_study_without_final_evaluations_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "s", weight_decay=0.0, seed=0, vocab_size=60, evaluate="stream")
    assert main(["build", str(tmp_path / "s")]) == 0
    page = (tmp_path / "s" / "report.html").read_text(encoding="utf-8")
    assert "run it with --evaluate final" in page
    assert "no run of this study has a final loss" in page
    assert main(["export", str(tmp_path / "s")]) == 2
    assert "no run of s has a final loss (some finished with --evaluate stream" in (
        capsys.readouterr().err
    )


def test_export_and_compare(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(small)]) == 0
    assert (small / "export" / "table_1.csv").is_file()
    make_run(tmp_path / "other", weight_decay=1.0, seed=5, vocab_size=60)
    assert main(["compare", str(small), str(tmp_path / "other")]) == 0
    assert main(["compare", str(small), str(small), "--out", str(tmp_path / "same.html")]) == 0
    page = (small / "compare-other.html").read_text(encoding="utf-8")
    assert "small: openelm-tiny" in page
    assert "other: openelm-tiny" in page
    assert 'id="table-comparison"' in page
    assert "skipped" not in capsys.readouterr().err


def test_a_prompt_is_coloured(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prompt", str(small), "--text", "token3 the電影TOKEN41"]) == 0
    assert capsys.readouterr().out == f"{small / 'prompt.svg'}\n"
    assert "<svg" in (small / "prompt.svg").read_text(encoding="utf-8")
    labels = ["a", "ab", " b", "é", "Å", "Ĥ"]  # the last two: the bytes of ł, as BPE writes them
    assert split("aAB béł", labels) == ["a", "ab", " b", "é", "Å", "Ĥ"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["build", "absent"], "absent is not a study"),
        (["build", "."], "is not a study"),
        (["build"], "no study is named"),
        (["build", "small", "small"], "--out"),
        (["build", "small", "--out", "."], "--out is ."),
        (["build", "small", "--out", "absent/page.html"], "absent/page.html"),
        (["build", "small", "--colour", "red"], "--colour"),
        (["export", "small", "--out", "small/0"], "--out is small/0"),
        (["export", "absent"], "absent is not a study"),
        (["compare", "small"], "SECOND"),
        (["prompt", "small", "--text", ""], "the text has 0 characters"),
        (["prompt", "small", "--text", "§"], "no token spells '§'"),
        (["prompt", "small", "--text", "a", "--out", "a.png"], "--out is a.png"),
        (["prompt", "small", "--text", "a", "--tokenizer", "absent"], "absent"),
        (["compare", "small", "absent"], "absent is not a study"),
    ],
)
def test_bad_input_is_one_line_and_exits_2(
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(small.parent)
    (small / "0").write_text("a file")
    before = sorted(small.parent.rglob("*"))
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert expected in said.err
    assert not said.out
    assert sorted(small.parent.rglob("*")) == before
