"""The solver against the closed form, which it does not know, and beyond the theorem."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch

import ufm
from ufm import NotCertifiedError, UFMProblem, certify, closed_form, neural_collapse, solve
from ufm.solver import solve_batch
from ufm.solver.axes import merge_collinear, reseed
from ufm.solver.scaled import Point, ScaledProblem

DECAY = {"lambda_W": 2e-3, "lambda_H": 5e-3}
PROBLEM = UFMProblem(class_counts=[500, 60, 7, 4, 1], **DECAY)
VARIANTS = [
    {},
    {"loss_weights": [1, 3, 2, 9, 5]},
    {"lambda_H": [5e-3, 1e-3, 2e-4, 1e-5, 1e-4]},
    {"label_smoothing": 0.1},
    {"loss": "mse"},
    {"loss": "mse", "nonnegative": False},
    {"width": 9},
    {"width": 4},
    {"feature_sharing": 0.5},
    {"feature_sharing": 1.0, "loss_weights": [1, 3, 2, 9, 5]},
]


def assert_solved(solution, problem):
    assert solution.status == "certified"
    assert solution.certificate.gap <= 1e-10 * solution.objective
    exact = closed_form(problem)
    torch.testing.assert_close(solution.loss, exact.loss, rtol=1e-8, atol=0)
    torch.testing.assert_close(solution.objective, exact.objective, rtol=1e-10, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_finds_the_closed_form_from_a_random_start(variant, seed):
    problem = PROBLEM.replace(**variant)
    solution = solve(problem, seed=seed)
    assert_solved(solution, problem)
    assert solution.W.shape == (5, problem.feature_width)
    assert solution.H.shape == (problem.feature_width, 5)
    again = certify(problem, solution.W, solution.H)
    # Both ends of the gap are sums of about V^2 rounded terms.
    assert abs(again.gap - solution.certificate.gap) <= 1e-13 * solution.objective


@pytest.mark.parametrize("excess", [-1e-3, -1e-6, 1e-6, 1e-3])
def test_at_the_threshold(excess):
    V, count = 20, 400
    lam = (count * (1 - excess) * (V - 1) / V) ** 0.5 / (19 * count + 10_000)
    problem = UFMProblem(class_counts=[10_000] + [count] * 19, lambda_W=lam, lambda_H=lam)
    assert_solved(solve(problem), problem)
    assert bool(closed_form(problem).collapsed[1:].all()) is (excess < 0)


def test_step_imbalance_that_traps_plain_descent():
    problem = UFMProblem(class_counts=[1000] * 10 + [10] * 10, lambda_W=2e-4, lambda_H=2e-4)
    for seed in range(3):
        assert_solved(solve(problem, seed=seed), problem)


@pytest.mark.parametrize(("seed", "sharing"), [(0, 0.0), (1, 0.0), (2, 0.0), (0, 0.5), (1, 1.0)])
def test_within_class_collapse_comes_out_of_free_samples(seed, sharing):
    problem = UFMProblem(class_counts=[60, 30, 12, 5, 1], **DECAY, feature_sharing=sharing)
    solution = solve(problem, per_sample=True, seed=seed)
    assert solution.H.shape == (5, 108)
    assert_solved(solution, problem)
    measured = neural_collapse(problem, solution.W, solution.H)
    assert measured.within_class < 1e-12
    assert measured.orthogonal_frame < 1e-6


@pytest.mark.parametrize("seed", [0, 3, 7, 8])
def test_a_class_with_two_axes_costs_no_other_class_its_own(seed):
    weights = [1.0, 1.0, 1.5, 2.0, 3.0]
    problem = UFMProblem(
        class_counts=[100, 50, 20, 5, 1], lambda_W=1e-3, lambda_H=1e-3, loss_weights=weights
    )
    assert_solved(solve(problem, per_sample=True, seed=seed), problem)


def test_free_features_reach_the_nuclear_norm_bound():
    free = PROBLEM.replace(nonnegative=False)
    solution = solve(free)
    assert solution.status == "certified"
    assert solution.objective < closed_form(PROBLEM).objective * (1 - 1e-3)
    scaled = solution.W @ solution.H * (free.counts * 5e-3 * 2e-3).sqrt()
    decay = solution.objective - (free.mass * solution.loss).sum()
    torch.testing.assert_close(decay, torch.linalg.matrix_norm(scaled, "nuc"), rtol=1e-8, atol=0)


def test_beyond_the_theorem_is_reported_as_measured():
    narrow = solve(PROBLEM, width=2)
    assert narrow.status == "stationary"
    assert "not known" in narrow.message
    assert narrow.certificate.gap > 1e-3 * narrow.objective
    with_bias = solve(PROBLEM.replace(bias=True))
    assert with_bias.bias.shape == (5,)
    assert with_bias.objective < closed_form(PROBLEM).objective
    rowwise = solve(PROBLEM.replace(lambda_W=[1e-3, 2e-3, 4e-3, 3e-3, 2e-3]))
    assert rowwise.certificate.gap >= -1e-12


def test_an_unfinished_run_says_so(monkeypatch):
    monkeypatch.setattr("ufm.solver.search.ROUNDS", 1)
    monkeypatch.setattr("ufm.solver.search.POLISH_STEPS", 0)
    monkeypatch.setattr("ufm.solver.search.FIRST_DESCENT", 1)
    problem = UFMProblem(class_counts=[6, 4, 2], **DECAY)
    with pytest.raises(NotCertifiedError, match="unfinished"):
        solve(problem, per_sample=True)
    solution = solve(problem, per_sample=True, throw=False)
    assert solution.status == "unfinished"
    assert "ran out" in solution.message
    assert solution.certificate.gap > 1e-10 * solution.objective


def test_a_batch_gives_what_each_problem_gives_alone():
    counts = torch.tensor([[500, 60, 7, 1], [40, 20, 8, 3], [5, 5, 5, 5]])
    lambda_W = torch.tensor([[2e-3], [1e-3], [3e-2]], dtype=torch.float64)
    batch = UFMProblem(class_counts=counts, lambda_W=lambda_W, lambda_H=5e-3)
    together = solve(batch)
    assert together.W.shape == (3, 4, 4)
    assert together.status == ["certified"] * 3
    for i in range(3):
        problem = UFMProblem(class_counts=counts[i], lambda_W=float(lambda_W[i]), lambda_H=5e-3)
        torch.testing.assert_close(together.loss[i], closed_form(problem).loss, rtol=1e-8, atol=0)


def test_solve_batch_keeps_the_order_of_mixed_problems():
    problems = [
        PROBLEM,
        UFMProblem(class_counts=[9, 3], **DECAY),
        PROBLEM.replace(label_smoothing=0.1),
        UFMProblem(class_counts=[4, 4], **DECAY),
        PROBLEM.replace(loss_weights=[1, 2, 3, 4, 5]),
    ]
    for problem, solution in zip(problems, solve_batch(problems), strict=True):
        assert_solved(solution, problem)


def test_a_given_start_is_used():
    optimum = closed_form(PROBLEM)
    solution = solve(PROBLEM, init=(optimum.W, optimum.H))
    assert solution.stats.get("iterations", 0) == 0
    assert_solved(solution, PROBLEM)


def test_the_same_seed_gives_the_same_numbers():
    # To the last bit, since any seed ends at this minimum: the same steps in buffers placed alike.
    assert torch.equal(solve(PROBLEM, seed=3).W, solve(PROBLEM, seed=3).W)


def test_float32_is_certified_for_what_it_is():
    solution = solve(PROBLEM, dtype=torch.float32, tolerance=1e-4)
    assert solution.status == "certified"
    assert solution.W.dtype == torch.float64


def test_gradient_and_hessian_against_autograd():
    generator = torch.Generator().manual_seed(0)
    for variant in ({}, {"bias": True}, {"label_smoothing": 0.2}, {"loss": "mse"}):
        problem = PROBLEM.replace(class_counts=[4, 3, 2, 2, 1], **variant)
        for per_sample in (False, True):
            scaled = ScaledProblem.of(
                problem.flattened(), per_sample=per_sample, dtype=torch.float64
            )
            columns = 12 if per_sample else 5
            at = Point(
                A=torch.randn(1, 5, 3, generator=generator, dtype=torch.float64),
                B=torch.rand(1, 3, columns, generator=generator, dtype=torch.float64),
                bias=torch.zeros(1, 5, dtype=torch.float64),
            )

            def value(flat, scaled=scaled, at=at):
                point = at.like(flat)
                logits = (point.A @ point.B) * scaled.row[:, :, None] * scaled.col[:, None]
                logits = logits + point.bias.unsqueeze(2) * scaled.bias
                target = torch.nn.functional.one_hot(scaled.label, 5).double().T
                if scaled.mse:
                    loss = 0.5 * (logits - target).square().sum(1)
                else:
                    target = target * (1 - scaled.smoothing) + scaled.smoothing / 5
                    loss = -(target * torch.log_softmax(logits, 1)).sum(1)
                decay = point.A.square().sum() + point.B.square().sum()
                return (scaled.mass * loss).sum() + 0.5 * decay

            flat = at.flat()
            computed, gradient = scaled.value_and_gradient(at)
            torch.testing.assert_close(computed[0], value(flat))
            expected = torch.autograd.functional.jacobian(value, flat)
            torch.testing.assert_close(gradient.flat(), expected)
            along = torch.randn(flat.shape, generator=generator, dtype=torch.float64)
            along[:, -5:] *= scaled.bias
            hessian = torch.autograd.functional.hvp(value, flat, along)[1]
            product = scaled.hessian_product(at, scaled.gradient_columns(at), at.like(along))
            torch.testing.assert_close(product.flat(), hessian)


def test_chunks_change_nothing(monkeypatch):
    whole = solve(PROBLEM)
    monkeypatch.setitem(ufm.solver.scaled.CHUNK_ELEMENTS, "cpu", 10)
    monkeypatch.setattr("ufm.solver.scaled.SMALLEST_CHUNK", 1)
    monkeypatch.setattr("ufm.certificate.BLOCK_ELEMENTS", 10)
    cut = solve(PROBLEM)
    torch.testing.assert_close(cut.loss, whole.loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(cut.certificate.lower_bound, whole.certificate.lower_bound)


def test_a_vocabulary_that_is_mostly_collapsed_needs_few_axes():
    counts = [5000, 900, 400, *([3, 2, 1] * 60)]
    problem = UFMProblem(class_counts=counts, lambda_W=2e-3, lambda_H=2e-3, width=4)
    assert_solved(solve(problem), problem)


def test_merging_collinear_axes_keeps_the_logits_and_saves_decay():
    a, b = torch.tensor([1.0, -2.0, 1.0]).double(), torch.tensor([0.0, 3.0]).double()
    A = torch.stack([a, 2 * a, torch.tensor([0.0, 1.0, -1.0]).double()], 1)
    B = torch.stack([b, 0.5 * b, torch.tensor([1.0, 0.0]).double()])
    merged_A, merged_B = merge_collinear(A, B)
    torch.testing.assert_close(merged_A @ merged_B, A @ B)
    assert int((merged_A.norm(dim=0) > 0).sum()) == 2
    assert merged_A.square().sum() + merged_B.square().sum() < A.square().sum() + B.square().sum()


def test_reseeding_starts_where_the_gradient_is_steep():
    A, B = torch.zeros(3, 2).double(), torch.zeros(2, 3).double()
    gradient = -torch.diag(torch.tensor([2.0, 0.5, 3.0]).double())
    label = torch.arange(3)
    new_A, new_B, added = reseed(A, B, gradient, label, nonnegative=True)
    assert added == 2
    assert (new_B > 0).nonzero().tolist() == [[0, 2], [1, 0]]
    assert (new_A[2, 0] > 0) & (new_A[0, 1] > 0)


def test_the_solver_does_not_import_the_closed_form():
    """Only the certificate may: it certifies a ClosedForm, which no solver file builds."""
    files = list((Path(inspect.getfile(ufm)).parent / "solver").glob("*.py"))
    assert len(files) > 7
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert "ufm.closed_form" not in modules


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"width": 0}, "width is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"tolerance": 0.0}, r"tolerance is 0\.0"),
        ({"dtype": torch.float16}, "dtype is torch.float16"),
        ({"init": "zeros"}, "init is 'zeros'"),
        ({"init": (torch.zeros(3, 2), torch.zeros(2, 5))}, r"\(3, 2\)"),
        ({"width": 10**9}, "too large to allocate"),
        ({"device": "moon"}, "device is 'moon'"),
        ({"init": (torch.full((5, 2), torch.nan), torch.zeros(2, 5))}, "W that is not finite"),
        ({"init": (torch.zeros(5, 2), torch.full((2, 5), -1.0))}, r"holds -1\.0 in H"),
    ],
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        solve(PROBLEM, **options)
