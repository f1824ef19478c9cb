"""The model whose class shares its feature, against literal minimisations that know no formula."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
from scipy import optimize

from ufm import (
    UFMProblem,
    closed_form,
    fit_critical_count,
    neural_collapse,
    repair_weights,
    solve,
    solve_batch,
)
from ufm.__main__ import main
from ufm.repair import repair_exponent

close = torch.testing.assert_close


def literal_minimum(columns, lambda_W, width=5, starts=4):
    """The least of sum_c mass_c CE(W h_c, label_c) + lW/2 |W|^2 + sum_c cost_c/2 |h_c|^2 over W and
    H >= 0 by scipy's L-BFGS-B from random starts: its value, the columns of H and their losses."""
    label, mass, cost = (np.array(values) for values in zip(*columns, strict=True))
    V, C = label.max() + 1, len(label)
    own = (label, np.arange(C))
    # In units in which both decays are 1, or the steps of different columns differ by orders.
    root_W, root_H = math.sqrt(lambda_W), np.sqrt(cost)

    def parts(x):
        W = x[: V * width].reshape(V, width) / root_W
        return W, x[V * width :].reshape(width, C) / root_H

    def losses(W, H):
        Z = W @ H
        return np.log(np.exp(Z - Z[own]).sum(0)), Z

    def value_and_gradient(x):
        W, H = parts(x)
        loss, Z = losses(W, H)
        G = np.exp(Z - Z[own] - loss)
        G[own] -= 1.0
        G *= mass
        gradient = np.concatenate([(G @ H.T / root_W).ravel(), (W.T @ G / root_H).ravel()])
        return (mass * loss).sum() + 0.5 * x @ x, gradient + x

    bounds = [(None, None)] * (V * width) + [(0, None)] * (width * C)
    options = {"maxiter": 20_000, "maxfun": 10**6, "ftol": 1e-16, "gtol": 1e-11, "maxcor": 30}
    generator = np.random.default_rng(0)
    ends = [
        optimize.minimize(
            value_and_gradient,
            generator.uniform(0, 1, len(bounds)),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options=options,
        )
        for _ in range(starts)
    ]
    best = min(ends, key=lambda end: end.fun)
    W, H = parts(best.x)
    return best.fun, H, losses(W, H)[0]


def assert_minimum(columns, problem):
    """The literal minimum of these columns is the closed form of `problem`."""
    label = torch.tensor([column[0] for column in columns])
    value, H, loss = literal_minimum(columns, problem.lambda_W)
    exact = closed_form(problem)
    assert value == pytest.approx(float(exact.objective), rel=1e-12)
    close(torch.tensor(loss), exact.loss[label], rtol=1e-6, atol=0)
    close(torch.tensor(H).square().sum(0), exact.feature_norm_sq[label], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("sharing", "decay", "collapsed"),
    [
        (0.0, 0.03, 0),
        (0.3, 0.03, 0),
        (1.0, 0.03, 0),
        (0.3, 0.15, 2),
        (1.0, 0.15, 1),
    ],
)
def test_samples_that_each_pay_their_share(sharing, decay, collapsed):
    """One column a sample, costing lambda_H n_k^-s: within-class collapse has to come out."""
    counts = [8, 3, 2]
    problem = UFMProblem(
        class_counts=counts, lambda_W=decay, lambda_H=decay, feature_sharing=sharing
    )
    assert int(closed_form(problem).collapsed.sum()) == collapsed
    cost = [decay * n**-sharing for n in counts]
    assert_minimum([(k, 1 / 13, cost[k]) for k, n in enumerate(counts) for _ in range(n)], problem)


@pytest.mark.parametrize("sharing", [0.5, 1.0])
def test_contexts_that_each_pay_once(sharing):
    """n_k^(1-s) contexts a class, equally frequent, each with one decayed row: the meaning of s."""
    counts, lambda_W, lambda_H = [16, 4, 1], 0.02, 0.05
    problem = UFMProblem(
        class_counts=counts, lambda_W=lambda_W, lambda_H=lambda_H, feature_sharing=sharing
    )
    contexts = [round(n ** (1 - sharing)) for n in counts]
    columns = [
        (k, n / m / sum(counts), lambda_H)
        for k, (n, m) in enumerate(zip(counts, contexts, strict=True))
        for _ in range(m)
    ]
    assert_minimum(columns, problem)


def test_contexts_of_unequal_frequency_share_the_axis_of_their_class():
    """They do not collapse to a point: a convex problem a class gives their margins."""
    contexts, N, V, lam = [(0, 9), (0, 4), (0, 1), (1, 5), (1, 2), (2, 3)], 24, 3, 0.02
    columns = [(k, n / N, lam) for k, n in contexts]
    _, H, loss = literal_minimum(columns, lam)
    label, counts = torch.tensor(contexts).T
    lengths = torch.tensor(H).norm(dim=0)
    cosines = torch.tensor(H).T @ torch.tensor(H) / torch.outer(lengths, lengths)
    close(cosines, (label == label[:, None]).double(), rtol=0, atol=1e-4)
    c = math.sqrt((V - 1) / V) * lam
    for k in range(V):
        n, found = counts[label == k].numpy(), loss[label == k]

        def cost(margins, n=n):
            losses = np.log1p((V - 1) * np.exp(-margins))
            return (n / N * losses).sum() + c * np.linalg.norm(margins)

        margins = optimize.minimize(cost, np.ones(len(n)), method="BFGS", tol=1e-10).x
        assert found == pytest.approx(np.log1p((V - 1) * np.exp(-margins)), rel=1e-4)
        pull = n * -np.expm1(-found) / (N * c)
        assert (pull**2).sum() == pytest.approx(1, abs=1e-6)
        assert pull.sum() <= math.sqrt(len(n)) * (1 + 1e-6)


FIELDS = {"class_counts": [500, 60, 7, 1], "lambda_W": 2e-3, "lambda_H": 5e-3}


@pytest.mark.parametrize("variant", [{}, {"lambda_H": [5e-3, 1e-3, 2e-3, 4e-3]}, {"width": 2}])
@pytest.mark.parametrize("sharing", [0.0, 0.25, 1.0])
def test_the_same_as_a_decay_of_its_own_for_each_class(variant, sharing):
    fields = FIELDS | {"lambda_W": 4e-2} | variant
    problem = UFMProblem(**fields, feature_sharing=sharing)
    counts = np.array(fields["class_counts"], dtype=float)
    explicit = UFMProblem(**(fields | {"lambda_H": fields["lambda_H"] * counts**-sharing}))
    close(problem.feature_decay, explicit.feature_decay, rtol=1e-14, atol=0)
    one, other = closed_form(problem), closed_form(explicit)
    for name in ("collapsed", "margin", "loss", "feature_norm_sq", "weight_norm_sq", "objective"):
        close(getattr(one, name), getattr(other, name), rtol=1e-12, atol=0)
    assert solve(problem).objective == pytest.approx(float(other.objective), rel=1e-10)


def test_batches_share_each_problem_s_own_way():
    problems = [
        UFMProblem(**FIELDS, feature_sharing=s, label_smoothing=e)
        for s, e in ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.5, 0.1), (0.5, 0.0))
    ]
    for problem, solution in zip(problems, solve_batch(problems), strict=True):
        assert solution.status == "certified"
        assert solution.problem.feature_sharing == problem.feature_sharing
        close(solution.problem.feature_decay, problem.feature_decay, rtol=1e-14, atol=0)
        close(solution.loss, closed_form(problem).loss, rtol=1e-8, atol=0)


def test_the_critical_count_is_one_number_that_parts_the_classes():
    V, N, lambda_W, lambda_H = 4, 568, 2e-2, 5e-2
    fields = FIELDS | {"lambda_W": lambda_W, "lambda_H": lambda_H}
    expected = {
        0.0: lambda_W * lambda_H * N**2 * V / (V - 1),
        1.0: N * math.sqrt(lambda_W * lambda_H * V / (V - 1)),
    }
    for sharing, count in expected.items():
        exact = closed_form(UFMProblem(**fields, feature_sharing=sharing))
        assert float(exact.critical_count) == pytest.approx(count, rel=1e-14)
        assert exact.collapsed.tolist() == [n <= count for n in fields["class_counts"]]
        miss = 1 - torch.exp(-exact.loss[~exact.collapsed])
        power = (1 + sharing) / 2
        law = (1 - 1 / V) * (count / torch.tensor([500.0, 60, 7, 1]).double()) ** power
        close(miss, law[~exact.collapsed], rtol=1e-13, atol=0)


@pytest.mark.parametrize("sharing", [0.5, 1.0])
def test_the_solver_sees_the_critical_count(sharing):
    counts = [400, 40, 8, 3]
    for shift, learned in ((1 - 1e-4, True), (1 + 1e-4, False)):
        root = (8 * shift) ** ((1 + sharing) / 2) / sum(counts) * math.sqrt(3 / 4)
        problem = UFMProblem(
            class_counts=counts, lambda_W=root, lambda_H=root, feature_sharing=sharing
        )
        assert bool(solve(problem).H[:, 2].any()) is learned
        assert float(closed_form(problem).critical_count) == pytest.approx(8 * shift, rel=1e-13)


def test_as_many_axes_as_active_classes_are_enough():
    problem = UFMProblem(
        class_counts=[500, 60, 7, 1], lambda_W=2e-2, lambda_H=5e-2, feature_sharing=1.0
    )
    active = int((~closed_form(problem).collapsed).sum())
    assert active == 2
    assert solve(problem, width=active).status == "certified"
    with pytest.raises(ValueError, match="width is 1"):
        closed_form(problem.replace(width=active - 1))


def test_self_duality_returns_where_a_class_pays_once():
    plain = UFMProblem(**FIELDS)
    for sharing, dual in ((0.0, False), (0.9, False), (1.0, True)):
        problem = plain.replace(feature_sharing=sharing)
        solution = solve(problem)
        distance = neural_collapse(problem, solution.W, solution.H).self_duality
        assert (distance < 1e-7) is dual


@pytest.mark.parametrize("sharing", [0.0, 0.4, 1.0])
def test_the_law_is_fitted_at_a_given_sharing(sharing):
    generator = np.random.default_rng(1)
    counts = np.ceil(10 ** generator.uniform(0, 4, 40))
    losses = generator.exponential(1.0, 40) * counts**-0.3
    weights = generator.uniform(0.1, 2, 40)
    power = (1 + sharing) / 2

    def squares(critical_count):
        law = (1 - 1 / 40) * np.minimum(1, (critical_count / counts) ** power)
        return float((weights * (1 - np.exp(-losses) - law) ** 2).sum())

    fit = fit_critical_count(
        counts, losses, vocab_size=40, weights=weights, feature_sharing=sharing
    )
    dense = min(squares(count) for count in np.geomspace(1e-2, 1e4, 20_001))
    assert squares(fit.critical_count) <= dense + 1e-12
    expected = -np.log1p(-(1 - 1 / 40) * (fit.critical_count / 1e4) ** power)
    assert float(fit.loss([1e4])[0]) == pytest.approx(expected, rel=1e-12)
    assert fit.feature_sharing == sharing


COUNTS = np.array([3000.0, 700, 90, 40, 7, 2, 1])


@pytest.mark.parametrize("sharing", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("goal", ["average", "balanced"])
def test_the_best_weights_of_all_follow_the_repair_exponent(goal, sharing):
    """Over free a_k, with the miss 1/r_k = N c / (a_k n_k^((1+s)/2)) of the theory, weak decay."""
    N, weak = COUNTS.sum(), 1e-9
    importance = COUNTS / N if goal == "average" else np.full(len(COUNTS), 1 / len(COUNTS))

    def mean_loss(log_a):
        a = np.exp(log_a)
        a *= N / (a * COUNTS).sum()
        miss = weak * N / (a * COUNTS ** ((1 + sharing) / 2))
        return (importance * -np.log1p(-miss)).sum() / (weak * N)

    best = optimize.minimize(mean_loss, np.zeros(len(COUNTS)), method="BFGS", tol=1e-12).x
    slope, offset = np.polyfit(np.log(COUNTS), best, 1)
    assert best == pytest.approx(slope * np.log(COUNTS) + offset, abs=2e-3)
    assert -slope == pytest.approx(repair_exponent(goal, sharing), abs=1e-3)
    weights = repair_weights(COUNTS, goal, feature_sharing=sharing)
    assert mean_loss(weights.log().numpy()) == pytest.approx(mean_loss(best), rel=1e-8)


@pytest.mark.parametrize("sharing", [0.0, 0.5, 1.0])
def test_the_equal_repair_makes_every_certified_loss_equal(sharing):
    counts, V = [900, 50, 3, 1], 4
    total = sum(n ** ((1 - sharing) / 2) for n in counts)
    weights = repair_weights(counts, "equal", feature_sharing=sharing)
    fields = {"class_counts": counts, "loss_weights": weights, "feature_sharing": sharing}
    c = 0.3 / total
    lam = c / math.sqrt((V - 1) / V)
    solution = solve(UFMProblem(**fields, lambda_W=lam, lambda_H=lam))
    close(solution.loss, torch.full((V,), -math.log(1 - 0.3)).double(), rtol=1e-7, atol=0)
    # All collapse at once at c times `total` = (V-1)/V.
    for factor, all_collapse in ((0.999, False), (1.001, True)):
        lam = factor * math.sqrt((V - 1) / V) / total
        collapsed = closed_form(UFMProblem(**fields, lambda_W=lam, lambda_H=lam)).collapsed
        assert bool(collapsed.all()) is bool(collapsed.any()) is all_collapse


def test_where_a_class_pays_once_inverse_frequency_does_not_over_correct():
    assert repair_exponent("equal", 1.0) == repair_exponent("balanced", 1.0) == 1.0
    weights = repair_weights([4, 1], "equal", feature_sharing=1.0)
    assert weights.tolist() == pytest.approx([0.625, 2.5], rel=1e-14)


@pytest.mark.parametrize("value", [1.2, -0.1, math.nan, math.inf])
def test_a_sharing_out_of_range_is_named(value):
    for call in (
        lambda: UFMProblem(**FIELDS, feature_sharing=value),
        lambda: fit_critical_count([2, 1], [0.1, 0.2], vocab_size=2, feature_sharing=value),
        lambda: repair_exponent("equal", value),
    ):
        with pytest.raises(ValueError, match=rf"feature_sharing is {value}; expected 0 <= value"):
            call()


def test_predict_at_a_sharing(tmp_path, capsys):
    counts, output = tmp_path / "counts.csv", tmp_path / "out.csv"
    counts.write_text("500\n60\n7\n1\n", encoding="utf-8")
    predict = ["predict", "--counts", str(counts), "--feature-sharing", "1"]
    assert main([*predict, "--lambda-W", "2e-3", "--output", str(output)]) == 0
    assert "g = 0.5 is best for the average loss, 1 for the balanced" in capsys.readouterr().out
    fields = {"class_counts": [500, 60, 7, 1], "lambda_W": 2e-3, "lambda_H": 2e-3}
    exact = closed_form(UFMProblem(**fields, feature_sharing=1.0))
    rows = csv.DictReader(output.read_text(encoding="utf-8").splitlines())
    # Each within 3e-14 of the truth, as test_closed_form.py has it.
    losses = [float(row["loss"]) for row in rows]
    assert losses == pytest.approx(exact.loss.tolist(), rel=1e-13, abs=0)
    assert main([*predict, "--critical-count", "1.5", "--loss-weight-exponent", "equal"]) == 0
    lines = capsys.readouterr().out.splitlines()
    average, balanced = (float(line.split()[2]) for line in lines if " nats" in line)
    assert average == pytest.approx(balanced, rel=1e-5)
    assert main([*predict, "--critical-count", "1.5"]) == 0
    assert "critical count 1.5\n" in capsys.readouterr().out


def test_solve_at_a_sharing(capsys):
    command = "solve --class-counts 500 60 7 1 --lambda-W 2e-3 --lambda-H 5e-3"
    assert main([*command.split(), "--feature-sharing", "0.5"]) == 0
    out = capsys.readouterr().out
    assert f"{float(closed_form(UFMProblem(**FIELDS, feature_sharing=0.5)).loss[1]):.10g}" in out
    assert "certified: a global minimum" in out


def test_phase_at_a_sharing(tmp_path, capsys):
    command = "phase --points 9 --class-counts 1 10 100 --feature-sharing 1 --output"
    assert main([*command.split(), str(tmp_path / "map")]) == 0
    assert "0 of 27 cells off the theory" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "map.csv").read_text(encoding="utf-8").splitlines()))
    assert {row["collapsed"] for row in rows} == {"0", "1"}
    for row in rows:
        expected = 111 * float(row["lambda"]) * math.sqrt(3 / 2)
        assert float(row["critical_count"]) == pytest.approx(expected, rel=1e-12)


def test_verify_at_a_sharing(capsys):
    assert main(["verify", "--feature-sharing", "1"]) == 0
    out = capsys.readouterr().out
    assert "lH n_k^-1 in place of lH" in out
    assert "15 of 15 claims settled" in out


@pytest.mark.parametrize("value", ["1.2", "nan", "x", "-1"])
@pytest.mark.parametrize(
    "command",
    [
        "verify",
        "predict --counts counts.txt --lambda-W 1e-3",
        "predict --counts counts.txt --critical-count 2",
        "solve --class-counts 5 2 --lambda-W 1e-3 --lambda-H 1e-3",
        "phase",
        "sweep",
    ],
)
def test_a_bad_sharing_is_one_line_and_exit_code_2(command, value, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counts.txt").write_text("5\n2\n", encoding="utf-8")
    assert main([*command.split(), "--feature-sharing", value]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "feature_sharing is" in said or "--feature-sharing" in said
    assert [path.name for path in tmp_path.iterdir()] == ["counts.txt"]
