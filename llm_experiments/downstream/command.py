"""python -m llm_experiments downstream: the models of a study, or one of a folder, on the tasks."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tyro.conf import OmitArgPrefixes

from llm_experiments.audit import load
from llm_experiments.configs import DataConfig, RunConfig
from llm_experiments.downstream.items import (
    Counts,
    Review,
    counts_of_corpus,
    counts_of_texts,
    encode,
)
from llm_experiments.downstream.measure import measure
from llm_experiments.downstream.results import (
    Downstream,
    differences,
    read_downstream,
    scores,
    write_downstream,
)
from llm_experiments.text.corpora import CorpusConfig, load_corpus
from llm_experiments.text.labelled import labelled_texts
from llm_experiments.text.preparation import PreparedCorpus, prepare
from run_store import Run, read_study, resolve_device
from run_store.circumstances import of_manifest
from run_store.command_line import check_at_least, one_line, parse_options, printable

Labelled = tuple[list[Review], np.ndarray]
_COMPARED = ("accuracy", "mean reciprocal rank", "loss (nats)")


@dataclass(frozen=True, kw_only=True)
class DownstreamOptions:
    """Sentiment, cloze and held-out loss of models, by how rare the tokens are."""

    study: tuple[Path, ...] = ()
    """one or more folders runs/<study>, of runs kept with --save-model"""
    checkpoint: Path | None = None
    """in their place any local folder in transformers' format (safetensors)"""
    text: OmitArgPrefixes[CorpusConfig] = field(default_factory=lambda: CorpusConfig(corpus="imdb"))
    label_column: str = "label"
    """column of the corpus that holds the sentiment"""
    reviews: int | None = None
    """learn and test on so many reviews each (a fixed random choice), instead of all"""
    context: int = 128
    """cut each review at this many tokens (the runs of a study have their own)"""
    device: str = "auto"
    """auto, cpu or cuda"""
    out: Path | None = None
    """folder for the results of --checkpoint; those of a study lie with its runs"""


def downstream_command(program: str, argv: list[str]) -> int:
    """Measure what is missing, and print scores; of a study also what weight decay changed."""
    options = parse_options(DownstreamOptions, argv, prog=f"{program} downstream")
    if bool(options.study) == (options.checkpoint is not None):
        raise ValueError("expected either --study or --checkpoint")
    check_at_least("context", options.context, 2)
    if options.checkpoint is not None:
        measured = of_checkpoint(options)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            write_downstream(options.out, measured)
        _print(Console(highlight=False, markup=False), {options.checkpoint.name: measured})
        return 0
    for study in options.study:
        of_study(study, options)
    return 0


def of_checkpoint(options: DownstreamOptions) -> Downstream:
    """The model of a folder; its counts are those of the corpus that is named.

    Raises ValueError as `audit.load`, `labelled_texts` and `measure`, and for a tokenizer without
    a fast form.
    """
    assert options.checkpoint is not None
    reviews = {split: _labelled(options.text, split, options) for split in ("train", "test")}
    model, tokenizer = load(options.checkpoint, resolve_device(options.device))
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        raise ValueError(f"{str(options.checkpoint)!r} has a slow tokenizer; expected a fast one")
    fast.no_truncation()  # as an earlier call of it may have left it
    fast.no_padding()
    sides = [
        (list(encode(fast, texts, options.context)), classes) for texts, classes in reviews.values()
    ]
    size = model.get_input_embeddings().num_embeddings
    counts = counts_of_texts(fast, load_corpus(options.text), options.context, size)
    return measure(model, counts, *sides)


def of_study(study: Path, options: DownstreamOptions) -> dict[str, Downstream]:
    """Measure the runs of a study that have no results yet; print what weight decay changed.

    Raises ValueError for a study without a kept model, and as `labelled_texts` and `measure`.
    """
    runs = read_study(study, check_records=False).runs
    kept = [run for run in runs if (run.folder / "model" / "config.json").is_file()]
    if not kept:
        raise ValueError(
            f"no finished run of {study} has kept its model; expected some, by a sweep with "
            "--save-model"
        )
    for run in runs:
        if run not in kept:
            print(f"left out: run {run.id} has kept no model (--save-model)", file=sys.stderr)
    found = {run.id: read_downstream(run.folder) for run in kept}
    missing = [run for run in kept if not _is_whole(found[run.id], options.reviews)]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("models", total=len(missing))
        for run, measured in zip(missing, _of_runs(missing, options), strict=True):
            write_downstream(run.folder, measured)
            found[run.id] = measured
            progress.advance(task)
    whole = {run: measured for run, measured in found.items() if measured is not None}
    _print_differences(Console(highlight=False, markup=False), kept, whole)
    print(f"{study}: {len(kept)} models measured, {len(missing)} of them now")
    return whole


def _is_whole(measured: Downstream | None, reviews: int | None) -> bool:
    return measured is not None and reviews in (None, len(measured.sentiment_correct))


def _of_runs(runs: Sequence[Run], options: DownstreamOptions) -> Iterator[Downstream]:
    """Each run's results in turn; on a CPU by a process on every core."""
    workers = min(len(runs), os.cpu_count() or 1)
    if workers < 2 or resolve_device(options.device).type != "cpu":
        yield from (of_run(run, options) for run in runs)
        return
    here = {"mp_context": get_context("spawn"), "initializer": torch.set_num_threads}
    with ProcessPoolExecutor(workers, **here, initargs=(1,)) as pool:
        yield from pool.map(functools.partial(of_run, options=options), runs)


def of_run(run: Run, options: DownstreamOptions) -> Downstream:
    """A finished run's own model, with the counts that it was trained on."""
    data, _ = of_manifest(run, DataConfig, RunConfig)
    if options.text.data_dir is not None:
        data = replace(data, data_dir=options.text.data_dir)
    train, test, counts = _asked(data, options.label_column, options.reviews)
    model, _ = load(run.folder / "model", resolve_device(options.device))
    return measure(model, counts, train, test)


@functools.lru_cache(maxsize=2)
def _asked(
    data: DataConfig, label_column: str, number: int | None
) -> tuple[Labelled, Labelled, Counts]:
    """What the models of one corpus are asked, and what they were trained on."""
    texts = [
        labelled_texts(data, split, label_column=label_column, number=number)
        for split in ("train", "test")
    ]
    corpus: PreparedCorpus = prepare(data)
    sides = [
        (list(encode(corpus.tokenizer(), reviews, data.context)), classes)
        for reviews, classes in texts
    ]
    return sides[0], sides[1], counts_of_corpus(corpus)


def _labelled(
    text: CorpusConfig, split: str, options: DownstreamOptions
) -> tuple[list[str], np.ndarray]:
    return labelled_texts(text, split, label_column=options.label_column, number=options.reviews)


def _print(console: Console, found: Mapping[str, Downstream]) -> None:
    for label, measured in found.items():
        table = Table(printable(label), "")
        for measure_, value in scores(measured).items():
            if measure_.score in _COMPARED:
                table.add_row(measure_.name, f"{value:.4f}")
        console.print(table)


def _print_differences(console: Console, runs: Sequence[Run], found: dict[str, Downstream]) -> None:
    """What the largest weight decay of each setting changed, seeds and items paired."""
    settings: dict[str, dict[float, dict[int, str]]] = {}
    for run in runs:
        config = run.manifest["config"]
        shared = {k: v for k, v in config.items() if k not in ("weight_decay", "seed")}
        cells = settings.setdefault(json.dumps(shared, sort_keys=True), {})
        cells.setdefault(config["weight_decay"], {})[config["seed"]] = run.id
    labels = {run.id: str(run.manifest.get("label", run.id)) for run in runs}
    for cells in settings.values():
        low, high = min(cells), max(cells)
        seeds = sorted(set(cells[low]) & set(cells[high]))
        if low == high or not seeds:
            continue
        table = Table("", f"λ = {low:g}", f"λ = {high:g}", "difference, 95 %", "items")
        try:
            sides = [[found[cells[decay][seed]] for seed in seeds] for decay in (low, high)]
            for d in (d for d in differences(*sides) if d.measure.score in _COMPARED):
                band = f"{d.band.mean:+.4f} ± {d.band.half_width:.4f}"
                table.add_row(
                    d.measure.name, f"{d.first:.4f}", f"{d.second:.4f}", band, f"{d.items:,}"
                )
        except ValueError as error:
            console.print(f"not compared: {one_line(error)}")
            continue
        console.print(f"{printable(labels[cells[high][seeds[0]]])} ... ({len(seeds)} seeds)")
        console.print(table)
