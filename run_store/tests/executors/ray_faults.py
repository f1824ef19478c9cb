"""A Ray cluster of two nodes on this machine, and a sweep on it that loses all it can lose.

Run in a network namespace of its own by test_ray.py, so that no traffic can leave the loopback
interface:  python -m run_store.tests.executors.ray_faults STUDY
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from run_store.leases import is_held, newest_attempt, read_lease
from run_store.runs import run_folders

SWEEP = ("--runs", "6", "--steps", "600", "--size", "260", "--checkpoint-every", "20")
_SIOCSIFFLAGS, _UP_AND_RUNNING = 0x8914, 0x41
_NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 80 * 2**20}


def main(study: Path) -> None:
    """Kill a worker, a node and the driver, one after the other; then let the sweep end."""
    _raise_loopback()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OPENBLAS_NUM_THREADS": "1"}
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=_NODE | {"include_dashboard": False})
    try:
        node = cluster.add_node(**_NODE)
        driver = _driver(study, cluster.address)
        # Every node has a run when one is killed, so that each fault costs an attempt.
        _until(driver, lambda: len(at_work(study)) == 2 and steps_done(study))
        os.kill(at_work(study)[0]["pid"], signal.SIGKILL)
        _until_further(driver, study, runs_at_work=2)
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        _until_further(driver, study, runs_at_work=1)
        driver.kill()
        driver.wait()
        print("killed a worker, a node and the driver", flush=True)
        driver = _driver(study, cluster.address)
        if driver.wait():
            sys.exit("the second driver failed")
    finally:
        cluster.shutdown()


def _driver(study: Path, address: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "run_store.tests.executors.toy_runs", str(study), *SWEEP]
    return subprocess.Popen([*command, "--executor", "ray", "--address", address])


def at_work(study: Path) -> list[dict[str, Any]]:
    """The leases of the runs that a living process has."""
    if not study.is_dir():
        return []
    newest = [newest_attempt(folder / "attempts") for folder in run_folders(study)]
    return [read_lease(f) for f in newest if f is not None and is_held(f)]


def steps_done(study: Path) -> int:
    """Steps that are safe, in checkpoints and in finished runs: grows as a sweep goes on."""
    total = 0
    for _, _, files in os.walk(study):
        steps = [int(name[11:-4]) for name in files if name.startswith("checkpoint-")]
        total += max(steps, default=0) + (10**6 if "classes.nc" in files else 0)
    return total


def _until_further(driver: subprocess.Popen[bytes], study: Path, *, runs_at_work: int) -> None:
    before = steps_done(study)
    _until(driver, lambda: len(at_work(study)) == runs_at_work and steps_done(study) > before)


def _until(driver: subprocess.Popen[bytes], condition: Callable[[], object]) -> None:
    while not condition():
        try:
            code = driver.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            continue
        sys.exit(f"the driver ended too early, with exit code {code}")


def _raise_loopback() -> None:
    """A new network namespace has its loopback interface down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _UP_AND_RUNNING))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
