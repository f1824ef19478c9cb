"""The named sweeps, spelled out, and what a plan says of them, against other ways to count."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llm_experiments.__main__ import main
from llm_experiments.configs import DataConfig, RunConfig, SweepConfig, TrainingConfig
from llm_experiments.models.presets import build_model, features
from llm_experiments.plan import (
    activation_bytes,
    flops_per_token,
    head_bytes,
    peak_bytes,
    plan,
)
from llm_experiments.recipes import RECIPES, recipe
from llm_experiments.sweep import sweep
from llm_experiments.tests.live_memory import LiveMemory
from llm_experiments.training.loop import token_losses
from llm_experiments.training.optimization import build_optimizer
from run_store.executors import ExecutorConfig

SEEDS = (0, 1, 2, 3, 4)
TABLE_1 = (0.0, 0.1, 0.3, 0.5, 1.0)
FIGURE_1 = (0.0, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0)
SMALL, LARGE = (64, 1, 128), (16, 4, 64)  # batch, accumulation, context: section 3


@pytest.mark.parametrize(
    ("name", "grids"),
    [
        ("table1", [("openelm-270m", "imdb", TABLE_1, SMALL)]),
        (
            "figure1",
            [
                ("openelm-270m", "imdb", FIGURE_1, SMALL),
                ("qwen2-0.5b", "imdb", FIGURE_1, SMALL),
                ("qwen2-1.5b", "imdb", FIGURE_1, LARGE),
                ("openelm-3b", "imdb", FIGURE_1, LARGE),
            ],
        ),
        ("figure4", [("openelm-270m", "imdb", TABLE_1, SMALL)]),
        ("figure5", [("openelm-270m", "imdb", (1.0,), SMALL)]),
        ("figure6", [("openelm-270m", "imdb", (1.0,), SMALL)]),
        (
            "figure7",
            [
                ("openelm-270m", "imdb", (0.0, 0.1, 1.0), SMALL),
                ("openelm-270m", "imdb-xl", (0.0, 0.1, 1.0), SMALL),
            ],
        ),
    ],
)
def test_the_grids_are_those_of_the_paper(
    name: str, grids: list[tuple[str, str, tuple[float, ...], tuple[int, int, int]]]
) -> None:
    found = recipe(name)
    assert len(found) == len(grids)
    for grid, (model, corpus, decays, (batch, accumulation, context)) in zip(
        found, grids, strict=True
    ):
        assert (grid.models, grid.data.corpus) == ((model,), corpus)
        assert (grid.weight_decays, grid.seeds) == (decays, SEEDS)
        assert (grid.decays, grid.loss_weight_exponents) == (("all",), (0.0,))
        assert grid.training == TrainingConfig(
            steps=10_000,
            batch_size=batch,
            accumulation=accumulation,
            learning_rate=5e-5,
            warmup_steps=10,
            evaluate_every=100,
            evaluate="final",
            precision="fp16",
            compile=True,
            optimizer="adamw",
            schedule="cosine",
            beta1=0.9,
            beta2=0.999,
            decay_mode="decoupled",
            tie_embeddings=True,
            dropout=0.0,
            label_smoothing=0.0,
        )
        assert (grid.data.vocab_size, grid.data.context) == (32005, context)
        assert (grid.data.packing, grid.data.num_sequences) == (False, None)


CHANGED = (
    *("model", "weight_decay", "loss_weight_exponent", "decay", "tie_embeddings", "dropout"),
    *("label_smoothing", "norm", "optimizer", "decay_mode", "learning_rate"),
    *("decay_exponent", "decay_until"),
)
PLAIN = asdict(RunConfig(model="openelm-270m"))


def runs(name: str) -> set[tuple[object, ...]]:
    """Of every cell what it changes of a plain run of OpenELM 270M, and its vocabulary."""
    return {
        (*sorted((f, v) for f, v in asdict(cell).items() if f in CHANGED and v != PLAIN[f]), size)
        for grid in recipe(name)
        for cell in grid.cells()
        for size in [grid.data.vocab_size]
    }


def at(decay: float, *changed: tuple[str, object], vocab_size: int = 32005) -> tuple[object, ...]:
    decayed = [("weight_decay", decay)] if decay else []
    return (*sorted([*changed, *decayed]), vocab_size)


def test_the_recipes_beyond_the_paper() -> None:
    untied = ("tie_embeddings", False)
    above = TABLE_1[1:]
    assert runs("repair") == {
        *(at(decay) for decay in TABLE_1),
        *(at(d, ("loss_weight_exponent", g)) for d in TABLE_1 for g in (0.25, 0.5, 0.75, 1.0)),
        *(
            at(decay, ("decay", group))
            for decay in TABLE_1
            for group in ("matrices", "no-embeddings", "embeddings")
        ),
        *(at(decay, untied) for decay in TABLE_1),
        *(
            at(d, ("decay", group), untied)
            for d in TABLE_1
            for group in ("embeddings", "head", "body")
        ),
        *(at(decay, ("decay_exponent", q)) for decay in above for q in (0.5, 1.0, 2.0)),
        *(at(decay, ("decay_exponent", 1.0), untied) for decay in above),
        *(at(decay, ("decay_until", share)) for decay in above for share in (0.5, 0.8)),
    }
    assert runs("regularisers") == {
        *(at(decay) for decay in TABLE_1),
        *(at(0, ("dropout", rate)) for rate in (0.1, 0.2, 0.3)),
        *(at(0, ("label_smoothing", share)) for share in (0.05, 0.1, 0.2)),
        *(at(d, ("decay", group)) for d in above for group in ("embeddings", "inner", "last-norm")),
        *(at(decay, ("norm", "layernorm")) for decay in TABLE_1),
        *(at(decay, untied) for decay in TABLE_1),
        *(at(d, ("model", m)) for d in TABLE_1 for m in ("qwen2-0.5b", "qwen2-moe-0.5b")),
    }
    assert runs("optimizers") == {
        *(at(decay) for decay in TABLE_1),
        *(at(decay, ("decay_mode", "l2")) for decay in (1e-5, 1e-4, 1e-3)),
        *(at(decay, ("optimizer", "muon")) for decay in TABLE_1),
        *(at(3 * d, ("learning_rate", 5e-5 / 3), ("optimizer", "lion")) for d in TABLE_1),
        *(at(decay, ("optimizer", "adamw-cautious")) for decay in above),
    }
    assert runs("vocabulary") == {
        at(decay, vocab_size=size) for decay in TABLE_1 for size in (8005, 16005, 32005)
    }


def test_the_small_recipe_of_alternatives_keeps_its_models_and_meets_the_plain_run() -> None:
    grids = recipe("alternatives-small")
    assert all(grid.save_model and len(grid.seeds) > 1 for grid in grids)
    changed = {name for run in runs("alternatives-small") for name, _ in run[:-1]}
    assert changed - {"model", "learning_rate"} == {
        *("weight_decay", "loss_weight_exponent", "decay", "dropout", "label_smoothing", "norm"),
        *("optimizer", "decay_exponent", "decay_until"),
    }


def test_the_large_recipe_goes_from_1_to_7_billion_parameters() -> None:
    rows = plan(recipe("scale"))
    sizes = [row.parameters / 1e9 for row in rows]
    assert sizes == sorted(sizes)
    assert (sizes[0] > 1, 6.7 < sizes[-1] < 7) == (True, True)  # a smaller vocabulary than Qwen's
    hours = rows[-1].flops * 3 / (989e12 * 0.18) / 3600
    assert rows[-1].gpu_hours("h200") == pytest.approx(hours)


def test_the_mechanism_changes_one_thing_at_a_time() -> None:
    """And has a run without decay beside every run with it, from which its excess is taken."""
    first = recipe("demo")[0]
    start = asdict(first.cells()[0]) | asdict(first.data)
    cells = [(c, grid.data) for grid in recipe("mechanism") for c in grid.cells()]
    for cell, data in cells:
        own = asdict(cell) | asdict(data)
        changed = {name for name in start if own[name] != start[name]}
        changed -= {"seed", *({"weight_decay", "decay"} if cell.weight_decay else ())}
        assert len(changed) <= 1 or changed == {"optimizer", "learning_rate"}
        assert (replace(cell, weight_decay=0.0, decay="all"), data) in cells


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_asks_twice_for_a_run(name: str) -> None:
    cells = [(c, grid.data) for grid in recipe(name) for c in grid.cells()]
    assert len(set(cells)) == len(cells)
    assert len({grid.study for grid in recipe(name)}) == 1


@pytest.mark.parametrize(
    ("model", "batch", "context"), [("openelm-1.1b", (16, 4), 64), ("qwen2-0.5b", (64, 1), 128)]
)
def test_a_single_run_of_a_published_model_is_the_papers(
    monkeypatch: pytest.MonkeyPatch, model: str, batch: tuple[int, int], context: int
) -> None:
    asked: list[SweepConfig] = []
    monkeypatch.setattr("llm_experiments.sweep.sweep", lambda *grids: asked.extend(grids) or {})
    assert main(["train", "--model", model, "--steps", "7"]) == 0
    (grid,) = asked
    assert (grid.training.batch_size, grid.training.accumulation) == batch
    assert (grid.training.precision, grid.training.steps) == ("fp16", 7)
    assert (grid.data.corpus, grid.data.context, grid.models) == ("imdb", context, (model,))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--recipe", "table1", "--model", "openelm-3b"], [("openelm-3b", LARGE)]),
        (
            ["--recipe", "table1", "--model", "qwen2-1.5b", "qwen2-0.5b"],
            [("qwen2-1.5b", LARGE), ("qwen2-0.5b", SMALL)],
        ),
        (["--recipe", "figure1", "--model", "openelm-3b"], [("openelm-3b", LARGE)]),
        (["--recipe", "figure1", "--model", "openelm-tiny"], [("openelm-tiny", SMALL)]),
        (
            ["--recipe", "table1", "--model", "openelm-3b", "--batch-size", "8"],
            [("openelm-3b", (8, 4, 64))],
        ),
        (
            ["--recipe", "table1", "--model", "openelm-3b", "--context", "128"],
            [("openelm-3b", (16, 4, 128))],
        ),
        (["--recipe", "demo", "--model", "openelm-3b"], [("openelm-3b", (16, 1, 64))] * 2),
    ],
)
def test_the_batch_follows_the_model_unless_it_is_given(
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    expected: list[tuple[str, tuple[int, int, int]]],
) -> None:
    asked: list[SweepConfig] = []
    monkeypatch.setattr("llm_experiments.sweep.sweep", lambda *grids: asked.extend(grids) or {})
    assert main(["sweep", *options]) == 0
    found = [
        (*grid.models, (grid.training.batch_size, grid.training.accumulation, grid.data.context))
        for grid in asked
    ]
    assert found == expected


@pytest.mark.parametrize("model_name", ["openelm-tiny", "qwen2-tiny"])
@pytest.mark.parametrize("tied", [True, False])
def test_planned_operations_are_those_that_torch_counts(model_name: str, tied: bool) -> None:
    model = build_model(model_name, vocab_size=500, tied=tied)
    ids = torch.zeros(2, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    counted = counter.get_total_flops() / ids.numel()
    # torch counts full attention, we half of it; and no norms, which have few parameters.
    assert flops_per_token(model, 64) == pytest.approx(counted, rel=0.06)


@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize(("model_name", "margin"), [("openelm-tiny", 0.0), ("qwen2-tiny", 0.12)])
def test_planned_activations_are_what_autograd_keeps(
    model_name: str, margin: float, half: torch.dtype | None
) -> None:
    """Here of real tensors; a Qwen2 without data is planned with a mask that it does not need."""
    model = build_model(model_name, vocab_size=500)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", half, enabled=half is not None),
    ):
        features(model, torch.zeros(4, 32, dtype=torch.int64))
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    measured = sum(storage.nbytes() for storage in kept.values())
    planned = activation_bytes(build_model(model_name, vocab_size=500, device="meta"), 4, 32, half)
    assert planned == pytest.approx(measured, rel=margin, abs=0)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [500, 30_000])
def test_the_planned_peak_is_that_of_a_step(
    vocab_size: int, half: torch.dtype | None, accumulation: int
) -> None:
    """Of the second step, when the optimizer's moments are there, by every tensor that exists."""
    model = build_model("openelm-tiny", vocab_size=vocab_size)
    optimizer = build_optimizer(model, RunConfig(weight_decay=0.1))
    weights = torch.ones(vocab_size)
    with LiveMemory(*model.parameters()) as memory:
        for _ in range(2):
            for _ in range(accumulation):
                sequences = torch.randint(5, vocab_size, (16, 64))
                token_losses(model, sequences, weights, half)[0].objective.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    kept = activation_bytes(model, 16, 64, half)
    head = head_bytes(model, 16, 64, half, "cpu")
    planned = peak_bytes(model, kept, head, accumulates=accumulation > 1)
    # While the head's gradient goes into the body some tensors of a layer are there as well.
    assert planned < memory.peak < 1.07 * planned


def test_a_plan_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--recipe", "figure1", "--card", "a100", "--utilisation", "0.3"]) == 0
    shown = capsys.readouterr().out
    assert "3036.7" in shown
    assert "140 runs to do" in shown
    assert "45.2" in shown  # GiB: 16 bytes a parameter of the 3B model
    assert list(tmp_path.iterdir()) == []
    for wrong in (["--card", "abacus"], ["--utilisation", "1.5"], ["--utilisation", "much"]):
        assert main(["plan", *wrong]) == 2
        assert wrong[1] in capsys.readouterr().err


def test_a_plan_knows_what_is_done(tmp_path: Path, data: DataConfig) -> None:
    grid = SweepConfig(
        study="s",
        runs_dir=tmp_path,
        models=("openelm-tiny",),
        weight_decays=(0.0,),
        training=TrainingConfig(steps=2, batch_size=4),
        data=data,
        device="cpu",
        execution=ExecutorConfig(runs_in_parallel=1),
    )
    sweep(grid)
    (row,) = plan([replace(grid, weight_decays=(0.0, 1.0))])
    assert (row.runs, row.finished) == (2, 1)
    assert row.tokens == 2 * 4 * 16
    left = row.flops / (989e12 * 0.5) / 3600
    assert row.gpu_hours("h100", 0.5) == pytest.approx(left)
    assert row.gpu_hours("h100") == pytest.approx(left * 0.5 / 0.34)  # as measured


def test_a_plan_counts_a_mixtures_router_apart_and_the_experts_that_a_token_meets() -> None:
    grid = replace(recipe("demo")[0], models=("qwen2-tiny", "qwen2-moe-tiny"))
    dense, mixture = plan([grid])
    router, gates = 2 * 128 * 8, 2 * 128
    assert (dense.router_parameters, mixture.router_parameters) == (0, router)
    assert mixture.flops - dense.flops == 6 * (router + gates) * dense.tokens
