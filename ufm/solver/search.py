"""The rounds of the solver on one flat batch: descend, merge and reseed, finish, certify."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ufm.certificate import certify
from ufm.problem import UFMProblem
from ufm.solver.axes import merge_collinear, reseed, spectral_axes
from ufm.solver.columns import finish_columns
from ufm.solver.descent import descend
from ufm.solver.newton import Polish, polish
from ufm.solver.scaled import Point, ScaledProblem

ROUNDS = 10
FIRST_DESCENT = 20
LONGEST_DESCENT = 320
POLISH_STEPS = 40
FLOOR = 1e-13
"""Projected gradient, in the scaled variables, at which the search for a better point ends."""
STATIONARY = 1e-8
"""Projected gradient below which a point counts as stationary."""

CERTIFIED, AT_STATIONARY_POINT, UNFINISHED = "certified", "stationary", "unfinished"


@dataclass(kw_only=True, eq=False)
class Search:
    """The state of a search over a flat batch: the best candidate of every problem so far."""

    problem: UFMProblem
    scaled: ScaledProblem
    tolerance: float
    W: Float[Tensor, "b V d"]
    H: Float[Tensor, "b d C"]
    bias: Float[Tensor, "b V"]
    objective: Float[Tensor, " b"]
    certified: Bool[Tensor, " b"]
    stationary: Bool[Tensor, " b"]
    effort: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(
        cls, problem: UFMProblem, *, per_sample: bool, dtype: torch.dtype, tolerance: float
    ) -> Search:
        """Nothing found yet. `problem` is flattened; its width is that of the answer."""
        scaled = ScaledProblem.of(problem, per_sample=per_sample, dtype=dtype)
        batch, columns = scaled.mass.shape
        classes, width = problem.num_classes, problem.feature_width
        nothing = problem.mass.new_zeros
        return cls(
            problem=problem,
            scaled=scaled,
            tolerance=tolerance,
            W=nothing(batch, classes, width),
            H=nothing(batch, width, columns),
            bias=nothing(batch, classes),
            objective=nothing(batch) + torch.inf,
            certified=nothing(batch, dtype=torch.bool),
            stationary=nothing(batch, dtype=torch.bool),
        )

    @property
    def splits(self) -> bool:
        """Whether the finish with one axis a column applies: it would take one axis a sample
        where samples have their own features, and a bias ties the columns together."""
        one_column_a_class = self.scaled.mass.shape[1] == self.problem.num_classes
        return one_column_a_class and self.problem.nonnegative and not self.problem.bias

    def statuses(self) -> list[str]:
        """One of the three a problem."""
        pairs = zip(self.certified.tolist(), self.stationary.tolist(), strict=True)
        return [
            CERTIFIED if certified else AT_STATIONARY_POINT if stationary else UNFINISHED
            for certified, stationary in pairs
        ]

    def run(self, start: Point) -> None:
        """Search from `start` until every problem is certified or the rounds run out."""
        todo = torch.arange(len(self.certified), device=self.certified.device)
        scaled, point = self.scaled, start
        budget = FIRST_DESCENT if self.splits else 4 * FIRST_DESCENT
        for _ in range(ROUNDS):
            self.effort["rounds"] += 1
            found = descend(scaled, point, iterations=budget, floor=FLOOR)
            self.effort["iterations"] += found.iterations
            self.effort["evaluations"] += found.evaluations
            point = found.at
            if self.splits:
                self._try_columns(scaled, point, todo)
                left = ~self.certified[todo]
                todo, scaled, point = _subset(todo, scaled, point, left)
            if len(todo):
                point, hopeless = self._improve(scaled, point, todo)
                left = ~(self.certified[todo] | hopeless)
                todo, scaled, point = _subset(todo, scaled, point, left)
            if not len(todo):
                return
            budget = min(2 * budget, LONGEST_DESCENT)

    def _try_columns(self, scaled: ScaledProblem, point: Point, todo: Tensor) -> None:
        """One axis a column, from the present logits; kept where it beats the best so far."""
        z, column = finish_columns(scaled, point.A, point.B)
        size = z.norm(dim=1)
        width = self.problem.feature_width
        fits = (size > 0).sum(1) <= width
        slots = min(width, size.shape[1])
        order = size.argsort(dim=1, descending=True)[:, :slots]
        root = size.gather(1, order).sqrt()
        A = z.gather(2, order.unsqueeze(1).expand(-1, z.shape[1], -1))
        A = A / root.clamp(min=1e-35).unsqueeze(1)
        B = z.new_zeros(len(z), slots, point.B.shape[2])
        B.scatter_(2, column[order].unsqueeze(2), root.unsqueeze(2))
        settled = torch.ones_like(fits)
        split = Point(A=_padded(A, 2, width), B=_padded(B, 1, width), bias=point.bias)
        keep = fits.nonzero().squeeze(1)
        self._record(*_subset(todo, scaled, split, keep), settled[keep])
        self.effort["split"] += int(self.certified[todo].sum())

    def _improve(
        self, scaled: ScaledProblem, point: Point, todo: Tensor
    ) -> tuple[Point, Bool[Tensor, " b"]]:
        """Merge, polish, certify and reseed the problems at `todo`. Also returns which of them
        are at a stationary point that offers no new axis."""
        done = polish(scaled, self._merge(point), steps=POLISH_STEPS, floor=FLOOR)
        answer = self._fit(scaled, done)
        self.effort["hessian_products"] += done.products
        self._record(todo, scaled, answer.at, answer.gradient_norm < STATIONARY)
        if bool(self.certified[todo].all()):
            return done.at, torch.zeros_like(todo, dtype=torch.bool)
        seeded, added = self._reseed(scaled, self._merge(done.at))
        hopeless = (added == 0) & (done.gradient_norm < STATIONARY)
        return seeded, hopeless

    def _fit(self, scaled: ScaledProblem, found: Polish) -> Polish:
        """`found` with no more axes than the answer may have; minimised again if that costs."""
        width = self.problem.feature_width
        narrow, dropped = _narrowed(found.at, width)
        if not dropped:
            return replace(found, at=narrow)
        # The polish may have made axes collinear: a class that has two must not cost another one.
        narrow, _ = _narrowed(self._merge(found.at), width)
        again = descend(scaled, narrow, iterations=LONGEST_DESCENT, floor=FLOOR)
        return polish(scaled, again.at, steps=POLISH_STEPS, floor=FLOOR)

    def _merge(self, point: Point) -> Point:
        if not self.problem.nonnegative:
            A, B = spectral_axes(point.A, point.B)
            return Point(A=A, B=B, bias=point.bias)
        pairs = [merge_collinear(A, B) for A, B in zip(point.A, point.B, strict=True)]
        A, B = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return Point(A=A, B=B, bias=point.bias)

    def _reseed(self, scaled: ScaledProblem, point: Point) -> tuple[Point, Tensor]:
        gradient = scaled.gradient_columns(point)
        nonnegative = self.problem.nonnegative
        triples = [
            reseed(A, B, G, scaled.label, nonnegative=nonnegative)
            for A, B, G in zip(point.A, point.B, gradient, strict=True)
        ]
        A = torch.stack([triple[0] for triple in triples])
        B = torch.stack([triple[1] for triple in triples])
        added = torch.tensor([triple[2] for triple in triples], device=A.device)
        return Point(A=A, B=B, bias=point.bias), added

    def _record(
        self, todo: Tensor, scaled: ScaledProblem, point: Point, stationary: Bool[Tensor, " b"]
    ) -> None:
        """Keep the candidates that are better than the best so far, and certify them."""
        if not len(todo):
            return
        W = (point.A * scaled.row.unsqueeze(2)).to(torch.float64)
        H = (point.B * scaled.col.unsqueeze(1)).to(torch.float64)
        bias = point.bias.to(torch.float64)
        certificate = certify(
            self.problem.take(todo), W, H, bias=bias if self.problem.bias else None
        )
        good = certificate.gap <= self.tolerance * certificate.objective
        better = good | (certificate.objective < self.objective[todo])
        better &= ~self.certified[todo]
        where = todo[better]
        self.W[where], self.H[where], self.bias[where] = W[better], H[better], bias[better]
        self.objective[where] = certificate.objective[better]
        self.certified[where] = good[better]
        self.stationary[where] = stationary[better]


def _subset(
    todo: Tensor, scaled: ScaledProblem, point: Point, keep: Tensor
) -> tuple[Tensor, ScaledProblem, Point]:
    """The part of the batch at `keep`, a mask or an index."""
    index = keep.nonzero().squeeze(1) if keep.dtype == torch.bool else keep
    if len(index) == len(todo):
        return todo, scaled, point
    part = Point(A=point.A[index], B=point.B[index], bias=point.bias[index])
    return todo[index], scaled.take(index), part


def _narrowed(point: Point, width: int) -> tuple[Point, bool]:
    """The `width` largest axes, and whether any other than zero was dropped."""
    if point.A.shape[2] == width:
        return point, False
    size = point.A.norm(dim=1) * point.B.norm(dim=2)
    order = size.argsort(dim=1, descending=True, stable=True)
    dropped = bool(size.gather(1, order[:, width:]).any())
    order = order[:, :width]
    A = point.A.gather(2, order.unsqueeze(1).expand(-1, point.A.shape[1], -1))
    B = point.B.gather(1, order.unsqueeze(2).expand(-1, -1, point.B.shape[2]))
    return Point(A=A, B=B, bias=point.bias), dropped


def _padded(values: Float[Tensor, "b _ _"], dim: int, size: int) -> Float[Tensor, "b _ _"]:
    missing = size - values.shape[dim]
    if missing <= 0:
        return values
    shape = list(values.shape)
    shape[dim] = missing
    return torch.cat([values, values.new_zeros(shape)], dim)
