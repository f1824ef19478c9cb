"""What a report reads, under fire for a second; `make fuzz` does it at length."""

from __future__ import annotations

import pytest

from reports.tests.fuzz_targets import TARGETS
from run_store.tests.fuzzing import Target, check


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_hostile_files_end_in_a_report_or_a_clear_error(target: Target) -> None:
    check(target, 30, examples=3)
