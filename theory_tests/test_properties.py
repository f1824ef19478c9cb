"""Laws that hold for every problem, over randomly drawn ones."""

from __future__ import annotations

import math

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from theory_tests.strategies import (
    candidates,
    changed,
    class_counts,
    problems,
    sharings,
    threshold_problems,
    variants,
    with_critical_count,
)
from ufm import certify, closed_form, fit_critical_count, neural_collapse, repair_weights

close = torch.testing.assert_close
ROUNDING = 1e-12  # relative; equal counts have equal losses but for it


@given(st.data(), variants())
def test_no_candidate_is_below_a_certified_bound(data, problem):
    optimum = closed_form(problem)
    certificate = certify(problem, *data.draw(candidates(problem)))
    slack = 1e-12 * optimum.objective
    assert certificate.lower_bound <= optimum.objective + slack
    assert optimum.objective <= certificate.objective + slack


@given(variants())
def test_the_closed_form_is_certified(problem):
    optimum = closed_form(problem)
    # MSE: a logit near 1 less 1 is right to the last place of 1 only, in each of V classes.
    unit = problem.num_classes * torch.finfo(torch.float64).eps
    rounding = 2 * unit if problem.loss == "mse" else 0.0
    for certificate in (certify(problem, optimum), certify(problem, optimum.W, optimum.H)):
        assert abs(certificate.gap) <= 1e-12 * certificate.objective + rounding
        close(certificate.objective, optimum.objective, rtol=1e-13, atol=0)


@given(st.data(), problems())
def test_renumbering_the_classes_renumbers_the_answer(data, problem):
    order = torch.tensor(data.draw(st.permutations(range(problem.num_classes))))
    one = closed_form(problem)
    other = closed_form(changed(problem, class_counts=problem.class_counts[order]))
    for name in ("loss", "margin", "feature_norm_sq", "weight_norm_sq", "loss_slope"):
        close(getattr(other, name), getattr(one, name)[order], rtol=1e-12, atol=0)
    close(other.logits, one.logits[order][:, order], rtol=1e-12, atol=1e-15)


@given(problems())
def test_only_the_product_of_the_decays_matters_to_the_loss(problem):
    swapped = changed(problem, lambda_W=problem.lambda_H, lambda_H=problem.lambda_W)
    one, other = closed_form(problem), closed_form(swapped)
    close(other.loss, one.loss, rtol=1e-10, atol=0)
    close(other.objective, one.objective, rtol=1e-12, atol=0)
    ratio = problem.lambda_W / problem.lambda_H
    close(one.feature_norm_sq, other.feature_norm_sq * ratio, rtol=1e-6, atol=0)


@given(problems())
def test_more_frequent_classes_are_better_learned(problem):
    order = problem.class_counts.argsort()
    optimum = closed_form(problem)
    loss = optimum.loss[order]
    assert (loss.diff() <= ROUNDING * loss[:-1]).all()
    for values in (optimum.margin, optimum.weight_norm_sq):
        assert (values[order].diff() >= -ROUNDING * values.max()).all()
    assert (loss <= math.log(problem.num_classes) * (1 + ROUNDING)).all()


@given(problems(), st.floats(1.0001, 100.0))
def test_more_decay_is_never_better(problem, factor):
    less, more = (
        closed_form(problem),
        closed_form(changed(problem, lambda_W=problem.lambda_W * factor)),
    )
    assert (more.loss >= less.loss * (1 - ROUNDING)).all()
    assert more.objective >= less.objective * (1 - ROUNDING)
    assert (more.collapsed | ~less.collapsed).all()


@given(problems(min_classes=3))
def test_the_slope_falls_with_the_count_among_learned_classes(problem):
    optimum = closed_form(problem)
    order = problem.class_counts.argsort()
    slope = optimum.loss_slope[order][~optimum.collapsed[order]]
    assert (slope.diff() <= ROUNDING * slope[:-1]).all()
    assert (optimum.loss_slope[optimum.collapsed] == 0).all()


@given(threshold_problems())
def test_a_class_is_learned_on_one_side_of_the_threshold_only(pair):
    below, above, index = pair
    learned, neglected = closed_form(below), closed_form(above)
    V = below.num_classes
    assert not learned.collapsed[index]
    assert neglected.collapsed[index]
    assert learned.margin[index] > 0 == neglected.margin[index]
    assert neglected.feature_norm_sq[index] == 0 < learned.feature_norm_sq[index]
    # The loss is continuous there: log V on both sides.
    close(float(neglected.loss[index]), math.log(V), rtol=1e-13, atol=0)
    assert 0 <= math.log(V) - float(learned.loss[index]) < V * 0.02


@given(variants())
def test_the_slope_is_the_finite_difference(problem):
    optimum = closed_form(problem)
    step = 1e-5
    assume(not ((problem.counts / optimum.critical_count - 1).abs() < 10 * step).any())

    def moved(factor):
        decay = {"lambda_W": problem.lambda_W * factor, "lambda_H": problem.lambda_H * factor}
        return closed_form(changed(problem, **decay)).loss

    geometric = (problem.row_decay * problem.unshared_decay).sqrt()
    difference = (moved(1 + step) - moved(1 - step)) / (2 * step * geometric)
    scale = float((optimum.loss / geometric).max())
    close(optimum.loss_slope, difference, rtol=2e-3, atol=1e-9 * scale)


@given(variants())
def test_norms_are_those_of_explicit_matrices(problem):
    optimum = closed_form(problem)
    close(optimum.weight_norm_sq, optimum.W.square().sum(1), rtol=1e-10, atol=1e-300)
    close(optimum.feature_norm_sq, optimum.H.square().sum(0), rtol=1e-12, atol=1e-300)
    close(optimum.W @ optimum.H, optimum.logits, rtol=1e-12, atol=1e-13)


@given(problems())
def test_the_features_are_orthogonal_and_the_logits_centred(problem):
    optimum = closed_form(problem)
    gram = optimum.H.T @ optimum.H
    close(gram, torch.diag(optimum.feature_norm_sq), rtol=1e-12, atol=0)
    assert optimum.logits.sum(0).abs().max() <= 1e-12 * (1 + float(optimum.margin.max()))


@given(class_counts(min_classes=3), st.floats(0.01, 0.9), sharings())
def test_the_law_is_fitted_back_from_the_losses(counts, share, sharing):
    assume(len(set(counts)) > 1)
    problem = with_critical_count(counts, share * max(counts), feature_sharing=sharing)
    optimum = closed_form(problem)
    close(float(optimum.critical_count), share * max(counts), rtol=1e-12, atol=0)
    fit = fit_critical_count(counts, optimum.loss, vocab_size=len(counts), feature_sharing=sharing)
    close(fit.critical_count, float(optimum.critical_count), rtol=1e-9, atol=0)
    assert fit.residuals.abs().max() < 1e-12


@given(class_counts(), st.floats(0.001, 0.5), sharings())
def test_the_equal_repair_makes_every_loss_equal(counts, share, sharing):
    critical = share * min(counts) / len(counts)
    problem = with_critical_count(counts, critical, feature_sharing=sharing)
    weights = repair_weights(counts, "equal", feature_sharing=sharing)
    loss = closed_form(changed(problem, loss_weights=weights)).loss
    close(loss, loss[:1].expand_as(loss), rtol=1e-9, atol=0)


@given(variants())
def test_sharing_is_a_decay_of_its_own_for_each_class(problem):
    explicit = changed(problem, lambda_H=problem.feature_decay, feature_sharing=0.0)
    one, other = closed_form(problem), closed_form(explicit)
    assert one.collapsed.equal(other.collapsed)
    for name in ("margin", "loss", "feature_norm_sq", "weight_norm_sq", "objective", "logits"):
        close(getattr(one, name), getattr(other, name), rtol=1e-12, atol=1e-300)
    # Each class has its own n_c: the count that its samples would have to be more than.
    power = (1 + problem.feature_sharing) / 2
    y = (problem.counts / other.critical_count).sqrt()
    close((problem.counts / one.critical_count) ** power, y, rtol=1e-12, atol=0)


@given(problems(min_classes=3))
def test_a_class_that_pays_once_is_self_dual(problem):
    once = changed(problem, feature_sharing=1.0)
    optimum = closed_form(once)
    assume(not optimum.collapsed.all())
    assert neural_collapse(once, optimum.W, optimum.H).self_duality < 1e-12
