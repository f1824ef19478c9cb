"""Named sweeps: functions that return one or more grids, which the command line may change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from llm_experiments.configs import DataConfig, SweepConfig, TrainingConfig


def demo() -> tuple[SweepConfig, ...]:
    """Two tiny models that come close to memorising 10,000 tokens: minutes on two CPU cores.

    The second grid repairs the first at its strongest decay, by weighting rare tokens more.
    """
    damage = SweepConfig(
        study="demo",
        models=("openelm-tiny", "qwen2-tiny"),
        training=TrainingConfig(steps=320, batch_size=16, learning_rate=3e-3, evaluate_every=20),
        data=DataConfig(vocab_size=1024, context=64, packing=True, num_sequences=160),
    )
    repair = replace(
        damage,
        models=("openelm-tiny",),
        weight_decays=(1.0,),
        loss_weight_exponents=(0.25, 0.5),
    )
    return damage, repair


def table1() -> tuple[SweepConfig, ...]:
    """Table 1 and Figures 4 to 7 of the paper: OpenELM 270M on IMDB, five seeds."""
    grid = SweepConfig(
        study="table1",
        models=("openelm-270m",),
        seeds=(0, 1, 2, 3, 4),
        data=DataConfig(corpus="imdb", vocab_size=32005, context=128),
    )
    return (grid,)


RECIPES: dict[str, Callable[[], tuple[SweepConfig, ...]]] = {
    recipe.__name__: recipe for recipe in (demo, table1)
}


def recipe(name: str) -> tuple[SweepConfig, ...]:
    """The grids of a named recipe. Raises ValueError for an unknown name."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is unknown; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]()
