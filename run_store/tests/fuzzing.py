"""Feeds readers of files with hostile bytes: `make fuzz` at length, the tests for seconds.

    python -m run_store.tests.fuzzing [--runs N] [--only PART] MODULE ...

Every room lists its readers in a module fuzz_targets of its tests. An input is a mutation of a
file that our own writers made, or of an input that led somewhere new. A reader may accept it, or
raise ValueError or OSError with a message that names the file; anything else is a finding, and so
are a crash, TIME_LIMIT seconds, MEMORY_LIMIT bytes and a canary that was touched.

Each reader runs in a child process. With atheris (the extra "fuzz") libFuzzer chooses the inputs
by the lines of our code that they reach; without it, inputs that gave a new message are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from run_store.tests.mutations import mutate_bytes

TIME_LIMIT = 10
MEMORY_LIMIT = 2**31
FINDINGS = Path("fuzz-findings")
Reader = Callable[[bytes], object]
# What differs between two messages of one kind.
_VALUES = re.compile(r"'[^']*'|\"[^\"]*\"|\([\d, ]*\)|\[.*?\]|[0-9a-f]{6,}|[\d.e+-]{2,}|\d")

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@dataclass(frozen=True)
class Target:
    """A reader under fire."""

    name: str
    seeds: Callable[[], list[bytes]]
    """files as our own writers make them"""
    reader: Callable[[Path], Reader]
    """in an empty folder, makes the function that writes an input there and reads it"""
    file: str
    """what an error has to name"""
    mutate: Callable[[bytes, random.Random], bytes] = mutate_bytes
    modules: tuple[str, ...] = ()
    """the code whose lines guide the choice of inputs"""
    refused: bool = False
    """whether even the seeds are, for the originals are not to be had here"""


@dataclass
class Tally:
    """What came of a reader's inputs."""

    runs: int = 0
    accepted: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    findings: dict[str, str] = field(default_factory=dict)
    slowest: float = 0.0


class Canary:
    """Tells whether code ran, or a file was read or changed, that an input had no business with."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.touched = folder / "touched"
        self.secret = folder / "secret"
        self.secret.write_text("the secret of the canary")

    def check(self, message: str) -> None:
        """Raise AssertionError if it was."""
        assert not self.touched.exists(), "code of an input was run"
        assert self.secret.read_text() == "the secret of the canary", "a file outside was changed"
        assert "the secret of" not in message, "a file outside was read"


def feed(target: Target, read: Reader, content: bytes, tally: Tally) -> bool:
    """One input; returns whether it led to a message (or success) not seen before."""
    begin = time.perf_counter()
    message, finding = "", ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(content)
    except (ValueError, OSError) as error:
        message = f"{type(error).__name__}: {error}"
        if target.file not in message:
            finding = f"does not name {target.file}: {message[:200]}\n{_where(error)}"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        finding = f"{type(error).__name__}: {str(error)[:200]}\n{_where(error)}"
    tally.runs += 1
    tally.slowest = max(tally.slowest, time.perf_counter() - begin)
    tally.accepted += not message and not finding
    if finding and (key := re.sub(r"\d+", "#", finding)) not in tally.findings:
        tally.findings[key] = _kept(target, content)
    said = message.rpartition(target.file)[2] if message else ""
    kind = _VALUES.sub("#", said)[:100]
    if message:
        tally.errors[kind] = tally.errors.get(kind, 0) + 1
    return tally.errors.get(kind) == 1


def _where(error: BaseException) -> str:
    """The last frames of a traceback, for people to find the place."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))


def _kept(target: Target, content: bytes) -> str:
    FINDINGS.mkdir(exist_ok=True)
    path = FINDINGS / f"{target.name.replace(' ', '-')}-{hash(content) & 0xFFFFFFFF:08x}"
    path.write_bytes(content)
    return str(path)


@contextlib.contextmanager
def reading(target: Target) -> Iterator[Reader]:
    """The target's reader, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        yield target.reader(Path(folder))


def short(target: Target, runs: int, seed: int = 0) -> Tally:
    """`runs` inputs in this process, a function of the seed; for the tests."""
    generator, tally = random.Random(seed), Tally()
    with reading(target) as read:
        pool = target.seeds()
        for content in pool:
            feed(target, read, content, tally)
        expected = 0 if target.refused else len(pool)
        assert tally.accepted == expected, f"{target.name} and its own: {tally.errors}"
        for _ in range(runs):
            content = target.mutate(generator.choice(pool), generator)
            if feed(target, read, content, tally):
                pool.append(content)
    return tally


def check(target: Target, runs: int, examples: int = 30) -> None:
    """The tests' part: mutations, then whatever Hypothesis makes up; both are always the same."""
    assert not short(target, runs).findings
    tally = Tally()
    anything = st.binary(max_size=200) | _JSON.map(lambda value: json.dumps(value).encode())

    with reading(target) as read:

        @settings(max_examples=examples, derandomize=True, deadline=None, database=None)
        @given(anything | st.sampled_from(target.seeds()))
        def feed_anything(content: bytes) -> None:
            feed(target, read, content, tally)
            assert not tally.findings

        feed_anything()


# ---- the long part: a child a target


def targets(modules: Sequence[str]) -> dict[str, Target]:
    """The targets of modules, by name."""
    loaded = [importlib.import_module(module) for module in modules]
    return {target.name: target for module in loaded for target in module.TARGETS}


def _child(target: Target, runs: int, seed: int, report: Path) -> None:
    """Feeds a target until it has had its inputs; the report is there at any time."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_LIMIT
    tally = Tally()

    def save() -> None:
        report.write_text(json.dumps(dataclasses.asdict(tally)))

    with reading(target) as read:
        pool = target.seeds()
        for content in pool:
            feed(target, read, content, tally)
        tally.slowest = 0.0  # what is done once, imports above all, is done
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))

        def one(content: bytes) -> bool:
            new = feed(target, read, content, tally)
            if new or tally.runs % 500 == 0:
                save()
            if tally.runs >= runs:
                save()
                os._exit(0)
            return new

        with contextlib.suppress(ImportError):
            _guided(target, pool, one, seed)
        generator = random.Random(seed)
        while True:
            signal.alarm(TIME_LIMIT)  # whose default is to end the process, in C code too
            content = target.mutate(generator.choice(pool), generator)
            if one(content):
                pool.append(content)


def _guided(target: Target, pool: list[bytes], one: Reader, seed: int) -> None:
    """libFuzzer's loop, which does not return."""
    import atheris

    for name in target.modules:
        _instrument(importlib.import_module(name), atheris.instrument_func)

    def mutate(content: bytes, most: int, number: int) -> bytes:
        generator = random.Random(number)
        # Half the time from a seed, or from what gave a new message, which lines do not tell.
        if generator.random() < 0.5:
            content = generator.choice(pool)
        if generator.random() < 0.3:
            return atheris.Mutate(content, most)
        return target.mutate(content, generator)[:most]

    with tempfile.TemporaryDirectory(prefix="fuzz-corpus-") as corpus:
        for number, content in enumerate(pool):
            Path(corpus, str(number)).write_bytes(content)
        most = 4 * max(map(len, pool)) + 4096
        options = [
            f"-max_len={most}",
            "-len_control=0",
            f"-timeout={TIME_LIMIT}",
            "-rss_limit_mb=0",
            "-verbosity=0",
        ]
        options += [f"-seed={seed}", f"-artifact_prefix={FINDINGS}/", corpus]
        atheris.Setup(
            ["fuzz", *options],
            lambda content: pool.append(content) if one(content) else None,
            custom_mutator=mutate,
        )
        atheris.Fuzz()


def _instrument(module: ModuleType, instrument: Callable[[Any], Any]) -> None:
    owners = [module, *(v for v in vars(module).values() if inspect.isclass(v))]
    for owner in owners:
        for value in list(vars(owner).values()):
            function = inspect.unwrap(value) if callable(value) else value
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                with contextlib.suppress(Exception):
                    instrument(function)


def fuzz(name: str, modules: Sequence[str], runs: int, seed: int = 1) -> Tally:
    """`runs` inputs for one target, in as many children as it takes."""
    total = Tally()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report")
        while total.runs < runs:
            report.unlink(missing_ok=True)
            command = [
                sys.executable,
                "-m",
                __spec__.name,
                "--child",
                name,
                "--report",
                str(report),
            ]
            command += ["--runs", str(runs - total.runs), "--seed", str(seed), *modules]
            scratch = Path(folder, "scratch")
            scratch.mkdir()
            environment = os.environ | {"TMPDIR": str(scratch)}
            child = subprocess.run(command, env=environment, capture_output=True, text=True)
            part = Tally(**json.loads(report.read_text())) if report.exists() else Tally()
            total.runs += part.runs
            total.accepted += part.accepted
            total.slowest = max(total.slowest, part.slowest)
            total.findings |= part.findings
            for kind, count in part.errors.items():
                total.errors[kind] = total.errors.get(kind, 0) + count
            if child.returncode:
                seed += 1
                kept = FINDINGS / f"{name.replace(' ', '-')}-died-{seed}"
                shutil.copytree(scratch, kept, symlinks=True, dirs_exist_ok=True)
                died = f"exit code {child.returncode}: {child.stderr[-600:]}"
                total.findings[died] = str(kept)
                if part.runs == 0 or len(total.findings) > 20:
                    break
            shutil.rmtree(scratch)
    return total


def main() -> int:
    """Exit code 1 if anything was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("modules", nargs="+", help="modules with TARGETS")
    parser.add_argument("--runs", type=int, default=100_000, help="inputs of each reader")
    parser.add_argument("--only", default="", help="readers whose name holds this")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    found = targets(options.modules)
    if options.child:
        _child(found[options.child], options.runs, options.seed, options.report)
    FINDINGS.mkdir(exist_ok=True)
    print("| reader | inputs | accepted | distinct errors | slowest | findings | seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    findings: dict[str, str] = {}
    for name in found:
        if options.only not in name:
            continue
        begin = time.perf_counter()
        tally = fuzz(name, options.modules, options.runs, options.seed)
        seconds = time.perf_counter() - begin
        print(
            f"| {name} | {tally.runs:,} | {tally.accepted:,} | {len(tally.errors)} | "
            f"{1000 * tally.slowest:.0f} ms | {len(tally.findings)} | {seconds:.0f} |",
            flush=True,
        )
        findings |= tally.findings
    for what, kept in findings.items():
        print(f"\n{kept}: {what}".encode("ascii", "backslashreplace").decode())
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
