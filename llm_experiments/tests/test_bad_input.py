"""Bad input: one clear line with the value and what was expected, exit code 2, nothing left."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_experiments.__main__ import main

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
        (["sweep", "--label-smoothing", "-0.1"], ["label_smoothing", "-0.1", "at least 0"]),
        (["sweep", "--device", "tpu"], ["tpu", "cuda"]),
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
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for word in expected:
        assert word.lower() in lines[0].lower()
    assert list(tmp_path.iterdir()) == []


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
