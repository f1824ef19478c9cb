"""python -m llm_experiments prepare | train | sweep | status | retry | plan | audit | ..."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from rich.console import Console
from rich.table import Table
from tyro.conf import OmitArgPrefixes

from frequency_bins import (
    FrequencyBins,
    coverage,
    percentile,
)
from llm_experiments.configs import DataConfig, Parallel, RunConfig, SweepConfig, TrainingConfig
from llm_experiments.models.presets import MODEL_NAMES
from llm_experiments.recipes import for_model, published, recipe
from run_store.command_line import (
    leave,
    parse_options,
    run_command,
    run_subcommand,
    take_option,
)
from run_store.executors.command_line import (
    StudyOptions,
    print_counts,
    retry_command,
    status_command,
)

_PROGRAM = "python -m llm_experiments"


@dataclass(frozen=True, kw_only=True)
class Train(StudyOptions):
    """Train one run; for a published model the defaults are the paper's recipe."""

    run: OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    parallel: Parallel = "ddp"
    """under torchrun: every process holds the whole model (ddp) or a part of it (fsdp)"""
    save_model: bool = False
    """keep the trained model in the run's folder, in transformers' format"""


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Write tokenizer, token ids and counts of a corpus, and show how uneven it is."""

    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    vocab_sizes: tuple[int, ...] | None = None
    """smaller vocabularies to show the share of rare entries for; default: halves"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 when a run failed; 2 with one line on bad input."""
    return run_command(_main, argv)


def _main(argv: list[str]) -> int:
    commands = {
        "prepare": _prepare,
        "train": _train,
        "sweep": _sweep,
        "status": lambda rest: status_command(_PROGRAM, rest),
        "retry": _retry,
        "plan": _plan,
        "audit": _audit,
        "downstream": _downstream,
        "predict-decay": _predict_decay,
    }
    return run_subcommand(_PROGRAM, commands, argv)


def _sweep(argv: list[str]) -> int:
    name, rest = take_option(argv, "--recipe", "demo")
    return _run(*_changed(recipe(name), rest))


def _plan(argv: list[str]) -> int:
    from llm_experiments.plan import plan

    card, rest = take_option(argv, "--card", "h200")
    share, rest = take_option(rest, "--utilisation", "")
    name, rest = take_option(rest, "--recipe", "demo")
    try:
        utilisation = float(share) if share else None
    except ValueError:
        raise ValueError(f"--utilisation is {share!r}; expected a number") from None
    rows = plan(_changed(recipe(name), rest))
    sizes = {"state": "state_bytes", "activ.": "activation_bytes"}
    sizes |= {"head": "head_bytes", "peak": "peak_bytes"}
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    table.add_column("corpus", no_wrap=True)
    for heading in ("done", "params", "tokens", "FLOP", *sizes, f"{card} h"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(row.model, row.corpus, f"{row.finished}/{row.runs}"),
            *(
                f"{row.parameters / 1e6:.1f}M",
                f"{row.tokens / 1e6:.1f}M",
                f"{row.flops:.1e}",
            ),
            *(_gibibytes(getattr(row, size)) for size in sizes.values()),
            f"{row.gpu_hours(card, utilisation):.2f}",
        )
    console = Console(highlight=False)
    console.print(table)
    for model, number in {row.model: row.router_parameters for row in rows}.items():
        if number:
            console.print(f"{model}: {number:,} of its parameters choose among experts")
    hours = sum(row.gpu_hours(card, utilisation) for row in rows)
    left = sum(row.runs - row.finished for row in rows)
    kept = "34 % (below 10^9 parameters) or 18 % (from there on), as measured on an H200,"
    if utilisation is not None:
        kept = f"{utilisation:.0%} (an assumption)"
    console.print(
        f"{left} runs to do: {hours:.2f} {card} hours of training, if {kept} of the card's "
        "data-sheet rate is kept; evaluation and start-up come on top. Tokens, FLOP and memory "
        "(GiB) are those of one run. State: weights, gradients, AdamW's moments. Activations: what "
        "a forward pass keeps, without torch.compile. Head: what the loss needs beside them. Peak: "
        "the most of it at once; what an allocator keeps comes on top. --parallel fsdp divides "
        "state and activations over the processes."
    )
    return 0


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.{1 if size >= 10 * 2**30 else 2}f}"


def _changed(grids: Sequence[SweepConfig], argv: list[str]) -> list[SweepConfig]:
    """A recipe with the user's options, over what the paper has for each model; no grid twice."""
    changed = [
        replace(_with_options(for_model(grid, model), argv), models=(model,))
        for grid in grids
        for model in _with_options(grid, argv).models
    ]
    return list(dict.fromkeys(changed))


def _with_options(grid: SweepConfig, argv: list[str]) -> SweepConfig:
    """A grid with the user's options; on another corpus it is another study."""
    changed = parse_options(SweepConfig, argv, prog=f"{_PROGRAM} sweep", default=grid)
    if changed.study == grid.study and changed.data.corpus != grid.data.corpus:
        corpus = changed.data.corpus.replace("/", "-")
        changed = replace(changed, study=f"{changed.study}-{corpus}")
    return changed


def _train(argv: list[str]) -> int:
    options = parse_options(Train, argv, prog=f"{_PROGRAM} train", default=_train_defaults(argv))
    run: RunConfig = options.run
    shared = {name: getattr(run, name) for name in TrainingConfig.__dataclass_fields__}
    other = {name: value for name, value in vars(options).items() if name != "run"}
    return _run(
        SweepConfig(
            **other,
            models=(run.model,),
            weight_decays=(run.weight_decay,),
            seeds=(run.seed,),
            decays=(run.decay,),
            loss_weight_exponents=(run.loss_weight_exponent,),
            training=TrainingConfig(**shared),
        )
    )


def _train_defaults(argv: list[str]) -> Train:
    """The paper's recipe for the model that is asked for; that of Train itself for a tiny one."""
    name, _ = take_option(argv, "--model", RunConfig.model)
    if name not in MODEL_NAMES or name.endswith("-tiny"):
        return Train()
    training, data = published(name)
    return Train(run=RunConfig(**asdict(training), model=name), data=data)


def _run(*grids: SweepConfig) -> int:
    from llm_experiments.sweep import sweep  # after the options are read: it imports for seconds

    counts = sweep(*grids)
    # Under torchrun only the first process tells.
    return print_counts(grids[0].study_folder, counts) if counts else 0


def _retry(argv: list[str]) -> int:
    from llm_experiments.sweep import retry

    return retry_command(_PROGRAM, argv, retry)


def _downstream(argv: list[str]) -> int:
    from transformers.utils import logging

    from llm_experiments.downstream.command import downstream_command

    logging.set_verbosity_error()  # what is wrong with a checkpoint, `load` says in one line
    logging.disable_progress_bar()
    return downstream_command(_PROGRAM, argv)


def _predict_decay(argv: list[str]) -> int:
    from llm_experiments.predict_decay import predict_decay_command

    return predict_decay_command(_PROGRAM, argv)


def _audit(argv: list[str]) -> int:
    from llm_experiments.audit.command import audit_command

    return audit_command(_PROGRAM, argv)


def _prepare(argv: list[str]) -> int:
    from llm_experiments.text.distribution import rare_shares
    from llm_experiments.text.preparation import prepare, write_counts

    options = parse_options(Prepare, argv, prog=f"{_PROGRAM} prepare")
    corpus = prepare(options.data)
    rare = rare_shares(corpus, options.vocab_sizes)
    counts, occurrences = corpus.class_counts, corpus.occurrence_counts
    console = Console(highlight=False)
    console.print(f"prepared {corpus.folder}", markup=False, soft_wrap=True)
    console.print(f"{len(corpus.tokens):,} sequences of {corpus.tokens.shape[1]} tokens")
    console.print(
        f"{int(occurrences.sum()):,} tokens, {int(counts.sum()):,} of them next tokens; "
        f"{int((occurrences > 0).sum()):,} of {corpus.vocab_size:,} types occur"
    )
    console.print(
        f"99th percentile of the counts: {percentile(occurrences, 99):,.1f} of occurrences, "
        f"{percentile(counts, 99):,.1f} of next tokens"
    )
    for share in (0.5, 0.8, 0.95):
        top = 100 * coverage(occurrences, share)
        console.print(f"{share:.0%} of the tokens are the top {top:.3g} % of the vocabulary")
    table = Table("next-token count", "types", "share of tokens")
    bins = FrequencyBins.powers(counts, base=3)
    shares = np.asarray(bins.token_share)
    for label, size, share in zip(bins.labels, bins.sizes, shares, strict=True):
        table.add_row(label, f"{int(size):,}", f"{100 * float(share):.2f} %")
    table.add_row("never", f"{int(bins.never_occurring):,}", "")
    console.print(table)
    table = Table("vocabulary", "below the 95th percentile of the text")
    for size, share in rare.items():
        table.add_row(f"{size:,}", f"{100 * share:.1f} % of it")
    console.print(table)
    console.print(
        f"counts for `python -m ufm predict --counts`: {write_counts(corpus)}", soft_wrap=True
    )
    return 0


if __name__ == "__main__":
    leave(main())
