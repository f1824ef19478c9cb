import subprocess
import sys

import pytest

# Page faults of taking, filling and freeing 24 MiB, when it was done once before.
FAULTS = """
import resource
import numpy as np
from llm_experiments.training.memory import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(24 << 20, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have other allocators")
def test_freed_memory_is_not_asked_for_again() -> None:
    command = [sys.executable, "-c", FAULTS]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 50  # 511 by default
