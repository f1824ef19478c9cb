"""python -m llm_experiments audit"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tyro.conf import OmitArgPrefixes

from llm_experiments.text.corpora import CorpusConfig, load_corpus
from run_store import resolve_device
from run_store.command_line import check_at_least, parse_options, printable

if TYPE_CHECKING:
    import pandas as pd

    from llm_experiments.audit.comparing import Comparison
    from llm_experiments.audit.result import TextTable, TokenAudit

_DTYPES = Literal["auto", "float32", "bfloat16", "float16"]
_HEAD = {
    "bin": "training count",
    "measured": "next tokens",
    "embedding_norm": "row norm, input",
    "head_norm": "row norm, head",
    "hardly_reachable": "hardly reached",
    "share_losing": "share that loses",
    "learning_speed": "learning speed",
}
_SHARES = ("hardly_reachable", "share_losing")


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Loss and accuracy by token frequency of a model that exists."""

    checkpoint: tuple[str, ...]
    """folder in transformers' format (safetensors) or hub name, owner/name@revision; of several,
    such as a training's steps in their order, the loss over training"""
    against: str | None = None
    """another checkpoint: what the first loses or wins over it, token by token"""
    tokenizer: str | None = None
    """folder or hub name of the tokenizer; default: that of the checkpoint"""
    text: OmitArgPrefixes[CorpusConfig] = field(default_factory=CorpusConfig)
    counts: Path | None = None
    """file with a count for each id, token or text (.csv, .tsv, .json), to sort tokens into bins"""
    counts_from: str | None = None
    """the corpus whose counts sort tokens into bins; default: the one measured on"""
    counts_data_dir: Path | None = None
    """folder of that corpus"""
    counts_text_column: str | None = None
    """its column of text; default: that of the text measured on"""
    context: int = 128
    """each document is cut at this many tokens; with --stride, the tokens of a window"""
    stride: int | None = None
    """read whole documents, in windows each so many tokens further than the one before"""
    documents: int | None = None
    """measure on the first so many documents only"""
    limit: int | None = None
    """measure on so many documents only, drawn at random"""
    seed: int = 0
    """of that draw"""
    dtype: _DTYPES = "auto"
    """type of weights and products; auto: the checkpoint's (losses are float32 in any case)"""
    batch_size: int | Literal["auto"] = "auto"
    """windows at a time; auto: as many as suit the device, fewer where it has no room"""
    device: str = "auto"
    """auto, cpu or cuda"""
    out: Path | None = None
    """write a .csv or .parquet file with a row for every token; `reports build` makes a page of the
    latter"""


def audit_command(program: str, argv: list[str]) -> int:
    """Measure, print the tables, and write what is asked for."""
    from transformers.utils import logging

    from llm_experiments.audit.comparing import compare
    from llm_experiments.audit.result import write_tokens

    logging.set_verbosity_error()  # what is wrong with a checkpoint, `load` says in one line
    logging.disable_progress_bar()
    options = parse_options(Audit, argv, prog=f"{program} audit")
    _check(options)
    audits = _audits(options)
    last = audits[-1] if options.against is None else audits[0]
    tables = [_by_frequency(last.by_frequency())]
    if last.words is not None and len(last.words):
        tables.append(_words(last))
    tokens = last.tokens
    if options.against is not None:
        comparison = compare(*audits)
        tables += [_against(comparison, options.against)]
        of_other = audits[1].tokens["loss"]
        tokens = tokens.assign(against_loss=of_other, difference=comparison.tokens)
    elif len(audits) > 1:
        table, tokens = _over_training(options, audits)
        tables.append(table)
    console = Console(highlight=False)
    for table in tables:
        shown = Table(*(printable(name) for name in table.head), title=table.title)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    said = _summary(last)
    if options.against is not None:
        said += _law(comparison)
    for line in said:
        console.print(line)
    if options.out is not None:
        write_tokens(options.out, tokens, tables, options.checkpoint[-1])
    return 0


def _audits(options: Audit) -> list[TokenAudit]:
    """One for each checkpoint, then the other, on the same documents."""
    import torch

    from llm_experiments.audit import audit
    from llm_experiments.audit.checkpoints import load
    from llm_experiments.audit.counts import read_counts

    device = resolve_device(options.device)
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    names = [*options.checkpoint, *([options.against] if options.against else [])]
    # The first is looked at before the corpus is read, which can take long.
    loaded = load(names[0], device, dtype=dtype, tokenizer=options.tokenizer)
    documents = load_corpus(options.text)
    measured, counted = _chosen(options, documents), documents
    if options.counts_from is not None:
        other = replace(
            options.text,
            corpus=options.counts_from,
            data_dir=options.counts_data_dir,
            text_column=options.counts_text_column or options.text.text_column,
        )
        counted = load_corpus(other)
    counts = None
    if options.counts is not None:
        model, tokenizer = loaded
        size = model.get_input_embeddings().num_embeddings
        counts = read_counts(options.counts, tokenizer, size)
    audits: list[TokenAudit] = []
    error = Console(stderr=True)  # elsewhere than on a terminal it would leave an empty line
    with Progress(console=error, transient=True, disable=not error.is_terminal) as progress:
        for place, name in enumerate(names):
            if place:
                loaded = load(name, device, dtype=dtype, tokenizer=options.tokenizer)
            task = progress.add_task(printable(Path(name).name), total=len(measured))
            model, tokenizer = loaded
            found = audit(
                model,
                tokenizer,
                measured,
                context=options.context,
                stride=options.stride,
                training_counts=counts,
                training_documents=counted,
                batch_size=None if options.batch_size == "auto" else options.batch_size,
                report=lambda done, task=task: progress.update(task, completed=done),
            )
            del model, loaded  # before the next one is read
            audits.append(found)
            if counts is None or len(counts) != found.losses.num_classes:
                counts = torch.tensor(found.tokens["training_count"].to_numpy())
    return audits


def _chosen(options: Audit, documents: list[str]) -> list[str]:
    documents = documents[: options.documents]
    if options.limit is None or options.limit >= len(documents):
        return documents
    places = random.Random(options.seed).sample(range(len(documents)), options.limit)
    return [documents[place] for place in sorted(places)]


def _check(options: Audit) -> None:
    """ValueError for what would only be found after the measurement."""
    check_at_least("context", options.context, 2)
    for name in ("documents", "limit", "stride", "batch_size"):
        if isinstance(value := getattr(options, name), int):
            check_at_least(name.replace("_", "-"), value, 1)
    if options.stride is not None and options.stride >= options.context:
        raise ValueError(f"stride is {options.stride}; expected less than the context")
    if options.against is not None and len(options.checkpoint) > 1:
        raise ValueError(f"against goes with one checkpoint; expected no {len(options.checkpoint)}")
    if options.counts is not None and options.counts_from is not None:
        raise ValueError("both counts and counts-from are given; expected one of them")
    out = options.out
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"out is {str(out)!r}; expected a file in a folder that is there")
    if out is not None and out.suffix not in (".csv", ".parquet"):
        raise ValueError(f"out is {str(out)!r}; expected a name that ends in .csv or .parquet")


def _by_frequency(frame: pd.DataFrame, title: str = "Tokens by training count") -> TextTable:
    """Rows of text; nothing stands for what was not measured."""
    from llm_experiments.audit.result import TextTable

    head = [str(_HEAD.get(name, name)) for name in frame.columns]
    rows = []
    for row in frame.itertuples(index=False):
        cells = []
        for name, value in zip(frame.columns, row, strict=True):
            if isinstance(value, str):
                cells.append(value)
            elif value is None or math.isnan(value):
                cells.append("")
            elif name in ("types", "measured"):
                cells.append(f"{int(value):,}")
            else:
                cells.append(f"{value:.1%}" if name in _SHARES else f"{value:.3f}")
        rows.append(cells)
    return TextTable(title=title, head=head, rows=rows)


def _words(found: TokenAudit) -> TextTable:
    from llm_experiments.audit.result import by_frequency

    assert found.words is not None
    frame = by_frequency(found.words).rename(columns={"types": "different", "measured": "words"})
    frame = frame.astype({"different": str, "words": str})
    return _by_frequency(frame, "Words (the sum over their tokens) by training count")


def _against(comparison: Comparison, other: str) -> TextTable:
    title = f"Loss less that of {printable(other)}, nats, 95 % interval over documents"
    return _by_frequency(comparison.bins, title)


def _over_training(options: Audit, audits: list[TokenAudit]) -> tuple[TextTable, pd.DataFrame]:
    from llm_experiments.audit.comparing import over_training

    steps = _steps(options.checkpoint)
    frame = over_training(steps, audits)
    tokens = audits[-1].tokens
    for step, found in zip(steps[:-1], audits[:-1], strict=True):
        tokens = tokens.assign(**{f"loss_{step}": found.tokens["loss"]})
    return _by_frequency(frame, "Loss over training, by step"), tokens


def _steps(names: tuple[str, ...]) -> list[int]:
    """The last number in each name, where they increase; else the first is 0, the next 1 ..."""
    found = [re.findall(r"\d+", name) for name in names]
    steps = [int(numbers[-1]) for numbers in found if numbers]
    increase = all(a < b for a, b in pairwise(steps))
    return steps if increase and len(steps) == len(names) else list(range(len(names)))


def _summary(found: TokenAudit) -> list[str]:
    average, size = found.average_loss, len(found.tokens)
    bits = "" if found.text is None else f", {found.text.bits_per_byte:.4f} bits a byte"
    lines = [
        f"average loss {average:.4f}, token-balanced {found.token_balanced_loss:.4f} nats{bits}"
    ]
    if average > 1.1 * math.log(size):
        lines.append(
            f"That is more than the {math.log(size):.2f} nats of guessing among the model's "
            "tokens: do checkpoint and tokenizer belong together?"
        )
    return lines


def _law(comparison: Comparison) -> list[str]:
    law = comparison.law
    if law is None:
        return [f"no law of the excess: {comparison.why_no_law}"]
    return [
        f"excess {law.amplitude:.3g} (1 + n/{law.saturation_count:.3g})^-{law.exponent:.3g} nats "
        f"over the training count n, R² {law.r_squared:.4f} of its log"
    ]
