"""One line and exit code 2 for whatever a user can get wrong; a traceback for our own bugs."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from run_store.command_line import one_line, parse_options, run_command


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train one."""

    weight_decay: float
    model: Literal["openelm-tiny", "qwen2-tiny", "openelm-270m", "qwen2-1.5b"] = "openelm-tiny"
    steps: int = 3
    class_counts: tuple[int, ...] = ()
    data_dir: Path = Path("data")

    def __post_init__(self) -> None:
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay is {self.weight_decay}; expected " + "word " * 40)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Train many."""

    config: Train


COMMANDS = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
)
PATH = "/" + "a" * 200 + "/b"


@pytest.fixture(params=["utf-8", "ascii"])
def encoding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """tyro draws its panel with what the terminal can show."""
    monkeypatch.setattr(
        "tyro._fmtlib._should_use_utf8_drawing_chars", lambda: request.param == "utf-8"
    )


def run(argv: list[str]) -> int:
    def parse_only(argv: list[str]) -> None:
        parse_options(COMMANDS, argv, prog="python -m trainer")

    return run_command(parse_only, argv)


@pytest.mark.usefixtures("encoding")
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], ["Expected one of {train, sweep}"]),
        (["tran"], ["tran", "Available subcommands: train, sweep"]),
        (["train"], ["Missing", "--weight-decay FLOAT"]),
        (["train", "--weight-decay"], ["--weight-decay", "Expected 1 values"]),
        (["train", "--weight-decay", "much"], ["'much'", "expected --weight-decay FLOAT"]),
        (["train", "--weight-decay", "1", "--steps", "1.5"], ["'1.5'", "--steps INT"]),
        (["train", "--weight-decay", "1", "--stps", "1"], ["--stps", "--steps INT"]),
        (["train", "--weight-decay", "1", "--model", PATH], [f"'{PATH}'", "'qwen2-1.5b'"]),
        (["train", "--weight-decay", "1", "--class-counts", "1", "x"], ["'x'", "INT"]),
        (["train", "--weight-decay", "1", "--class-counts", "1", "\x1b[2J\n"], [r"\x1b[2J\n"]),
        (["train", "--weight-decay", "-1"], ["error: weight_decay is -1.0; expected word word"]),
        (["sweep", "--config.weight-decay", "-1"], ["error: weight_decay is -1.0; expected"]),
        (["train", "--weight-decay", "1", "more"], ["more"]),
    ],
)
def test_a_wrong_option_is_one_line(
    argv: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not set(err) & set("│╭╰─\x1b")
    assert "---" not in err
    for words in said:
        assert words in err


def test_right_options_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse_options(COMMANDS, ["train", "--weight-decay", "0.5"], prog="trainer")
    assert options == Train(weight_decay=0.5)
    recipe = Train(weight_decay=0.5, steps=7)
    assert parse_options(Train, ["--steps", "8"], prog="trainer", default=recipe) == Train(
        weight_decay=0.5, steps=8
    )
    with pytest.raises(SystemExit) as leaving:
        run(["train", "--help"])
    assert leaving.value.code == 0
    assert "--weight-decay" in capsys.readouterr().out


def raising(error: BaseException) -> int:
    def fail(argv: list[str]) -> None:
        raise error

    return run_command(fail, [])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("seeds is ();\n expected one\tor more"), "seeds is (); expected one or more"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a\nb"), r"'a\nb': No such file"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "'x': Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EXDEV, "Cross-device", "a", None, "b"), "'a' -> 'b': Cross-device"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad start"), "'utf-8' codec can't decode"),
        (ValueError(), "ValueError"),
        (ValueError("\x1b[31m\udcff"), r"\x1b[31m\udcff"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(error) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")


def test_an_interrupt_is_130_and_a_bug_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ZeroDivisionError):
        raising(ZeroDivisionError())


def test_exit_codes_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_command(lambda argv: None, []) == 0
    assert run_command(lambda argv: 3, []) == 3
    monkeypatch.setattr("sys.argv", ["program", "--one", "two"])
    assert run_command(len) == 2


def test_a_closed_pipe_ends_quietly() -> None:
    code = (
        "import sys; from run_store.command_line import run_command\n"
        "def write(argv):\n"
        "    for i in range(100000): print(i)\n"
        "sys.exit(run_command(write, []))"
    )
    pipe = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert pipe.stdout is not None
    assert pipe.stderr is not None
    pipe.stdout.close()
    assert pipe.stderr.read() == b""
    pipe.stderr.close()
    assert pipe.wait() == 141


@given(text=st.text())
def test_one_line_is_printable_whatever_the_message(text: str) -> None:
    assert one_line(ValueError(text)).isprintable()
    assert one_line(OSError(errno.EIO, os.strerror(errno.EIO), text)).isprintable()
