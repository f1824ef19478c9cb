"""For every test: the same examples each time, however slow the machine, one thread, and signals.

Two workers a machine: threads of their own would only wait for each other. Where OMP_NUM_THREADS is
given it holds, since sums depend on it in their last bits.
"""

from __future__ import annotations

import os
import signal

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")
# Kernels of Triton run on a CPU if it is told so before it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
# A shell has what runs in its background ignore them, and so would all that a test starts.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)
