"""The loop: one step against the formulas, records that add up, resuming without a trace."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy

from frequency_bins import ClassMetrics
from run_store import Attempt, Diverged, Run, Stopped, attempt
from run_store.checkpoint_writer import CheckpointWriter
from run_store.saved_state import read_state
from vision_appendix import training
from vision_appendix.augmentation import normalise, training_batch
from vision_appendix.configs import DataConfig, RunConfig
from vision_appendix.imbalanced_cifar10 import LabelledImages, load_images, resolve_counts
from vision_appendix.last_layer import last_layer
from vision_appendix.training import (
    Progress,
    build,
    evaluation_steps,
    learning_rate,
    training_step,
)

TINY: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 16,
    "learning_rate": 0.05,
    "width": 2,
    "crop_padding": 1,
    "flip": False,
    "cutout": 2,
    "class_counts": (2, 3, 4, 5, 6, 7, 8, 9, 10, 11),
    "weight_decay": 0.1,
}


@pytest.fixture(scope="module")
def digits() -> LabelledImages:
    whole = load_images(DataConfig())
    data = whole.subset(resolve_counts(RunConfig(**TINY), whole), 0)
    few = slice(None, None, 10)
    test = {"test_images": whole.test_images[few], "test_labels": whole.test_labels[few]}
    return LabelledImages(**(vars_of(data) | test))


def vars_of(data: LabelledImages) -> dict[str, Any]:
    return {name: getattr(data, name) for name in LabelledImages.__dataclass_fields__}


def train(config: RunConfig, data: LabelledImages, run: Run, **options: Any) -> None:
    with attempt(run) as mine:
        training.train(config, data, mine, **options)


def new_run(folder: Path, config: RunConfig) -> Run:
    return Run.create(folder, asdict(config))


def test_a_run_leaves_a_whole_record(digits: LabelledImages, tmp_path: Path) -> None:
    config = RunConfig(**TINY)
    run = new_run(tmp_path, config)
    seen: list[Progress] = []
    train(config, digits, run, report=seen.append)
    record = run.classes()
    counts = np.array(config.class_counts)
    steps = [round(e * 65 / 16) for e in (1, 2, 3)]
    assert [p.step for p in seen] == list(range(1, steps[-1] + 1))
    assert record["step"].values.tolist() == steps
    assert record["label"].values.tolist() == [str(k) for k in range(10)]
    assert record["class_count"].values.tolist() == counts.tolist()
    assert record["final_count"].values.tolist() == counts.tolist()
    windows = np.diff([0, *steps]) * 16
    assert record["count"].sum("class").values.tolist() == windows.tolist()
    assert record["test_count"].sum("class").values.tolist() == [60] * 3
    for row, scalars in zip(range(3), run.scalars(), strict=True):
        for prefix in ("", "test_"):
            count = record[prefix + "count"].values[row]
            for name in ("loss", "accuracy"):
                mean = np.nansum(count * record[prefix + name].values[row]) / count.sum()
                assert scalars[prefix + name] == pytest.approx(mean, rel=1e-12)
    assert run.status == "finished"
    names = {path.name for path in run.folder.iterdir()}
    record_files = {"manifest.json", "classes.nc", "scalars.jsonl", "last_layer.safetensors"}
    assert names == record_files | {"attempts"}


def test_the_final_pass_is_the_trained_networks_loss(
    digits: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(**TINY)
    models = []

    def keep(*arguments: Any) -> Any:
        models.append(build(*arguments))
        return models[-1]

    monkeypatch.setattr(training, "build", keep)
    run = new_run(tmp_path, config)
    train(config, digits, run)
    model = models[0][0].eval()
    with torch.no_grad():
        features = model.features(normalise(digits, digits.images))
        logits = features @ model.classifier.weight.T * 0.125
    losses = cross_entropy(logits, digits.labels, reduction="none").double()
    record = run.classes()
    layer = safetensors.torch.load_file(run.folder / "last_layer.safetensors")
    within = torch.zeros(16, 16)
    for k in range(10):
        mine = digits.labels == k
        # The network is of float32, and convolutions may add up in another order.
        assert record["final_loss"].values[k] == pytest.approx(losses[mine].mean().item(), rel=1e-5)
        right = (logits[mine].argmax(dim=1) == k).double().mean().item()
        assert record["final_accuracy"].values[k] == pytest.approx(right)
        centred = features[mine] - features[mine].mean(dim=0)
        within += centred.T @ centred / len(losses)
        torch.testing.assert_close(layer["class_means"][k], features[mine].mean(dim=0))
        variance = centred.square().sum(dim=1).mean()
        torch.testing.assert_close(layer["within_class_variance"][k], variance)
    scale = within.abs().max().item()
    assert scale > 0
    found = layer["within_class_covariance"]
    torch.testing.assert_close(found, within, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(layer["classifier"], model.classifier.weight.detach() * 0.125)


@pytest.mark.parametrize("mode", ["l2", "decoupled"])
@pytest.mark.parametrize("decay", ["all", "matrices", "head", "body"])
def test_two_steps_of_sgd_against_the_formulas(
    digits: LabelledImages, decay: str, mode: str
) -> None:
    config = RunConfig(**TINY, decay=decay, decay_mode=mode)
    model, optimizer = build(config, digits)
    twin, _ = build(config, digits)
    metrics = ClassMetrics(10)
    total = evaluation_steps(config, len(digits.images))[-1]
    velocity = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for step in range(2):
        training_step(config, digits, model, optimizer, metrics, step)
        images, targets = training_batch(config, digits, config.seed, step)
        cross_entropy(twin(images), targets).backward()
        rate = learning_rate(config, step, total)
        for name, p in twin.named_parameters():
            is_head = name == "classifier.weight"
            decayed = {
                "all": True,
                "matrices": "norm" not in name,
                "head": is_head,
                "body": not is_head,
            }[decay]
            assert p.grad is not None
            gradient = p.grad.clone()
            with torch.no_grad():
                if decayed and mode == "l2":
                    gradient += 0.1 * p
                if decayed and mode == "decoupled":
                    p -= rate * 0.1 * p
                velocity[name] = 0.9 * velocity[name] + gradient
                p -= rate * (gradient + 0.9 * velocity[name])  # Nesterov
            p.grad = None
    for p, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-6)
    assert metrics.count.sum() == 32


def test_learning_rate_climbs_and_falls_in_straight_lines() -> None:
    config = RunConfig(learning_rate=0.4, warmup=0.25)
    rates = [learning_rate(config, step, 1000) for step in range(1000)]
    assert max(rates) == pytest.approx(0.4, rel=5e-3)
    assert rates.index(max(rates)) in (249, 250)
    np.testing.assert_allclose(np.diff(rates[:250]), 0.4 / 250, rtol=1e-9)
    np.testing.assert_allclose(np.diff(rates[250:]), -0.4 / 750, rtol=1e-9)
    assert rates[0] == pytest.approx(0.4 / 500)
    assert rates[-1] == pytest.approx(0.4 / 1500)


def test_evaluation_steps() -> None:
    config = RunConfig(epochs=5, batch_size=10, evaluate_every=2)
    assert evaluation_steps(config, 100) == [20, 40, 50]
    assert evaluation_steps(config, 3) == [1, 2]  # 0.6, 1.2 and 1.5 steps
    assert evaluation_steps(RunConfig(epochs=1, batch_size=512), 10) == [1]


class Killed(BaseException):
    """Ends a run as a signal would."""


def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    digits: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(**TINY)
    whole, broken = new_run(tmp_path / "whole", config), new_run(tmp_path / "broken", config)
    train(config, digits, whole)
    monkeypatch.setattr(CheckpointWriter, "is_due", lambda writer, step: step % 4 == 0)
    firsts = []
    for last in (3, 6, 9, 10):

        def kill(progress: Progress, last: int = last) -> None:
            firsts.append(progress.step)
            if progress.step >= last:
                raise Killed

        with pytest.raises(Killed):
            train(config, digits, broken, report=kill)
        torch.rand(5)
    assert firsts == [1, 2, 3, 1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 9, 10]
    train(config, digits, broken)
    for name in ("classes.nc", "last_layer.safetensors"):
        assert (broken.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    keys = ("step", "loss", "test_accuracy", "learning_rate")
    rows = [[[row[k] for k in keys] for row in run.scalars()] for run in (whole, broken)]
    assert rows[0] == rows[1]


def test_a_run_that_is_asked_to_stop_stops_after_any_step(
    digits: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(**TINY)
    whole, broken = new_run(tmp_path / "whole", config), new_run(tmp_path / "broken", config)
    train(config, digits, whole)
    seen: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "should_stop", lambda mine: seen[-1] in (2, 6, 12))
        for step in (2, 6, 12):
            with pytest.raises(Stopped, match=f"step {step}"):
                train(config, digits, broken, report=lambda progress: seen.append(progress.step))
            assert broken.status == "waiting"
    train(config, digits, broken, report=lambda progress: seen.append(progress.step))
    assert seen == list(range(1, 13))
    for name in ("classes.nc", "last_layer.safetensors"):
        assert (broken.folder / name).read_bytes() == (whole.folder / name).read_bytes()


@pytest.mark.parametrize("how", ["other weights", "another step", "half of it"])
def test_a_checkpoint_that_was_tampered_with_is_named_and_not_used(
    how: str,
    digits: LabelledImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = RunConfig(**TINY)
    whole, broken = new_run(tmp_path / "whole", config), new_run(tmp_path / "broken", config)
    train(config, digits, whole)
    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "should_stop", lambda mine: True)
        with pytest.raises(Stopped):
            train(config, digits, broken)
    (path,) = broken.folder.glob("attempts/*/checkpoint-*.pt")
    if how == "other weights":
        state = read_state(path)
        state["model"]["classifier.weight"][0] += 1
        torch.save(state, path)
    elif how == "another step":
        path = path.rename(path.with_name(path.name.replace("-00000001-", "-00000009-")))
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    train(config, digits, broken)
    assert f"ignoring {path}: cut short or changed" in capsys.readouterr().err
    assert (broken.folder / "classes.nc").read_bytes() == (whole.folder / "classes.nc").read_bytes()


def test_a_run_that_diverges_publishes_nothing(digits: LabelledImages, tmp_path: Path) -> None:
    config = RunConfig(**(TINY | {"learning_rate": 1e30, "weight_decay": 0.0}))
    run = new_run(tmp_path, config)
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) at step"):
        train(config, digits, run)
    assert not (run.folder / "classes.nc").exists()


def test_bfloat16_trains_too(digits: LabelledImages) -> None:
    config = RunConfig(**TINY, precision="bfloat16")
    model, optimizer = build(config, digits)
    metrics = ClassMetrics(10)
    training_step(config, digits, model, optimizer, metrics, 0)
    exact, _ = build(RunConfig(**TINY), digits)
    images, targets = training_batch(config, digits, 0, 0)
    loss = cross_entropy(exact(images), targets).item()
    assert metrics.loss_sum.sum().item() / 16 == pytest.approx(loss, rel=0.02)


def test_a_compiled_run_has_the_losses_of_an_eager_one(
    digits: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated as ever, but without a C++ compiler; a step's network alone."""
    stock = torch.nn.Module.compile
    modes: list[str] = []

    def traced(module: torch.nn.Module, *, mode: str) -> None:
        modes.append(mode)
        stock(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    torch._dynamo.reset()
    counters["stats"].clear()
    runs = {c: new_run(tmp_path / str(c), RunConfig(**TINY, compile=c)) for c in (False, True)}
    for compiled, run in runs.items():
        train(RunConfig(**TINY, compile=compiled), digits, run)
    assert modes == ["reduce-overhead"]
    assert counters["stats"]["unique_graphs"] == 1
    records = [run.classes() for run in runs.values()]
    for name in ("loss", "test_loss", "final_loss"):
        np.testing.assert_allclose(records[1][name], records[0][name], rtol=1e-3, atol=1e-5)


def test_a_run_that_is_not_compiled_keeps_its_id() -> None:
    """That of before there was a choice."""
    resolved = [RunConfig(compile=c).resolved(DataConfig(), (1,), "hash") for c in (False, True)]
    assert "compile" not in resolved[0]
    assert resolved[1] == resolved[0] | {"compile": True}


def test_last_layer_of_a_class_without_spread(digits: LabelledImages) -> None:
    one = digits.subset([1] * 10, 0)
    config = RunConfig(**(TINY | {"class_counts": (1,) * 10}))
    layer = last_layer(build(config, one)[0], one)
    assert layer["within_class_variance"].tolist() == [0.0] * 10
    assert layer["class_means"].shape == (10, 16)
