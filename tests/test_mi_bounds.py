"""Claims of mi_bounds.py against plain Python loops over small worlds (no module code in them)."""
import itertools
import math
import re

import pytest
import torch

import mi_bounds as mb


def rows(gen, *shape, zeros):
    """Random distributions over the last axis, with exact zeros if asked (at least one entry a row
    stays)."""
    w = torch.rand(*shape, generator=gen, dtype=torch.float64) + 0.02
    if zeros:
        w = w * (torch.rand(*shape, generator=gen) > 0.35)
        w = torch.where(w.sum(-1, keepdim=True) > 0, w, 1.0)
    return w / w.sum(-1, keepdim=True)


def world(seed, zeros=False):
    """P, Q, prior, D_x and the data joint D_xy; the three sizes differ, so no swapped axis can
    hide."""
    gen = torch.Generator().manual_seed(seed)
    X, Z, Y = list(itertools.permutations((3, 4, 5)))[seed % 6]
    D_xy = rows(gen, X * Y, zeros=zeros).reshape(X, Y)
    return (
        rows(gen, X, Z, Y, zeros=zeros),
        rows(gen, X, Y, Z, zeros=zeros),
        rows(gen, X, Z, zeros=zeros),
        D_xy.sum(1),
        D_xy,
    )


WORLDS = [(seed, zeros) for seed in range(12) for zeros in (False, True)]
worlds = pytest.mark.parametrize("seed,zeros", WORLDS)


def brute_mi(P, prior, D_x):
    """sum p(x,y,z) log [ p(x,y,z) p(x) / (p(x,y) p(x,z)) ]: the definition, not the two
    entropies."""
    p, r, d = P.tolist(), prior.tolist(), D_x.tolist()
    joint = {(x, y, z): d[x] * r[x][z] * p[x][z][y]
             for x in range(len(d)) for z in range(len(r[0])) for y in range(len(p[0][0]))}
    xy, xz, xx = {}, {}, {}
    for (x, y, z), w in joint.items():
        xy[x, y] = xy.get((x, y), 0) + w
        xz[x, z] = xz.get((x, z), 0) + w
        xx[x] = xx.get(x, 0) + w
    return sum(
        w * math.log(w * xx[x] / (xy[x, y] * xz[x, z])) for (x, y, z), w in joint.items() if w > 0
    )


def brute_eq3(P, Q, D_xy):
    """Eq. 3 as the paper writes it: (x,y) ~ D, z ~ Q(.|x,y), y_hat ~ P(.|x,z), log Q(z|x,y_hat)."""
    p, q, d = P.tolist(), Q.tolist(), D_xy.tolist()
    total = 0.0
    X, Y, Z = len(d), len(d[0]), len(p[0])
    for x, y, z, y_hat in itertools.product(range(X), range(Y), range(Z), range(Y)):
        w = d[x][y] * q[x][y][z] * p[x][z][y_hat]
        if w > 0:
            total += w * (math.log(q[x][y_hat][z]) if q[x][y_hat][z] > 0 else -math.inf)
    return total


def brute_elbo(P, Q, prior, x, y, beta=1.0):
    total = 0.0
    for z, q in enumerate(Q[x, y].tolist()):
        p, r = P[x, z, y].item(), prior[x, z].item()
        if q > 0:
            total += (
                -math.inf
                if p == 0 or r == 0
                else q * (math.log(p) - beta * (math.log(q) - math.log(r)))
            )
    return total


def same(a, b, tol=1e-12):
    return a == b or abs(a - b) < tol


# ---- Eq. 1 to 3, Theorem 3.1

@worlds
def test_exact_mi_is_the_mutual_information(seed, zeros):
    P, Q, prior, D_x, _ = world(seed, zeros)
    assert same(mb.exact_mi(P, prior, D_x).item(), brute_mi(P, prior, D_x))


@worlds
def test_belief_is_the_average_of_Q_over_the_data(seed, zeros):
    P, Q, _, D_x, D_xy = world(seed, zeros)
    got = mb.belief(D_xy, Q)
    for x, z in itertools.product(range(len(D_x)), range(Q.shape[2])):
        if D_x[x] > 0:
            want = sum(
                D_xy[x, y].item() / D_x[x].item() * Q[x, y, z].item() for y in range(Q.shape[1])
            )
            assert same(got[x, z].item(), want)
    if (D_x > 0).all():
        assert torch.allclose(got, mb.belief(D_xy / D_xy.sum(1, keepdim=True), Q), atol=1e-14)


@worlds
def test_phase1_objective_under_the_belief_is_eq_3(seed, zeros):
    P, Q, _, D_x, D_xy = world(seed, zeros)
    assert same(mb.phase1_objective(P, Q, mb.belief(D_xy, Q), D_x).item(), brute_eq3(P, Q, D_xy))


@worlds
def test_bound_is_below_mi_and_the_slack_closes_it(seed, zeros):
    P, Q, prior, D_x, _ = world(seed, zeros)
    truth = brute_mi(P, prior, D_x)
    bound, slack = (
        mb.barber_agakov(P, Q, prior, D_x).item(), mb.barber_agakov_slack(P, Q, prior, D_x).item())
    assert bound <= truth + 1e-12 and slack >= 0
    assert same(bound + slack, truth) if bound > -math.inf else slack == math.inf
    if not zeros:
        assert slack > 1e-3


@worlds
def test_bound_is_tight_at_the_true_posterior(seed, zeros):
    P, _, prior, D_x, _ = world(seed, zeros)
    Q = mb.true_posterior(P, prior)
    assert torch.allclose(Q.sum(-1), torch.ones(1, dtype=torch.float64), atol=1e-12)
    assert same(mb.barber_agakov(P, Q, prior, D_x).item(), brute_mi(P, prior, D_x))
    assert same(mb.barber_agakov_slack(P, Q, prior, D_x).item(), 0)


@worlds
def test_H_z_given_x_does_not_move_with_theta(seed, zeros):
    P, Q, prior, D_x, _ = world(seed, zeros)
    Q = Q * 0.99 + 0.01 / Q.shape[2]                                         # a finite bound
    grads = []
    for f in (mb.phase1_objective, mb.barber_agakov):
        logits = P.log().requires_grad_()                                    # -inf where P is zero
        grads.append(torch.autograd.grad(f(logits.softmax(-1), Q, prior, D_x), logits)[0])
    assert torch.equal(*grads) and grads[0].isfinite().all() and grads[0].abs().max() > 1e-4


def test_eq_1_and_3_gradients_match_finite_differences():
    P, Q, prior, D_x, D_xy = world(3)
    logits, eps = P.log().requires_grad_(), 1e-5
    step = torch.randn(P.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    P_tilde = mb.belief(D_xy, Q)
    for f, brute in (
        (lambda P: mb.exact_mi(P, prior, D_x), lambda P: brute_mi(P, prior, D_x)),
        (lambda P: mb.phase1_objective(P, Q, P_tilde, D_x), lambda P: brute_eq3(P, Q, D_xy)),
    ):
        slope = (torch.autograd.grad(f(logits.softmax(-1)), logits)[0] * step).sum().item()
        up, down = (brute((logits.detach() + s * eps * step).softmax(-1)) for s in (1, -1))
        assert abs(slope - (up - down) / (2 * eps)) < 1e-7 < abs(slope)


def test_shared_zeros_leave_finite_gradients():
    P = torch.eye(3, dtype=torch.float64)[None].requires_grad_()
    Q = torch.eye(3, dtype=torch.float64)[None].requires_grad_()
    prior, D_x = torch.full((1, 3), 1 / 3, dtype=torch.float64), torch.ones(1)
    assert same(mb.exact_mi(P, prior, D_x).item(), math.log(3))
    assert same(mb.barber_agakov(P, Q, prior, D_x).item(), math.log(3))
    for f in (
        mb.exact_mi(P, prior, D_x),
        mb.phase1_objective(P, Q, prior, D_x),
        mb.elbo(P, Q, prior).sum(),
    ):
        grads = torch.autograd.grad(f, (P, Q), allow_unused=True)
        assert all(g.isfinite().all() for g in grads if g is not None)
    blur = 0.7 * Q.detach() + 0.1                                            # zeros in P alone
    grad, = torch.autograd.grad(mb.phase1_objective(P, blur, prior, D_x), P)     # (1,3,3)
    assert torch.allclose(grad, prior[:, :, None] * blur.transpose(1, 2).log())


# ---- Eq. 5, Theorem 3.2

@worlds
def test_elbo_is_eq_5_and_its_gap_is_the_posterior_kl(seed, zeros):
    P, Q, prior, _, _ = world(seed, zeros)
    J, logp, gap = mb.elbo(P, Q, prior), mb.log_evidence(P, prior), mb.elbo_slack(P, Q, prior)
    for x, y in itertools.product(range(P.shape[0]), range(P.shape[2])):
        p_y = sum(prior[x, z].item() * P[x, z, y].item() for z in range(P.shape[1]))
        assert same(logp[x, y].item(), math.log(p_y) if p_y > 0 else -math.inf)
        assert same(J[x, y].item(), brute_elbo(P, Q, prior, x, y))
        assert same(mb.elbo(P, Q, prior, 0.1)[x, y].item(), brute_elbo(P, Q, prior, x, y, beta=0.1))
        assert J[x, y] <= logp[x, y] + 1e-12 and gap[x, y] >= -1e-15
        if J[x, y] > -math.inf:                                              # the KL, term by term
            kl = sum(q * math.log(q / (prior[x, z].item() * P[x, z, y].item() / p_y))
                     for z, q in enumerate(Q[x, y].tolist()) if q > 0)
            assert same(gap[x, y].item(), kl) and same((J + gap)[x, y].item(), logp[x, y].item())


@worlds
def test_elbo_is_tight_at_the_true_posterior(seed, zeros):
    P, _, prior, _, _ = world(seed, zeros)
    Q, logp = mb.true_posterior(P, prior), mb.log_evidence(P, prior)
    possible = logp > -math.inf
    assert torch.allclose(mb.elbo(P, Q, prior)[possible], logp[possible], atol=1e-12)
    assert mb.elbo_slack(P, Q, prior).abs().max() < 1e-12


def test_small_beta_breaks_the_bound():
    P, _, prior, _, _ = world(0)
    beta = 0.1
    best = (prior[:, None, :] * P.transpose(1, 2) ** (1 / beta))
    J = mb.elbo(P, best / best.sum(-1, keepdim=True), prior, beta)
    # the optimum in closed form
    assert torch.allclose(J, beta * best.sum(-1).log(), atol=1e-12)
    assert (J > mb.log_evidence(P, prior)).any()
    assert (J >= mb.elbo(P, mb.true_posterior(P, prior), prior, beta)).all()


def test_beta_zero_ignores_even_an_infinite_kl():
    P, Q, _, _, _ = world(1)
    prior = torch.eye(P.shape[1], dtype=torch.float64)[:1].expand(P.shape[0], -1)
    assert (mb.elbo(P, Q, prior) == -math.inf).all() and mb.elbo(P, Q, prior, 0).isfinite().all()


# ---- From samples

def draw(p, gen, n=1):
    return torch.multinomial(p, n, replacement=True, generator=gen)


def test_sampled_barber_agakov_is_near_the_exact_value():
    P, Q, _, D_x, D_xy = world(2)
    gen, B, G = torch.Generator().manual_seed(0), 20_000, 4
    xy = draw(D_xy.flatten(), gen, B)
    x, y = xy // D_xy.shape[1], xy % D_xy.shape[1]                           # (B,)
    z = draw(Q[x, y], gen)                                                   # (B,1)
    y_hat = draw(P[x, z[:, 0]], gen, G)                                      # (B,G)
    logq = Q[x[:, None], y_hat, z].log()                                     # (B,G)
    prior = mb.belief(D_xy, Q)
    H = -sum(d * p * math.log(p) for d, row in zip(D_x.tolist(), prior.tolist()) for p in row)
    for samples in (logq, logq[:, 0]):
        objective, bound = (
            mb.barber_agakov_from_samples(samples), mb.barber_agakov_from_samples(samples, H))
        assert abs(objective.mean - brute_eq3(P, Q, D_xy)) < 4 * objective.standard_error < 0.05
        assert same(bound.mean, objective.mean + H) and same(
            bound.standard_error, objective.standard_error
        )
        assert bound.mean - 4 * bound.standard_error < brute_mi(P, prior, D_x)


def test_standard_error_counts_groups_not_rollouts():
    # two groups, each of one mind
    logq = torch.tensor([[-1.0] * 50, [-3.0] * 50])
    est = mb.barber_agakov_from_samples(logq)
    # std 2^.5 over 2 groups
    assert est.mean == -2 and same(est.standard_error, 1.0)
    assert est.per_pair.tolist() == [-1, -3] and math.isnan(
        mb.barber_agakov_from_samples(logq[:1])[1]
    )


def test_monte_carlo_elbo_within_four_standard_errors():
    P, Q, prior, _, D_xy = world(4)
    gen, B, K = torch.Generator().manual_seed(1), 20_000, 8
    xy = draw(D_xy.flatten(), gen, B)
    x, y = xy // D_xy.shape[1], xy % D_xy.shape[1]                           # (B,)
    z = draw(Q[x, y], gen, K)                                                # (B,K)
    X, Y = x[:, None], y[:, None]
    logs = P[X, z, Y].log(), Q[X, Y, z].log(), prior[X, z].log()             # three of (B,K)
    cells = list(itertools.product(range(D_xy.shape[0]), range(D_xy.shape[1])))
    for beta in (1.0, 0.1, 0.0):
        est = mb.elbo_from_samples(*logs, beta=beta)
        exact = sum(D_xy[c].item() * brute_elbo(P, Q, prior, *c, beta=beta) for c in cells)
        assert abs(est.mean - exact) < 4 * est.standard_error < 0.05


def test_impossible_samples_give_minus_infinity():
    inf, one = torch.full((2, 3), -math.inf), torch.full((2, 3), -1.0)
    assert mb.elbo_from_samples(inf, one, one).mean == -math.inf
    assert mb.elbo_from_samples(one, one, inf).mean == -math.inf
    assert mb.elbo_from_samples(one, one, inf, beta=0).mean == -1
    assert mb.barber_agakov_from_samples(inf).mean == -math.inf


# ---- Collapse

def test_collapse_by_hand():
    got = mb.collapse(["open door", "open  door ", "take the red key", "wait"], ["open door", "go"])
    assert got.pop("perplexity_ratio") > 1
    assert got == {
        "unique": 3 / 4,
        "mean_length": 9 / 4,
        "true_unique": 1.0,
        "true_mean_length": 1.5,
    }
    assert mb.collapse(["a"] * 10) == {"unique": 0.1, "mean_length": 1.0, "true_unique": None,
                                       "true_mean_length": None, "perplexity_ratio": None}
    assert mb.collapse(["", "go on"])["mean_length"] == 1.0


def test_perplexity_ratio_under_the_word_counts_by_hand():
    # words of the truth, each plus one: go 3, on 2, the end 3, any other 1, of 9
    got = mb.collapse(["go", "go up"], ["go on", "go"])["perplexity_ratio"]
    hat, true = [3, 3, 3, 1, 3], [3, 2, 3, 3, 3]
    nats = [-sum(math.log(count / 9) for count in counts) / 5 for counts in (hat, true)]
    assert same(got, math.exp(nats[0]) / math.exp(nats[1]))


def test_perplexity_ratio_under_a_model_by_hand():
    logp = {"go": -2.0, "go on": -6.0, "jump over it": -20.0}
    for kind in (list, torch.tensor):
        got = mb.collapse(["jump over it", "go"], ["go on"], lambda zs: kind([logp[z] for z in zs]))
        assert same(got["perplexity_ratio"], math.exp(22 / 6 - 6 / 3), 1e-5)


def test_perplexity_ratio_tells_worn_phrases_from_gibberish():
    true = ["open the red door", "take the key", "go north", "open the box"]
    ratio = lambda zs: mb.collapse(zs, true)["perplexity_ratio"]
    assert ratio(true) == 1 and ratio(["open the"] * 4) < 0.8 and ratio(["xq zzv kk"] * 4) > 1.5
    assert math.isfinite(ratio([""]))


# ---- Errors: one line that names the argument

ok = dict(
    P=torch.full((2, 3, 4), 1 / 4),
    Q=torch.full((2, 4, 3), 1 / 3),
    prior=torch.full((2, 3), 1 / 3),
    D_x=torch.full((2,), 1 / 2),
)
bad = [(dict(P=ok["P"] * 0.9), "P: must sum to 1 over y"), (dict(Q=ok["P"]), "Q: shape"),
       (dict(prior=torch.ones(3)), "prior: shape"),
       (dict(prior=torch.tensor([[2., -1, 0]] * 2)), "prior: entries"),
       (dict(D_x=torch.full((3,), 1 / 3)), "D_x: shape"),
       (dict(D_x=torch.tensor([math.nan, 1])), "D_x: entries"),
       (dict(P=torch.full((2, 4, 3), 1 / 3)), r"Q: shape \(2, 4, 3\), expected \(X=2, Y=3, Z=4\)")]


@pytest.mark.parametrize("change,message", bad)
def test_wrong_tables_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as e:
        mb.barber_agakov(**(ok | change))
    assert "\n" not in str(e.value)


def test_float32_tables_are_taken():
    assert mb.barber_agakov(**ok).dtype == torch.float64
    assert abs(mb.exact_mi(ok["P"], ok["prior"], ok["D_x"])) < 1e-6


one = torch.full((2, 3), -1.0)


@pytest.mark.parametrize("call,message", [
    (lambda: mb.belief(torch.ones(2, 4), ok["Q"]), "D_xy: must sum to 1"),
    (lambda: mb.barber_agakov_from_samples([]), "logq_of_z: shape"),
    (lambda: mb.barber_agakov_from_samples([-1.0, math.nan]), "logq_of_z"),
    (lambda: mb.barber_agakov_from_samples([0.7, 1.2]), "a loss"),
    (lambda: mb.elbo_from_samples(one, one[:, :2], one), "logq_z: shape"),
    (lambda: mb.elbo_from_samples(one[0], one[0], one[0]), "logp_y: shape"),
    (lambda: mb.elbo_from_samples(one, one - math.inf, one), "logq_z: -inf"),
    (lambda: mb.collapse([]), "z_hat"),
    (lambda: mb.collapse("open door"), "z_hat"),
    (lambda: mb.collapse(["a"], [None]), "z_true"),
    (lambda: mb.collapse(["a"], []), "z_true"),
])
def test_wrong_samples_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_demo_prints_its_table(capsys):
    mb.main()
    lines = capsys.readouterr().out.splitlines()[1:]
    rows = [line.split()[-6:] for line in lines[:2]]
    assert [r[2] == "0.0000" and r[5] == "0.0000" for r in rows] == [False, True]
    assert rows[1][0] == rows[1][1] == rows[0][0] and rows[1][3] == rows[1][4] == rows[0][3]
    assert float(lines[2].split()[-3]) < 1e-12
    trace = [float(value) for value in re.findall(r"-\d\.\d+", lines[3])]
    assert trace == sorted(trace) and trace[0] < trace[-1] - 0.1 and len(trace) == 5
    assert [line.split()[0] for line in lines[4:]] == ["collapsed", "diverse"]
