"""The unconstrained ReLU-features model under weight decay: solved in closed form and certified."""

import importlib
import sys

if sys.argv[0] == "-m":  # of the command line alone: Ctrl-C is one line while all else is imported
    importlib.import_module("run_store.signals")

from ufm.certificate import Certificate, certify
from ufm.closed_form import ClosedForm, closed_form
from ufm.geometry import Geometry, neural_collapse
from ufm.law import CriticalCountFit, fit_critical_count
from ufm.problem import UFMProblem
from ufm.repair import repair_weights
from ufm.solver import NotCertifiedError, Solution, solve, solve_batch

__all__ = [
    "Certificate",
    "ClosedForm",
    "CriticalCountFit",
    "Geometry",
    "NotCertifiedError",
    "Solution",
    "UFMProblem",
    "certify",
    "closed_form",
    "fit_critical_count",
    "neural_collapse",
    "repair_weights",
    "solve",
    "solve_batch",
]
