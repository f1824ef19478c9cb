"""Breaks every formula of ufm/ once and shows that the tests go red each time.

    python -m theory_tests.mutants

Each mutant is a copy of `ufm/` and its tests in a temporary folder, with one sign, index or factor
changed, on which the suite runs in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLOSED_FORM = Path("ufm/closed_form.py")
PROBLEM, LAW, REPAIR = Path("ufm/problem.py"), Path("ufm/law.py"), Path("ufm/repair.py")
SUITE = ("theory_tests/test_properties.py", "ufm/tests/test_closed_form.py")
SHARING_SUITE = ("ufm/tests/test_feature_sharing.py",)


@dataclass(frozen=True)
class Mutant:
    """One replacement in a file of ours; `old` occurs exactly once in it."""

    name: str
    old: str
    new: str
    target: Path = CLOSED_FORM

    def source(self) -> str:
        """The mutated text of the file."""
        text = (ROOT / self.target).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.name!r}: {self.old!r} occurs {text.count(self.old)} times; expected once"
            )
        return text.replace(self.old, self.new)


MUTANTS = (
    Mutant(
        "n_c: V/(V-1) upside down", "(_V(problem) / _off(problem))", "(_off(problem) / _V(problem))"
    ),
    Mutant("n_c: V/(V-1) dropped", "critical = critical * (_V", "critical = critical * 1.0 # (_V"),
    Mutant(
        "n_c: for MSE too",
        'if problem.loss == "cross_entropy":\n        critical',
        "if True:\n        critical",
    ),
    Mutant(
        "n_c: lambda_W twice",
        "problem.row_decay.sqrt() * problem.feature_decay.sqrt()",
        "problem.row_decay",
    ),
    Mutant("n_c: N not squared", "* total).square()", "* total)"),
    Mutant(
        "n_c: loss weights not squared", "problem.loss_weights.square()", "problem.loss_weights"
    ),
    Mutant(
        "n_c: loss weights the wrong way",
        "critical / problem.loss_weights",
        "critical * problem.loss_weights",
    ),
    Mutant(
        "n_c: smoothing not squared",
        "(1.0 - problem.label_smoothing) ** 2",
        "(1.0 - problem.label_smoothing)",
    ),
    Mutant("collapse: the other side", "counts <= critical", "counts >= critical"),
    Mutant(
        "excess: over n_k", "((counts - critical) / critical)", "((counts - critical) / counts)"
    ),
    Mutant("excess: not clamped", ".clamp(min=0.0)", ".clamp(min=-1.0)"),
    Mutant("y: no root", "y = (1.0 + excess).sqrt()", "y = 1.0 + excess"),
    Mutant("y - 1: denominator", "excess / (1.0 + y)", "excess / (2.0 + y)"),
    Mutant("smoothing: sign in the spread", "1.0 + y * (smooth", "1.0 - y * (smooth"),
    Mutant("smoothing: e for e/(1-e)", "(smooth / (1.0 - smooth))", "smooth"),
    Mutant("odds: V-1 for V", "odds = V * y_minus_1", "odds = off * y_minus_1"),
    Mutant("odds: spread multiplied", "y_minus_1 / spread", "y_minus_1 * spread"),
    Mutant("margin: log for log1p", "margin = odds.log1p()", "margin = (odds + 1e-9).log()"),
    Mutant("loss: V for V-1", "(off / (1.0 + odds)).log1p()", "(V / (1.0 + odds)).log1p()"),
    Mutant("loss: minus one", "(off / (1.0 + odds)).log1p()", "(off / (1.0 + odds))"),
    Mutant("loss: smoothing sign", "log1p() + smooth", "log1p() - smooth"),
    Mutant("loss: smoothing factor", "smooth * off / V * margin", "smooth * margin"),
    Mutant("slope: V for V-1", "slope = off / (spread", "slope = V / (spread"),
    Mutant("slope: sign", "slope = off /", "slope = -off /"),
    Mutant("slope: V dropped", "spread + V * y_minus_1", "spread + y_minus_1"),
    Mutant("slope: one spread", "(spread * (spread + V", "((spread + V"),
    Mutant(
        "slope: learned and collapsed swapped",
        "torch.where(collapsed, 0.0, slope)",
        "torch.where(collapsed, slope, 0.0)",
    ),
    Mutant(
        "slope: not per lambda",
        "slope / (decay_W * problem.unshared_decay).sqrt()",
        "slope / (decay_W * problem.unshared_decay)",
    ),
    Mutant("MSE: margin", "return y_minus_1 / y,", "return y_minus_1,"),
    Mutant("MSE: loss without the half", "0.5 / y.square()", "1.0 / y.square()"),
    Mutant("MSE: loss not squared", "0.5 / y.square()", "0.5 / y"),
    Mutant("MSE: slope", "1.0 / y.square())", "1.0 / y)"),
    Mutant(
        "gauge: n_k dropped",
        "gauge = (decay_W * decay_H * counts).sqrt()",
        "gauge = (decay_W * decay_H).sqrt()",
    ),
    Mutant("spectrum: |e_k - 1/V| dropped", "math.sqrt(_off(problem) / _V(problem))", "1.0"),
    Mutant(
        "spectrum: |e_k - 1/V| upside down",
        "math.sqrt(_off(problem) / _V(problem))",
        "math.sqrt(_V(problem) / _off(problem))",
    ),
    Mutant("features: n_k dropped", "spectrum / (decay_H * counts)", "spectrum / decay_H"),
    Mutant(
        "features: lambda_W for lambda_H",
        "spectrum / (decay_H * counts)",
        "spectrum / (decay_W * counts)",
    ),
    Mutant(
        "weights: lambda_H for lambda_W",
        "_weight_norm_sq(problem, spectrum) / decay_W",
        "_weight_norm_sq(problem, spectrum) / decay_H",
    ),
    Mutant(
        "weights: own class counted twice (as printed)",
        "spectrum.sum(-1, keepdim=True) - spectrum",
        "spectrum.sum(-1, keepdim=True)",
    ),
    Mutant("weights: sign of the others", "(off / V) + others", "(off / V) - others"),
    Mutant("weights: V/(V-1)", "spectrum * (off / V)", "spectrum * (V / off)"),
    Mutant("weights: V for V (V-1)", "others / (V * off)", "others / V"),
    Mutant("objective: unweighted loss", "problem.mass * loss + spectrum", "loss + spectrum"),
    Mutant(
        "objective: half the decay",
        "problem.mass * loss + spectrum",
        "problem.mass * loss + 0.5 * spectrum",
    ),
    Mutant("objective: sign", "problem.mass * loss + spectrum", "problem.mass * loss - spectrum"),
    Mutant("logits: sign of 1/V", "unit - 1.0 / classes", "unit + 1.0 / classes"),
    Mutant("logits: 1/(V-1)", "unit - 1.0 / classes", "unit - 1.0 / (classes - 1)"),
    Mutant("logits: rows for columns", "self.margin.unsqueeze(-2)", "self.margin.unsqueeze(-1)"),
    Mutant(
        "W: norm not rooted",
        "self.margin / self.feature_norm_sq.sqrt()",
        "self.margin / self.feature_norm_sq",
    ),
    Mutant(
        "H: norm not rooted",
        "norms = self.feature_norm_sq.sqrt()",
        "norms = self.feature_norm_sq",
    ),
    Mutant("axes: collapsed classes first", "argsort(self.collapsed", "argsort(~self.collapsed"),
    Mutant(
        "width: one too few accepted",
        "problem.feature_width < active",
        "problem.feature_width + 1 < active",
    ),
    Mutant(
        "sharing: n_k^s for n_k^-s",
        "self.counts**-self.feature_sharing",
        "self.counts**self.feature_sharing",
        PROBLEM,
    ),
    Mutant("sharing: none", "self.counts**-self.feature_sharing", "1.0", PROBLEM),
    Mutant(
        "sharing: twice in a batch",
        "lambda_H=self.unshared_decay.reshape",
        "lambda_H=self.feature_decay.reshape",
        PROBLEM,
    ),
    Mutant(
        "sharing: twice in a part of a batch",
        "lambda_H=self.unshared_decay[index]",
        "lambda_H=self.feature_decay[index]",
        PROBLEM,
    ),
    Mutant("sharing: n_c without its root", "** (1.0 / (1.0 + sharing))", "** 1.0"),
    Mutant(
        "sharing: n_c of each class's own decay", "critical * problem.counts**sharing", "critical"
    ),
    Mutant("sharing: slope per decay of a sample", "problem.unshared_decay", "decay_H"),
    Mutant("law: root for every sharing", "n ** (0.5 * (1.0 + sharing))", "n**0.5", LAW),
    Mutant("law: n_c squared for every sharing", "2.0 / (1.0 + sharing)", "2.0", LAW),
    Mutant("law: loss as if nothing were shared", "0.5 * (1.0 + self.feature_sharing)", "0.5", LAW),
    Mutant("repair: average", '0.25 * sharing,\n        "equal"', '0.0,\n        "equal"', REPAIR),
    Mutant("repair: equal", "0.5 * sharing", "0.25 * sharing", REPAIR),
    Mutant("repair: balanced", "0.25 * sharing,\n    }", "0.5 * sharing,\n    }", REPAIR),
)


def survives(mutant: Mutant) -> bool:
    """Whether the suite passes on the mutant, which it must not."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        for name in ("ufm", "theory_tests", "run_store"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "conftest.py"):
            shutil.copy(ROOT / name, copy)
        (copy / mutant.target).write_text(mutant.source(), encoding="utf-8")
        suite = SUITE if mutant.target == CLOSED_FORM else SHARING_SUITE
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *suite]
        result = subprocess.run(
            command,
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode not in (0, 1):
        raise RuntimeError(f"mutant {mutant.name!r}: pytest did not run: {result.stdout[-2000:]}")
    return result.returncode == 0


def main() -> int:
    """Run them all; 0 when none survives."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="suites run at a time")
    jobs = parser.parse_args().jobs
    alive = []
    with ThreadPoolExecutor(jobs) as pool:
        for mutant, lives in zip(MUTANTS, pool.map(survives, MUTANTS), strict=True):
            print(f"{'SURVIVED' if lives else 'caught':9s}{mutant.name}", flush=True)
            if lives:
                alive.append(mutant.name)
    print(f"{len(MUTANTS) - len(alive)} of {len(MUTANTS)} mutants caught")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
