"""A Ray cluster: one task a run. Needs the extra `ray`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from run_store.executors.pools import RETRIES, ExecutorConfig, WorkerDied


class RayPool:
    """Makes calls on a cluster, which does them again where a worker or node dies.

    Without an address a cluster of this machine alone is started, on the loopback interface.
    """

    def __init__(self, width: int, config: ExecutorConfig, *, device: str, threads: int) -> None:
        # Before the import, which reads it.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            import ray
        except ImportError:
            raise ValueError(
                "executor 'ray' needs the package ray; expected pip install "
                "'fair-language-model[ray]'"
            ) from None
        self.width, self._ray = width, ray
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if config.address is None:
            here: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
            ray.init(address="local", **here, **quiet)
        else:
            try:
                ray.init(address=config.address, **quiet)
            except ConnectionError as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"address {config.address!r}: no Ray cluster: {reason}") from None
        if threading.current_thread() is threading.main_thread():
            # Ray has put a handler of its own below Python's, which would abort this process.
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        has_gpus = device == "cuda" or (device == "auto" and "GPU" in resources)
        self._call = ray.remote(
            num_cpus=threads,
            num_gpus=config.gpus_per_run if has_gpus else 0,
            max_retries=RETRIES,
            scheduling_strategy="SPREAD",
        )(_call)

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Call a function of a module on a node that has room."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        inner = self._call.remote(function, *arguments).future()

        def settle(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                future.set_result(done.result())
            elif isinstance(error, self._ray.exceptions.RayTaskError):  # `do` itself never raises
                last = str(error).strip().splitlines()[-1]
                reason = f"a Ray worker cannot do runs ({last}); expected this package on all nodes"
                future.set_exception(ValueError(reason))
            else:  # what Ray raises for processes and nodes that died
                first = str(error).strip().splitlines()[0]
                future.set_exception(WorkerDied(f"{type(error).__name__}: {first}"))

        inner.add_done_callback(settle)
        return future

    def interrupt(self) -> None:
        """Nothing: its workers are asked through the store."""

    def close(self) -> None:
        """Leave the cluster, which ends this driver's tasks; one started here ends as a whole."""
        self._ray.shutdown()


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)
