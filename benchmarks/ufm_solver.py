"""How long the UFM takes to solve: ours beside what a user would reach for instead.

    python -m benchmarks.ufm_solver                     # the table and the batch, on this CPU
    python -m benchmarks.ufm_solver --device cuda       # also 4,096 problems at once on a GPU
    python -m benchmarks.ufm_solver --counts FILE --device cuda     # a whole vocabulary
    python -m benchmarks.ufm_solver --counts FILE --classes 6000 --active 250 --width 256   # CPU

FILE holds the counts of a corpus, as `python -m llm_experiments prepare` writes them.

Everyone minimises the same F from the same start (W, H) in float64, in the variables W and H
sqrt(n_k) (scipy once more in ours, sqrt(lambda_W) W and sqrt(lambda_H n_k) H), and is timed until
F is within 1e-8 (relative) of the known minimum; ours until its certificate shows it. A run that
ends above that is "trapped", one cut off "over time", each with the gap where it stopped and its
time over ours. A peer may take six times as long as ours, so "over time" means at least five
times slower. Problems: Zipf class counts with three classes in ten collapsed.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from ufm import ClosedForm, Solution, UFMProblem, closed_form, solve
from ufm.counts_file import read_counts

GOAL = 1e-8
SIZES = (10, 30, 100, 300, 1000)
PATIENCE = 6.0
"""What a peer may take, in units of our time."""


class Reached(Exception):
    """Raised inside a baseline when F is within GOAL, or the time is up."""


class Watch:
    """Stops a baseline at the goal or at the limit, and remembers the best F it saw."""

    def __init__(self, minimum: float, limit: float) -> None:
        self.minimum, self.limit = minimum, limit
        self.best, self.began = math.inf, time.perf_counter()

    def see(self, value: float) -> None:
        self.best = min(self.best, value)
        if self.gap <= GOAL or self.seconds > self.limit:
            raise Reached

    @property
    def gap(self) -> float:
        return self.best / self.minimum - 1.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began


class Objective:
    """F and its gradient in A = W and B = H sqrt(n_k), written as a user would."""

    def __init__(self, problem: UFMProblem) -> None:
        self.mass, self.root = problem.mass, problem.counts.sqrt()
        self.decay_W, self.decay_H = float(problem.row_decay[0]), float(problem.feature_decay[0])

    def __call__(self, A: Tensor, B: Tensor) -> tuple[float, Tensor, Tensor]:
        logits = A @ (B / self.root)
        log_p = torch.log_softmax(logits, 0)
        G = log_p.exp()
        G.diagonal().sub_(1.0)
        G *= self.mass
        value = -(self.mass * log_p.diagonal()).sum()
        decay = self.decay_W * A.square().sum() + self.decay_H * B.square().sum()
        value = value + 0.5 * decay
        grad_A = G @ (B / self.root).T + self.decay_W * A
        grad_B = (A.T @ G) / self.root + self.decay_H * B
        return float(value), grad_A, grad_B


def zipf_problem(classes: int, seed: int = 0) -> UFMProblem:
    """Zipf counts, lambda_W = lambda_H, n_c just below the count of the class at rank 0.7 V."""
    counts = [max(1, round(1e4 / rank)) for rank in range(1, classes + 1)]
    critical = 0.97 * sorted(counts)[round(0.3 * (classes - 1))]
    lam = math.sqrt(critical * (classes - 1) / classes) / sum(counts)
    return UFMProblem(class_counts=counts, lambda_W=lam, lambda_H=lam)


def random_start(problem: UFMProblem, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(W, H) of order one in the scaled variables, d = V."""
    V = problem.num_classes
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(V, V, generator=generator, dtype=torch.float64) / math.sqrt(V)
    B = torch.rand(V, V, generator=generator, dtype=torch.float64) / math.sqrt(V)
    H = B / (problem.feature_decay * problem.counts).sqrt()
    return A / problem.row_decay.sqrt().unsqueeze(1), H


def axes_start(problem: UFMProblem) -> tuple[Tensor, Tensor]:
    """One axis of its own for every class, of order one in the scaled variables: nothing traps."""
    unit = torch.eye(problem.num_classes, dtype=torch.float64)
    H = unit / (problem.feature_decay * problem.counts).sqrt()
    return unit / problem.row_decay.sqrt().unsqueeze(1), H


STARTS: dict[str, Callable[[UFMProblem], tuple[Tensor, Tensor]]] = {
    "random": random_start,
    "one axis a class": axes_start,
}


def run_ours(problem: UFMProblem, start: tuple[Tensor, Tensor], watch: Watch) -> None:
    solution = solve(problem, init=start, tolerance=GOAL, throw=False)
    watch.see(float(solution.objective))


def run_scipy(
    problem: UFMProblem, start: tuple[Tensor, Tensor], watch: Watch, *, scaled: bool = False
) -> None:
    function, V = Objective(problem), problem.num_classes
    unit_A = math.sqrt(function.decay_W) if scaled else 1.0
    unit_B = math.sqrt(function.decay_H) if scaled else 1.0

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        A, B = torch.from_numpy(x).split(V * V)
        F, grad_A, grad_B = function(A.view(V, V) / unit_A, B.view(V, V) / unit_B)
        watch.see(F)
        return F, torch.cat([grad_A.flatten() / unit_A, grad_B.flatten() / unit_B]).numpy()

    A, B = start[0].flatten() * unit_A, (start[1] * function.root).flatten() * unit_B
    x = torch.cat([A, B]).numpy()
    bounds = optimize.Bounds(np.repeat([-np.inf, 0.0], V * V), np.inf)
    options = {"maxiter": 10**6, "maxfun": 10**7, "ftol": 0.0, "gtol": 1e-12}
    optimize.minimize(value, x, jac=True, method="L-BFGS-B", bounds=bounds, options=options)


def run_adam(problem: UFMProblem, start: tuple[Tensor, Tensor], watch: Watch) -> None:
    function = Objective(problem)
    A, B = start[0].clone(), start[1] * function.root
    optimizer = torch.optim.Adam([A, B], lr=0.05 * float(A.std()))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9995)
    while True:
        F, A.grad, B.grad = function(A, B)
        watch.see(F)
        optimizer.step()
        schedule.step()
        B.clamp_(min=0.0)


def run_projected_gradient(problem: UFMProblem, start: tuple[Tensor, Tensor], watch: Watch) -> None:
    function, step = Objective(problem), 1.0
    A, B = start[0].clone(), start[1] * function.root
    F, grad_A, grad_B = function(A, B)
    while True:
        watch.see(F)
        while True:
            new_A, new_B = A - step * grad_A, (B - step * grad_B).clamp(min=0.0)
            moved = (new_A - A).square().sum() + (new_B - B).square().sum()
            new_F, new_grad_A, new_grad_B = function(new_A, new_B)
            if new_F <= F - 0.1 * float(moved) / step or step < 1e-12:
                break
            step *= 0.5
            watch.see(F)
        A, B, F, grad_A, grad_B = new_A, new_B, new_F, new_grad_A, new_grad_B
        step *= 1.3


RUNNERS: dict[str, Callable[[UFMProblem, tuple[Tensor, Tensor], Watch], None]] = {
    "ours": run_ours,
    "scipy L-BFGS-B": run_scipy,
    "scipy, our variables": partial(run_scipy, scaled=True),
    "torch Adam": run_adam,
    "projected gradient": run_projected_gradient,
}


def race(sizes: tuple[int, ...], least: float, start: str) -> None:
    """The table, and how our time grows with V. Peers get `least` seconds, or more."""
    print(f"seconds to a relative gap of {GOAL:g}; times ours")
    print(f"start: {start}")
    print(f"{'V':>6s}  " + "  ".join(f"{name:>36s}" for name in RUNNERS))
    ours: list[tuple[int, float]] = []
    tiny = zipf_problem(5)
    for runner in 2 * list(RUNNERS.values()):  # loads what the first calls load
        with contextlib.suppress(Reached):
            runner(tiny, axes_start(tiny), Watch(0.9 * float(closed_form(tiny).objective), 0.5))
    for classes in sizes:
        problem = zipf_problem(classes)
        minimum = float(closed_form(problem).objective)
        cells, limit = [], math.inf
        for name, runner in RUNNERS.items():
            watch = Watch(minimum, limit)
            try:
                runner(problem, STARTS[start](problem), watch)
                how = "trapped"
            except Reached:
                how = "reached" if watch.gap <= GOAL else "over time"
            seconds = watch.seconds
            if name == "ours":
                ours.append((classes, seconds))
                limit = max(least, PATIENCE * seconds)
            gap, times = max(watch.gap, 0.0), seconds / ours[-1][1]
            cells.append(f"{seconds:8.3f} s {how:>9s} {gap:7.1e} {times:6.1f}x")
        print(f"{classes:6d}  " + "  ".join(f"{cell:>36s}" for cell in cells), flush=True)
    if len(ours) > 1:
        (small, fast), (large, slow) = ours[-2], ours[-1]
        power = math.log(slow / fast) / math.log(large / small)
        print(f"ours grows as V^{power:.2f} from V = {small} to {large}")


def batch_problem(number: int, classes: int = 10) -> UFMProblem:
    """Random counts over four decades, three classes in ten collapsed."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(number, classes, generator=generator, dtype=torch.float64)
    counts = (10 ** (4 * draw)).ceil().long()
    critical = 0.97 * counts.double().quantile(0.3, dim=1, keepdim=True)
    lam = (critical * (classes - 1) / classes).sqrt() / counts.sum(1, keepdim=True)
    return UFMProblem(class_counts=counts, lambda_W=lam, lambda_H=lam)


def certified_batch(number: int, device: str | torch.device) -> tuple[int, float]:
    """How many of so many problems are certified to 1e-9, and the seconds of all."""
    solve(batch_problem(16), tolerance=1e-9, device=device)
    solution = solve(batch_problem(number), tolerance=1e-9, device=device, throw=False)
    return solution.status.count("certified"), solution.stats["seconds"]


def race_batch(number: int, alone: int, device: str) -> None:
    """Problems a second, together and one by one, each certified to 1e-9."""
    flat = batch_problem(number).flattened()
    began = time.perf_counter()
    for i in range(alone):
        solve(flat.take(torch.tensor(i)), tolerance=1e-9)
    one_by_one = alone / (time.perf_counter() - began)
    certified, seconds = certified_batch(number, device)
    rate = number / seconds
    print(f"{number} problems of V = 10 on {device}: {certified} certified in {seconds:.2f} s")
    print(
        f"{rate:.0f} problems/s together, {one_by_one:.1f} one by one on the CPU: "
        f"{rate / one_by_one:.0f} times"
    )


def vocabulary_problem(counts: list[int], active: int, classes: int | None = None) -> UFMProblem:
    """The (most frequent) classes that occur, n_c chosen so that `active` of them are learned."""
    ordered = sorted((count for count in counts if count > 0), reverse=True)[:classes]
    if not 1 <= active < len(ordered):
        raise ValueError(f"active is {active}; expected 1 to {len(ordered) - 1}")
    V = len(ordered)
    critical = 0.5 * (ordered[active - 1] + ordered[active])
    lam = math.sqrt(critical * (V - 1) / V) / sum(ordered)
    return UFMProblem(class_counts=ordered, lambda_W=lam, lambda_H=lam)


def gap_and_error(solution: Solution, exact: ClosedForm) -> tuple[float, float]:
    """The largest relative gap of a certificate and error of a class's loss."""
    gap = (solution.certificate.gap / solution.objective).max()
    error = ((solution.loss.cpu() - exact.loss) / exact.loss).abs().max()
    return float(gap), float(error)


def solve_vocabulary(
    problem: UFMProblem, width: int, device: str | torch.device
) -> Iterator[tuple[str, Any]]:
    """Solve it from a random start; yields each figure and its name as soon as it is known."""
    exact = closed_form(problem)
    yield "classes", problem.num_classes
    yield "classes learned", int((~exact.collapsed).sum())
    solution = solve(problem, width=width, device=device, tolerance=GOAL, throw=False)
    yield "seconds", solution.stats["seconds"]
    yield "status", solution.status
    if torch.device(device).type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield "peak memory, GiB", peak / 2**30
    gap, error = gap_and_error(solution, exact)
    yield "relative gap", gap
    yield "relative error of a class's loss", error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument(
        "--least", type=float, default=10.0, help="seconds a peer gets, however quick ours is"
    )
    parser.add_argument("--starts", nargs="*", choices=STARTS, default=list(STARTS))
    parser.add_argument("--number", type=int, default=4096, help="problems in the batch; 0: none")
    parser.add_argument("--alone", type=int, default=30, help="problems solved one by one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="of the batch and the vocabulary")
    parser.add_argument("--counts", type=Path, help="solve this vocabulary, and nothing else")
    parser.add_argument("--classes", type=int, help="of it, only so many most frequent classes")
    parser.add_argument("--active", type=int, default=2000, help="classes it learns")
    parser.add_argument("--width", type=int, default=2048, help="feature width it is given")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, "
        f"{options.threads} threads, {os.cpu_count()} cores, load {load:.1f}"
    )
    if options.counts is not None:
        counts = read_counts(options.counts)[1]
        problem = vocabulary_problem(counts, options.active, options.classes)
        for name, value in solve_vocabulary(problem, options.width, options.device):
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{name}: {shown}", flush=True)
        return
    for start in options.starts:
        race(tuple(options.sizes), options.least, start)
    if options.number:
        race_batch(options.number, options.alone, options.device)


if __name__ == "__main__":
    main()
