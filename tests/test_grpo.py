"""Claims of `grpo.py`, against enumeration, autograd of the exact objective, and a naive loop."""

import dataclasses
import itertools
import math

import pytest
import torch
from conftest import EOS, MAKERS, Net, Recorder, frozen, grads, naive, relative, tiny_llama, weights

import grpo
import lm
import mi_bounds
from models import optim

REWARDS = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)
THETA = torch.tensor([0.4, -0.2, 0.1, 0.8], dtype=torch.float64)
PROMPTS = [[5], [3, 1, 4, 1, 5, 2, 6], [2, 7, 1]]


@dataclasses.dataclass
class Settings(grpo.Phase):
    """A phase, and what else a step depends on."""
    longest: int = 4
    tokens: int = 10**6
    lr: float = 0.1


def settings(**kw):
    """Every setting that a test relies on is said here or in the test: defaults are free to
    change."""
    plain = dict(
        group_size=4,
        temperature=1.0,
        min_p=0.0,
        form="sum",
        floor=0.0,
        scale="mean",
        beta=0.0,
        kl="reward",
        clip=0.2,
        max_norm=1e9,
    )
    return Settings(**plain | kw)


def rollouts_of(prompts, rows, logps, cfg):
    options = lm.Options(EOS, cfg.temperature, min_p=cfg.min_p, tokens=cfg.tokens)
    return grpo.Rollouts(prompts, rows, logps, options)


def take_step(policy, ref, optimizers, reward, cfg, prompts=PROMPTS, seed=0, **sampler):
    """Draw, reward(owner, rows) -> (N,), one step: (log, rows, R). sampler: other options to draw
    with. seed: a number or a generator."""
    gen = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    options = lm.Options(EOS, **dict(temperature=cfg.temperature, min_p=cfg.min_p) | sampler)
    rows, logps = lm.sample(policy, prompts, cfg.group_size, cfg.longest, options, generator=gen)
    R = reward([n // cfg.group_size for n in range(len(rows))], rows)
    log = grpo.step(
        Net(policy),
        ref and Net(ref),
        optimizers,
        rollouts_of(prompts, rows, logps, cfg),
        R=R.view(-1, cfg.group_size),
        phase=cfg,
        lr=cfg.lr,
    )
    return log, rows, R


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0).item()


# --- the estimator, on policies small enough to enumerate -----------------------------------------

def expected_update(
    theta, G, R, cfg, table=lambda theta: theta.log_softmax(-1)[:, None], live=None
):
    """Mean over all groups of the ascent direction. table(theta) -> (K, T) token log-probs of all K
    outcomes; R(logp) -> (K,) rewards, maybe with the KL. The loss is linear in A: the group's
    probability scales it."""
    theta = theta.clone().requires_grad_()
    logp = table(theta)                                                            # (K, T)
    live = torch.ones_like(logp, dtype=torch.bool) if live is None else live
    p, reward = logp.detach().sum(1).exp(), R(logp.detach())
    groups = torch.tensor(list(itertools.product(range(len(p)), repeat=G)))        # (K^G, G)
    A = grpo.advantages(reward[groups], cfg.scale) * p[groups].prod(1, keepdim=True)
    n = groups.flatten()
    objective = grpo.surrogate(logp[n], logp[n].detach(), A.flatten()[:, None], cfg.clip)
    loss = grpo.loss_sum(objective, logp[n], None, live[n], cfg)
    loss.div(G).neg().backward()
    return theta.grad


def exact_gradient(theta, J):
    theta = theta.clone().requires_grad_()
    J(theta).backward()
    return theta.grad


@pytest.mark.parametrize("G", [2, 3, 4])
@pytest.mark.parametrize("scale", ["mean", "loo"])
def test_expected_update_is_the_reward_gradient(G, scale):
    """Eq. 4: over all K^G groups, (1 - 1/G) of it with R - mean, all of it with leave-one-out."""
    update = expected_update(THETA, G, lambda logp: REWARDS, settings(scale=scale))
    truth = exact_gradient(THETA, lambda theta: (theta.softmax(-1) * REWARDS).sum())
    assert torch.allclose(update, truth * (1 if scale == "loo" else 1 - 1 / G), rtol=1e-10)


def test_std_scale_changes_direction():
    """scale="std" climbs, but not along the gradient."""
    update = expected_update(THETA, 3, lambda logp: REWARDS, settings(scale="std"))
    truth = exact_gradient(THETA, lambda theta: (theta.softmax(-1) * REWARDS).sum())
    assert 0.8 < cosine(update, truth) < 0.9999


def test_std_scale_ignores_the_unit_of_the_reward():
    update = expected_update(THETA, 3, lambda logp: REWARDS, settings(scale="std"))
    tenfold = expected_update(THETA, 3, lambda logp: 10 * REWARDS, settings(scale="std"))
    assert relative(tenfold, update) < 1e-3


def test_std_scale_by_hand():
    R = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 3.0]])
    by_hand = [
        [(r - sum(g) / 3) / (torch.tensor(g).std().item() + 1e-4) for r in g] for g in R.tolist()
    ]
    assert torch.allclose(grpo.advantages(R, "std"), torch.tensor(by_hand))


def world():
    """One x; four actions z, three next states y: P (1, 4, 3), prior (1, 4); y = 1 was seen."""
    gen = torch.Generator().manual_seed(0)
    P = torch.rand(1, 4, 3, generator=gen, dtype=torch.float64) + .05
    prior = torch.rand(1, 4, generator=gen, dtype=torch.float64) + .1
    return P / P.sum(-1, keepdim=True), prior / prior.sum(-1, keepdim=True)


def elbo_of(theta, P, prior, beta):
    Q = torch.full((1, 3, 4), .25, dtype=torch.float64)
    return mi_bounds.elbo(P, torch.stack([Q[0, 0], theta.softmax(-1), Q[0, 2]])[None], prior, beta)[
        0, 1
    ]


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("scale", ["mean", "loo"])
def test_kl_in_the_reward_climbs_the_elbo_of_eq_5(beta, scale):
    P, prior = world()
    logP, logprior = P[0, :, 1].log(), prior[0].log()
    cfg = settings(scale=scale)
    run = lambda kl: expected_update(THETA, 3, lambda logp: logP - beta * kl(logp[:, 0]), cfg)
    update = run(lambda logq: grpo.k1(logq, logprior))
    truth = exact_gradient(THETA, lambda theta: elbo_of(theta, P, prior, beta))
    assert torch.allclose(update, truth * (1 if scale == "loo" else 2 / 3), rtol=1e-9)
    swapped = run(lambda logq: grpo.k1(logprior, logq))
    assert relative(swapped, update) > 1e-2  # the sign of the KL matters


def sequences(V, T):
    """All rows that end at the first EOS or at T tokens."""
    rows, open_ = [], [()]
    for t in range(T):
        longer = [(*r, v) for r in open_ for v in range(V)]
        rows += [r for r in longer if r[-1] == EOS or t == T - 1]
        open_ = [r for r in longer if r[-1] != EOS]
    return rows


SEQUENCES = sequences(3, 3)
HISTORIES = sorted({r[:t] for r in SEQUENCES for t in range(len(r))})
LIVE = torch.tensor([[t < len(r) for t in range(3)] for r in SEQUENCES])


def sequence_table(theta):
    """(K, 3) token log-probs of all rows, 0 after the end. theta: (histories, V), one softmax
    each."""
    logp = theta.log_softmax(-1)
    zero = logp.new_zeros(())
    at = lambda r, t: logp[HISTORIES.index(r[:t]), r[t]] if t < len(r) else zero
    return torch.stack([torch.stack([at(r, t) for t in range(3)]) for r in SEQUENCES])


def test_sequence_update_is_the_elbo_gradient():
    """V = 3, up to 3 tokens, early ends. The SUM over tokens is exact; a KL per token is not."""
    gen = torch.Generator().manual_seed(1)
    theta, other = (
        torch.randn(len(HISTORIES), 3, generator=gen, dtype=torch.float64) for _ in range(2)
    )
    logP = 2 * torch.randn(len(SEQUENCES), generator=gen, dtype=torch.float64)
    ref, lengths = sequence_table(other).sum(1), LIVE.sum(1)
    assert len(SEQUENCES) == 15 and sequence_table(theta).sum(
        1
    ).exp().sum().item() == pytest.approx(1)

    def J(theta):
        logq = sequence_table(theta).sum(1)
        return (logq.exp() * (logP - (logq - ref))).sum()

    truth = exact_gradient(theta, J)
    run = lambda R: expected_update(theta, 2, R, settings(), table=sequence_table, live=LIVE)
    assert relative(run(lambda logp: logP - grpo.k1(logp.sum(1), ref)), truth / 2) < 1e-10
    assert cosine(run(lambda logp: logP - grpo.k1(logp.sum(1), ref) / lengths), truth) < .99


@pytest.mark.parametrize("scale", ["mean", "loo"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_whole_step_averages_to_the_exact_gradient(scale, beta):
    """`step` itself, fed with all groups of two of the 7 rows of V = 3, T <= 2, weighed by
    probability."""
    policy, ref, rows = tiny_llama(3, 1), tiny_llama(3, 2), sequences(3, 2)
    values = {r: math.sin(3 * n) * 2 for n, r in enumerate(rows)}
    logq = torch.stack([naive(policy, [1, 2], r, 0.7).sum() for r in rows])
    logref = torch.stack([naive(ref, [1, 2], r, 0.7).sum() for r in rows]).detach()
    assert logq.exp().sum().item() == pytest.approx(1, abs=1e-5)
    (
        logq.exp() * (torch.tensor([values[r] for r in rows]) - beta * (logq - logref))
    ).sum().backward()
    truth = grads(policy)
    policy.zero_grad()
    cfg = settings(group_size=2, longest=2, scale=scale, beta=beta, temperature=0.7)
    mean = torch.zeros_like(truth)
    for a, b in itertools.product(range(len(rows)), repeat=2):
        pair = [list(rows[a]), list(rows[b])]
        drawn = rollouts_of(
            [[1, 2]], pair, [naive(policy, [1, 2], row, 0.7).tolist() for row in pair], cfg
        )
        recorder, R = Recorder(policy), torch.tensor([[values[tuple(row)] for row in pair]])
        grpo.step(Net(policy), Net(ref), [recorder], drawn, R=R, phase=cfg, lr=0.1)
        if recorder.seen:
            mean -= (logq[a] + logq[b]).exp().item() * recorder.seen[0]
    assert relative(mean, truth * (1 if scale == "loo" else 1 / 2)) < 1e-4


# --- advantages -----------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", ["mean", "std", "loo"])
@pytest.mark.parametrize("value", [0.1, -7.3, 1e8, 1 / 3])
def test_equal_rewards_give_exactly_nothing(scale, value):
    """Also where the mean of equal numbers is off by a rounding."""
    for G in (2, 3, 7, 16):
        assert (grpo.advantages(torch.full((4, G), value), scale) == 0).all()


@pytest.mark.parametrize("scale", ["mean", "std", "loo"])
def test_rounding_noise_is_not_blown_up(scale):
    """Rounding is no signal (Adam would make a full step of it); a spread of a ten-thousandth of a
    nat is."""
    R = torch.rand(8, 6, generator=torch.Generator().manual_seed(0))
    assert (grpo.advantages(1e-6 * R, scale) == 0).all()
    assert (grpo.advantages(1e-4 * R, scale) != 0).all()


@pytest.mark.parametrize("scale", ["mean", "std", "loo"])
def test_advantages_are_relative_to_the_group(scale):
    R = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    A = grpo.advantages(R, scale)
    assert torch.allclose(A.sum(1), torch.zeros(5), atol=1e-5)
    assert torch.allclose(grpo.advantages(R + torch.arange(5.)[:, None], scale), A, atol=1e-5)
    for b in range(5):
        assert torch.allclose(grpo.advantages(R[b:b + 1], scale)[0], A[b])
        assert A[b].argmax() == R[b].argmax()


def test_loo_subtracts_the_mean_of_the_others():
    R = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    A = grpo.advantages(R, "loo")
    for b, k in itertools.product(range(3), range(4)):
        others = [R[b, j] for j in range(4) if j != k]
        assert A[b, k].item() == pytest.approx((R[b, k] - sum(others) / 3).item(), abs=1e-6)


# --- KL -------------------------------------------------------------------------------------------

REF = torch.tensor([0.1, 0.9, -0.6, 0.2], dtype=torch.float64).log_softmax(-1)


def kl(a, b):
    return (a.exp() * (a - b)).sum()


def test_k1_and_k3_are_unbiased_kl_estimates():
    pi = THETA.log_softmax(-1)
    for k in (grpo.k1, grpo.k3):
        assert (pi.exp() * k(pi, REF)).sum().item() == pytest.approx(kl(pi, REF).item(), rel=1e-12)
        swapped = (pi.exp() * k(REF, pi)).sum().item()
        assert swapped != pytest.approx(kl(pi, REF).item(), rel=1e-2)
    assert (
        (grpo.k3(pi, REF) > 0).all()
        and (grpo.k3(pi, pi) == 0).all()
        and (grpo.k1(pi, pi) == 0).all()
    )


def test_k1_as_a_loss_has_no_expected_gradient():
    g = exact_gradient(
        THETA, lambda theta: (THETA.softmax(-1) * grpo.k1(theta.log_softmax(-1), REF)).sum()
    )
    assert g.abs().max() < 1e-15


def test_k3_loss_descends_the_forward_kl_of_one_token():
    g = exact_gradient(
        THETA, lambda theta: (THETA.softmax(-1) * grpo.k3(theta.log_softmax(-1), REF)).sum()
    )
    forward = exact_gradient(THETA, lambda theta: kl(REF, theta.log_softmax(-1)))
    reverse = exact_gradient(THETA, lambda theta: kl(theta.log_softmax(-1), REF))
    assert torch.allclose(g, forward, rtol=1e-10) and relative(g, reverse) > 1e-2


def test_k3_does_not_overflow():
    assert grpo.k3(torch.tensor(-1000.0), torch.tensor(0.0)).isfinite()


# --- surrogate, loss ------------------------------------------------------------------------------

@pytest.mark.parametrize("A", [2.0, -3.0])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0])
def test_clip_acts_only_on_the_side_of_the_advantage(A, ratio):
    old = torch.tensor(-1.3)
    logp = (old + math.log(ratio)).requires_grad_()
    value = grpo.surrogate(logp, old, torch.tensor(A), 0.2)
    value.backward()
    off = (A > 0 and ratio > 1.2) or (A < 0 and ratio < 0.8)
    assert logp.grad.item() == pytest.approx(0 if off else A * ratio, rel=1e-5, abs=1e-12)
    assert value.item() == pytest.approx(
        A * min(max(ratio, 0.8), 1.2) if off else A * ratio, rel=1e-5
    )


def test_gradient_at_the_first_step_is_a_grad_logp():
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    A = torch.tensor([1.5, -0.7])
    grpo.surrogate(logp, logp.detach(), A, 0.2).sum().backward()
    assert torch.allclose(logp.grad, A)


def test_loss_counts_live_tokens_only():
    logp = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    live = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    for cfg in (settings(), settings(kl="loss", beta=0.5)):
        logp.grad = None
        A = torch.tensor([1., -1., 2.])
        old = logp.detach()
        objective = grpo.surrogate(logp, old, A[:, None], cfg.clip)
        grpo.loss_sum(objective, logp, old - 1, live, cfg).backward()
        assert (logp.grad[~live] == 0).all() and (logp.grad[live] != 0).all()


# --- one step against a naive loop ----------------------------------------------------------------

def value(owner, row):
    """Any reward will do: it depends on the prompt, the tokens and their order."""
    return math.sin(1 + 3 * owner + sum((t + 1) * v for t, v in enumerate(row)))


def reward(owner, rows):
    return torch.tensor([value(o, r) for o, r in zip(owner, rows)])


def naive_loss(policy, ref, prompts, rows, cfg, old=None):
    """The objective as `grpo` states it, over all B*G rollouts: no batch, no cache, no row left
    out."""
    B, G = len(prompts), cfg.group_size
    prompt = lambda n: prompts[n // G]
    logp = [naive(policy, prompt(n), r, cfg.temperature, cfg.min_p) for n, r in enumerate(rows)]
    old = [lp.detach() for lp in logp] if old is None else old
    logref = [naive(ref, prompt(n), r, cfg.temperature).detach() for n, r in enumerate(rows)]
    R = [value(n // G, r) for n, r in enumerate(rows)]
    if cfg.kl == "reward":
        R = [R[n] - cfg.beta * (old[n].sum() - logref[n].sum()).item() for n in range(B * G)]
    total = 0.0
    for n in range(B * G):
        group = R[n // G * G:(n // G + 1) * G]
        A = R[n] - sum(group) / G
        A = A * G / (G - 1) if cfg.scale == "loo" else A
        A = A / (torch.tensor(group).std().item() + 1e-4) if cfg.scale == "std" else A
        for t in range(len(rows[n])):
            ratio = (logp[n][t] - old[n][t]).exp()
            off = ratio > 1 + cfg.clip if A > 0 else ratio < 1 - cfg.clip
            total = total - (0 if off else ratio * A)  # off: a constant, no gradient
            if cfg.kl == "loss":
                d = logref[n][t] - logp[n][t]
                total = total + cfg.beta * (d.exp() - 1 - d)
    return total / (B * G), old


@pytest.mark.parametrize("kl, min_p", [("reward", 0.0), ("loss", 0.0), ("reward", 0.02)])
@pytest.mark.parametrize("scale", ["mean", "std", "loo"])
@pytest.mark.parametrize("kind", list(MAKERS))
def test_gradient_equals_a_naive_loop_at_any_budget(kind, scale, kl, min_p):
    """Unequal lengths, duplicates within and across groups, T = 0.7, pad == eos, any budget."""
    policy, ref = MAKERS[kind](4, 1, 14.0), MAKERS[kind](4, 2, 14.0)
    prompts = [[t % 4 for t in p] for p in PROMPTS]
    for tokens in (1, 20, 40, 10**6):
        cfg = settings(
            group_size=6,
            longest=4,
            temperature=0.7,
            min_p=min_p,
            kl=kl,
            beta=0.4,
            scale=scale,
            tokens=tokens,
        )
        recorder = Recorder(policy)
        log, rows, R = take_step(policy, ref, [recorder], reward, cfg, prompts=prompts, seed=1)
        if tokens == 1:
            lengths = set(map(len, rows))
            assert len(lengths) > 1 and len({(n // 6, *r) for n, r in enumerate(rows)}) < 18 == len(
                rows
            )
            naive_loss(policy, ref, prompts, rows, cfg)[0].backward()
            truth = grads(policy)
            policy.zero_grad()
            first = rows
        assert rows == first and R.tolist() == pytest.approx(
            [value(n // 6, r) for n, r in enumerate(rows)]
        )
        assert relative(recorder.seen[0], truth) < 1e-4 and len(recorder.seen) == 1
        assert (
            log["grad_norm"] == pytest.approx(truth.norm().item(), rel=1e-4) and log["gap"] < 1e-4
        )


def test_log_tells_the_truth():
    policy, ref, cfg = tiny_llama(9, 1), tiny_llama(9, 2), settings(beta=0.1, temperature=0.7)
    truth = tiny_llama(9, 1)
    log, rows, R = take_step(policy, ref, optim.make_optimizers(policy, 1e-3), reward, cfg)
    owner = [n // 4 for n in range(12)]
    total = lambda model: sum(
        naive(model, PROMPTS[o], r, 0.7).sum().item() for o, r in zip(owner, rows)
    )
    assert log["kl"] == pytest.approx((total(truth) - total(ref)) / 12, abs=1e-4)
    assert log["reward"] == pytest.approx(
        sum(value(o, r) for o, r in zip(owner, rows)) / 12, abs=1e-6
    )
    assert log["reward_std"] == pytest.approx(R.view(3, 4).std(1).mean().item())
    assert log["truncated"] == sum(EOS not in r for r in rows) / 12 and log["tokens"] == sum(
        map(len, rows)
    )
    assert log["gap"] < 1e-4 and log["zero_std_groups"] == 0


def test_kl_is_zero_when_the_phase_begins():
    policy = tiny_llama()
    ref = frozen(policy)
    run = lambda n: take_step(policy, ref, opt, reward, cfg, seed=n)[0]
    cfg, opt = settings(beta=0.1, lr=1e-2, temperature=0.7), optim.make_optimizers(policy, 1e-2)
    assert abs(run(0)["kl"]) < 1e-4
    assert max(abs(run(n)["kl"]) for n in range(1, 4)) > 1e-2  # and not because ref follows


def test_the_kl_with_min_p_is_what_it_leaves_out():
    """Of the policy that draws to the reference, which draws from all: at a phase's start -log of
    the mass that stayed."""
    policy = tiny_llama()
    ref, cfg, opt = (
        frozen(policy), settings(beta=0.1, lr=1e-2, min_p=0.3),
        optim.make_optimizers(policy, 1e-2))
    log, rows, _ = take_step(policy, ref, opt, reward, cfg)
    lost = [
        (naive(ref, PROMPTS[n // 4], row, min_p=0.3) - naive(ref, PROMPTS[n // 4], row))
        .sum()
        .item()
        for n, row in enumerate(rows)
    ]
    assert (
        log["kl"] == pytest.approx(sum(lost) / len(lost), abs=1e-4)
        and log["kl"] > 0.01
        and 0 < log["gap"] < 1e-4
    )


def test_sampler_trainer_gap_stops_the_step():
    """Drawn at another temperature than the one that is scored."""
    policy = tiny_llama()
    log, *_ = take_step(policy, None, [Recorder(policy)], reward, settings())
    assert log["gap"] < 1e-4
    with pytest.raises(RuntimeError, match="sampler and trainer disagree"):
        take_step(policy, None, [Recorder(policy)], reward, settings(), temperature=0.7)


@pytest.mark.parametrize("gap, options", [(0.01, dict(min_p=0.05)), (1.9, dict(half=True))])
def test_gaps_of_rounding_are_allowed(gap, options):
    grpo.check_gap(gap, lm.Options(EOS, **options))


@pytest.mark.parametrize("where", ["reward", "-inf reward", "weights", "reference"])
def test_a_step_without_finite_numbers_is_skipped(where):
    """Neither the weights nor the moments of Adam move, and the log says so."""
    policy, ref = tiny_llama(), tiny_llama(9, 2)
    optimizers = optim.make_optimizers(policy, 1e-2, muon=False)
    bad = {"reward": math.nan, "-inf reward": -math.inf}.get(where, 0.0)
    broken = {"weights": policy, "reference": ref}.get(where)
    if broken:
        with torch.no_grad():
            broken.model.norm.weight[0] = math.nan
    before = weights(policy)

    def some_bad(owner, rows):
        R = reward(owner, rows)
        R[1] += bad
        return R

    cfg = settings(beta=0.1 if where == "reference" else 0.0)
    log, _, _ = take_step(policy, ref, optimizers, some_bad, cfg)
    assert log["skipped"] and not optimizers[0].state
    assert torch.equal(weights(policy).nan_to_num(), before.nan_to_num())
    assert all(p.grad is None for p in policy.parameters())


def test_no_reference_is_needed_without_a_kl():
    grad = []
    for ref in (None, tiny_llama(9, 2)):
        recorder = Recorder(tiny_llama())
        take_step(recorder.model, ref, [recorder], reward, settings(beta=0.0))
        grad += recorder.seen
    assert torch.equal(*grad)


def test_constant_reward_changes_no_parameter():
    for scale in ("mean", "std", "loo"):
        policy = tiny_llama()
        before, opt = weights(policy), optim.make_optimizers(policy, 1e-2)
        constant = lambda owner, rows: torch.full((len(rows),), -7.3)
        log, *_ = take_step(policy, None, opt, constant, settings(scale=scale))
        assert torch.equal(weights(policy), before)
        assert (
            log["zero_std_groups"] == 1
            and log["reward"] == pytest.approx(-7.3)
            and log["grad_norm"] == 0
        )


def some_flat(which):
    """A reward without spread in all groups, or in that of the first prompt."""
    def R(owner, rows):
        if which == "flat":
            return torch.full((len(rows),), -7.3)
        return torch.where(torch.tensor(owner) == 0, -2.0, reward(owner, rows))
    return R


@pytest.mark.parametrize("kl", ["reward", "loss"])
@pytest.mark.parametrize("scale", ["mean", "std", "loo"])
@pytest.mark.parametrize("which, share", [("flat", 1), ("first flat", 1 / 3)])
def test_zero_std_groups_are_of_the_reward_alone(which, share, scale, kl):
    """Although the KL, which sits in the reward or not, differs within each group."""
    policy, ref = tiny_llama(9, 1), tiny_llama(9, 2)
    cfg = settings(beta=0.5, kl=kl, scale=scale)
    log, *_ = take_step(policy, ref, [Recorder(policy)], some_flat(which), cfg)
    assert log["zero_std_groups"] == pytest.approx(share) and abs(log["kl"]) > 0.1


@pytest.mark.parametrize("which", ["flat", "first flat"])
def test_divided_by_std_a_kl_alone_teaches_nothing(monkeypatch, which):
    """Its noise would be blown up to 1. With "mean" the KL goes on to draw the policy to the
    reference."""
    seen, micro_batches = {}, grpo.micro_batches
    for scale in ("std", "mean"):
        policy, ref = tiny_llama(9, 1), tiny_llama(9, 2)

        def noting(net, rollouts, A, phase):
            seen[scale] = A
            return micro_batches(net, rollouts, A, phase)

        monkeypatch.setattr(grpo, "micro_batches", noting)
        cfg = settings(beta=0.5, scale=scale)
        take_step(policy, ref, [Recorder(policy)], some_flat(which), cfg)
    A = seen["std"]
    flat = [which == "flat" or n < 4 for n in range(len(A))]
    assert not A[flat].any() and A[[not f for f in flat]].all() and seen["mean"][flat].any()


def test_floored_is_the_share_that_lies_on_the_floor():
    def floored(R, floor):
        phase, rows = settings(floor=floor), [[1]] * len(R)
        R = grpo.shape(torch.tensor(R), rows, phase)
        rollouts = grpo.Rollouts([[0]], rows, [], lm.Options(EOS))
        return grpo.summary(R[None], rollouts, phase)["floored"]

    assert floored([-3.0, -30.0, -9.99, -10.0], 10.0) == 0.5
    assert floored([-3.0, -4.0], 10.0) == 0 and floored([-30.0, -40.0], 10.0) == 1
    # No floor
    assert floored([-99.0, -98.0], 0) == 0


@pytest.mark.parametrize("scale", ["mean", "std", "loo"])
def test_noise_in_equal_rewards_gives_a_tiny_gradient(scale):
    norm = []
    for size in (1.0, 1e-7):
        recorder = Recorder(tiny_llama())
        noisy = lambda owner, rows: size * reward(owner, rows)
        log, *_ = take_step(recorder.model, None, [recorder], noisy, settings(scale=scale))
        norm.append(log["grad_norm"])
    assert norm[1] < 1e-2 * norm[0] and norm[0] > 0.1


def test_rewards_stay_with_their_group():
    """A reward that is the prompt's number has no spread in any group, and none is learned from."""
    policy = tiny_llama()
    before = weights(policy)
    number = lambda owner, rows: torch.tensor(owner, dtype=torch.float)
    log, _, R = take_step(policy, None, optim.make_optimizers(policy, 1e-2), number, settings())
    assert R.tolist() == [0.] * 4 + [1.] * 4 + [2.] * 4
    assert (
        log["zero_std_groups"] == 1
        and log["reward_std"] == 0
        and torch.equal(weights(policy), before)
    )


# --- reward shape, duplicates ---------------------------------------------------------------------

def test_floor_is_applied_after_dividing_by_length():
    logp, lengths = torch.tensor([-3.0, -30.0, -0.5, -44.0]), [2, 5, 1, 4]

    def shaped(form, floor):
        rows = [[0] * length for length in lengths]
        return grpo.shape(logp, rows, settings(form=form, floor=floor))

    assert torch.allclose(shaped("mean", 0) * torch.tensor([2., 5., 1., 4.]), logp)
    assert torch.equal(shaped("sum", 0), logp)
    assert shaped("sum", 10).tolist() == [-3.0, -10.0, -0.5, -10.0]
    assert shaped("mean", 10).tolist() == [-1.5, -6.0, -0.5, -10.0]


# --- learning -------------------------------------------------------------------------------------

def first_token(model, prefix=(5,)):
    return model(torch.tensor([prefix])).logits[0, -1].detach().log_softmax(-1)


@pytest.mark.parametrize("kl_form", ["reward", "loss"])
def test_kl_alone_draws_the_policy_to_the_reference(kl_form):
    policy, ref = tiny_llama(9, 1), tiny_llama(9, 2)
    cfg = settings(group_size=64, longest=1, beta=3.0, kl=kl_form, lr=0.01, max_norm=1.0)
    opt, gen = optim.make_optimizers(policy, cfg.lr, muon=False), torch.Generator().manual_seed(0)
    before = kl(first_token(policy), first_token(ref)).item()
    for _ in range(40):
        nothing = lambda owner, rows: torch.zeros(len(rows))
        take_step(policy, ref, opt, nothing, cfg, prompts=[[5]], seed=gen)
    assert kl(first_token(policy), first_token(ref)).item() < 0.2 * before > 0.1


@pytest.mark.parametrize("muon", [True, False])
def test_a_rewarded_first_token_becomes_likely(muon):
    policy, cfg = tiny_llama(9, 1), settings(group_size=16, longest=2, lr=0.02, max_norm=1.0)
    start = first_token(policy)
    wanted = start.argsort()[4].item()  # neither likely nor unheard of
    opt, gen = optim.make_optimizers(policy, cfg.lr, muon), torch.Generator().manual_seed(0)
    hit = lambda owner, rows: torch.tensor([float(r[0] == wanted) for r in rows])
    for _ in range(30):
        take_step(policy, None, opt, hit, cfg, prompts=[[5]], seed=gen)
    assert start.exp()[wanted] < 0.3 and first_token(policy).exp()[wanted] > 0.9
