"""Each algebraic step of the theory proved with sympy, each printed formula refuted by a number.

Symbols: V classes, n samples of a class, N samples, x = lambda_W, y = lambda_H, M the margin,
r = sqrt(n) / (N c) with c = sqrt((V-1)/V x y), s the feature_sharing. `zero(e)` proves e = 0 by
simplification.
"""

from __future__ import annotations

import itertools

import pytest
import sympy as sp

V, n, N, x, y, r, M, t = sp.symbols("V n N lambda_W lambda_H r M t", positive=True)
c = sp.sqrt((V - 1) / V * x * y)
R = sp.sqrt(n) / (N * c)
MARGIN = sp.log((V - 1) * (r - 1))
CRITICAL = x * y * N**2 * V / (V - 1)
s = sp.Symbol("s", nonnegative=True)
SHARED = {y: y * n**-s}
R_SHARED = n ** ((1 + s) / 2) / (N * c)
CRITICAL_SHARED = (N * c * V / (V - 1)) ** (2 / (1 + s))


def zero(expression: sp.Expr) -> bool:
    """Whether it is identically zero for V = 1 + v, r = 1 + q (v, q > 0; keeps roots real)."""
    v, q = sp.symbols("v q", positive=True)
    expression = sp.expand_log(expression.subs({V: 1 + v, r: 1 + q}), force=True)
    return sp.simplify(sp.powdenest(expression, force=True)) == 0


def softmax_miss(margin: sp.Expr) -> sp.Expr:
    """1 - p_kk where the other V - 1 logits lie `margin` below."""
    return (V - 1) * sp.exp(-margin) / (1 + (V - 1) * sp.exp(-margin))


def test_the_margin_makes_the_chance_of_a_miss_one_over_r():
    assert zero(softmax_miss(MARGIN) - 1 / r)


def test_the_loss_in_its_two_forms():
    assert zero(sp.log(1 + (V - 1) * sp.exp(-MARGIN)) + sp.log(1 - 1 / r))
    assert zero(1 / R - (1 - 1 / V) * sp.sqrt(CRITICAL / n))


def test_a_class_is_learned_above_the_critical_count_only():
    threshold = R.subs(n, CRITICAL)
    assert zero(threshold - V / (V - 1))
    assert zero(MARGIN.subs(r, V / (V - 1)))


def test_the_feature_norm_balances_the_two_decays():
    # One rank-one term: |a| |b| = M |e_k - 1/V| sqrt(x y n) in the scaled variables, |a| = |b|.
    spectrum = M * sp.sqrt((V - 1) / V) * sp.sqrt(x * y * n)
    assert zero(spectrum / (y * n) - sp.sqrt(x * (V - 1) / (y * V * n)) * M)


def test_tightness_of_the_dual_is_the_margin():
    # |g_k| = mass / sqrt(x y n) (1 - p_kk) sqrt(V/(V-1)) = 1 exactly at 1 - p_kk = 1/r.
    norm = (n / N) / sp.sqrt(x * y * n) * (1 / R) * sp.sqrt(V / (V - 1))
    assert zero(norm - 1)


def test_off_diagonal_dual_products_are_not_positive():
    a, b = sp.symbols("a b", positive=True)
    for size in range(2, 6):
        one = a * (sp.eye(size)[:, 0] - sp.ones(size, 1) / size)
        two = b * (sp.eye(size)[:, 1] - sp.ones(size, 1) / size)
        assert sp.simplify(one.dot(two) + a * b / size) == 0


def test_strong_duality_term_by_term():
    # mass CE + decay cost = mass entropy, at the margin.
    miss = 1 / r
    loss = -sp.log(1 - miss)
    entropy = -(1 - miss) * sp.log(1 - miss) - miss * sp.log(miss / (V - 1))
    # The decay cost over the mass is M / R, and (q_k - p_k).z_k of the centred logits is M / r.
    cost = M * sp.sqrt((V - 1) / V) * sp.sqrt(x * y * n) * N / n
    assert zero(cost - M / R)
    inner = miss * MARGIN * (V - 1) / V + miss * MARGIN / V
    assert zero(inner - MARGIN / r)
    assert zero(loss + inner - entropy)


def explicit(size: int) -> tuple[sp.Matrix, sp.Matrix, list[sp.Symbol], list[sp.Symbol]]:
    """W and H of the closed form for symbolic counts and margins."""
    counts = list(sp.symbols(f"n1:{size + 1}", positive=True))
    margins = list(sp.symbols(f"M1:{size + 1}", positive=True))
    W, H = sp.zeros(size, size), sp.zeros(size, size)
    for k, (count, margin) in enumerate(zip(counts, margins, strict=True)):
        norm = sp.sqrt(sp.sqrt(x * (size - 1) / (y * size * count)) * margin)
        H[k, k] = norm
        for j in range(size):
            W[j, k] = margin / norm * ((1 if j == k else 0) - sp.Rational(1, size))
    return W, H, counts, margins


@pytest.mark.parametrize("size", [2, 3, 4])
def test_weight_norms_sum_over_the_other_classes(size):
    W, _, counts, margins = explicit(size)
    scale = sp.sqrt(y / (x * size**3 * (size - 1)))
    for k in range(size):
        terms = [sp.sqrt(count) * m for count, m in zip(counts, margins, strict=True)]
        others = sum(terms) - terms[k]
        formula = scale * ((size - 1) ** 2 * terms[k] + others)
        row = sum(W[k, j] ** 2 for j in range(size))
        assert sp.simplify(row - formula) == 0
        # As printed, with the own class once more: by so much too large.
        assert sp.simplify(scale * ((size - 1) ** 2 * terms[k] + sum(terms)) - row) == (
            sp.simplify(scale * terms[k])
        )


def test_printed_weight_norms_are_refuted():
    # n = 40, 20, 8, 3 and lambda = 1/500: |w_1|^2 is 23.438, the printed one 25.729.
    W, _, counts, margins = explicit(4)
    decay = sp.Rational(1, 500)
    numbers = [40, 20, 8, 3]
    at = {x: decay, y: decay} | dict(zip(counts, numbers, strict=True))
    case = {N: sum(numbers), V: 4, x: decay, y: decay}
    learned = [sp.log(3 * (R.subs(case).subs(n, count) - 1)) for count in numbers]
    at |= dict(zip(margins, learned, strict=True))
    terms = [sp.sqrt(count) * m for count, m in zip(numbers, learned, strict=True)]
    printed = sp.sqrt(1 / sp.Integer(4**3 * 3)) * (9 * terms[0] + sum(terms))
    true = sum(W[0, j] ** 2 for j in range(4)).subs(at)
    assert abs(sp.N(true) - 23.438) < 1e-3
    assert abs(sp.N(printed) - 25.729) < 1e-3


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_classifier_is_what_the_proof_starts_from(size):
    W, H, counts, _ = explicit(size)
    pulls = [sp.sqrt(count) * H[:, m] for m, count in enumerate(counts)]
    scale = sp.sqrt(y / (x * size * (size - 1)))
    for k in range(size):
        row = scale * (size * pulls[k] - sum(pulls, sp.zeros(size, 1)))
        assert sp.simplify(row - W[k, :].T) == sp.zeros(size, 1)


@pytest.mark.parametrize("size", [2, 3])
def test_the_gradients_vanish(size):
    W, H, counts, _ = explicit(size)
    total = sum(counts)
    roots = [sp.sqrt(k) / (total * c.subs(V, size)) for k in counts]
    at = {f"M{k + 1}": sp.log((size - 1) * (roots[k] - 1)) for k in range(size)}
    G = sp.zeros(size, size)
    for k, j in itertools.product(range(size), repeat=2):
        miss = 1 / roots[k]
        p = 1 - miss if j == k else miss / (size - 1)
        G[j, k] = counts[k] / total * (p - (1 if j == k else 0))
    numbers = dict(zip(counts, [sp.Integer(7), sp.Integer(3), sp.Integer(2)], strict=False))
    numbers |= {x: sp.Rational(1, 50), y: sp.Rational(1, 30)}
    margins = {sp.Symbol(name, positive=True): value for name, value in at.items()}
    gradient_W = (G * H.T + x * W).subs(margins).subs(numbers)
    weighted = H * sp.diag(*counts) * y
    gradient_H = (W.T * G + weighted).subs(margins).subs(numbers)
    for entry in gradient_W:
        assert abs(sp.N(entry, 40)) < 1e-35
    for row, column in itertools.product(range(size), repeat=2):
        value = sp.N(gradient_H[row, column], 40)
        assert value > -1e-35
        assert row != column or abs(value) < 1e-35


def test_the_slope():
    lam = sp.Symbol("lambda", positive=True)
    at = {x: lam, y: lam}
    loss = -sp.log(1 - 1 / R.subs(at))
    slope = N * sp.sqrt(V - 1) / (sp.sqrt(n * V) - lam * N * sp.sqrt(V - 1))
    assert zero(sp.diff(loss, lam) - slope)
    assert zero(sp.diff(loss, lam) - 1 / (lam * (R.subs(at) - 1)))
    # Falling in n: every factor below is positive where the class is learned.
    assert zero(sp.diff(slope, n) + slope**2 * sp.sqrt(V) / (2 * sp.sqrt(n) * N * sp.sqrt(V - 1)))


def test_label_smoothing():
    e = sp.Symbol("e", positive=True)
    kk = 1 - e * (V - 1) / V - 1 / r
    off = (1 - kk) / (V - 1)
    # q_k - p_k stays along e_k - 1/V and has the same length as without smoothing.
    assert zero((1 - e * (V - 1) / V - kk) - 1 / r)
    assert zero((e / V - off) + 1 / (r * (V - 1)))
    # At the threshold the prediction is uniform.
    assert zero(kk.subs(r, V / ((V - 1) * (1 - e))) - 1 / V)


def test_label_smoothing_in_its_computed_form():
    # s = y_k - 1 = sqrt(n / n_c) - 1 > 0, and e = f / (1 + f) with f > 0.
    s, f, v, lam = sp.symbols("s f v lambda", positive=True)
    e, size, ratio = f / (1 + f), 1 + v, 1 + s
    root = ratio * size / (v * (1 - e))
    own, other = 1 - e * v / size - 1 / root, e / size + 1 / (root * v)
    spread = 1 + ratio * e / (1 - e)
    odds = size * s / spread
    assert sp.simplify(own / other - (1 + odds)) == 0
    margin = sp.log(1 + odds)
    loss = sp.log(1 + v / (1 + odds)) + e * v / size * margin
    # -log p_kk = log(1 + (V-1) e^-M), and the smoothed share of the margin.
    assert sp.simplify(own * (1 + v / (1 + odds))) == 1
    # y_k falls like 1 / lambda.
    slope = sp.diff(loss, s) * -ratio / lam
    assert sp.simplify(slope - v / (spread * (spread + size * s)) / lam) == 0


def test_mean_squared_error():
    s = sp.Symbol("s", positive=True)
    mass = n / N
    reduced = mass * (s - 1) ** 2 / 2 + s * sp.sqrt(x * y * n)
    solution = sp.solve(sp.diff(reduced, s), s)
    assert len(solution) == 1
    assert sp.simplify(solution[0] - (1 - N * sp.sqrt(x * y / n))) == 0
    # Loss, slope and value of the minimum with u = 1/y_k, which grows as lambda.
    u, lam = sp.symbols("u lambda", positive=True)
    at = {x: (u * sp.sqrt(n) / N) ** 2 / y}
    assert sp.simplify(solution[0].subs(at) - (1 - u)) == 0
    loss = (1 - solution[0].subs(at)) ** 2 / 2
    assert sp.simplify(loss - u**2 / 2) == 0
    assert sp.simplify(sp.diff(loss, u) * u / lam - u**2 / lam) == 0
    least = reduced.subs(s, solution[0]).subs(at)
    assert sp.simplify(least - mass * (u - u**2 / 2)) == 0


def test_loss_weights_that_equalise():
    a = N / sp.Symbol("S", positive=True) / sp.sqrt(n)  # sum a n = N with S = sum of sqrt(n_j)
    assert sp.diff(sp.simplify(a * R), n) == 0


@pytest.mark.parametrize(("importance", "exponent"), [(1, (1 + s) / 4), (0, (3 + s) / 4)])
def test_optimal_exponents_at_weak_decay(importance, exponent):
    # loss_k -> 1 / (a_k r_k); minimise sum n^importance loss under sum a n = N: stationary where
    # d/da of both terms are proportional over classes. Convex in a, so this is the minimum.
    a = sp.Symbol("a", positive=True)
    loss = n**importance / (a * R_SHARED)
    price = sp.diff(a * n, a)
    ratio = (sp.diff(loss, a) / price).subs(a, n**-exponent)
    assert sp.diff(sp.simplify(ratio), n) == 0
    assert sp.diff(loss, a, 2).subs(V, 1 + t).is_positive
    at_zero = sp.Rational(1, 4) if importance else sp.Rational(3, 4)
    assert exponent.subs(s, 0) == at_zero


def test_sharing_puts_its_decay_into_every_formula():
    # lambda_H n^-s for lambda_H turns sqrt(n) into n^((1+s)/2), and n_c into the shared one.
    assert zero(R.subs(SHARED) - R_SHARED)
    assert zero(R_SHARED.subs(n, CRITICAL_SHARED) - V / (V - 1))
    law = (1 - 1 / V) * (CRITICAL_SHARED / n) ** ((1 + s) / 2)
    assert zero(1 / R_SHARED - law)
    for sharing, count in ((0, CRITICAL), (1, N * sp.sqrt(x * y * V / (V - 1)))):
        assert zero(CRITICAL_SHARED.subs(s, sharing) - count)
    feature = sp.sqrt(x * (V - 1) / (y * V * n)) * M
    shared = sp.sqrt(x * (V - 1) / (y * V)) * n ** ((s - 1) / 2) * M
    assert zero(feature.subs(SHARED) - shared)
    gauge = sp.sqrt(x * y * n).subs(SHARED)
    assert zero(gauge - sp.sqrt(x * y) * n ** ((1 - s) / 2))


def test_the_slope_where_features_are_shared():
    lam = sp.Symbol("lambda", positive=True)
    root = R_SHARED.subs({x: lam, y: lam})
    assert zero(sp.diff(-sp.log(1 - 1 / root), lam) - 1 / (lam * (root - 1)))


def test_contexts_that_each_pay_once_share_like_s():
    # m equally frequent contexts a class, a feature each that costs y once: their columns g are
    # equal, so |sum b_c g_c| <= |b| for all b >= 0 iff m |g|^2 <= 1. With m = n^(1-s).
    m, miss = sp.symbols("m miss", positive=True)
    column = n / (m * N) / sp.sqrt(x * y) * miss * sp.sqrt(V / (V - 1))
    (tight,) = sp.solve(m * column**2 - 1, miss)
    assert zero(tight - sp.sqrt(m) * N * c / n)
    assert zero(1 / tight.subs(m, n ** (1 - s)) - R_SHARED)


def test_the_equal_repair_where_features_are_shared():
    # a = N n^(-(1+s)/2) / S keeps sum a n = N with S = sum of n_j^((1-s)/2), and 1/(a r) = c S.
    S = sp.Symbol("S", positive=True)
    a = N * n ** (-(1 + s) / 2) / S
    assert zero(a * n - N / S * n ** ((1 - s) / 2))
    assert zero(1 / (a * R_SHARED) - c * S)
    # At c S = (V-1)/V all classes are at the threshold.
    assert zero((a * R_SHARED).subs(S, (V - 1) / V / c) - V / (V - 1))


def test_the_classifier_is_the_centred_features_where_a_class_pays_once():
    weight = sp.sqrt(y * n).subs(SHARED)
    assert sp.diff(sp.simplify(weight.subs(s, 1)), n) == 0


def test_printed_objective_contradicts_the_feature_norm():
    # With lambda_H |H|^2 the balance |a| = |b| gives |mu|^2 smaller by sqrt(2).
    spectrum = M * sp.sqrt((V - 1) / V) * sp.sqrt(x * 2 * y * n)
    assert zero(spectrum / (2 * y * n) * sp.sqrt(2) - sp.sqrt(x * (V - 1) / (y * V * n)) * M)
    assert not zero(spectrum / (2 * y * n) - sp.sqrt(x * (V - 1) / (y * V * n)) * M)


def test_printed_margin_is_refuted():
    # n = 9 of N = 12, V = 2, lambda = 1/5: the printed ratio is 5 times too large.
    at = {n: 9, N: 12, V: 2, x: sp.Rational(1, 5), y: sp.Rational(1, 5)}
    printed = sp.sqrt(n) / (N * sp.sqrt((V - 1) / V) * x * y)
    assert sp.simplify((printed / R).subs(at)) == 5
    # It is positive (learned) although the paper's own condition says neglected.
    collapse = x * y * N**2 * (V - 1) / V
    case = {n: 2, N: 12, V: 2, x: sp.Rational(1, 5), y: sp.Rational(1, 5)}
    assert (n - collapse).subs(case) < 0
    assert ((V - 1) * (printed - 1) - 1).subs(case) > 0


def test_printed_critical_count_is_refuted():
    printed = x * y * N**2 * (V - 1) / V
    assert zero(CRITICAL / printed - (V / (V - 1)) ** 2)
    # At V = 2 a class at twice the printed count is not learned: r = sqrt(2) < V/(V-1) = 2.
    assert sp.simplify(R.subs(n, 2 * printed).subs(V, 2) - sp.sqrt(2)) == 0


def test_printed_proposition_is_negative():
    margins = [sp.log(99)] * 4
    printed = sp.log(sum(sp.exp(m / 16) for m in margins)) - margins[0]
    assert sp.N(printed) < 0 < sp.N(sp.log(1 + 3 * sp.exp(-margins[0])))


def test_printed_logits_are_refuted():
    W, H, _, margins = explicit(3)
    product = sp.simplify(W.T.T * H)
    assert sp.simplify(product[0, 0] - sp.Rational(2, 3) * margins[0]) == 0
    assert sp.simplify(product[1, 0] + margins[0] / 3) == 0
    assert sp.simplify(product[0, 0] - margins[0]) != 0
    assert sp.simplify(product[1, 0] - margins[1] / 9) != 0


def test_printed_slope_is_refuted():
    lam = sp.Symbol("lambda", positive=True)
    at = {n: 9, N: 12, V: 2, lam: sp.Rational(1, 10)}
    margin = sp.log((V - 1) * (R.subs({x: lam, y: lam}) - 1))
    # The bracket is -dM/dlambda once its second root covers only n V.
    bracket = 1 / lam + N * sp.sqrt(V - 1) / (sp.sqrt(n * V) - lam * N * sp.sqrt(V - 1))
    assert zero(bracket + sp.diff(margin, lam))
    printed = 1 / lam + N * sp.sqrt(V - 1) / sp.sqrt(n * V - lam * N * sp.sqrt(V - 1))
    assert abs(sp.N((printed - bracket).subs(at))) > 0.1
    true = sp.diff(sp.log(1 + (V - 1) * sp.exp(-margin)), lam)
    assert sp.N(true.subs(at)) < sp.N(printed.subs(at)) / 2
