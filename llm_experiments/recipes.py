"""Named sweeps: functions that return a config, which the command line may then change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llm_experiments.configs import DataConfig, SweepConfig, TrainingConfig


def demo() -> SweepConfig:
    """Two tiny models that come close to memorising 12,000 tokens: minutes on two CPU cores."""
    return SweepConfig(
        study="demo",
        models=("openelm-tiny", "qwen2-tiny"),
        training=TrainingConfig(steps=400, batch_size=16, learning_rate=3e-3, evaluate_every=20),
        data=DataConfig(vocab_size=1024, context=64, packing=True, num_sequences=192),
    )


def table1() -> SweepConfig:
    """Table 1 and Figures 4 to 7 of the paper: OpenELM 270M on IMDB, five seeds."""
    return SweepConfig(
        study="table1",
        models=("openelm-270m",),
        seeds=(0, 1, 2, 3, 4),
        data=DataConfig(corpus="imdb", vocab_size=32005, context=128),
    )


RECIPES: dict[str, Callable[[], SweepConfig]] = {
    recipe.__name__: recipe for recipe in (demo, table1)
}


def recipe(name: str) -> SweepConfig:
    """The config of a named recipe. Raises ValueError for an unknown name."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is unknown; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]()


def study_folder(config: SweepConfig) -> Path:
    """Where the runs of a sweep live."""
    return config.runs_dir / config.study
