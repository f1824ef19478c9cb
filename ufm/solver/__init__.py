"""A solver that does not know the closed form, and certifies what it finds."""

from ufm.solver.solver import NotCertifiedError, Solution, solve, solve_batch

__all__ = ["NotCertifiedError", "Solution", "solve", "solve_batch"]
