"""One row a claim of the paper's Section 5 and Appendix A: what is printed, what is true, and how
far each is from certified solves that know neither."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ufm import as_printed
from ufm.closed_form import closed_form
from ufm.geometry import neural_collapse
from ufm.problem import UFMProblem, checked_sharing
from ufm.solver import Solution, solve

HOLDS_BELOW = 1e-6
"""Relative error against certified solves up to which a formula holds."""
REFUTED_ABOVE = 1e-3
"""Relative error from which a printed formula counts as shown to be wrong."""
SLOPE_STEP = 1e-4


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim with its measured errors: relative, or the number of counterexamples."""

    name: str
    where: str
    printed: str
    corrected: str
    printed_error: float
    corrected_error: float
    misprinted: bool
    """Whether ufm/THEORY.md, section 5, says that the printed form is wrong."""

    @property
    def confirmed(self) -> bool:
        """The corrected form holds, and the printed one fails exactly where it should."""
        if self.misprinted:
            return self.corrected_error <= HOLDS_BELOW and self.printed_error >= REFUTED_ABOVE
        return max(self.corrected_error, self.printed_error) <= HOLDS_BELOW

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.confirmed:
            return "NOT CONFIRMED"
        return "corrected form holds, printed form refuted" if self.misprinted else "holds"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Case:
    """A problem with its certified solution."""

    problem: UFMProblem
    solution: Solution
    sampled: Solution
    """With one free feature a sample."""

    @property
    def margin(self) -> Float[Tensor, " V"]:
        """M_k as measured: own logit less the mean of the others."""
        logits = self.solution.W @ self.solution.H
        own = logits.diagonal()
        return own - (logits.sum(0) - own) / (len(own) - 1)


def verify(
    *,
    device: str | torch.device | None = None,
    seed: int = 0,
    feature_sharing: float | int = 0.0,
) -> list[Claim]:
    """Solve the test problems from random starts and measure every claim on them.

    With feature_sharing, every formula has lambda_H n_k^-s for lambda_H, and the same verdict.

    Raises NotCertifiedError if a solve ends without its certificate.
    """
    sharing = checked_sharing(feature_sharing)
    cases = [_case(_shared(problem, sharing), device, seed) for problem in _problems()]
    rows: list[Callable[[list[_Case]], Claim]] = [
        _objective,
        _within_class_collapse,
        _orthogonality,
        _feature_norms,
        _weight_norms,
        _margins,
        _collapse_condition,
        _classifier_rows,
        _own_logits,
        _other_logits,
        _losses,
    ]
    claims = [row(cases) for row in rows]
    claims.append(_slope(device, seed, sharing))
    claims.extend(_conclusions(device, seed, sharing))
    return claims


def _problems() -> list[UFMProblem]:
    """Two classes to twelve; nothing, something and nearly everything collapsed."""
    return [
        UFMProblem(class_counts=[40, 20, 8, 3], lambda_W=2e-3, lambda_H=2e-3),
        UFMProblem(class_counts=[9, 2], lambda_W=0.1, lambda_H=0.1),
        UFMProblem(class_counts=[60, 30, 12, 5, 1], lambda_W=4e-3, lambda_H=9e-3),
        UFMProblem(class_counts=[30] * 6 + [3] * 6, lambda_W=6e-3, lambda_H=1e-3),
    ]


def _shared(problem: UFMProblem, sharing: float) -> UFMProblem:
    """With features shared and lambda_H such that the same classes are learned."""
    critical_count = float(closed_form(problem).critical_count)
    lambda_H = problem.unshared_decay[0] * critical_count**sharing
    return problem.replace(feature_sharing=sharing, lambda_H=float(lambda_H))


def _case(problem: UFMProblem, device: str | torch.device | None, seed: int) -> _Case:
    solution = solve(problem, device=device, seed=seed)
    sampled = solve(problem, device=device, seed=seed, per_sample=True)
    return _Case(problem=solution.problem, solution=solution, sampled=sampled)


def _claim(
    name: str,
    where: str,
    printed: str,
    corrected: str,
    errors: list[tuple[float, float]],
    *,
    misprinted: bool,
) -> Claim:
    """The worst of both errors over the cases: one case is enough to refute a printed form, and the
    corrected one has to hold in all."""
    return Claim(
        name=name,
        where=where,
        printed=printed,
        corrected=corrected,
        printed_error=max(error for error, _ in errors),
        corrected_error=max(error for _, error in errors),
        misprinted=misprinted,
    )


def _relative(claimed: Tensor, measured: Tensor) -> float:
    """Largest difference over the largest measured size."""
    return float((claimed - measured).abs().max() / measured.abs().max().clamp(min=1e-300))


def _norms(case: _Case) -> Float[Tensor, " V"]:
    return case.solution.H.square().sum(0)


def _objective(cases: list[_Case]) -> Claim:
    errors = []
    for case in cases:
        # lambda_H |H|^2 without the 1/2 is the problem with 2 lambda_H: its solve against (c).
        doubled = case.problem.replace(lambda_H=2.0 * case.problem.unshared_decay)
        printed = solve(doubled).H.square().sum(0)
        claimed = closed_form(case.problem).feature_norm_sq
        errors.append((_relative(claimed, printed), _relative(claimed, _norms(case))))
    return _claim(
        "objective, against (c)",
        "Eq. (1)",
        "lH |H|^2",
        "lH |H|^2 / 2",
        errors,
        misprinted=True,
    )


def _within_class_collapse(cases: list[_Case]) -> Claim:
    spread = [
        neural_collapse(case.problem, case.sampled.W, case.sampled.H).within_class ** 0.5
        for case in cases
    ]
    text = "h_ki = mu_k"
    errors = [(value, value) for value in spread]
    return _claim("(a) within-class collapse", "Sec. 5 (a)", text, text, errors, misprinted=False)


def _orthogonality(cases: list[_Case]) -> Claim:
    errors = []
    for case in cases:
        frame = neural_collapse(case.problem, case.sampled.W, case.sampled.H).orthogonal_frame
        worst = 0.0 if frame != frame else frame
        errors.append((worst, worst))
    text = "mu_k . mu_l = 0"
    return _claim("(b) orthogonal means", "Sec. 5 (b)", text, text, errors, misprinted=False)


def _feature_norms(cases: list[_Case]) -> Claim:
    errors = []
    for case in cases:
        V, counts = case.problem.num_classes, case.problem.counts
        ratio = case.problem.row_decay / case.problem.feature_decay
        claimed = (ratio * (V - 1) / (V * counts)).sqrt() * case.margin
        error = _relative(claimed, _norms(case))
        errors.append((error, error))
    text = "|mu_k|^2 = sqrt(lW (V-1) / (lH V n_k)) M_k"
    return _claim("(c) feature norms", "Sec. 5 (c)", text, text, errors, misprinted=False)


def _weight_norms(cases: list[_Case]) -> Claim:
    errors = []
    for case in cases:
        measured = case.solution.W.square().sum(1)
        printed = as_printed.weight_norm_sq(case.problem, case.margin)
        claimed = closed_form(case.problem).weight_norm_sq
        errors.append((_relative(printed, measured), _relative(claimed, measured)))
    return _claim(
        "(d) weight norms",
        "Sec. 5 (d)",
        "last sum over all j",
        "last sum over j != k",
        errors,
        misprinted=True,
    )


def _margins(cases: list[_Case]) -> Claim:
    errors = []
    for case in cases:
        printed = as_printed.margin(case.problem)
        claimed = closed_form(case.problem).margin
        errors.append((_relative(printed, case.margin), _relative(claimed, case.margin)))
    return _claim(
        "M_k",
        "Sec. 5",
        "log((V-1)(sqrt(n_k)/(N sqrt((V-1)/V) lW lH) - 1))",
        "log((V-1)(sqrt(n_k)/(N sqrt((V-1)/V lW lH)) - 1))",
        errors,
        misprinted=True,
    )


def _collapse_condition(cases: list[_Case]) -> Claim:
    errors = []
    for case in cases:
        measured = _norms(case) == 0
        printed = (as_printed.collapsed(case.problem) != measured).sum()
        claimed = (closed_form(case.problem).collapsed != measured).sum()
        errors.append((float(printed), float(claimed)))
    return _claim(
        "collapse (classes misjudged)",
        "Sec. 5, Cor. 4.6",
        "n_k <= lW lH N^2 (V-1)/V",
        "n_k <= lW lH N^2 V/(V-1)",
        errors,
        misprinted=True,
    )


def _classifier_rows(cases: list[_Case]) -> Claim:
    errors = []
    for case in cases:
        problem, W, H = case.problem, case.solution.W, case.solution.H
        V = problem.num_classes
        pulls = (problem.feature_decay * problem.counts).sqrt() * H
        rows = (V * pulls - pulls.sum(1, keepdim=True)).T
        scale = (problem.row_decay[0] * V * (V - 1)).rsqrt()
        error = _relative(scale * rows, W)
        errors.append((error, error))
    text = "w_k = sqrt(lH / (lW V (V-1))) (V sqrt(n_k) mu_k - sum_m sqrt(n_m) mu_m)"
    name = "classifier, where the proof starts"
    return _claim(name, "App. A", text, text, errors, misprinted=False)


def _own_logits(cases: list[_Case]) -> Claim:
    errors = [_logit_errors(case, torch.eye(case.problem.num_classes)) for case in cases]
    return _claim(
        "own logit in the proof",
        "App. A",
        "w_k.mu_k = M_k",
        "w_k.mu_k = (V-1)/V M_k",
        errors,
        misprinted=True,
    )


def _other_logits(cases: list[_Case]) -> Claim:
    errors = [_logit_errors(case, 1.0 - torch.eye(case.problem.num_classes)) for case in cases]
    return _claim(
        "other logits in the proof",
        "App. A",
        "w_j.mu_k = M_j / V^2",
        "w_j.mu_k = -M_k / V",
        errors,
        misprinted=True,
    )


def _logit_errors(case: _Case, part: Float[Tensor, "V V"]) -> tuple[float, float]:
    part = part.to(case.solution.W)
    measured = part * (case.solution.W @ case.solution.H)
    printed, claimed = as_printed.logits(case.margin), closed_form(case.problem).logits
    return _relative(part * printed, measured), _relative(part * claimed, measured)


def _losses(cases: list[_Case]) -> Claim:
    errors = []
    for case in cases:
        measured = case.solution.loss
        printed = as_printed.loss(case.margin)
        claimed = closed_form(case.problem).loss
        errors.append((_relative(printed, measured), _relative(claimed, measured)))
    return _claim(
        "Proposition 5.1",
        "Sec. 5, App. A",
        "log(sum_j exp(M_j / V^2)) - M_k",
        "log(1 + (V-1) exp(-M_k))",
        errors,
        misprinted=True,
    )


def _slope(device: str | torch.device | None, seed: int, sharing: float) -> Claim:
    """Against a fourth-order difference of certified solves at lambda_W = lambda_H."""
    errors = []
    for counts, lam in (([40, 20, 8, 3], 1e-3), ([60, 30, 12, 5, 2], 2e-3)):
        problem = UFMProblem(
            class_counts=counts, lambda_W=lam, lambda_H=lam, feature_sharing=sharing
        )
        shifts = (-2.0, -1.0, 1.0, 2.0)
        moved = [
            solve(
                problem.replace(
                    lambda_W=lam * (1 + shift * SLOPE_STEP), lambda_H=lam * (1 + shift * SLOPE_STEP)
                ),
                device=device,
                seed=seed,
            )
            for shift in shifts
        ]
        losses = [solution.loss.cpu() for solution in moved]
        margins = [_Case(problem=problem, solution=s, sampled=s).margin.cpu() for s in moved]
        measured = _difference(losses) / (lam * SLOPE_STEP)
        margin_slope = _difference(margins) / (lam * SLOPE_STEP)
        exact = closed_form(problem)
        printed = as_printed.loss_slope(problem, exact.margin, margin_slope)
        errors.append((_relative(printed, measured), _relative(exact.loss_slope, measured)))
    return _claim(
        "d loss / d lambda",
        "Sec. 5",
        "d loss'/dl + 1/l + N sqrt(V-1) / sqrt(n_k V - l N sqrt(V-1))",
        "N sqrt(V-1) / (sqrt(n_k V) - l N sqrt(V-1))",
        errors,
        misprinted=True,
    )


def _difference(values: list[Tensor]) -> Tensor:
    """Fourth-order central difference from values at -2, -1, 1 and 2 steps."""
    return (values[0] - 8.0 * values[1] + 8.0 * values[2] - values[3]) / 12.0


def _conclusions(device: str | torch.device | None, seed: int, sharing: float) -> list[Claim]:
    """The bold conclusions, as counterexamples among certified solves along lambda."""
    counts = [400, 150, 60, 25, 10, 4, 2, 1]
    grid = torch.logspace(-4, -1, 25, dtype=torch.float64).unsqueeze(1)
    batch = UFMProblem(
        class_counts=torch.tensor(counts).expand(25, -1),
        lambda_W=grid,
        lambda_H=grid,
        feature_sharing=sharing,
    )
    solution = solve(batch, device=device, seed=seed)
    loss, collapsed = solution.loss, solution.H.square().sum(-2) == 0
    neglected = collapsed.sum(1)
    fewer = int((neglected.diff() < 0).sum()) + int(neglected[0] == neglected[-1])
    disordered = int((loss.diff(dim=1) < -1e-9).sum())
    learned = ~(collapsed[1:] | collapsed[:-1])
    rise = torch.where(learned, loss.diff(dim=0), torch.nan)
    slower = int((rise.diff(dim=1) < -1e-9).sum())
    rows = (
        ("more decay neglects more tokens", fewer),
        ("loss falls with frequency", disordered),
        ("rare tokens' loss rises faster with lambda", slower),
    )
    return [
        Claim(
            name=name,
            where="Sec. 5, in bold",
            printed="(counterexamples)",
            corrected="(counterexamples)",
            printed_error=float(found),
            corrected_error=float(found),
            misprinted=False,
        )
        for name, found in rows
    ]
