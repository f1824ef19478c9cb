"""Slurm through submitit: one job a run. Needs the extra `slurm`."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from run_store.executors.pools import RETRIES, ExecutorConfig, WorkerDied

_POLL_SECONDS = 2.0
# submitit asks for 5 minutes. A day fits most queues; a job that ends earlier goes on in another.
_MINUTES = 24 * 60


class SlurmPool:
    """Makes every call in a job of its own. submitit's files lie in ./slurm, which nodes must see.

    A job that dies is submitted again, RETRIES times.
    """

    def __init__(self, width: int, config: ExecutorConfig, *, device: str, threads: int) -> None:
        try:
            import submitit
        except ImportError:
            raise ValueError(
                "executor 'slurm' needs the package submitit; expected pip install "
                "'fair-language-model[slurm]'"
            ) from None
        if shutil.which("sbatch") is None:
            raise ValueError("executor 'slurm' needs sbatch, which is not on this machine's PATH")
        self.width, self._submitit = width, submitit
        self._executor = submitit.AutoExecutor(folder=Path("slurm") / "%j", cluster="slurm")
        options = dict(option.split("=", 1) for option in config.slurm_options)
        gpus = 0 if device == "cpu" else config.gpus_per_run
        named: dict[str, Any] = {"slurm_gres": f"gpu:{gpus}"} if gpus else {}
        if "time" not in options:
            named["timeout_min"] = _MINUTES
        self._executor.update_parameters(
            cpus_per_task=threads,
            **named,
            slurm_additional_parameters=options,
        )
        self._jobs: dict[Future[Any], tuple[Any, Any, int]] = {}
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._poller = threading.Thread(target=self._poll, daemon=True)
        self._poller.start()

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Call a function of a module in a job of its own."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        call = (function, *arguments)
        job = self._executor.submit(*call)
        with self._lock:
            self._jobs[future] = job, call, 0
        return future

    def interrupt(self) -> None:
        """Nothing: its workers are asked through the store."""

    def close(self) -> None:
        """Cancel the jobs that are left."""
        self._closing.set()
        self._poller.join()
        for job, *_ in self._jobs.values():
            job.cancel()

    def _poll(self) -> None:
        while not self._closing.wait(_POLL_SECONDS):
            with self._lock:
                jobs = list(self._jobs.items())
            for future, (job, call, deaths) in jobs:
                if job.done():
                    self._settle(future, job, call, deaths)

    def _settle(self, future: Future[Any], job: Any, call: Any, deaths: int) -> None:
        # submitit would wait 15 s for the result of a job that died, and hold up all others. What a
        # slow file system still hides of one that did not, a second job finds in the run's folder.
        job._results_timeout_s = _POLL_SECONDS
        error = job.exception()
        with self._lock:
            del self._jobs[future]
            died = isinstance(error, self._submitit.core.utils.UncompletedJobError)
            if died and deaths < RETRIES:
                try:
                    self._jobs[future] = self._executor.submit(*call), call, deaths + 1
                except Exception as refused:  # this thread must go on, for the other jobs
                    error = refused
                else:
                    return
        if error is None:
            future.set_result(job.result())
        else:
            last = str(error).strip().splitlines()[-1]
            future.set_exception(WorkerDied(f"Slurm job {job.job_id}: {last}"))
