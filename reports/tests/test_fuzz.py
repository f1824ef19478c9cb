"""The report of a hostile store, for a second; `make fuzz` does it at length."""

from __future__ import annotations

from reports.tests.fuzz_targets import TARGETS
from run_store.tests.fuzzing import check


def test_hostile_manifests_end_in_a_report_or_a_clear_error() -> None:
    (target,) = TARGETS
    check(target, 30, examples=3)
