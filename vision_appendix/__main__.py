"""python -m vision_appendix train | sweep | status | retry | plan"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from rich.console import Console
from rich.table import Table
from tyro.conf import OmitArgPrefixes

from run_store.command_line import parse_options, run_command, run_subcommand, take_option
from run_store.executors.command_line import (
    StudyOptions,
    print_counts,
    retry_command,
    status_command,
)
from vision_appendix.configs import DataConfig, RunConfig, SweepConfig, TrainingConfig
from vision_appendix.recipes import recipe

_PROGRAM = "python -m vision_appendix"


@dataclass(frozen=True, kw_only=True)
class Train(StudyOptions):
    """Train one run."""

    run: OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one line on bad input."""
    return run_command(_main, argv)


def _main(argv: list[str]) -> int:
    commands = {
        "train": _train,
        "sweep": _sweep,
        "status": lambda rest: status_command(_PROGRAM, rest),
        "retry": _retry,
        "plan": _plan,
    }
    recipes = "sweep and plan take --recipe digits | figure9; with --data-dir it is figure9"
    return run_subcommand(_PROGRAM, commands, argv, recipes)


def _train(argv: list[str]) -> int:
    name, rest = _take_recipe(argv)
    like = recipe(name)
    default = Train(run=like.cells()[0], data=like.data)
    options = parse_options(Train, rest, prog=f"{_PROGRAM} train", default=default)
    run: RunConfig = options.run
    shared = {f.name: getattr(run, f.name) for f in fields(TrainingConfig)}
    other = {name: value for name, value in vars(options).items() if name != "run"}
    return _run(
        SweepConfig(
            **other,
            imbalances=(run.imbalance,),
            class_counts=run.class_counts,
            shuffle_classes=run.shuffle_classes,
            weight_decays=(run.weight_decay,),
            seeds=(run.seed,),
            decays=(run.decay,),
            training=TrainingConfig(**shared),
        )
    )


def _sweep(argv: list[str]) -> int:
    return _run(_sweep_config("sweep", argv))


def _run(config: SweepConfig) -> int:
    from vision_appendix.sweep import sweep  # after the options are read: it imports for seconds

    return print_counts(config.study_folder, sweep(config))


def _retry(argv: list[str]) -> int:
    from vision_appendix.sweep import retry

    return retry_command(_PROGRAM, argv, retry)


def _plan(argv: list[str]) -> int:
    config = _sweep_config("plan", argv)
    from vision_appendix.sweep import plan

    planned = plan(config)
    table = Table("run", "images", "steps", "time")
    for cell, seconds in planned:
        time = "done" if seconds is None else _duration(seconds)
        table.add_row(cell.describe(), f"{sum(cell.class_counts):,}", f"{cell.steps:,}", time)
    console = Console(highlight=False)
    console.print(table)
    total = sum(seconds or 0.0 for _, seconds in planned)
    console.print(f"{len(planned)} runs, {_duration(total)} of training steps yet to do")
    return 0


def _sweep_config(command: str, argv: list[str]) -> SweepConfig:
    name, rest = _take_recipe(argv)
    named = recipe(name)
    config = parse_options(SweepConfig, rest, prog=f"{_PROGRAM} {command}", default=named)
    assert isinstance(config, SweepConfig)
    if config.shuffle_classes and config.study == named.study:  # which is another study
        return replace(config, study=f"{named.study}-shuffled")
    return config


def _take_recipe(argv: list[str]) -> tuple[str, list[str]]:
    has_folder = any(argument.replace("_", "-").startswith("--data-dir") for argument in argv)
    return take_option(argv, "--recipe", "figure9" if has_folder else "digits")


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


if __name__ == "__main__":
    sys.exit(main())
