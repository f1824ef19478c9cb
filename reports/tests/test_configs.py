"""Configs of other kinds than our own: named and left out, or shown as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reports.reading import collect
from reports.table_views import table_views
from reports.tests.studies import make_run


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight_decay", "nan"),
        ("weight_decay", True),
        ("seed", 0.5),
        ("seed", 2**63),
        ("model", ["x"]),
        ("loss_weight_exponent", [0.5]),
        ("class_counts", [1, "x"]),
        ("batch_size", {}),
    ],
)
def test_a_value_of_another_kind_is_named(field: str, value: Any, tmp_path: Path) -> None:
    good = {"weight_decay": 0.0, "seed": 0}
    make_run(tmp_path, **good, vocab_size=12, steps=3)
    make_run(tmp_path, **(good | {field: value}), status="new")
    found = collect([tmp_path])
    assert len(found.manifests) == 1
    (note,) = found.problems
    assert field in note.reason


def test_a_name_that_is_no_unicode_has_its_tables(tmp_path: Path) -> None:
    for text in ("a", "\ud800"):
        config = {"corpus": text, "batch_size": None, text: text}
        make_run(tmp_path, weight_decay=0.1, seed=0, vocab_size=12, steps=3, **config)
    found = collect([tmp_path])
    assert not found.problems
    headings = [heading for view in table_views(found.groups) for heading, _ in view.bodies]
    assert any("\\ud800" in heading for heading in headings)
    assert "".join(headings).encode("utf-8")
