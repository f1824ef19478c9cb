"""The UFM's solver on a GPU: certificates against the closed form, thousands at once, one large."""

from __future__ import annotations

from pathlib import Path

from benchmarks import ufm_solver
from benchmarks.gpu.parts import Record, Settings
from ufm import closed_form, solve
from ufm.counts_file import read_counts


def checks_of_ufm(settings: Settings, record: Record) -> None:
    """The solver on the device: certificates, and the closed form."""
    for name, problem in (
        ("32 of V = 10", ufm_solver.batch_problem(32)),
        ("V = 60", ufm_solver.zipf_problem(60)),
    ):
        solution = solve(problem, device=settings.device, tolerance=1e-9, throw=False)
        gap, error = ufm_solver.gap_and_error(solution, closed_form(problem))
        record.check(f"UFM, {name}: relative gap", gap, 1e-9)
        record.check(f"UFM, {name}: relative error of a class's loss", error, 1e-6)


def ufm_batch(settings: Settings, record: Record) -> None:
    """Thousands of problems at once."""
    certified, seconds = ufm_solver.certified_batch(settings.problems, settings.device)
    record.check("problems not certified to 1e-9", settings.problems - certified, 0)
    record.check(f"{settings.problems} problems of V = 10: seconds", seconds, 10)


def ufm_vocabulary(settings: Settings, record: Record) -> None:
    """A whole vocabulary, n_c chosen so that some of its classes are learned."""
    if settings.counts:
        counts = read_counts(Path(settings.counts))[1]
    else:
        counts = [max(1, round(1e6 / rank)) for rank in range(1, settings.vocab_size + 1)]
    record.figure("counts", settings.counts or "Zipf")
    problem = ufm_solver.vocabulary_problem(counts, settings.active)
    limits = {"relative gap": 1e-8, "relative error of a class's loss": 1e-6}
    for name, value in ufm_solver.solve_vocabulary(problem, settings.width, settings.device):
        if name in limits:
            record.check(name, value, limits[name])
        else:
            record.figure(name, value)
