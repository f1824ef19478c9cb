"""python -m llm_experiments audit"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tyro.conf import OmitArgPrefixes

from frequency_bins import FrequencyBins, average_loss, token_balanced_loss
from llm_experiments.text.corpora import CorpusConfig, load_corpus
from run_store import resolve_device, write_atomically
from run_store.command_line import check_at_least, parse_options


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Loss and accuracy by token frequency of a model that exists."""

    checkpoint: Path
    """local folder in transformers' format (safetensors)"""
    text: OmitArgPrefixes[CorpusConfig] = field(default_factory=CorpusConfig)
    counts_from: str | None = None
    """the corpus whose counts sort tokens into bins; default: the one measured on"""
    counts_data_dir: Path | None = None
    """folder of that corpus"""
    counts_text_column: str | None = None
    """its column of text; default: that of the text measured on"""
    context: int = 128
    """each document is cut at this many tokens"""
    documents: int | None = None
    """measure on the first so many documents only"""
    device: str = "auto"
    """auto, cpu or cuda"""
    out: Path | None = None
    """write a CSV file with a line for every token"""


def audit_command(program: str, argv: list[str]) -> int:
    """Measure, print the table by frequency, and write what is asked for."""
    from transformers.utils import logging

    from llm_experiments.audit.checkpoints import load
    from llm_experiments.audit.measuring import measure, next_token_counts, tokenize
    from llm_experiments.audit.writing import to_csv

    logging.set_verbosity_error()  # what is wrong with a checkpoint, `load` says in one line
    logging.disable_progress_bar()
    options = parse_options(Audit, argv, prog=f"{program} audit")
    _check(options)
    model, tokenizer = load(options.checkpoint, resolve_device(options.device))
    documents = load_corpus(options.text)
    measured = tokenize(tokenizer, documents[: options.documents], options.context)
    if options.counts_from is not None:
        other = replace(
            options.text,
            corpus=options.counts_from,
            data_dir=options.counts_data_dir,
            text_column=options.counts_text_column or options.text.text_column,
        )
        counted = tokenize(tokenizer, load_corpus(other), options.context)
    elif len(documents) == len(documents[: options.documents]):
        counted = measured
    else:
        counted = tokenize(tokenizer, documents, options.context)
    shown = Console(stderr=True)  # elsewhere than on a terminal it would leave an empty line
    with Progress(console=shown, transient=True, disable=not shown.is_terminal) as progress:
        task = progress.add_task("audit", total=len(measured))
        losses = measure(model, measured, report=lambda done: progress.update(task, completed=done))
    metrics = losses.metrics
    bins = FrequencyBins.powers(next_token_counts(counted, metrics.num_classes), base=3)
    table = Table("training count", "types", "measured tokens", "loss", "accuracy")
    for label, members in (
        *((label, bins.index == number) for number, label in enumerate(bins.labels)),
        ("never", bins.index < 0),
    ):
        seen = members & (metrics.count > 0)
        means = (metrics.loss[seen].mean(), metrics.accuracy[seen].mean())
        shown = [f"{float(mean):.3f}" if bool(seen.any()) else "" for mean in means]
        tokens = int(metrics.count[members].sum())
        table.add_row(label, f"{int(members.sum()):,}", f"{tokens:,}", *shown)
    console = Console(highlight=False)
    console.print(table)
    average = float(average_loss(metrics.count, metrics.loss))
    balanced = float(token_balanced_loss(metrics.count, metrics.loss))
    console.print(f"average loss {average:.4f}, token-balanced {balanced:.4f} nats")
    if average > 1.1 * math.log(len(tokenizer)):
        console.print(
            f"That is more than the {math.log(len(tokenizer)):.2f} nats of guessing among the "
            "tokenizer's tokens: do checkpoint and tokenizer belong together?"
        )
    if options.out is not None:
        write_atomically(options.out, to_csv(tokenizer, bins.class_counts, metrics))
    return 0


def _check(options: Audit) -> None:
    """ValueError for what would only be found after the measurement."""
    check_at_least("context", options.context, 2)
    if options.documents is not None:
        check_at_least("documents", options.documents, 1)
    if options.out is not None and (options.out.is_dir() or not options.out.parent.is_dir()):
        raise ValueError(f"out is {str(options.out)!r}; expected a file in a folder that is there")
