"""The one way every command line of the project takes its options and reports what is wrong.

>>> def main(argv: Sequence[str] | None = None) -> int:
...     return run_command(_main, argv)
...
... def _main(argv: list[str]) -> None:
...     options = parse_options(Train | Sweep, argv, prog="python -m llm_experiments")
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import tyro

from run_store.signals import Terminated, end_at_once

USER_ERRORS = (ValueError, OSError)  # UnicodeDecodeError is a ValueError, a full disk an OSError

_LONGEST_LINE = 1000


def run_command(
    parse_and_run: Callable[[list[str]], int | None], argv: Sequence[str] | None = None
) -> int:
    """Run a command line and return its exit code.

    `parse_and_run` gets the arguments (`argv`, or those of the process) and returns an exit code
    or None for 0. A ValueError or OSError becomes one line ``error: ...`` on stderr and code 2; an
    interrupt one line and code 130; a closed pipe on stdout code 141; SIGTERM and SIGHUP, where
    they are heard, 143 and 129. Any other exception is a bug and keeps its traceback. `--help`
    leaves through SystemExit, as tyro has it.
    """
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _open_streams()
    try:
        code = parse_and_run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Terminated as asked:
        return asked.exit_code
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # as rich leaves
            return _without_stdout(141)
        raise
    except BrokenPipeError:
        return _without_stdout(141)
    except USER_ERRORS as error:
        code = 2
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            try:
                os.write(1, b"\n")
            except OSError:
                error.filename, code = "standard output", _without_stdout(2)
        print(f"error: {one_line(error)}", file=sys.stderr)
        return code
    except RuntimeError as error:
        if not str(error).startswith("Symlink loop"):  # Path.resolve, before Python 3.13
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def _open_streams() -> None:
    """Have stdout and stderr where they were closed, and able to show any text."""
    codecs.register_error("shown", _shown)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="shown")


def _shown(error: UnicodeError) -> tuple[bytes, int]:
    """The bytes of a file's name that is not text, else a question mark."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return b"".join(os.fsencode(c) if "\udc80" <= c <= "\udcff" else b"?" for c in text), error.end


def _without_stdout(code: int) -> int:
    """Python flushes stdout once more at exit, which would print a second complaint."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


def check_at_least(name: str, value: int, least: int) -> None:
    """ValueError for an option below its least value."""
    if value < least:
        raise ValueError(f"{name} is {value}; expected at least {least}")


def check_finite(name: str, value: float | int) -> None:
    """ValueError for an option that is infinite, not a number or negative."""
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {value}; expected a finite number of at least 0")


def leave(status: int) -> NoReturn:
    """Exit with a status; where torchrun started this process, without Python's finalization.

    Once a DDP model was made, torch keeps its process group, whose threads go on after the group
    was destroyed, and now and then abort a process that is ending, which torchrun then reports as
    a failure (seen with torch 2.14, in a script of init, DDP, barrier and destroy alone).
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run_subcommand(
    program: str,
    commands: Mapping[str, Callable[[list[str]], int]],
    argv: list[str],
    more_help: str = "",
) -> int:
    """Call the one of `commands` that the first argument names with the others.

    Without arguments, or with --help, a line of usage. ValueError for an unknown command.
    """
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command in ("", "-h", "--help"):
        print(f"usage: {program} {{{' | '.join(commands)}}} [--help | options]")
        if more_help:
            print(more_help)
        return 0
    if command not in commands:
        raise ValueError(f"command {command!r} is unknown; expected one of {', '.join(commands)}")
    return commands[command](rest)


def take_option(argv: list[str], option: str, default: str) -> tuple[str, list[str]]:
    """The value of one option and the other arguments, to read it before them.

    A recipe does so, as it gives the defaults of all other options. ValueError if it has no value.
    """
    rest = list(argv)
    for index, argument in enumerate(argv):
        if argument == option:
            if index + 1 == len(argv):
                raise ValueError(f"{option} has no value; expected one")
            del rest[index : index + 2]
            return argv[index + 1], rest
        if argument.startswith(f"{option}="):
            del rest[index]
            return argument.removeprefix(f"{option}="), rest
    return default, rest


def parse_options(
    options: Any,
    argv: Sequence[str],
    *,
    prog: str,
    description: str | None = None,
    default: Any = None,
) -> Any:
    """The options that `argv` spells, as an instance of `options`, a type that tyro reads.

    What `argv` leaves out comes from `default`, an instance, where one is given. Raises
    ValueError with one line in place of tyro's panel of several lines.
    """
    panel = io.StringIO()
    try:
        with contextlib.redirect_stderr(panel):
            given = {} if default is None else {"default": default}
            return tyro.cli(options, args=list(argv), prog=prog, description=description, **given)
    except SystemExit as leaving:
        if leaving.code in (0, None):
            raise
        raise ValueError(_panel_message(panel.getvalue())) from None


def one_line(error: BaseException) -> str:
    """The message of an exception on one line, without control characters."""
    if isinstance(error, OSError) and error.strerror is not None:
        message = error.strerror
        names = [repr(os.fsdecode(n)) for n in (error.filename, error.filename2) if n is not None]
        message = ": ".join([" -> ".join(names), message]) if names else message
    else:
        message = str(error)
    return printable(message) or type(error).__name__


def printable(text: str) -> str:
    """Text from data on one line, what a terminal would obey (or cannot encode) written out.

    Cut after 1,000 characters.
    """
    text = " ".join(text.split())
    text = text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _panel_message(panel: str) -> str:
    """What tyro's panel says, on one line: its sections between the title and the pointer to help.

    Rules separate the sections; on a terminal without UTF-8 they and the frame are ASCII.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", panel)
    lines = [line.strip(" │╭╮╰╯") for line in plain.splitlines()]
    rules = [bool(line) and (set(line) <= set("─-") or line.startswith("─")) for line in lines]
    width = max((len(x) for x, rule in zip(lines, rules, strict=True) if rule), default=0)
    sections = [""]
    for line, rule in zip(lines, rules, strict=True):
        if rule:
            sections.append("")
        else:
            sections[-1] = _join(sections[-1], line, width)
    said = [s for s in sections[1:] if s and not s.startswith("For full helptext")]
    if not said:
        return " ".join(plain.split())
    # "Error parsing Train: " names a class of ours, "Error parsing --steps: " the user's option.
    said[0] = re.sub(r"^Error parsing [^-:][^:]*: ", "", said[0])
    said[0] = said[0].removesuffix(" (required)").removesuffix(".")
    said[1:] = [re.sub(r"^Argument helptext:", "expected", s) for s in said[1:]]
    return "; ".join(said)


def _join(text: str, more: str, width: int) -> str:
    """Undo a line break: only a word wider than the panel is broken inside."""
    if not text or not more:
        return text + more
    broken_word = len(text.split(" ")[-1] + more.split(" ")[0]) > width
    return text + more if broken_word else f"{text} {more}"
