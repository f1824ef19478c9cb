"""What a report reads of a run, under fire: its manifest, and so every field of its config."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import jinja2
import xarray as xr

from reports import page, reading, tables
from reports.configs import check_config
from reports.published import is_paper_setting
from reports.reading import NEEDED, collect, reduce_run
from reports.shrunken import shrink
from reports.table_views import TableView, _seconds
from reports.tests.studies import make_run
from run_store import Run, run_id
from run_store.runs import json_document
from run_store.shrunken import ShrunkenRun
from run_store.tests.fuzzing import Canary, Reader, Target
from run_store.tests.mutations import mutate_json

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
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            given = json.loads(content)
            if random.random() < 0.5:
                config = json.dumps(given["config"]).encode()
                given["config"] = json.loads(mutate_json(config, random))
                changed = json.dumps(given).encode()
            else:
                changed = mutate_json(content, random)
            if json.loads(changed)["config"].items():
                return changed
        content = random.choice(_manifests())
    return mutate_json(content, random)


def _reader(folder: Path) -> Reader:
    """The report of a study of two runs, of which one is the input's.

    No input changes a record, so both are read once, and reduced once for each config. No figure
    is drawn, and the tables of numbers, most of what a page costs, are made for one input in 32.
    """
    canary = Canary(folder / "canary")
    study = folder / "study"
    other = make_run(study, weight_decay=0.0, seed=0, **SIZE)
    whole = make_run(study, weight_decay=0.1, seed=0, **SIZE)
    digest = whole.manifest["classes_sha256"]
    records = {run.manifest["classes_sha256"]: run.classes(only=NEEDED) for run in (other, whole)}
    read_record = Run.classes
    run = whole

    def classes(run: Run, **options: Any) -> xr.Dataset:
        known = records.get(str(run.manifest.get("classes_sha256")))
        return read_record(run, **options) if known is None else known

    reduced: dict[tuple[str, str], Any] = {}

    def reduce_once(run: Run, manifest: Mapping[str, Any]) -> Any:
        key = run.id, str(manifest.get("data_hash"))
        if key not in reduced:
            if len(reduced) > 100:
                reduced.clear()
            with mock.patch.object(Run, "classes", classes):
                reduced[key] = reduce_run(run, manifest)
        return reduced[key]

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
        with mock.patch.object(reading, "reduce_run", reduce_once):
            collection = collect([study])
        reasons = "; ".join(note.reason for note in collection.problems)
        canary.check(reasons)
        if reasons:
            raise ValueError(f"manifest.json of a report: {reasons}")
        # A hash, so that an input always does the same.
        parts = _EVERY_TIME if zlib.crc32(content) % 32 else _SELDOM
        with mock.patch.multiple(page, **parts), _templates_kept(folder):
            text = page.render(collection)
        assert "\ud800" not in text
        text.encode("utf-8")

    return read


def _chosen_figures(groups: Sequence[xr.Dataset]) -> list[object]:
    page.drawings(groups)  # which reads the configs
    return []


def _tables_of_configs(groups: Sequence[xr.Dataset]) -> list[object]:
    """Nothing, but after what reads the configs for the tables of numbers."""
    tables.repair(*groups)
    for group in groups:
        is_paper_setting(group.attrs["config"])
    return []


def _times_of_runs(groups: object, manifests: Mapping[str, Mapping[str, Any]]) -> None:
    for manifest in manifests.values():
        _seconds(manifest)


def _shrunken() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder) / "study", weight_decay=0.1, seed=0, **SIZE)
        (path,) = shrink(Path(folder) / "study", Path(folder))
        return [path.read_bytes()]


def _shrunken_reader(folder: Path) -> Reader:
    """A file of the name that its config gives it, so that what follows is read too."""
    canary = Canary(folder / "canary")

    def read(content: bytes) -> None:
        name = "0" * 12
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            name = run_id(json.loads(content)["manifest"]["config"])
        path = folder / f"{name}.json"
        path.write_bytes(content)
        try:
            run = ShrunkenRun(path)
            check_config(run.manifest["config"])
            reduce_run(run, run.manifest)
        except ValueError as error:
            canary.check(str(error))
            raise ValueError(f"run.json: {error}") from None
        finally:
            path.unlink()

    return read


_NO_TABLE = TableView(key="", title="", caption="", head=(), bodies=())
_SELDOM: dict[str, Any] = {"figure_views": _chosen_figures, "verdict_view": lambda: _NO_TABLE}
_EVERY_TIME = _SELDOM | {
    "table_views": _tables_of_configs,
    "run_table": _times_of_runs,
    "pack": lambda groups: None,
}


def _templates_kept(folder: Path) -> contextlib.AbstractContextManager[object]:
    """The page's template compiled once."""
    (compiled := folder / "compiled").mkdir(exist_ok=True)
    cache = jinja2.FileSystemBytecodeCache(str(compiled))
    keeping = functools.partial(jinja2.Environment, bytecode_cache=cache)
    return mock.patch.object(jinja2, "Environment", keeping)


TARGETS = [
    Target(
        "report: manifest.json",
        _manifests,
        _reader,
        "manifest.json",
        _mutate,
        (
            *("reports.reading", "reports.groups", "reports.page", "reports.tables"),
            *("reports.table_views", "reports.answer", "reports.published", "reports.ranks"),
            "reports.wording",
        ),
    ),
    Target(
        "report: shrunken run", _shrunken, _shrunken_reader, "run.json", mutate_json,
        ("run_store.shrunken",),
    ),
]  # fmt: skip
