"""The unconstrained ReLU-features model under weight decay: solved in closed form and certified."""

from ufm.certificate import Certificate, certify
from ufm.closed_form import ClosedForm, closed_form
from ufm.law import CriticalCountFit, fit_critical_count
from ufm.problem import UFMProblem
from ufm.solver import NotCertifiedError, Solution, solve, solve_batch

__all__ = [
    "Certificate",
    "ClosedForm",
    "CriticalCountFit",
    "NotCertifiedError",
    "Solution",
    "UFMProblem",
    "certify",
    "closed_form",
    "fit_critical_count",
    "solve",
    "solve_batch",
]
