"""The last layer's geometry in reports: by hand, in the order of the counts, and when damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from reports import figures, tables
from reports.groups import for_drawing
from reports.page import drawings
from reports.reading import collect
from reports.table_views import geometry_view
from run_store import Run, attempt, class_record
from vision_appendix.last_layer import LAST_LAYER, read_last_layer

V = 6
COUNTS = np.array([40, 30, 20, 3, 2, 1])  # the rarest last, so that their order is seen
NAMES = list("abcdef")


def simplex() -> torch.Tensor:
    return torch.eye(V) - 1 / V


def collapsed() -> dict[str, torch.Tensor]:
    """The three rare classes share a classifier and half of a mean's length; d = V."""
    means = simplex()
    means[3:] = 0.5 * means[3:].mean(dim=0)
    return {"classifier": 2 * means, "class_means": means, "within_class_variance": torch.ones(V)}


def balanced() -> dict[str, torch.Tensor]:
    # A shift of all features is none of the geometry's business.
    variance = torch.full((V,), 0.5)
    means = simplex() + 0.3
    return {"classifier": simplex(), "class_means": means, "within_class_variance": variance}


def publish_layer(
    folder: Path, counts: np.ndarray, layer: dict[str, torch.Tensor] | bytes | None, decay: float
) -> Run:
    config = {"model": "resnet9", "imbalance": str(counts.min()), "weight_decay": decay, "seed": 0}
    ones = np.ones((1, V))
    record = class_record(
        steps=[1], class_counts=counts, labels=NAMES, count=ones.astype(int), loss=ones,
        accuracy=ones, final_count=counts, final_loss=1 / np.sqrt(counts),
        final_accuracy=ones[0], test_count=ones.astype(int), test_accuracy=ones,
    )  # fmt: skip
    run = Run.create(folder, config)
    with attempt(run) as mine:
        mine.resume(0)
        if layer is not None:
            content = layer if isinstance(layer, bytes) else safetensors.torch.save(layer)
            (mine.folder / LAST_LAYER).write_bytes(content)
        mine.publish(record, files=() if layer is None else (LAST_LAYER,))
    return run


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers") / "study"
    publish_layer(folder, np.full(V, 9), balanced(), 0.0)
    publish_layer(folder, COUNTS, balanced(), 0.0)
    publish_layer(folder, COUNTS, collapsed(), 0.1)
    return folder


def test_measures_by_hand(study: Path) -> None:
    few, even = collect([study]).groups
    row = tables.geometry(even).iloc[0]
    # tr S_between is the squared length of a vertex: 5/6.
    assert row["within_class"] == pytest.approx(0.5 / (5 / 6))
    for name in ("equinorm", "equiangle", "self_duality"):
        assert row[name] == pytest.approx(0, abs=1e-6)
    assert row["rare_cosine"] == pytest.approx(-1 / 5)
    assert row["frequent_cosine"] == pytest.approx(-1 / 5)
    row = tables.geometry(few).iloc[1]
    means = collapsed()["class_means"].double().numpy()
    centred = means - means.mean(axis=0)
    assert row["within_class"] == pytest.approx(1 / (centred**2).sum(axis=1).mean())
    assert row["rare_cosine"] == pytest.approx(1)
    assert row["frequent_cosine"] == pytest.approx(-1 / 5)
    norms = np.linalg.norm(centred, axis=1)
    last = few.isel(run=1)
    np.testing.assert_allclose(last["feature_norm"], norms / norms.mean(), rtol=1e-6)
    rows = np.linalg.norm(means, axis=1)
    np.testing.assert_allclose(last["classifier_norm"], rows / rows.mean(), rtol=1e-6)


def test_table_and_figure_show_them(study: Path) -> None:
    collection = collect([study])
    view = geometry_view(collection.groups)
    assert view is not None
    assert view.bodies[0][1][1][-2:] == ["1.000", "-0.200"]
    (shown,) = [
        groups for draw, groups in drawings(collection.groups) if draw.__name__ == "last_layer"
    ]
    figure = figures.last_layer(*(for_drawing(group) for group in shown))
    _, classifier, *_ = figure.axes
    rarest_first = np.argsort(COUNTS)
    expected = shown[0]["classifier_norm"].values[1][rarest_first]
    np.testing.assert_allclose(classifier.lines[1].get_ydata(), expected)
    assert classifier.get_xticklabels()[0].get_text() == "f (1)"


def test_runs_without_a_last_layer_have_neither(tmp_path: Path) -> None:
    publish_layer(tmp_path / "study", COUNTS, None, 0.0)
    collection = collect([tmp_path / "study"])
    assert len(tables.geometry(*collection.groups)) == 0
    assert "last_layer" not in {draw.__name__ for draw, _ in drawings(collection.groups)}
    assert geometry_view(collection.groups) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (b"{}", "not safetensors"),
        ({"classifier": None}, "classifier has none; expected 6 classes"),
        ({"class_means": torch.ones(5, V)}, r"class_means has shape \(5, 6\); expected 6 classes"),
        ({"class_means": torch.ones(V, 2)}, "different widths"),
        ({"within_class_variance": torch.full((V,), torch.nan)}, "is not finite"),
    ],
)
def test_a_damaged_layer_is_one_line(
    tmp_path: Path, change: bytes | dict[str, torch.Tensor | None], said: str
) -> None:
    layer: bytes | dict[str, torch.Tensor] = b""
    if isinstance(change, bytes):
        layer = change
    else:
        changed = {name: change.get(name, value) for name, value in balanced().items()}
        layer = {name: value for name, value in changed.items() if value is not None}
    run = publish_layer(tmp_path / "study", COUNTS, layer, 0.0)
    with pytest.raises(ValueError, match=said):
        read_last_layer(run.folder, V)
    collection = collect([tmp_path / "study"])
    assert not collection.groups
    (problem,) = collection.problems
    assert LAST_LAYER in problem.reason
