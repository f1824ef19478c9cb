"""Solves F(W, H) from a random start, knowing nothing of the closed form, and certifies the end.

Rounds of: projected L-BFGS in the scaled variables (`descent`); merge what is spent twice and seed
what has no axis (`axes`); a second-order finish (`columns`, `newton`); the certificate, which alone
ends a run as "certified".
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ufm.certificate import Certificate, certify, feature_losses, sample_labels
from ufm.problem import UFMProblem, allocation, check_allocation
from ufm.solver.scaled import Point
from ufm.solver.search import AT_STATIONARY_POINT, CERTIFIED, UNFINISHED, Search

MESSAGES = {
    CERTIFIED: "a global minimum: the gap to the lower bound is within the tolerance",
    AT_STATIONARY_POINT: "a stationary point, not known to be a global minimum: "
    "the gap to the lower bound stays open",
    UNFINISHED: "not a minimum: the rounds ran out before the gradient vanished",
}
BLOCK_ENTRIES = {"cpu": 150_000, "cuda": 2**27}
"""Numbers that the points of one block of problems hold: what a CPU's cache keeps."""
STATE_COPIES = 30
"""Points that the search holds at a time (quasi-Newton pairs, trial points, gradients)."""


class NotCertifiedError(RuntimeError):
    """The solver ended without a certificate on a problem where one can be expected."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """What `solve` found; leading batch dimensions as in the problem."""

    problem: UFMProblem
    W: Float[Tensor, "*batch V d"]
    H: Float[Tensor, "*batch d columns"]
    bias: Float[Tensor, "*batch V"] | None
    certificate: Certificate
    loss: Float[Tensor, "*batch V"]
    """Mean loss of each class in nats."""
    status: str | list[str]
    """"certified" (gap <= tolerance * objective), "stationary" or "unfinished"; for a batch a
    list in the order of the problems."""
    message: str | list[str]
    stats: dict[str, Any]
    """Rounds, L-BFGS iterations, evaluations and Hessian products (each counted once for a
    block of problems), problems certified by the finish with one axis a column, seconds."""

    @property
    def objective(self) -> Float[Tensor, "*batch"]:
        """F(W, H)."""
        return self.certificate.objective


def solve(
    problem: UFMProblem,
    *,
    width: int | None = None,
    seed: int = 0,
    init: str | tuple[Tensor, Tensor] = "random",
    per_sample: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-10,
    throw: bool = True,
) -> Solution:
    """Minimise F over W (V, d) and H (d, V), or (d, N) with `per_sample`.

    width: d, in place of the problem's. seed: of the random start, the same for every problem of a
    batch. init: "random", or a start (W, H) for one problem. device: where to compute; default the
    problem's. dtype: of the search; certificates are always float64. tolerance: a run is certified
    when gap <= tolerance * objective. How: ufm/THEORY.md, section 7.

    Raises ValueError for arguments out of range. With `throw`, NotCertifiedError where a run ends
    "unfinished", or uncertified although the bound is known to be tight (H >= 0, width >= V, no
    bias, one lambda_W). Elsewhere a stationary end is returned as such.
    """
    if width is not None:
        problem = problem.replace(width=width)
    _check_arguments(seed, init, dtype, tolerance, problem)
    began = time.perf_counter()
    here = problem if device is None else problem.to(device)
    flat = here.flattened()
    columns = int(flat.num_samples[0]) if per_sample else flat.num_classes
    width = _search_width(flat)
    entries = (flat.num_classes + columns) * width
    compute = flat.class_counts.device
    check_allocation("the state of the search", STATE_COPIES, entries, device=compute)
    check_allocation("the answers", len(flat.class_counts), entries, device=compute)
    with allocation("the search"):
        if init == "random":
            start = _random_start(flat, columns, width, seed, dtype)
        else:
            start = _given_start(flat, columns, width, init, dtype)
        searches = []
        for index in _blocks(flat, entries):
            search = Search.of(
                flat.take(index), per_sample=per_sample, dtype=dtype, tolerance=tolerance
            )
            search.run(_repeated(start, len(index)))
            searches.append(search)
        solution = _assembled(here, searches, per_sample, time.perf_counter() - began)
    if throw:
        _raise_if_unexpected(solution)
    return solution


def solve_batch(problems: Sequence[UFMProblem], **options: Any) -> list[Solution]:
    """`solve` for many problems; those with the same V and switches are solved together.

    Takes the options of `solve`, and returns the solutions in the order given. With `per_sample`
    only problems with equal class counts share a batch.

    Raises ValueError for a problem that is itself a batch, and what `solve` raises.
    """
    per_sample = bool(options.get("per_sample", False))
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for position, problem in enumerate(problems):
        if problem.batch_shape:
            raise ValueError(
                f"problem {position} has batch shape {tuple(problem.batch_shape)}; expected one "
                "problem an entry"
            )
        groups[_kind(problem, per_sample)].append(position)
    solutions: dict[int, Solution] = {}
    for members in groups.values():
        together = solve(_stacked([problems[i] for i in members]), **(options | {"throw": False}))
        for place, position in enumerate(members):
            solutions[position] = _one_of(together, place)
    ordered = [solutions[position] for position in range(len(problems))]
    if options.get("throw", True):
        for solution in ordered:
            _raise_if_unexpected(solution)
    return ordered


def block_size(problem: UFMProblem, device: str | torch.device = "cpu") -> int:
    """How many problems like these `solve` takes at once there, with one feature a class."""
    return _block_size(torch.device(device), 2 * problem.num_classes * _search_width(problem))


def _search_width(problem: UFMProblem) -> int:
    """Room for a few axes more than the answer has: merging needs somewhere to seed."""
    width, classes = problem.feature_width, problem.num_classes
    if width < classes or not problem.nonnegative:
        return width
    return width + max(2, classes // 10)


def _random_start(
    problem: UFMProblem, columns: int, width: int, seed: int, dtype: torch.dtype
) -> Point:
    """Scaled variables of order one: normal A, and B uniform (normal where features are free)."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.empty(1, problem.num_classes, width, dtype=torch.float64)
    B = torch.empty(1, width, columns, dtype=torch.float64)
    A = A.normal_(generator=generator) / math.sqrt(width)
    if problem.nonnegative:
        B = B.uniform_(generator=generator) / math.sqrt(width)
    else:
        B = B.normal_(generator=generator) / math.sqrt(width)
    bias = torch.zeros(1, problem.num_classes)
    device = problem.class_counts.device
    return Point(A=A.to(device, dtype), B=B.to(device, dtype), bias=bias.to(device, dtype))


def _given_start(
    problem: UFMProblem, columns: int, width: int, init: object, dtype: torch.dtype
) -> Point:
    """A start (W, H) in scaled variables, with axes of zeros up to the width of the search."""
    if not isinstance(init, tuple) or len(init) != 2:
        raise ValueError(f"init is {init!r}; expected 'random' or a pair (W, H)")
    device = problem.class_counts.device
    W, H = (torch.as_tensor(part).to(device, torch.float64) for part in init)
    classes = problem.num_classes
    if len(problem.class_counts) != 1 or W.ndim != 2 or H.ndim != 2 or W.shape[1] > width:
        raise ValueError(
            f"init has shapes {tuple(W.shape)} and {tuple(H.shape)}; expected one start (V, d), "
            f"(d, {columns}) for one problem, d at most {width}"
        )
    if W.shape[0] != classes or H.shape != (W.shape[1], columns):
        raise ValueError(
            f"init has shapes {tuple(W.shape)} and {tuple(H.shape)}; expected ({classes}, d) and "
            f"(d, {columns})"
        )
    for name, values in (("W", W), ("H", H)):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"init holds a {name} that is not finite; expected finite values")
    if problem.nonnegative and bool((H < 0).any()):
        raise ValueError(f"init holds {H.min().item()} in H; the problem expects H >= 0")
    decay = problem.feature_decay[0]
    per_class = columns == classes
    scale = decay * problem.counts[0] if per_class else decay[sample_labels(problem)]
    A, B = W * problem.row_decay[0].sqrt().unsqueeze(1), H * scale.sqrt()
    missing = width - W.shape[1]
    A = torch.nn.functional.pad(A, (0, missing))
    B = torch.nn.functional.pad(B, (0, 0, 0, missing))
    bias = torch.zeros(1, classes, dtype=dtype, device=device)
    return Point(A=A.to(dtype).unsqueeze(0), B=B.to(dtype).unsqueeze(0), bias=bias)


def _repeated(start: Point, batch: int) -> Point:
    return Point(
        A=start.A.repeat(batch, 1, 1),
        B=start.B.repeat(batch, 1, 1),
        bias=start.bias.repeat(batch, 1),
    )


def _blocks(problem: UFMProblem, entries: int) -> list[Tensor]:
    device = problem.class_counts.device
    size, batch = _block_size(device, entries), len(problem.class_counts)
    return [
        torch.arange(first, min(first + size, batch), device=device)
        for first in range(0, batch, size)
    ]


def _block_size(device: torch.device, entries: int) -> int:
    return max(1, BLOCK_ENTRIES.get(device.type, BLOCK_ENTRIES["cuda"]) // entries)


def _assembled(
    problem: UFMProblem, searches: list[Search], per_sample: bool, seconds: float
) -> Solution:
    batch = problem.batch_shape

    def joined(name: str) -> Tensor:
        parts = torch.cat([getattr(search, name) for search in searches])
        return parts.reshape(*batch, *parts.shape[1:])

    W, H = joined("W"), joined("H")
    bias = joined("bias") if problem.bias else None
    statuses = [status for search in searches for status in search.statuses()]
    effort: Counter[str] = sum((search.effort for search in searches), Counter())
    return Solution(
        problem=problem,
        W=W,
        H=H,
        bias=bias,
        certificate=certify(problem, W, H, bias=bias),
        loss=_mean_losses(problem, W, H, bias, per_sample),
        status=statuses if batch else statuses[0],
        message=[MESSAGES[status] for status in statuses] if batch else MESSAGES[statuses[0]],
        stats=dict(effort) | {"seconds": seconds, "device": str(W.device)},
    )


def _mean_losses(
    problem: UFMProblem, W: Tensor, H: Tensor, bias: Tensor | None, per_sample: bool
) -> Float[Tensor, "*batch V"]:
    losses = feature_losses(problem, W, H, bias=bias)
    if not per_sample:
        return losses
    label = sample_labels(problem)
    sums = losses.new_zeros(*losses.shape[:-1], problem.num_classes).index_add(-1, label, losses)
    return sums / problem.counts


def _kind(problem: UFMProblem, per_sample: bool) -> tuple[object, ...]:
    counts = tuple(problem.class_counts.tolist()) if per_sample else None
    return (
        problem.num_classes,
        problem.feature_sharing,
        problem.label_smoothing,
        problem.loss,
        problem.nonnegative,
        problem.bias,
        problem.width,
        problem.is_rowwise,
        problem.loss_weights is None,
        problem.class_counts.device,
        counts,
    )


def _stacked(problems: list[UFMProblem]) -> UFMProblem:
    weights = [p.loss_weights for p in problems if p.loss_weights is not None]
    return problems[0].replace(
        class_counts=torch.stack([p.class_counts for p in problems]),
        lambda_W=torch.stack([p.row_decay for p in problems]),
        lambda_H=torch.stack([p.unshared_decay for p in problems]),
        loss_weights=torch.stack(weights) if weights else None,
    )


def _one_of(together: Solution, place: int) -> Solution:
    return Solution(
        problem=together.problem.take(torch.tensor(place)),
        W=together.W[place],
        H=together.H[place],
        bias=None if together.bias is None else together.bias[place],
        certificate=Certificate(
            objective=together.certificate.objective[place],
            lower_bound=together.certificate.lower_bound[place],
        ),
        loss=together.loss[place],
        status=together.status[place],
        message=together.message[place],
        stats=together.stats,
    )


def _check_arguments(
    seed: int, init: object, dtype: torch.dtype, tolerance: float, problem: UFMProblem
) -> None:
    if not math.isfinite(tolerance) or tolerance <= 0:
        raise ValueError(f"tolerance is {tolerance}; expected a finite number > 0")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype}; expected torch.float32 or torch.float64")
    if isinstance(init, str) and init != "random":
        raise ValueError(f"init is {init!r}; expected 'random' or a pair (W, H)")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; expected a whole number >= 0 (and < 2^63)")
    if not len(problem.class_counts):
        raise ValueError("class_counts holds no problem; expected at least one")


def _raise_if_unexpected(solution: Solution) -> None:
    problem = solution.problem
    tight = problem.nonnegative and problem.feature_width >= problem.num_classes
    tight = tight and not problem.bias and not problem.is_rowwise
    statuses = solution.status if isinstance(solution.status, list) else [solution.status]
    for position, status in enumerate(statuses):
        if status == UNFINISHED or (tight and status != CERTIFIED):
            gap = solution.certificate.gap.flatten()[position].item()
            raise NotCertifiedError(
                f"problem {position} ended {status} with a gap of {gap:.3g}: {MESSAGES[status]}"
            )
