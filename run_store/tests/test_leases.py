"""Who holds a run: one at a time, freed by death, judged by silence and never by a clock."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from run_store import LeaseLost, RunInUse, leases
from run_store.leases import Watch, acquire, is_held, newest_attempt, read_lease

ROOT = Path(__file__).parents[2]
# A holder on "another machine": its kernel's name is not ours, so a flock proves nothing.
HOLDER = """
import sys, signal
sys.path.insert(0, {root!r})
from pathlib import Path
from run_store import leases
leases.BEAT_SECONDS = 0.02
if {elsewhere}:
    leases.kernel_id = lambda: "another kernel"
lease = leases.acquire(Path(sys.argv[1]))
print(lease.number, flush=True)
sys.stdin.readline()
try:
    lease.check()
    print("mine", flush=True)
except leases.LeaseLost:
    print("lost", flush=True)
lease.end("waiting")
"""


@contextmanager
def holder(
    attempts: Path, *, elsewhere: bool, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lease until a line is written to it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(root=str(ROOT), elsewhere=elsewhere), str(attempts)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | (env or {}),
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().strip().isdigit()
        try:
            yield process
        finally:
            process.kill()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def until(condition: Callable[[], bool]) -> None:
    """Ask again until it holds; the suite's own time limit is what ends this otherwise."""
    while not condition():
        pass


@pytest.fixture
def attempts(tmp_path: Path) -> Path:
    return tmp_path / "attempts"


def test_a_lease_is_held_by_one_and_numbers_rise(attempts: Path) -> None:
    assert newest_attempt(attempts) is None
    for number in (1, 2, 3):
        lease = acquire(attempts)
        assert lease.number == number
        assert newest_attempt(attempts) == lease.folder
        assert is_held(lease.folder)
        with pytest.raises(RunInUse, match=f"process {os.getpid()} on "):
            acquire(attempts)
        lease.end("failed", "why")
        assert is_held(lease.folder) is False
        assert read_lease(lease.folder)["status"] == "failed"
        assert read_lease(lease.folder)["error"] == "why"


def test_of_many_that_try_at_once_one_gets_it(attempts: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path; from run_store import RunInUse, leases\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try: leases.acquire(Path(sys.argv[1])); print('got it', flush=True)\n"
        "except RunInUse: print('in use', flush=True)\n"
        "sys.stdin.readline()"
    )
    command = [sys.executable, "-c", code, str(attempts)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]  # type: ignore[call-overload]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        answers = [process.stdout.readline().strip() for process in processes]
    finally:
        for process in processes:
            process.communicate("\n")
    assert sorted(answers) == ["got it", "in use", "in use", "in use"]
    assert [path.name for path in attempts.iterdir()] == ["0001"]


def test_the_kernel_tells_at_once_that_a_holder_was_killed(attempts: Path) -> None:
    with holder(attempts, elsewhere=False) as process:
        assert is_held(attempts / "0001") is True
        with pytest.raises(RunInUse, match=f"process {process.pid}"):
            acquire(attempts)
        process.kill()
        process.wait()
        assert is_held(attempts / "0001") is False
        acquire(attempts).end("waiting")


def test_a_holder_elsewhere_is_judged_by_its_beat(attempts: Path) -> None:
    with holder(attempts, elsewhere=True) as process:
        now = 0.0
        watch = Watch(patience=10.0, clock=lambda: now)
        until(lambda: watch.is_held(attempts / "0001") is True)
        with pytest.raises(RunInUse):
            acquire(attempts)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        stopped = Watch(patience=10.0, clock=lambda: now)
        assert stopped.is_held(attempts / "0001") is None
        now = 9.9
        assert stopped.is_held(attempts / "0001") is None
        now = 10.0
        assert stopped.is_held(attempts / "0001") is False
        # What the observer knows, `acquire` does not, unless it is told.
        with pytest.raises(RunInUse):
            acquire(attempts)
        mine = acquire(attempts, dead=1)
        assert mine.number == 2
        process.send_signal(signal.SIGCONT)
        assert answer(process) == "lost"
        mine.check()
        mine.end("waiting")


def test_a_holder_learns_by_itself_that_it_was_replaced(
    attempts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.01)
    lease = acquire(attempts)
    shutil.copytree(lease.folder, attempts / "0002")
    assert lease.lost.wait(60)
    with pytest.raises(LeaseLost):
        lease.check()
    lease.end("waiting")


def test_a_holder_hears_that_it_should_stop(
    attempts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.01)
    lease = acquire(attempts)
    assert not lease.stop.is_set()
    leases.ask_to_stop(lease.folder)
    assert lease.stop.wait(60)
    lease.end("waiting")


CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += 3600;
    return result;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build a clock with")
def test_clocks_that_disagree_by_an_hour_do_no_harm(attempts: Path, tmp_path: Path) -> None:
    """The holder's clock is an hour ahead, really."""
    (tmp_path / "clock.c").write_text(CLOCK)
    library = tmp_path / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "clock.c"], check=True)
    ahead = {"LD_PRELOAD": str(library)}
    code = "import time; print(time.time())"
    command = [sys.executable, "-c", code]
    times = [
        float(subprocess.run(command, env=os.environ | env, capture_output=True).stdout)
        for env in ({}, ahead)
    ]
    assert 3590 < times[1] - times[0] < 3700
    with holder(attempts, elsewhere=True, env=ahead) as process:
        watch = Watch(patience=0.5)
        until(lambda: watch.is_held(attempts / "0001") is True)
        for _ in range(20):
            assert watch.is_held(attempts / "0001") is True
        assert answer(process) == "mine"
        process.wait()
        assert watch.is_held(attempts / "0001") is False
    with holder(attempts, elsewhere=True, env=ahead) as process:
        watch = Watch(patience=0.5)
        until(lambda: watch.is_held(attempts / "0002") is True)
        process.kill()
        process.wait()
        until(lambda: watch.is_held(attempts / "0002") is False)
        acquire(attempts, dead=2).end("waiting")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"\xff\x00", b"[" * 3000])
def test_a_lease_that_is_none_is_nobodys(content: bytes, attempts: Path) -> None:
    (attempts / "0007").mkdir(parents=True)
    (attempts / "0007" / "lease.json").write_bytes(content)
    assert read_lease(attempts / "0007") == {}
    lease = acquire(attempts)
    assert lease.number == 8
    lease.end("waiting")


def test_an_error_of_any_length_fits(attempts: Path) -> None:
    for error in ("x" * 10_000, "é\n" * 10_000, "\ud800" * 5000):
        lease = acquire(attempts)
        lease.end("failed", error)
        state = read_lease(lease.folder)
        assert state["status"] == "failed"
        assert error.startswith(state["error"])
        assert len(state["error"]) >= 100
        assert (lease.folder / "lease.json").stat().st_size == 2048
