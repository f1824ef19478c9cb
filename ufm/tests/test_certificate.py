from __future__ import annotations

import math

import pytest
import torch

from ufm import UFMProblem, certify, closed_form
from ufm.certificate import dual_scale, perron_upper_bound

PROBLEM = UFMProblem(class_counts=[6, 3, 2, 1], lambda_W=2e-2, lambda_H=1e-2)


def by_hand(problem, W, H):
    """F and the bound of ufm/THEORY.md, section 4: loops, eigenvalues, one sample at a time."""
    counts, N = problem.class_counts.tolist(), int(problem.num_samples)
    lW, lH = problem.lambda_W, problem.lambda_H
    V = len(counts)
    value, column, bound = 0.0, 0, 0.0
    means = []
    for k, n in enumerate(counts):
        samples = [H[:, k]] * n if H.shape[1] == V else list(H[:, column : column + n].T)
        column += n
        means.append(sum(samples) / n)
        for h in samples:
            value += float(torch.logsumexp(W @ h, 0) - (W @ h)[k]) / N
            value += 0.5 * lH * float(h.square().sum())
    value += 0.5 * lW * float(W.square().sum())
    P = torch.stack([torch.softmax(W @ mean, 0) for mean in means], 1)
    G = torch.stack(
        [
            n / N * (torch.eye(V).double()[k] - P[:, k]) / math.sqrt(lW * lH * n)
            for k, n in enumerate(counts)
        ],
        1,
    )
    gram = (G.T @ G).clamp(min=0) if problem.nonnegative else G.T @ G
    s = max(1.0, math.sqrt(float(torch.linalg.eigvalsh(gram)[-1])))
    for k, n in enumerate(counts):
        phat = (1 - 1 / s) * torch.eye(V).double()[k] + P[:, k] / s
        bound -= n / N * float(torch.xlogy(phat, phat).sum())
    return value, bound


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("columns", [4, 12])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 10.0])
def test_equals_the_definition(columns, scale, nonnegative):
    problem = UFMProblem(
        class_counts=[6, 3, 2, 1], lambda_W=2e-2, lambda_H=1e-2, nonnegative=nonnegative
    )
    generator = torch.Generator().manual_seed(columns)
    W = scale * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    H = scale * torch.rand(5, columns, generator=generator, dtype=torch.float64)
    value, bound = by_hand(problem, W, H)
    certificate = certify(problem, W, H)
    assert float(certificate.objective) == pytest.approx(value, rel=1e-13)
    assert float(certificate.lower_bound) == pytest.approx(bound, rel=1e-13)
    assert float(certificate.gap) == pytest.approx(value - bound, rel=1e-10)


@pytest.mark.parametrize(
    ("variant", "offset"),
    [({}, 0.0), ({"loss": "mse"}, 0.0), ({"label_smoothing": 0.3}, 0.0), ({"loss": "mse"}, 0.7)],
)
def test_classes_at_rest_are_left_out_of_the_bound_exactly(variant, offset):
    """Features of 1e-13 in place of zero, which nothing leaves out, give the same certificate."""
    problem = UFMProblem(class_counts=[[9, 6, 3, 2, 1]], lambda_W=5e-2, lambda_H=4e-2, **variant)
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(1, 5, 4, generator=generator, dtype=torch.float64) - offset
    H = torch.rand(1, 4, 5, generator=generator, dtype=torch.float64)
    H[..., 2:] = 0.0
    tiny = torch.where(H == 0, 1e-13, H)
    rest, all_moving = certify(problem, W, H), certify(problem, W, tiny)
    torch.testing.assert_close(rest.lower_bound, all_moving.lower_bound, rtol=1e-11, atol=0)
    torch.testing.assert_close(rest.objective, all_moving.objective, rtol=1e-11, atol=0)


def test_a_large_vocabulary_with_few_features_takes_no_square_matrix():
    """V x V would be 27 GB; the candidate is the minimum, written down by hand."""
    V, active = 60_000, 3
    counts = torch.full((V,), 2)
    counts[:active] = torch.tensor([90_000, 50_000, 20_000])
    problem = UFMProblem(class_counts=counts, lambda_W=2e-4, lambda_H=2e-4)
    optimum = closed_form(problem)
    assert int((~optimum.collapsed).sum()) == active
    root = optimum.feature_norm_sq[:active].sqrt()
    H = torch.zeros(active, V, dtype=torch.float64)
    H[:, :active] = torch.diag(root)
    W = torch.zeros(V, active, dtype=torch.float64)
    W[:active] = torch.eye(active, dtype=torch.float64)
    W = (W - 1.0 / V) * (optimum.margin[:active] / root)
    certificate = certify(problem, W, H)
    torch.testing.assert_close(certificate.objective, optimum.objective, rtol=1e-13, atol=0)
    assert abs(certificate.gap) <= 1e-12 * certificate.objective


def test_never_above_the_minimum():
    minimum = float(closed_form(PROBLEM).objective)
    generator = torch.Generator().manual_seed(0)
    for scale in torch.logspace(-3, 2, 60).tolist():
        W = scale * torch.randn(4, 4, generator=generator, dtype=torch.float64)
        H = scale * torch.rand(4, 4, generator=generator, dtype=torch.float64)
        assert float(certify(PROBLEM, W, H).lower_bound) <= minimum * (1 + 1e-14)


def test_free_features_have_a_strictly_lower_minimum():
    free = UFMProblem(class_counts=[6, 3, 2, 1], lambda_W=2e-2, lambda_H=1e-2, nonnegative=False)
    optimum = closed_form(PROBLEM)
    certificate = certify(free, optimum.W, optimum.H)
    assert certificate.gap > 1e-3 * certificate.objective


def test_a_bias_is_certified_by_feasible_duals_only():
    problem = UFMProblem(class_counts=[6, 3, 2, 1], lambda_W=2e-2, lambda_H=1e-2, bias=True)
    frequency = problem.mass.log()
    zero_W, zero_H = torch.zeros(4, 4).double(), torch.zeros(4, 4).double()
    entropy = -float((problem.mass * problem.mass.log()).sum())
    certificate = certify(problem, zero_W, zero_H, bias=frequency)
    assert float(certificate.objective) == pytest.approx(entropy)
    assert certificate.gap > 0
    far = certify(problem, zero_W, zero_H, bias=frequency + torch.tensor([30.0, 0, 0, 0]))
    assert far.lower_bound <= certificate.objective


def test_each_problem_of_a_batch_has_its_own_certificate():
    counts = torch.tensor([[6, 3, 2, 1], [1, 1, 5, 5]])
    problem = UFMProblem(class_counts=counts, lambda_W=2e-2, lambda_H=1e-2)
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    H = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    batch = certify(problem, W, H)
    for i in range(2):
        one = certify(UFMProblem(class_counts=counts[i], lambda_W=2e-2, lambda_H=1e-2), W[i], H[i])
        torch.testing.assert_close(batch.objective[i], one.objective)
        torch.testing.assert_close(batch.lower_bound[i], one.lower_bound)


def test_perron_bound_is_an_upper_bound_and_tight():
    generator = torch.Generator().manual_seed(5)
    matrix = torch.rand(30, 9, 9, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.mT
    upper, converged = perron_upper_bound(matrix)
    exact = torch.linalg.eigvalsh(matrix)[:, -1]
    assert converged
    torch.testing.assert_close(upper, exact, rtol=1e-13, atol=0)
    blocks = torch.block_diag(torch.rand(3, 3), torch.eye(2), torch.zeros(2, 2)).double()
    blocks = blocks + blocks.T
    assert float(perron_upper_bound(blocks)[0]) >= float(torch.linalg.eigvalsh(blocks)[-1]) - 1e-14


def test_dual_scale_without_a_sign_is_the_spectral_norm():
    G = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    assert float(dual_scale(G, nonnegative=False)) == pytest.approx(
        float(torch.linalg.matrix_norm(G, 2))
    )


@pytest.mark.parametrize(
    ("W", "H", "named"),
    [
        (torch.zeros(3, 2), torch.zeros(2, 4), r"W has shape \(3, 2\)"),
        (torch.zeros(4, 2), torch.zeros(3, 4), r"H has shape \(3, 4\)"),
        (torch.zeros(4, 2), torch.zeros(2, 5), r"H has shape \(2, 5\)"),
        (torch.full((4, 2), math.nan), torch.zeros(2, 4), "W holds nan"),
        (torch.zeros(4, 2), torch.full((2, 4), math.inf), "H holds inf"),
        (torch.zeros(4, 2), torch.full((2, 4), -0.5), "H holds -0.5"),
        (torch.zeros(4, 2), None, "H is None"),
        (torch.zeros(4), torch.zeros(2, 4), r"W has shape \(4,\)"),
        (torch.zeros(4, 2), torch.zeros(4), r"H has shape \(4,\)"),
    ],
)
def test_bad_candidates_are_named(W, H, named):
    with pytest.raises(ValueError, match=named):
        certify(PROBLEM, W, H)


def test_a_bias_must_fit_the_problem():
    with pytest.raises(ValueError, match="bias"):
        certify(PROBLEM, torch.zeros(4, 2), torch.zeros(2, 4), bias=torch.zeros(4))


def test_a_closed_form_is_certified_for_its_own_problem_only():
    other = PROBLEM.replace(lambda_H=2e-2)
    assert certify(PROBLEM.replace(), closed_form(PROBLEM)).gap <= 1e-14
    with pytest.raises(ValueError, match="closed form is that of"):
        certify(other, closed_form(PROBLEM))
