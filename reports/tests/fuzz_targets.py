"""What a report reads of a run, under fire: its manifest, and so every field of its config."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from random import Random
from unittest import mock

from frequency_bins import Run, run_id
from frequency_bins.runs import json_document
from frequency_bins.tests.fuzzing import Canary, Reader, Target
from frequency_bins.tests.mutations import mutate_json
from reports import page
from reports.groups import collect
from reports.table_views import TableView
from reports.tests.studies import make_run

SIZE = {"vocab_size": 12, "steps": 3}


def _manifests() -> list[bytes]:
    """As a run of each kind has it, but for the id, which follows from the config."""
    config = {
        "model": "qwen2-tiny", "corpus": "python-docs", "weight_decay": 0.3, "seed": 1,
        "steps": 300, "learning_rate": 2e-3, "batch_size": 16, "vocab_size": 12,
        "loss_weight_exponent": 0.25, "decay": "matrices", "tie_embeddings": True,
    }  # fmt: skip
    images = {
        "model": "resnet9", "dataset": "digits", "weight_decay": 0.01, "seed": 0, "epochs": 2,
        "imbalance": "paper", "class_counts": [3, 2], "decay": "all", "shuffle_classes": False,
    }  # fmt: skip
    more = {
        "versions": {"python": "3.11"}, "device": "cpu", "host": "h", "git_commit": "0123+",
        "command": "python -m x", "data_hash": "feed", "steps": 300, "label": "a run",
        "started": "2025-01-01T00:00:00+00:00", "finished": "2025-01-01T00:01:00+00:00",
    }  # fmt: skip
    return [
        json_document({"config": config, "status": "finished"} | more),
        json_document({"config": images, "status": "finished"} | more),
        json_document({"config": config, "status": "failed", "error": "no"} | more),
    ]


def _mutate(content: bytes, random: Random) -> bytes:
    """Other values, keys and shapes, mostly: broken JSON is the manifest's own reader's."""
    for _ in range(10):
        changed = mutate_json(content, random)
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            if json.loads(changed)["config"].items():
                return changed
        content = random.choice(_manifests())
    return changed


def _reader(folder: Path) -> Reader:
    """The report of a study of two runs, of which one is the input's; all but its figures."""
    canary = Canary(folder / "canary")
    study = folder / "study"
    make_run(study, weight_decay=0.0, seed=0, **SIZE)
    whole = make_run(study, weight_decay=0.1, seed=0, **SIZE)
    digest = whole.manifest["classes_sha256"]
    parts = {
        "figure_views": mock.Mock(return_value=[]),
        "verdict_view": lambda: TableView(key="", title="", caption="", head=(), bodies=()),
    }
    run = whole

    def read(content: bytes) -> None:
        nonlocal run
        given, described = {}, content
        try:
            given = json.loads(content)
            named = {"format_version": 1, "run_id": run_id(given["config"])}
            described = json.dumps({"classes_sha256": digest} | given | named).encode()
            run.folder.rename(study / named["run_id"])
            run = Run(study / named["run_id"])
        except (ValueError, TypeError, KeyError, OSError, RecursionError):
            pass  # the folder keeps its name, and the file is what it is
        (run.folder / "manifest.json").write_bytes(described)
        collection = collect([study])
        reasons = "; ".join(note.reason for note in collection.problems)
        canary.check(reasons)
        if reasons:
            raise ValueError(f"manifest.json of a report: {reasons}")
        with mock.patch.multiple(page, **parts):
            text = page.render(collection)
        assert "\ud800" not in text
        text.encode("utf-8")

    return read


TARGETS = [
    Target(
        "report: manifest.json",
        _manifests,
        _reader,
        "manifest.json",
        _mutate,
        ("reports.groups", "reports.page", "reports.tables", "reports.table_views"),
    )
]
