"""Studies that version 0.1.0 wrote: still read, reported, resumed and retried.

`written_before/runs` holds, of text and of images, a finished run, one that was stopped at a
checkpoint and one that failed, made on another CPU; `written_before/text` is their corpus. Paths in
the manifests begin with /tmp/written-before.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llm_experiments import sweep as text
from llm_experiments.__main__ import main as text_main
from reports.__main__ import main as reports_main
from reports.reading import collect
from run_store import Run, read_study
from run_store.executors import ExecutorConfig
from run_store.leases import Watch
from run_store.status import study_states
from run_store.tests.executors.inline_pool import InlinePool, use_inline_pool
from vision_appendix import sweep as images
from vision_appendix.__main__ import main as images_main

WRITTEN = Path(__file__).parent / "written_before"
STUDIES = ("text", "images")
FINISHED = {"text": "077372cf2aca", "images": "205ca122a65f"}
STOPPED = {"text": "fa82d2802386", "images": "1823fa0c6627"}
FAILED = {"text": "714ef1c9473f", "images": "7476307e033d"}
# Relative: other kernels moved losses of text by 1e-6, of images by 3e-3; moments forgotten in
# going on would move them by 3e-1 and 4e-2.
ROUNDING = {"text": 1e-4, "images": 1e-2}
# The commands that made the studies, but for where.
COMMANDS = {
    "text": (
        "sweep --recipe demo --study text --model openelm-tiny --weight-decay 0 0.5 1 --steps 12 "
        "--batch-size 8 --evaluate-every 4 --warmup-steps 2 --corpus text --vocab-size 300 "
        "--context 16 --num-sequences 48 --loss-weight-exponent 0 --device cpu"
    ),
    "images": (
        "sweep --recipe digits --study images --imbalance exponential:0.1 --weight-decay 0 0.02 "
        "0.04 --seed 0 --epochs 3 --width 2 --evaluate-every 1 --device cpu"
    ),
}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the studies whose manifests say where it is."""
    folder = tmp_path / "written"
    shutil.copytree(WRITTEN, folder)
    for manifest in folder.rglob("manifest.json"):
        said = manifest.read_text(encoding="ascii")
        manifest.write_text(said.replace("/tmp/written-before", str(folder)), encoding="ascii")
    use_inline_pool(monkeypatch)
    monkeypatch.setattr(text, "open_pool", lambda *_, **__: InlinePool())
    return folder


def _command(study: str, folder: Path, runs: str) -> int:
    main = {"text": text_main, "images": images_main}[study]
    places = ["--runs-dir", str(folder / runs)]
    if study == "text":
        places += ["--data-dir", str(folder / "text"), "--cache-dir", str(folder / "cache")]
    return main([*COMMANDS[study].split(), *places])


@pytest.mark.parametrize("study", STUDIES)
def test_reading_and_its_report(study: str, written: Path, tmp_path: Path) -> None:
    folder, page = written / "runs" / study, tmp_path / "page.html"
    found = read_study(folder)
    assert [run.id for run in found.runs] == [FINISHED[study]]
    assert not found.problems
    states = {state.run.id: state.status for state in study_states(folder, Watch())}
    expected = {FINISHED[study]: "finished", STOPPED[study]: "waiting", FAILED[study]: "failed"}
    assert states == expected
    assert [group.sizes["run"] for group in collect([folder]).groups] == [1]
    assert reports_main(["build", str(folder), "--out", str(page)]) == 0
    assert page.stat().st_size > 100_000


@pytest.mark.parametrize("study", STUDIES)
def test_going_on_where_it_stopped(study: str, written: Path) -> None:
    """The sweep's command knows its runs; one resumed equals one made anew but for rounding."""
    before = (written / "runs" / study / FINISHED[study] / "classes.nc").read_bytes()
    assert _command(study, written, "runs") == 0
    assert _command(study, written, "anew") == 0
    for name in (FINISHED, STOPPED, FAILED):
        old = Run(written / "runs" / study / name[study])
        new = Run(written / "anew" / study / name[study])
        assert old.status == new.status == "finished"
        for variable, values in new.classes().data_vars.items():
            found = old.classes()[variable]
            if values.dtype.kind != "f":
                np.testing.assert_array_equal(found, values)
            elif "accuracy" in variable:  # rounded in another order, a tie may fall the other way
                assert abs(float(np.nanmean(found - values))) < 0.01
            else:
                np.testing.assert_allclose(found, values, rtol=ROUNDING[study])
    assert (written / "runs" / study / FINISHED[study] / "classes.nc").read_bytes() == before
    assert _first_step(written / "runs" / study / STOPPED[study]) > 0


def _first_step(run: Path) -> int:
    return int(json.loads((run / "attempts" / "0002" / "lease.json").read_text())["first_step"])


@pytest.mark.parametrize("study", STUDIES)
def test_retrying_what_failed(study: str, written: Path) -> None:
    retry = {"text": text.retry, "images": images.retry}[study]
    assert retry(written / "runs" / study, ExecutorConfig(), "cpu")["finished"] == 1
    assert Run(written / "runs" / study / FAILED[study]).status == "finished"
    assert Run(written / "runs" / study / STOPPED[study]).status == "waiting"
