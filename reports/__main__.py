"""python -m reports build | demo"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from frequency_bins import write_atomically
from frequency_bins.command_line import parse_options, run_command
from reports.groups import collect
from reports.page import render


@dataclass(frozen=True, kw_only=True)
class Build:
    """Write one self-contained HTML page from the runs of one or more studies."""

    studies: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="STUDY")]
    """Folders runs/<study>."""
    out: Path | None = None
    """Where the page goes; by default report.html in the study's folder."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run the demo sweep (finished runs are kept), then build its page."""

    out: Path | None = None
    """Where the page goes; by default report.html in the study's folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 when something in the store was unreadable; 2 with one line on bad input."""
    return run_command(_main, argv)


def _main(argv: list[str]) -> int:
    options = parse_options(
        Build | Demo, argv, prog="python -m reports", description="Figures, tables, one page."
    )
    return build(options) if isinstance(options, Build) else demo(options)


def build(options: Build) -> int:
    """Build the page and print its path."""
    if not options.studies:
        raise ValueError("no study is named; expected one or more folders runs/<study>")
    out = options.out
    if out is None:
        if len(options.studies) > 1:
            raise ValueError(
                f"{len(options.studies)} studies share one page; expected --out FILE.html"
            )
        out = options.studies[0] / "report.html"
    if out.is_dir():
        raise ValueError(f"--out is {out}, a folder; expected a file")
    if options.out is not None and not out.parent.is_dir():
        raise ValueError(f"--out is {out}; expected a file in a folder that exists")
    collection = collect(options.studies)
    write_atomically(out, render(collection).encode("utf-8"))
    for problem in collection.problems:
        print(f"skipped {problem.path}: {problem.reason}", file=sys.stderr)
    print(out)
    return 1 if collection.problems else 0


def demo(options: Demo) -> int:
    """Run the demo sweep and build its page."""
    # Here, so that `build` needs neither transformers nor its seconds of import.
    from llm_experiments.recipes import demo as demo_recipe
    from llm_experiments.recipes import study_folder
    from llm_experiments.sweep import sweep

    config = demo_recipe()
    sweep(config)
    return build(Build(studies=(study_folder(config),), out=options.out))


if __name__ == "__main__":
    sys.exit(main())
