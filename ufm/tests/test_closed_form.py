"""The closed form against the textbook formulas in 50 digits, and against the KKT conditions."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from ufm import UFMProblem, certify, closed_form
from ufm.certificate import objective

TABLE = [
    ([500, 60, 7, 1], 2e-3, 5e-3),
    ([40, 20, 8, 3], 1e-3, 4e-3),
    ([9, 3], 3e-2, 1e-2),
    ([10] * 7, 1e-2, 1e-2),
    ([100000, 5, 5, 2, 1], 1e-4, 1e-5),
]
VARIANTS = [
    {},
    {"loss_weights": [1.0, 3.0, 2.0, 9.0]},
    {"lambda_H": [5e-3, 1e-3, 2e-4, 1e-5]},
    {"label_smoothing": 0.1},
    {"loss": "mse"},
    {"loss": "mse", "nonnegative": False},
    {"loss_weights": [1.0, 3.0, 2.0, 9.0], "label_smoothing": 0.05, "lambda_H": [1e-3] * 4},
    {"width": 9},
    {"width": 3},
    {"feature_sharing": 1.0},
    {"feature_sharing": 0.5, "lambda_H": [5e-3, 1e-3, 2e-4, 1e-5], "label_smoothing": 0.1},
    {"feature_sharing": 0.3, "loss_weights": [1.0, 3.0, 2.0, 9.0], "loss": "mse"},
]


def textbook(counts, lambda_W, lambda_H, sharing):
    """ufm/THEORY.md, section 2, to the letter, one class after the other, in 50 digits; in the form
    of its section 6 where features are shared."""
    with mpmath.workdps(50):
        s = mpmath.mpf(sharing)
        V, N = len(counts), mpmath.mpf(sum(counts))
        lW, lH = mpmath.mpf(lambda_W), mpmath.mpf(lambda_H)
        c = mpmath.sqrt((V - 1) * lW * lH / V)
        r = [mpmath.mpf(n) ** ((1 + s) / 2) / (N * c) for n in counts]
        active = [x * (V - 1) > V for x in r]
        M = [
            mpmath.log((V - 1) * (x - 1)) if a else mpmath.mpf(0)
            for x, a in zip(r, active, strict=True)
        ]
        scale = mpmath.sqrt(lH / (lW * V**3 * (V - 1)))
        root = [mpmath.mpf(n) ** ((1 - s) / 2) for n in counts]
        term = [n * m for n, m in zip(root, M, strict=True)]
        losses = [
            -mpmath.log(1 - 1 / x) if a else mpmath.log(V) for x, a in zip(r, active, strict=True)
        ]
        return {
            "margin": M,
            "loss": losses,
            "feature_norm_sq": [
                mpmath.sqrt(lW * (V - 1) / (lH * V)) / n * m for n, m in zip(root, M, strict=True)
            ],
            "weight_norm_sq": [
                scale * ((V - 1) ** 2 * term[k] + sum(term) - term[k]) for k in range(V)
            ],
            "loss_slope": [
                1 / (mpmath.sqrt(lW * lH) * (x - 1)) if a else mpmath.mpf(0)
                for x, a in zip(r, active, strict=True)
            ],
            "critical_count": (N * c * V / (V - 1)) ** (2 / (1 + s)),
        }


@pytest.mark.parametrize("sharing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("counts", "lambda_W", "lambda_H"), TABLE)
def test_agrees_with_the_textbook_formulas(counts, lambda_W, lambda_H, sharing):
    problem = UFMProblem(
        class_counts=counts, lambda_W=lambda_W, lambda_H=lambda_H, feature_sharing=sharing
    )
    result = closed_form(problem)
    for name, expected in textbook(counts, lambda_W, lambda_H, sharing).items():
        expected = torch.tensor(
            [float(x) for x in expected] if isinstance(expected, list) else float(expected),
            dtype=torch.float64,
        )
        torch.testing.assert_close(getattr(result, name), expected, rtol=3e-14, atol=0)


@pytest.mark.parametrize("excess", [1e-3, 1e-7, 1e-10])
def test_keeps_its_digits_at_the_threshold_of_a_large_vocabulary(excess):
    V, count = 32005, 10**12
    lam = math.sqrt(count / (1 + excess) * (V - 1) / V) / (V * count)
    result = closed_form(UFMProblem(class_counts=[count] * V, lambda_W=lam, lambda_H=lam))
    with mpmath.workdps(60):
        exact = mpmath.mpf(lam)
        critical = exact**2 * (V * mpmath.mpf(count)) ** 2 * V / (V - 1)
        r = mpmath.sqrt(count / critical) * V / (V - 1)
        margin, loss = mpmath.log((V - 1) * (r - 1)), -mpmath.log(1 - 1 / r)
    # Rounding lambda alone moves n_c by 1e-16, which is 1e-16 / excess of the margin.
    assert float(result.margin[0]) == pytest.approx(float(margin), rel=1e-15 / excess)
    assert float(result.loss[0]) == pytest.approx(float(loss), rel=1e-11)


def test_tiny_losses_keep_their_digits():
    result = closed_form(UFMProblem(class_counts=[10**12, 10**9], lambda_W=1e-26, lambda_H=1e-26))
    ratio = 0.5 * (result.critical_count / torch.tensor([1e12, 1e9], dtype=torch.float64)).sqrt()
    torch.testing.assert_close(result.loss, ratio, rtol=1e-9, atol=0)
    assert (result.loss > 0).all()
    assert (result.loss < 1e-17).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_satisfies_the_first_order_conditions(variant):
    fields = {"class_counts": [500, 60, 7, 1], "lambda_W": 2e-3, "lambda_H": 5e-3}
    problem = UFMProblem(**(fields | variant))
    result = closed_form(problem)
    W, H = result.W.clone().requires_grad_(), result.H.clone().requires_grad_()
    value = objective(problem, W, H)
    grad_W, grad_H = torch.autograd.grad(value, (W, H))
    assert grad_W.abs().max() < 1e-14
    assert grad_H[result.H > 0].abs().max() < 1e-13
    if problem.nonnegative:
        assert grad_H.min() > -1e-13
    assert float(value.detach()) == pytest.approx(float(result.objective), rel=1e-14)
    torch.testing.assert_close(result.W @ result.H, result.logits, rtol=0, atol=1e-13)
    torch.testing.assert_close(result.weight_norm_sq, result.W.square().sum(1), rtol=1e-13, atol=0)
    torch.testing.assert_close(
        result.feature_norm_sq, result.H.square().sum(0), rtol=1e-13, atol=1e-300
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_certificate_closes_at_the_minimum(variant):
    fields = {"class_counts": [500, 60, 7, 1], "lambda_W": 2e-3, "lambda_H": 5e-3}
    problem = UFMProblem(**(fields | variant))
    result = closed_form(problem)
    for certificate in (certify(problem, result), certify(problem, result.W, result.H)):
        assert abs(certificate.gap) <= 1e-14 * certificate.objective


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "width" not in v])
def test_the_slope_is_the_derivative_at_a_fixed_ratio(variant):
    fields = {"class_counts": [500, 60, 7, 1], "lambda_W": 2e-3, "lambda_H": 5e-3} | variant
    step = 1e-6
    decay_H = torch.tensor(fields["lambda_H"], dtype=torch.float64)

    def loss(factor):
        moved = {"lambda_W": fields["lambda_W"] * factor, "lambda_H": decay_H * factor}
        return closed_form(UFMProblem(**(fields | moved))).loss

    geometric = (fields["lambda_W"] * decay_H).sqrt()
    expected = (loss(1 + step) - loss(1 - step)) / (2 * step * geometric)
    slope = closed_form(UFMProblem(**fields)).loss_slope
    torch.testing.assert_close(slope, expected, rtol=1e-7, atol=1e-7)


def test_a_batch_is_each_problem_alone():
    counts = torch.tensor([[500, 60, 7, 1], [40, 20, 8, 3]])
    lambda_W, lambda_H = torch.tensor([[2e-3], [1e-3]]).double(), 5e-3
    batch = closed_form(UFMProblem(class_counts=counts, lambda_W=lambda_W, lambda_H=lambda_H))
    for i in range(2):
        one = closed_form(
            UFMProblem(class_counts=counts[i], lambda_W=float(lambda_W[i]), lambda_H=lambda_H)
        )
        for name in ("critical_count", "loss", "objective", "logits", "W", "H", "loss_slope"):
            torch.testing.assert_close(getattr(batch, name)[i], getattr(one, name))


def test_repair_weights_of_minus_one_half_make_every_loss_equal():
    counts = torch.tensor([900, 50, 3, 1])
    problem = UFMProblem(
        class_counts=counts, lambda_W=1e-3, lambda_H=2e-3, loss_weights=counts.double() ** -0.5
    )
    common = -math.log(1 - math.sqrt(0.75 * 2e-6) * float(counts.double().sqrt().sum()))
    torch.testing.assert_close(closed_form(problem).loss, torch.full((4,), common).double())


@pytest.mark.parametrize(
    ("variant", "named"),
    [
        ({"lambda_W": [1e-3, 2e-3]}, "lambda_W"),
        ({"bias": True}, "bias"),
        ({"nonnegative": False}, "nonnegative"),
        ({"width": 1}, "width is 1"),
    ],
)
def test_refuses_what_has_no_closed_form(variant, named):
    fields = {"class_counts": [9, 5], "lambda_W": 1e-3, "lambda_H": 1e-3}
    with pytest.raises(ValueError, match=named):
        closed_form(UFMProblem(**(fields | variant)))


def test_matrices_too_large_to_allocate_are_refused():
    result = closed_form(UFMProblem(class_counts=[5] * 2_000_000, lambda_W=1e-9, lambda_H=1e-9))
    assert result.loss.shape == (2_000_000,)
    for name in ("logits", "W", "H"):
        with pytest.raises(ValueError, match=r"2000000 x 2000000.*too large"):
            getattr(result, name)


def test_few_axes_take_few_columns():
    counts = [10_000] * 2 + [1] * 199_998
    problem = UFMProblem(class_counts=counts, lambda_W=1e-4, lambda_H=1e-4, width=2)
    result = closed_form(problem)
    assert result.W.shape == (200_000, 2)
    torch.testing.assert_close(result.weight_norm_sq, result.W.square().sum(1))
    assert (result.H != 0).nonzero().tolist() == [[0, 0], [1, 1]]


def test_the_vocabulary_of_imdb_in_linear_memory():
    rank = torch.arange(1, 32006)
    counts = (5_000_000 / rank).long().clamp(min=2)
    lam = 3.0 / float(counts.sum())
    problem = UFMProblem(class_counts=counts, lambda_W=lam, lambda_H=4 * lam)
    certificate = certify(problem, closed_form(problem))
    assert abs(certificate.gap) <= 1e-12 * certificate.objective
