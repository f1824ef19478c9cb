"""Studies and a page that several tests read; none of them changes any."""

from __future__ import annotations

from pathlib import Path

import pytest

from reports import figures
from reports import page as page_module
from reports.reading import Collection, collect
from reports.tests.studies import make_run, make_study


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, three weight decays, two seeds, and beside them all that can be unfinished."""
    folder = make_study(
        tmp_path_factory.mktemp("runs") / "study",
        weight_decays=(0.0, 0.3, 1.0),
        seeds=(0, 1),
        models=("openelm-tiny", "qwen2-tiny"),
    )
    make_run(folder, weight_decay=2.0, seed=0, status="diverged")
    make_run(folder, weight_decay=0.3, seed=2, status="running")
    return folder


@pytest.fixture(scope="session")
def collection(study: Path) -> Collection:
    """The study, read."""
    return collect([study])


@pytest.fixture(scope="session")
def page(collection: Collection) -> str:
    """The study's page."""
    return page_module.render(collection)


@pytest.fixture
def one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages with a single figure: drawing takes nearly all of a page's time."""
    monkeypatch.setattr(page_module, "FIGURES", (figures.figure_4,))
    monkeypatch.setattr(page_module, "CORPUS_FIGURES", ())
