"""Named sweeps: functions that return a config, which the command line may then change."""

from __future__ import annotations

from collections.abc import Callable

from vision_appendix.configs import DataConfig, SweepConfig, TrainingConfig


def digits() -> SweepConfig:
    """The effect on a CPU in a minute: 8 x 8 handwritten digits, which are not mirrored.

    Balanced are 45 images a digit, 450 in all; imbalanced 11 to 114, 461 in all. The rarest are
    still learned without weight decay (with the paper's shares they would be 2 or 3 images, and
    are not), so there is something to lose.
    """
    return SweepConfig(
        study="digits",
        imbalances=("balanced:0.4", "exponential:0.1"),
        weight_decays=(0.0, 3e-3, 1e-2, 2e-2, 4e-2),
        seeds=(0, 1, 2),
        training=TrainingConfig(
            epochs=40,
            batch_size=64,
            learning_rate=0.2,
            width=8,
            crop_padding=1,
            flip=False,
            cutout=0,
            evaluate_every=10,
        ),
        data=DataConfig(dataset="digits"),
    )


def figure9() -> SweepConfig:
    """Figure 9 of the paper: ResNet9 on CIFAR-10, balanced and imbalanced, five seeds."""
    return SweepConfig(study="figure9", seeds=(0, 1, 2, 3, 4), data=DataConfig(dataset="cifar10"))


RECIPES: dict[str, Callable[[], SweepConfig]] = {
    recipe.__name__: recipe for recipe in (digits, figure9)
}


def recipe(name: str) -> SweepConfig:
    """The config of a named recipe. Raises ValueError for an unknown name."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is unknown; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]()
