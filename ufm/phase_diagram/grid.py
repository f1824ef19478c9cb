"""A phase diagram: certified solves over decay and count, against the theory's boundary.

Every block of problems that the solver takes at once is a call of its own, so that a part of the
diagram has the bits of the whole, wherever it is solved (with as many threads).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ufm.closed_form import closed_form
from ufm.files import beside, write_csv
from ufm.problem import UFMProblem, checked_sharing
from ufm.solver.solver import block_size, solve

MOST_POINTS = 100_000
"""Of a phase diagram: each is a problem to solve."""


@dataclass(frozen=True, kw_only=True)
class PhaseGrid:
    """The problems of a phase diagram, one for each decay."""

    class_counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    """Samples of each class."""
    smallest: float = 1e-5
    """Least lambda = lambda_W = lambda_H."""
    largest: float = 1e-1
    """Largest lambda."""
    points: int = 60
    """Values of lambda."""
    feature_sharing: float = 0.0
    """s in [0, 1]: 0 decays every sample's feature, 1 weights (a class's feature once)."""

    def __post_init__(self) -> None:
        if not 0 < self.smallest < self.largest < float("inf"):
            raise ValueError(
                f"smallest is {self.smallest} and largest {self.largest}; "
                "expected 0 < smallest < largest"
            )
        checked_sharing(self.feature_sharing)
        if not 2 <= self.points <= MOST_POINTS:
            raise ValueError(f"points is {self.points}; expected 2 to {MOST_POINTS}")

    @property
    def counts(self) -> tuple[int, ...]:
        """The class counts in rising order, each once."""
        return tuple(sorted(set(self.class_counts)))

    @property
    def decays(self) -> Float[Tensor, " points"]:
        """The values of lambda, evenly spaced in their logarithm."""
        ends = torch.tensor([self.smallest, self.largest], dtype=torch.float64).log()
        return torch.linspace(float(ends[0]), float(ends[1]), self.points).double().exp()

    def problem(self, first: int = 0, last: int | None = None) -> UFMProblem:
        """The problems of the points from `first` to before `last`, as one batch."""
        decays = self.decays[first:last].unsqueeze(1)
        counts = torch.tensor(self.counts).expand(len(decays), -1)
        return UFMProblem(
            class_counts=counts,
            lambda_W=decays,
            lambda_H=decays,
            feature_sharing=self.feature_sharing,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """What was solved of a diagram: points in order, classes by rising count."""

    loss: Float[Tensor, "points V"]
    collapsed: Bool[Tensor, "points V"]

    @classmethod
    def joined(cls, parts: list[Part]) -> Part:
        """Parts one after the other."""
        return cls(
            loss=torch.cat([part.loss for part in parts]),
            collapsed=torch.cat([part.collapsed for part in parts]),
        )


def solve_points(
    grid: PhaseGrid, *, first: int = 0, last: int | None = None, device: str = "cpu"
) -> Iterator[Part]:
    """Certified solves of the points from `first` to before `last`, block by block.

    Raises NotCertifiedError where one ends without a certificate.
    """
    last = grid.points if last is None else last
    size = points_at_once(grid, device)
    for begin in range(first, last, size):
        solution = solve(grid.problem(begin, min(begin + size, last)), device=device)
        yield Part(loss=solution.loss.cpu(), collapsed=(solution.H.square().sum(-2) == 0).cpu())


def points_at_once(grid: PhaseGrid, device: str = "cpu") -> int:
    """Points that make a block of the solver's."""
    return block_size(grid.problem(0, 1), device)


def report_diagram(grid: PhaseGrid, found: Part, output: Path) -> int:
    """Write <output>.csv and .png and say so; exit code 1 where cells are off the theory."""
    counts, decays = grid.counts, grid.decays
    theory = closed_form(grid.problem())
    rows = (
        (
            repr(float(decays[i])),
            counts[k],
            repr(float(found.loss[i, k])),
            int(found.collapsed[i, k]),
            int(theory.collapsed[i, k]),
            repr(float(theory.critical_count[i])),
        )
        for i in range(grid.points)
        for k in range(len(counts))
    )
    header = ["lambda", "count", "loss", "collapsed", "collapsed_in_theory", "critical_count"]
    table, figure = output.with_suffix(".csv"), output.with_suffix(".png")
    write_csv(table, header, rows)
    _draw(figure, decays, torch.tensor(counts), found.loss, theory.critical_count)
    wrong = int((found.collapsed != theory.collapsed).sum())
    cells = found.collapsed.numel()
    print(f"{grid.points} certified solves; {wrong} of {cells} cells off the theory")
    print(f"wrote {table} and {figure}")
    return 1 if wrong else 0


def _draw(path: Path, decays: Tensor, counts: Tensor, loss: Tensor, critical: Tensor) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    chance = float(torch.tensor(float(len(counts))).log())
    mesh = axes.pcolormesh(decays, counts, (loss / chance).T, shading="nearest", vmin=0, vmax=1)
    axes.plot(decays, critical, color="white", label="critical count $n_c$ (theory)")
    axes.set(xscale="log", yscale="log", xlabel="$\\lambda_W = \\lambda_H$", ylabel="class count")
    axes.set_ylim(float(counts.min()), float(counts.max()))
    axes.legend(loc="lower right", facecolor="gray", labelcolor="white")
    figure.colorbar(mesh, label="loss / log V (1: not learned)")
    with beside(path) as part:
        figure.savefig(part, dpi=150, format="png")
    plt.close(figure)
