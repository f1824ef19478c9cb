"""python -m reports build | export | compare | prompt | shrink | demo"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from reports import tables
from reports.export import export, saved
from reports.figures import figure_2
from reports.page import render
from reports.prompt import split
from reports.reading import NOT_EVALUATED, Collection, collect, joined
from reports.shrunken import shrink
from reports.table_views import comparison_view
from run_store import write_atomically
from run_store.command_line import parse_options, run_command

STUDIES = tyro.conf.arg(metavar="STUDY [STUDY ...]", help_behavior_hint="")


@dataclass(frozen=True, kw_only=True)
class Build:
    """Write one self-contained HTML page from the runs of one or more studies."""

    studies: Annotated[tuple[Path, ...], tyro.conf.Positional, STUDIES]
    """Folders runs/<study>; or the tokens.parquet of one audit."""
    out: Path | None = None
    """Where the page goes; by default report.html in the study's folder."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write figures (SVG, PDF) and tables (CSV, parquet, LaTeX) of one or more studies."""

    studies: Annotated[tuple[Path, ...], tyro.conf.Positional, STUDIES]
    """Folders runs/<study>."""
    out: Path | None = None
    """Folder for the files; by default export/ in the study's folder."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Write one page that sets two studies side by side."""

    first: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FIRST")]
    """A folder runs/<study>."""
    second: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SECOND")]
    """The folder of the other."""
    out: Path | None = None
    """Where the page goes; by default compare-<second>.html in the first study's folder."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Draw a text with its rare and its frequent tokens in two colours (Figure 2)."""

    study: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STUDY")]
    """A folder runs/<study>, whose training counts say what is rare."""
    text: str
    """The text; any."""
    tokenizer: Path | None = None
    """The tokenizer.json of the prepared corpus; without it the text is split by longest match."""
    out: Path | None = None
    """A .svg or .pdf file; by default prompt.svg in the study's folder."""


@dataclass(frozen=True, kw_only=True)
class Shrink:
    """Write each finished run of a study as one small file, which `build` reads like the run."""

    study: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STUDY")]
    """A folder runs/<study>."""
    out: Path
    """Folder for the files, <run-id>.json."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run the demo's sweeps (finished runs are kept), then build their page."""

    out: Path | None = None
    """Where the page goes; by default report.html in the study's folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 when something in the store was unreadable; 2 with one line on bad input."""
    torch.set_num_threads(1)  # a report's tensors are small: threads would wait for each other
    return run_command(_main, argv)


def _main(argv: list[str]) -> int:
    options = parse_options(
        Build | Export | Compare | Prompt | Shrink | Demo,
        argv,
        prog="python -m reports",
        description="Figures, tables and one page from runs/<study>.",
    )
    commands: dict[type, Callable[[Any], int]] = {
        Build: build, Export: export_files, Compare: compare, Prompt: prompt, Shrink: shrink_runs,
        Demo: demo,
    }  # fmt: skip
    return commands[type(options)](options)


def build(options: Build) -> int:
    """Build the page and print its path."""
    if len(options.studies) == 1 and (path := options.studies[0]).suffix == ".parquet":
        # Here, so that a page of runs needs neither transformers nor its seconds of import.
        from reports.audit_page import audit_page, read_audit

        out = _file(options.out, path.with_suffix(".html"))
        write_atomically(out, audit_page(read_audit(path)).encode("utf-8"))
        print(out)
        return 0
    out = _file(options.out, _beside(options.studies, options.out) / "report.html")
    collection = collect(options.studies)
    write_atomically(out, render(collection).encode("utf-8"))
    return _done(out, collection)


def export_files(options: Export) -> int:
    """Write the files and print their folder. ValueError if no run has a final loss."""
    out = options.out or _beside(options.studies, options.out) / "export"
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is {out}, a file; expected a folder")
    collection = collect(options.studies)
    if not collection.groups:
        raise ValueError(f"{_no_final_loss(collection)}; nothing to export")
    export(collection.groups, out)
    return _done(out, collection)


def compare(options: Compare) -> int:
    """Build the page of two studies side by side and print its path."""
    default = options.first / f"compare-{options.second.resolve().name}.html"
    out = _file(options.out, default)
    sides = [collect([folder]) for folder in (options.first, options.second)]
    names = ["/".join(side.studies) for side in sides]
    frame = tables.comparison(*(side.groups for side in sides))
    views = [comparison_view(frame, *names)] if len(frame) else []
    both = joined(*sides)
    write_atomically(out, render(both, first_tables=views).encode("utf-8"))
    return _done(out, both)


def prompt(options: Prompt) -> int:
    """Draw Figure 2 for a text and print the file's path. ValueError if no run has a final loss."""
    out = _file(options.out, options.study / "prompt.svg")
    if out.suffix not in (".svg", ".pdf"):
        raise ValueError(f"--out is {out}; expected a name that ends in .svg or .pdf")
    collection = collect([options.study])
    if not collection.groups:
        raise ValueError(f"{_no_final_loss(collection)}; nothing says what is rare")
    group = collection.groups[0]
    tokens = split(options.text, group["label"].values.tolist(), options.tokenizer)
    write_atomically(out, saved(figure_2(group, tokens), out.suffix[1:]))
    return _done(out, collection)


def demo(options: Demo) -> int:
    """Run the demo's sweeps, of language models and of images, and build their page."""
    # Here, as above.
    from llm_experiments import recipes, sweep
    from vision_appendix.recipes import digits
    from vision_appendix.sweep import sweep as sweep_images

    grids, images = recipes.demo(), digits()
    counts = (sweep.sweep(*grids), sweep_images(images))
    page = _file(options.out, grids[0].study_folder / "report.html")
    done = [status for swept in counts for status, number in swept.items() if number]
    if page.exists() and set(done) <= {sweep.EARLIER}:
        print(page)
        return 0
    studies = (grids[0].study_folder, images.study_folder)
    return build(Build(studies=studies, out=page))


def shrink_runs(options: Shrink) -> int:
    """Write the small files and print their paths and sizes."""
    for path in shrink(options.study, options.out):
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


def _no_final_loss(collection: Collection) -> str:
    """That no run of the studies has final losses, and why some have none."""
    found = f"no run of {', '.join(collection.studies)} has a final loss"
    streamed = any(note.reason == NOT_EVALUATED for note in collection.unfinished)
    return f"{found} (some {NOT_EVALUATED})" if streamed else found


def _beside(studies: Sequence[Path], out: Path | None) -> Path:
    """The folder that the output of these studies goes to where --out does not say."""
    if not studies:
        raise ValueError("no study is named; expected one or more folders runs/<study>")
    if len(studies) > 1 and out is None:
        raise ValueError(f"{len(studies)} studies share one output; expected --out")
    return studies[0]


def _file(named: Path | None, default: Path) -> Path:
    if named is None:
        return default
    if named.is_dir() or not named.parent.is_dir():
        raise ValueError(f"--out is {named}; expected a file in a folder that exists")
    return named


def _done(out: Path, collection: Collection) -> int:
    for problem in collection.problems:
        print(f"skipped {problem.path}: {problem.reason}", file=sys.stderr)
    print(out)
    return 1 if collection.problems else 0


if __name__ == "__main__":
    sys.exit(main())
