"""Both theorems, the second gradient and EM on 10,000 random small worlds, 1e-9 at most."""
import itertools
import math

import pytest
import torch

import mi_bounds as mb

SIZES = list(itertools.product((3, 4, 5), repeat=3))
# The slow ones take a minute in all; a million worlds took five, the largest error 6e-14
many = pytest.mark.parametrize("n", [10_000, pytest.param(200_000, marks=pytest.mark.slow)])


def tables(gen, W, *shape):
    """W tables of distributions over the last axis: dense, with zeros, or near-deterministic (down
    to 1e-34: four rounds of EM take that to 1e-130, and what falls below 1e-308 has no log)."""
    w = torch.rand(W, *shape, generator=gen, dtype=torch.float64) + 0.02
    holes = w * (torch.rand(W, *shape, generator=gen) > 0.35)
    holes = torch.where(holes.sum(-1, keepdim=True) > 0, holes, 1.0)
    kind = torch.randint(3, (W, *[1] * len(shape)), generator=gen)
    w = torch.where(kind == 0, w, torch.where(kind == 1, holes, w**20))
    return w / w.sum(-1, keepdim=True)


def worlds(n, at_once=4000):
    """n worlds or a few more, 3 to 5 symbols on each axis: batches of P, Q, prior, D_x, D_xy."""
    gen = torch.Generator().manual_seed(0)
    for X, Z, Y in SIZES:
        left = math.ceil(n / len(SIZES))
        while left > 0:
            W = min(left, at_once)
            left -= W
            D_xy = tables(gen, W, X * Y).reshape(W, X, Y)
            P, Q, prior = tables(gen, W, X, Z, Y), tables(gen, W, X, Y, Z), tables(gen, W, X, Z)
            yield P, Q, prior, D_xy.sum(-1), D_xy


def off(a, b):
    """The largest difference; equal infinities do not differ. NaN stays NaN."""
    return torch.where(a == b, 0.0, (a - b).abs()).max()


def over(low, high):
    """How far `low` stands above `high` at most."""
    return torch.where(low <= high, 0.0, low - high).max()


def worst(check, n):
    return torch.stack([value for world in worlds(n) for value in check(*world)]).max().item()


def kl(p, q):
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)


def mean(D_xy, value):
    return torch.where(D_xy > 0, D_xy * value, 0.0).sum((-2, -1))


# ---- Both theorems

def theorem_3_1(P, Q, prior, D_x, D_xy):
    belief = mb.belief(D_xy, Q)
    # Eq. 3 as the paper writes it
    drawn = torch.einsum("wxy,wxyz,wxzv->wxvz", D_xy, Q, P)
    eq3 = torch.where(drawn > 0, drawn * Q.log(), 0.0).sum((1, 2, 3))
    yield off(mb.phase1_objective(P, Q, belief, D_x), eq3)
    for z_given_x in (belief, prior):
        I = mb.exact_mi(P, z_given_x, D_x)
        p_y = torch.einsum("wxz,wxzy->wxy", z_given_x, P)
        p_xz = D_x[..., None] * z_given_x
        yield off(I, mean(p_xz, kl(P, p_y[:, :, None])))
        bound = mb.barber_agakov(P, Q, z_given_x, D_x)
        slack = mb.barber_agakov_slack(P, Q, z_given_x, D_x)
        yield over(bound, I)
        yield over(-slack, torch.zeros(()))
        yield off(slack, I - bound)
        posterior = mb.true_posterior(P, z_given_x)
        expected_kl = mean(D_x[..., None] * p_y, kl(posterior, Q))
        yield off(slack, expected_kl)
        yield off(mb.barber_agakov(P, posterior, z_given_x, D_x), I)


def theorem_3_2(P, Q, prior, D_x, D_xy):
    J, logp, slack = mb.elbo(P, Q, prior), mb.log_evidence(P, prior), mb.elbo_slack(P, Q, prior)
    yield over(J, logp)
    yield over(-slack, torch.zeros(()))
    possible = logp > -math.inf
    yield off(slack[possible], (logp - J)[possible])
    posterior = mb.true_posterior(P, prior)
    yield off(slack[possible], kl(Q, posterior)[possible])
    yield off(mb.elbo(P, posterior, prior), logp)


@many
def test_theorem_3_1_holds_in_every_world(n):
    assert worst(theorem_3_1, n) <= 1e-9


@many
def test_theorem_3_2_holds_in_every_world(n):
    assert worst(theorem_3_2, n) <= 1e-9


def test_the_worlds_hold_what_is_hard():
    P, Q, prior, D_x, D_xy = next(worlds(10_000))
    assert (D_xy == 0).any() and (mb.log_evidence(P, prior) == -math.inf).any()
    assert (mb.barber_agakov(P, Q, prior, D_x) == -math.inf).any()
    assert ((P > 0) & (P < 1e-30)).any() and (P > 1 - 1e-6).any()
    assert sum(len(P) for P, *_ in worlds(10_000)) >= 10_000


# ---- The second gradient

def within_reach(P, Q, prior):
    """P under which each y can happen, and Q that reads only z that can have happened, so that the
    bound is finite."""
    never = mb.log_evidence(P, prior) == -math.inf                           # (W,X,Y)
    P = P + never[:, :, None]
    P = P / P.sum(-1, keepdim=True)
    posterior = mb.true_posterior(P, prior)
    Q = Q * (posterior > 0) + posterior
    return P, Q / Q.sum(-1, keepdim=True), posterior


def autograd(f, P, D_xy):
    """The gradient of E_D f(softmax(theta)) at softmax(theta) = P."""
    theta = P.log().requires_grad_()
    return torch.autograd.grad((D_xy * f(theta.softmax(-1))).sum(), theta)[0]


def second_gradient(P, Q, prior, D_x, D_xy):
    P, Q, posterior = within_reach(P, Q, prior)
    for read in (Q, posterior):
        want = autograd(lambda P: mb.elbo(P, read, prior), P, D_xy)
        yield off(mb.elbo_gradient(P, read, D_xy), want)
        best = mb.m_step(P, read, D_xy)
        yield mb.elbo_gradient(best, read, D_xy).abs().max()
    # Fisher's identity
    want = autograd(lambda P: mb.log_evidence(P, prior), P, D_xy)
    yield off(mb.elbo_gradient(P, posterior, D_xy), want)


@many
def test_the_second_gradient_is_autograds_in_every_world(n):
    assert worst(second_gradient, n) <= 1e-9


def test_fishers_identity_wants_the_true_posterior():
    P, Q, prior, _, D_xy = next(worlds(1000))
    P, Q, _ = within_reach(P, Q, prior)
    want = autograd(lambda P: mb.log_evidence(P, prior), P, D_xy)
    assert off(mb.elbo_gradient(P, Q, D_xy), want) > 0.1


# ---- EM

def ascent(P, Q, prior, D_x, D_xy, rounds=4):
    trace = mb.coordinate_ascent(P, prior, D_xy, rounds)[1]
    D_y = D_xy / D_xy.sum(-1, keepdim=True)
    yield over(trace, mean(D_xy, D_y.log()))
    for t in range(rounds):
        before = mean(D_xy, mb.log_evidence(P, prior))
        yield off(trace[t], before)
        posterior = mb.true_posterior(P, prior)
        new = mb.m_step(P, posterior, D_xy)
        after = mean(D_xy, mb.log_evidence(new, prior))
        yield over(before, after)
        # The rise is two KLs: what the M-step gains, and how far the posterior moves away from Q
        reads = torch.einsum("wxy,wxyz->wxz", D_xy, posterior)
        moved = mean(D_xy, kl(posterior, mb.true_posterior(new, prior)))
        gained = mean(reads, kl(new, P))
        known = before > -math.inf
        yield off((after - before)[known], (gained + moved)[known])
        # Any rise of the bound will do: a step of part of the way
        part = mean(D_xy, mb.log_evidence(P + 0.3 * (new - P), prior))
        yield over(before, part)
        P = new
    yield off(trace[rounds], after)


@many
def test_em_never_lowers_the_evidence_in_any_world(n):
    assert worst(ascent, n) <= 1e-9


def half_an_e_step(P, Q, prior, D_xy):
    """E_D of the bound and of the evidence before and after Q goes half of the way and P all."""
    half = (Q + mb.true_posterior(P, prior)) / 2
    new = mb.m_step(P, half, D_xy)
    return ([mean(D_xy, mb.elbo(*pq, prior)) for pq in ((P, Q), (P, half), (new, half))],
            [mean(D_xy, mb.log_evidence(p, prior)) for p in (P, new)])


def bound_rises(P, Q, prior, D_x, D_xy):
    start, e_step, m_step = half_an_e_step(P, Q, prior, D_xy)[0]
    yield over(start, e_step)
    yield over(e_step, m_step)


@many
def test_half_an_e_step_never_lowers_the_bound_in_any_world(n):
    assert worst(bound_rises, n) <= 1e-9


def test_an_action_that_nobody_reads_keeps_its_row():
    P, Q, prior, _, D_xy = next(worlds(10_000))
    unread = torch.einsum("wxy,wxyz->wxz", D_xy, Q) == 0
    assert unread.any() and torch.equal(mb.m_step(P, Q, D_xy)[unread], P[unread])


def test_after_half_an_e_step_the_evidence_may_fall():
    P, Q, prior, _, D_xy = next(worlds(10_000))
    P = mb.coordinate_ascent(P, prior, D_xy, 4)[0]
    before, after = half_an_e_step(P, Q, prior, D_xy)[1]
    assert (after < before - 0.01).any()


# ---- Many worlds at once

def test_worlds_at_once_are_worlds_one_by_one():
    P, Q, prior, D_x, D_xy = (t[:6] for t in next(worlds(200)))
    for f, args in (
        (mb.belief, (D_xy, Q)), (mb.true_posterior, (P, prior)),
        (mb.entropy_z_given_x, (prior, D_x)), (mb.exact_mi, (P, prior, D_x)),
        (mb.phase1_objective, (P, Q, prior, D_x)), (mb.barber_agakov, (P, Q, prior, D_x)),
        (mb.barber_agakov_slack, (P, Q, prior, D_x)), (mb.log_evidence, (P, prior)),
        (mb.elbo, (P, Q, prior)), (mb.elbo_slack, (P, Q, prior)),
        (mb.elbo_gradient, (P, Q, D_xy)), (mb.m_step, (P, Q, D_xy)),
        (lambda *a: mb.coordinate_ascent(*a, 3)[0], (P, prior, D_xy)),
    ):
        one_by_one = torch.stack([f(*world) for world in zip(*args)])
        assert off(f(*args), one_by_one) <= 1e-12
        grid = f(*(t.unflatten(0, (2, 3)) for t in args))
        assert off(grid, one_by_one.unflatten(0, (2, 3))) <= 1e-12


@pytest.mark.parametrize("wrong", [lambda Q: Q[:3], lambda Q: Q[0], lambda Q: Q[None]])
def test_other_worlds_are_refused(wrong):
    P, Q, prior, D_x, _ = next(worlds(200))
    with pytest.raises(ValueError, match=r"Q: shape .*, expected \(8, X=3, Y=3, Z=3\)"):
        mb.barber_agakov(P, wrong(Q), prior, D_x)
