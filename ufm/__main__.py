"""python -m ufm verify | solve | predict | phase | train | sweep | status | retry

sweep is phase in runs of a study, by an executor; status and retry are about such a study."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from run_store.command_line import one_line, parse_options, run_command
from ufm import as_printed
from ufm.closed_form import closed_form
from ufm.counts_file import count_words, read_counts
from ufm.files import check_folder, write_csv
from ufm.phase_diagram.grid import Part, PhaseGrid, report_diagram, solve_points
from ufm.problem import UFMProblem, checked_sharing, usable_device
from ufm.repair import Goal, repair_exponent, repair_weights
from ufm.solver import NotCertifiedError, Solution, solve
from ufm.solver.search import UNFINISHED
from ufm.training.comparison import Train, train
from ufm.verification import Claim, verify

_HERE = ("verify", "solve", "predict", "phase", "train")
_BY_RUNS = ("sweep", "status", "retry")


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Measure every claim of the paper's Section 5 and Appendix A against certified solves."""

    device: str = "cpu"
    """Where to solve: cpu, cuda, ..."""
    seed: int = 0
    """Of the random starts."""
    counts: Path | None = None
    """Class counts of a real corpus, for the claim of Section 4.1 (see `predict`)."""
    feature_sharing: float = 0.0
    """s in [0, 1]: every formula with lambda_H n_k^-s for lambda_H."""
    output: Path | None = None
    """Also write the table here, as CSV."""


@dataclass(frozen=True, kw_only=True)
class Solve:
    """Solve one problem from a random start and certify it."""

    class_counts: tuple[int, ...]
    """Samples of each class."""
    lambda_W: tuple[float, ...]
    """Decay of the classifier: one, or one a row."""
    lambda_H: tuple[float, ...]
    """Decay of the features: one, or one a class."""
    feature_sharing: float = 0.0
    """s in [0, 1]: 0 decays every sample's feature, 1 weights (a class's feature once)."""
    width: int | None = None
    """Feature width; default the number of classes."""
    label_smoothing: float = 0.0
    """e in [0, 1)."""
    loss: str = "cross_entropy"
    """cross_entropy or mse."""
    loss_weight_exponent: float | Goal = 0.0
    """g of the loss weights n_k^-g, or what they are for."""
    nonnegative: bool = True
    """H >= 0, or free features."""
    bias: bool = False
    """Add a free bias."""
    per_sample: bool = False
    """One free feature a sample in place of one a class."""
    seed: int = 0
    """Of the random start."""
    tolerance: float = 1e-10
    """Certified when gap <= tolerance * objective."""
    device: str = "cpu"
    """Where to solve."""


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Per-token loss and neglected tokens from class counts and the decay, in closed form."""

    counts: Path | None = None
    """One integer a line, a CSV with a count column, or JSON."""
    corpus: Path | None = None
    """Or a UTF-8 text: its words between white space are the tokens."""
    lambda_W: float | None = None
    """Decay of the classifier."""
    lambda_H: float | None = None
    """Decay of the features; default lambda_W."""
    feature_sharing: float = 0.0
    """s in [0, 1]: 0 decays every sample's feature, 1 weights (a class's feature once)."""
    critical_count: float | None = None
    """Or n_c itself, as fitted to a run."""
    loss_weight_exponent: float | Goal = 0.0
    """g of the loss weights n_k^-g, or what they are for."""
    output: Path | None = None
    """Write label, count, loss, learned of every token here, as CSV."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Collapse over lambda and count: certified solves against the theory's boundary."""

    grid: tyro.conf.OmitArgPrefixes[PhaseGrid] = field(default_factory=PhaseGrid)
    device: str = "cpu"
    """Where to solve."""
    threads: int = 1
    """CPU threads."""
    output: Path = Path("phase")
    """Stem of the files: .csv and .png are added."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where something is not certified; 2 with one line on bad input."""
    return run_command(_main, argv)


def _main(argv: list[str]) -> int:
    try:
        return _run(argv)
    except NotCertifiedError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


def _run(argv: list[str]) -> int:
    if argv[:1] and argv[0] in _BY_RUNS:
        from ufm.phase_diagram.sweep import COMMANDS  # after the options: it imports for seconds

        return COMMANDS[argv[0]](argv[1:])
    options = _options(argv)
    if not isinstance(options, Predict | Train):
        usable_device(options.device)
    if not isinstance(options, Solve) and options.output is not None:
        check_folder(options.output)
    match options:
        case Verify():
            return _verify(options)
        case Solve():
            return _solve(options)
        case Predict():
            return _predict(options)
        case Train():
            return train(options)
        case _:
            return _phase(options)


def _options(argv: list[str]) -> Verify | Solve | Predict | Phase | Train:
    commands: Any = (
        Annotated[Verify, tyro.conf.subcommand("verify")]
        | Annotated[Solve, tyro.conf.subcommand("solve")]
        | Annotated[Predict, tyro.conf.subcommand("predict")]
        | Annotated[Phase, tyro.conf.subcommand("phase")]
        | Annotated[Train, tyro.conf.subcommand("train")]
    )
    if not argv or not (argv[0] in _HERE or argv[0].startswith("-")):
        given = f"command {argv[0]!r} is unknown" if argv else "no command is given"
        raise ValueError(f"{given}; expected one of {', '.join(_HERE + _BY_RUNS)}")
    chosen: Verify | Solve | Predict | Phase | Train = parse_options(
        commands, argv, prog="python -m ufm", description=__doc__
    )
    return chosen


def _verify(options: Verify) -> int:
    claims = verify(
        device=options.device, seed=options.seed, feature_sharing=options.feature_sharing
    )
    if options.counts is not None:
        claims.append(_coverage_claim(options.counts))
    title = "Claims against certified solves (relative errors; counterexamples)"
    if options.feature_sharing:
        title += f", lH n_k^-{options.feature_sharing:g} in place of lH"
    table = Table(title=title)
    header = ["claim", "where", "as printed", "corrected", "error printed", "error corrected"]
    for name in (*header, "verdict"):
        table.add_column(name, overflow="fold")
    rows = [
        (
            claim.name,
            claim.where,
            claim.printed,
            claim.corrected,
            f"{claim.printed_error:.2g}",
            f"{claim.corrected_error:.2g}",
            claim.verdict,
        )
        for claim in claims
    ]
    for row in rows:
        table.add_row(*row)
    _console().print(table)
    if options.output is not None:
        write_csv(options.output, [*header, "verdict"], rows)
    failed = [claim.name for claim in claims if not claim.confirmed]
    settled = f"{len(claims) - len(failed)} of {len(claims)} claims settled"
    print(f"{settled}: what is right holds, what is misprinted fails")
    return 1 if failed else 0


def _coverage_claim(path: Path) -> Claim:
    """Section 4.1: how much of the vocabulary 95 % of the tokens need, all entries counted."""
    _, counts = read_counts(path)
    ordered = torch.tensor(counts, dtype=torch.float64).sort(descending=True).values
    needed = int((ordered.cumsum(0) < 0.95 * ordered.sum()).sum()) + 1
    share = needed / len(counts)
    return Claim(
        name="95 % of the tokens are few types",
        where="Sec. 4.1",
        printed=f"the top {as_printed.COVERING_SHARE:.2%} of the vocabulary",
        corrected=f"the top {share:.2%} in {path.name}",
        printed_error=abs(as_printed.COVERING_SHARE - share) / share,
        corrected_error=0.0,
        misprinted=True,
    )


def _solve(options: Solve) -> int:
    weights = None
    if options.loss_weight_exponent:
        weights = repair_weights(
            options.class_counts,
            options.loss_weight_exponent,
            feature_sharing=options.feature_sharing,
        )
    problem = UFMProblem(
        class_counts=options.class_counts,
        lambda_W=_one_or_all(options.lambda_W),
        lambda_H=_one_or_all(options.lambda_H),
        feature_sharing=options.feature_sharing,
        loss_weights=weights,
        label_smoothing=options.label_smoothing,
        loss=options.loss,
        nonnegative=options.nonnegative,
        bias=options.bias,
        width=options.width,
    )
    solution = solve(
        problem,
        seed=options.seed,
        per_sample=options.per_sample,
        tolerance=options.tolerance,
        device=options.device,
        throw=False,
    )
    try:
        exact: list[float] | None = closed_form(problem).loss.tolist()
    except ValueError:
        exact = None
    table = Table("count", "loss", "closed form", "|w_k|^2")
    norms = solution.W.square().sum(1).tolist()
    for k, count in enumerate(options.class_counts):
        known = "none known" if exact is None else f"{exact[k]:.10g}"
        table.add_row(str(count), f"{float(solution.loss[k]):.10g}", known, f"{norms[k]:.6g}")
    _console().print(table)
    _print_certificate(solution)
    return 1 if solution.status == UNFINISHED else 0


def _one_or_all(values: tuple[float, ...]) -> float | tuple[float, ...]:
    return values[0] if len(values) == 1 else values


def _print_certificate(solution: Solution) -> None:
    certificate = solution.certificate
    print(f"objective   {float(certificate.objective):.15g}")
    print(f"lower bound {float(certificate.lower_bound):.15g}")
    print(f"gap         {float(certificate.gap):.3g}")
    print(f"{solution.status}: {solution.message} ({solution.stats['seconds']:.2f} s)")


def _predict(options: Predict) -> int:
    labels, counts = _counts_of(options)
    kept = [k for k, count in enumerate(counts) if count > 0]
    present = torch.tensor([counts[k] for k in kept])
    lambda_W, lambda_H = _decays_of(options, present)
    weights = None
    if options.loss_weight_exponent:
        weights = repair_weights(
            present, options.loss_weight_exponent, feature_sharing=options.feature_sharing
        )
    problem = UFMProblem(
        class_counts=present,
        lambda_W=lambda_W,
        lambda_H=lambda_H,
        feature_sharing=options.feature_sharing,
        loss_weights=weights,
    )
    result = closed_form(problem)
    share = problem.counts / problem.counts.sum()
    neglected = result.collapsed
    print(f"classes        {len(counts):,}, {len(counts) - len(kept):,} of them never occur")
    print(f"samples        {int(problem.num_samples):,}")
    if result.critical_count.ndim == 0:
        print(f"critical count {float(result.critical_count):.6g}")
    print(
        f"neglected      {int(neglected.sum()):,} classes, "
        f"{100 * float(share[neglected].sum()):.3g} % of the samples"
    )
    print(f"average loss   {float((share * result.loss).sum()):.6g} nats")
    print(f"balanced loss  {float(result.loss.mean()):.6g} nats")
    print(f"loss weights   {_repairs(options.feature_sharing)}")
    if options.output is not None:
        losses, learned = result.loss.tolist(), (~neglected).tolist()
        rows = (
            (labels[k], counts[k], repr(losses[i]), int(learned[i])) for i, k in enumerate(kept)
        )
        write_csv(options.output, ["label", "count", "loss", "learned"], rows)
        print(f"wrote          {options.output}")
    return 0


def _repairs(feature_sharing: float) -> str:
    average, equal, balanced = (
        f"{repair_exponent(goal, feature_sharing):g}" for goal in get_args(Goal)
    )
    return (
        f"count^-g with g = {average} is best for the average loss, {balanced} for the balanced "
        f"one (weak decay); {equal} makes all losses equal"
    )


def _counts_of(options: Predict) -> tuple[list[str], list[int]]:
    if (options.counts is None) == (options.corpus is None):
        given = "neither" if options.counts is None else "both"
        raise ValueError(f"{given} of --counts and --corpus is given; expected one")
    if options.counts is not None:
        return read_counts(options.counts)
    assert options.corpus is not None
    return count_words(options.corpus)


def _decays_of(options: Predict, counts: Tensor) -> tuple[float, float]:
    if (options.critical_count is None) == (options.lambda_W is None):
        given = "neither" if options.lambda_W is None else "both"
        raise ValueError(f"{given} of --lambda-W and --critical-count is given; expected one")
    if options.lambda_W is not None:
        return options.lambda_W, options.lambda_W if options.lambda_H is None else options.lambda_H
    assert options.critical_count is not None
    if not 0.0 < options.critical_count < float("inf"):
        raise ValueError(f"critical_count is {options.critical_count}; expected a number > 0")
    if len(counts) < 2:
        raise ValueError(f"{len(counts)} class occurs; expected at least two")
    V, N = len(counts), float(counts.sum())
    power = 0.5 * (1.0 + checked_sharing(options.feature_sharing))
    geometric = options.critical_count**power * ((V - 1) / V) ** 0.5 / N
    return geometric, geometric


def _phase(options: Phase) -> int:
    torch.set_num_threads(options.threads)
    parts = list(solve_points(options.grid, device=options.device))
    return report_diagram(options.grid, Part.joined(parts), options.output)


def _console() -> Console:
    # Not cut to the 80 columns that rich assumes of a pipe.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 180)


if __name__ == "__main__":
    sys.exit(main())
