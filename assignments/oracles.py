"""What only the grader tries: each function against an independent computation, by enumeration or
by autograd of the exact objective, on random numbers. A function here is named after the one that
it tests. Nothing here calls the function of ours that it stands for.
"""
import itertools
import math
import random
import statistics
from collections import Counter

import torch

import grpo
from assignments import probes
from assignments.claims import PAIRS, PHASE, close, normal, table
from assignments.student import claim

TIMES = range(3)        # random instances of each claim


def number(rng, low, high):
    return torch.randint(low, high, (), generator=rng).item()


def exact_gradient(J, theta):
    theta = theta.clone().requires_grad_()
    J(theta).backward()
    return theta.grad


def naive(net, prompt, row, temperature=1.0):
    """(T,) log p(row_t | prompt, row_<t): one row, no padding, no cache. Differentiable."""
    ids = torch.tensor([[*prompt, *row]])
    logits = net(ids, use_cache=False).logits[0, len(prompt) - 1:-1] / temperature
    return logits.log_softmax(-1)[range(len(row)), row]


def some_rows(rng, n, V=6, longest=4):
    """n rows of tokens of unlike lengths."""
    return [torch.randint(V, (number(rng, 1, longest + 1),), generator=rng).tolist()
            for _ in range(n)]


# --- 1: the expected update -------------------------------------------------------------------

def advantages(student, rng):
    for K, G in ((3, 2), (4, 3), (3, 4)):
        theta, R = normal(rng, K), 3 * normal(rng, K)
        for scale, share in (("mean", 1 - 1 / G), ("loo", 1.0)):
            update = expected_update(student, theta, R, G, scale)
            truth = exact_gradient(lambda theta: (theta.softmax(0) * R).sum(), theta)
            claim(close(update, share * truth, 1e-9),
                  f'over all groups, the update with "{scale}" is {share:.2f} times the gradient')
    default = student("grpo.advantages", R[None])
    claim(close(default, student("grpo.advantages", R[None], "mean")), 'the default is "mean"')
    # Rewards near 1e-4 show the constant under the fraction
    for size in (1.0, 1e-3):
        R = size * normal(rng, 4, 3)
        A = student("grpo.advantages", R, "std")
        for group, found in zip(R.tolist(), A.tolist(), strict=True):
            mean, std = statistics.mean(group), statistics.stdev(group) + 1e-4
            by_hand = torch.tensor([(r - mean) / std for r in group]).double()
            claim(close(torch.tensor(found).double(), by_hand),
                  'with "std" it is (R - mean) / (std + 1e-4) with G - 1 under the variance')
    for scale in ("mean", "std", "loo"):
        R = torch.stack([torch.tensor([2.0, 2.0 + 3e-6, 2.0]), torch.tensor([1.0, 1.0001, 1.0])])
        A = student("grpo.advantages", R.double(), scale)
        claim((A[0] == 0).all(), "rewards that are equal up to rounding give exactly 0")
        claim((A[1] != 0).all(), "a spread of a ten-thousandth of a nat gives more than 0")


def expected_update(student, theta, R, G, scale):
    """The mean of (1/G) sum_k A_k grad log p(row_k) over all K^G groups."""
    p = theta.softmax(0)
    groups = torch.tensor(list(itertools.product(range(len(p)), repeat=G)))
    A = student("grpo.advantages", R[groups], scale)
    claim(A.shape == groups.shape, "A has the shape of R")
    weight = (p[groups].prod(1, keepdim=True) * A / G).flatten()
    return exact_gradient(lambda t: (weight * t.log_softmax(0)[groups.flatten()]).sum(), theta)


# --- 2 and 3: log-probs and rows ---------------------------------------------------------------

def scored_mask(student, rng):
    for _ in TIMES:
        rows = some_rows(rng, 5)
        n_scored = [number(rng, 0, len(row) + 1) for row in rows]
        T = 4 + number(rng, 0, 3)
        mask = student("models.batches.scored_mask", rows, n_scored, T, "cpu")
        wanted = [[len(row) - n <= t < len(row) for t in range(T)]
                  for row, n in zip(rows, n_scored)]
        claim(mask.tolist() == wanted, "the last n_scored tokens of each row are scored, not more")


def check_logits(found, net, prompts, rows, n_scored, weight):
    """The logits, the targets, the counts and the gradient against one naive pass a row."""
    logits, targets, t, gradient, _ = found
    whole, tokens, counts = [], [], []
    for prompt, row, n in zip(prompts, rows, n_scored):
        ids = torch.tensor([[*prompt, *row]])
        out = net(ids, use_cache=False).logits[0, :-1]
        whole.append(out[len(out) - n:])
        tokens += row[len(row) - n:]
        counts += range(n)
    claim(targets.tolist() == tokens, "the targets are the scored tokens, row by row")
    claim(t.tolist() == counts, "t counts the scored tokens of each row from 0")
    whole = torch.cat(whole)
    claim(close(logits, whole.detach(), 1e-4), "the logits are those of one row without padding")
    logp = whole.log_softmax(-1)[range(len(tokens)), tokens]
    (logp * weight).sum().backward()
    claim(close(gradient, probes.grads(net), 1e-3), "the gradient is that of one row at a time")


def run_whole(student, rng):
    for seed in TIMES:
        prompts, rows = some_rows(rng, 4), some_rows(rng, 4)
        n_scored = [number(rng, 1, len(row) + 1) for row in rows]
        weight = normal(rng, sum(n_scored)).float()
        found = student("probes.run_whole", seed, prompts, rows, n_scored, weight)
        check_logits(found, probes.net(seed), prompts, rows, n_scored, weight)


def run_shared(student, rng):
    for seed in TIMES:
        prompts, rows = some_rows(rng, 3, longest=5), some_rows(rng, 6)
        owner = [2, 0, 1, 1, 0, 2]
        n_scored = [number(rng, 1, len(row) + 1) for row in rows]
        weight = normal(rng, sum(n_scored)).float()
        found = student("probes.run_shared", seed, prompts, rows, owner, n_scored, weight)
        owned = [prompts[o] for o in owner]
        check_logits(found, probes.net(seed), owned, rows, n_scored, weight)
        most = 3 * (max(map(len, prompts)) - 1) + 6 * max(map(len, rows))
        claim(sum(found[4]) <= most, "each prompt goes through the model once for all its rows")


def sample_batch(student, rng):
    prompts, n, longest = [[1, 2, 3], [4, 2]], 2000, 2
    net = probes.net(3)
    for temperature in (1.0, 0.5):
        u = torch.rand(2 * n, longest, generator=rng, dtype=torch.float64)
        rows, logps, fed = student("probes.sample_batch", 3, prompts, n, u, temperature)
        claim([len(group) for group in rows] == [n, n], "each prompt has n rows")
        claim(sum(fed) <= 2 * 2 + 2 * n * longest, "each prompt goes through the model once")
        for prompt, group, said in zip(prompts, rows, logps, strict=True):
            check_law(net, prompt, group, said, temperature, longest)
            first = Counter(tuple(row[:1]) for row in group[::2])
            again = Counter(tuple(row[:1]) for row in group[1::2])
            both = sum(a[:1] == b[:1] for a, b in zip(group[::2], group[1::2])) / (n / 2)
            chance = sum(first[k] * again[k] for k in first) / (n / 2) ** 2
            claim(abs(both - chance) < 0.06, "rows of a prompt are drawn independently")
    check_long_rows(student, rng)
    check_allowed(student, rng)
    check_greedy(student, rng, net)


def every_row(longest, V=6):
    """All rows that end at the first end token or at `longest`."""
    done, open_ = [], [()]
    for t in range(longest):
        longer = [(*row, v) for row in open_ for v in range(V)]
        done += [row for row in longer if row[-1] == 0 or t == longest - 1]
        open_ = [row for row in longer if row[-1] != 0]
    return done


@torch.no_grad()
def check_law(net, prompt, rows, logps, temperature, longest):
    """How often each possible row is drawn, against its chance."""
    seen, n = Counter(map(tuple, rows)), len(rows)
    said = dict(zip(map(tuple, rows), logps, strict=True))
    every = every_row(longest)
    claim(set(seen) <= set(every), "a row ends with its first end token, or at the longest")
    for row in every:
        logp = naive(net, prompt, row, temperature)
        p = logp.sum().exp().item()
        error = math.sqrt(p * (1 - p) / n)
        claim(abs(seen[row] / n - p) < 5 * error + 2e-3, "each row is drawn as often as p says")
        if row in said:
            claim(close(torch.tensor(said[row]), logp, 1e-4), "the log-probs are those of the row")


def check_long_rows(student, rng):
    """Rows that are long, part at unlike times, end at unlike times."""
    net, prompts, n = probes.net(5), some_rows(rng, 3, longest=6), 7
    u = torch.rand(3 * n, 6, generator=rng, dtype=torch.float64)
    rows, logps, _ = student("probes.sample_batch", 5, prompts, n, u)
    with torch.no_grad():
        for prompt, group, said in zip(prompts, rows, logps, strict=True):
            for row, logp in zip(group, said, strict=True):
                claim(close(torch.tensor(logp), naive(net, prompt, row), 1e-4),
                      "the log-probs are those of the row after its own prompt")
    claim(len({len(row) for group in rows for row in group}) > 1, "rows end at unlike times")


@torch.no_grad()
def check_allowed(student, rng):
    """Each place in a row has its own tokens that may stand there."""
    net, allowed = probes.net(3), torch.ones(3, 6, dtype=torch.bool)
    for t, v in enumerate((0, 2, 4)):
        allowed[t, v] = False
    u = torch.rand(40, 3, generator=rng, dtype=torch.float64)
    (rows,), (logps,), _ = student("probes.sample_batch", 3, [[1, 2]], 40, u, allowed=allowed)
    for row, said in zip(rows, logps, strict=True):
        kept = [naive_among(net, [1, 2], row, t, allowed[t]) for t in range(len(row))]
        claim(close(torch.tensor(said), torch.tensor(kept), 1e-4),
              "the t-th token is one that the options allow at t")


def naive_among(net, prompt, row, t, allowed):
    """log p of the t-th token among those that are allowed."""
    logits = net(torch.tensor([[*prompt, *row[:t]]]), use_cache=False).logits[0, -1]
    return logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)[row[t]].item()


@torch.no_grad()
def check_greedy(student, rng, net):
    prompts = some_rows(rng, 3)
    u = torch.rand(6, 3, generator=rng, dtype=torch.float64)
    rows, logps, fed = student("probes.sample_batch", 3, prompts, 2, u, 0.0)
    for prompt, group, said in zip(prompts, rows, logps, strict=True):
        row = []
        while len(row) < 3 and 0 not in row:
            row.append(net(torch.tensor([[*prompt, *row]])).logits[0, -1].argmax().item())
        claim(group == [row, row], "at temperature 0 each token is the likeliest")
        claim(close(torch.tensor(said[0]), naive(net, prompt, row), 1e-4),
              "at temperature 0 the log-probs are those at temperature 1")


# --- 4 to 6: the loss -------------------------------------------------------------------------

def kl(a, b):
    return (a.exp() * (a - b)).sum()


def check_kl(student, rng, name):
    """(gradient of the expected value as a loss, pi's logits, ref)"""
    theta, ref = normal(rng, 5), normal(rng, 5).log_softmax(0)
    pi = theta.log_softmax(0)
    value, slope = student("probes.gradient", name, [pi, ref], 0)
    claim(value.shape == pi.shape, "a value for each token")
    claim(close((pi.exp() * value).sum(), kl(pi, ref), 1e-9),
          "its mean under pi is KL(pi || ref)")
    weight = pi.exp() * slope
    return exact_gradient(lambda theta: (weight * theta.log_softmax(0)).sum(), theta), theta, ref


def k1(student, rng):
    for _ in TIMES:
        gradient, _, _ = check_kl(student, rng, "grpo.k1")
        claim(close(gradient, torch.zeros(5).double()), "as a loss it has no gradient, on average")


def k3(student, rng):
    for _ in TIMES:
        gradient, theta, ref = check_kl(student, rng, "grpo.k3")
        forward = exact_gradient(lambda theta: kl(ref, theta.log_softmax(0)), theta)
        claim(close(gradient, forward), "as a loss it descends KL(ref || pi)")


def surrogate(student, rng):
    cases = itertools.product((2.0, -3.0), (0.5, 0.75, 0.9, 1.1, 1.25, 2.0), (0.2, 0.3))
    for A, ratio, clip in cases:
        old = -normal(rng, 1).abs()
        logp = old + math.log(ratio)
        args = [logp, old, torch.tensor([A]).double(), clip]
        value, slope = student("probes.gradient", "grpo.surrogate", args, 0)
        beyond = ratio > 1 + clip if A > 0 else ratio < 1 - clip
        words = f"A {'above' if A > 0 else 'below'} 0, ratio {ratio}, clip {clip}"
        bound = 1 + clip if A > 0 else 1 - clip
        claim(close(value, [A * (bound if beyond else ratio)]), f"{words}: the value")
        claim(close(slope, [0.0 if beyond else A * ratio]), f"{words}: the gradient")


def token_loss(logp, old, ref, A, beta):
    """One token's loss, from numbers; clip 0.2."""
    ratio = math.exp(logp - old)
    bounded = min(max(ratio, 0.8), 1.2)
    penalty = math.exp(ref - logp) - 1 - (ref - logp)
    return -min(ratio * A, bounded * A) + beta * penalty


def loss_sum(student, rng):
    for kl_form, beta in itertools.product(("loss", "reward"), (0.5, 0.0)):
        logp, old, ref = [-normal(rng, 4, 3).abs() for _ in range(3)]
        A = normal(rng, 4)
        live = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).double()
        phase = {"kl": kl_form, "beta": beta, "clip": 0.2}
        loss, _ = student("probes.loss_sum", [logp, old, ref], A, live, phase)
        weight = beta if kl_form == "loss" else 0.0
        terms = [token_loss(logp[i, t], old[i, t], ref[i, t], A[i].item(), weight)
                 for i, t in live.nonzero().tolist()]
        claim(close(loss, sum(terms)), f"the sum over live tokens, kl={kl_form}, beta={beta}")
    for phase in ({"kl": "reward", "beta": 0.5}, {"kl": "loss", "beta": 0.0}):
        loss, _ = student("probes.loss_sum", [logp, logp, None], A, live, phase)
        claim(close(loss, -(A[:, None] * live).sum()), "without a KL in the loss no ref is needed")


def some_rollouts(rng, seed, temperature):
    """([prompts, rows, logps], naive log-probs): 2 rollouts of each of 3 prompts."""
    prompts, rows, net = some_rows(rng, 3), some_rows(rng, 6), probes.net(seed)
    logps = [naive(net, prompts[i // 2], row, temperature) for i, row in enumerate(rows)]
    return net, prompts, rows, logps


def backward(student, rng):
    for seed, (kl_form, temperature) in enumerate([("reward", 1.0), ("loss", 0.7)]):
        net, prompts, rows, logps = some_rollouts(rng, seed, temperature)
        drawn = [[v + 0.01 * (i + 1) for v in logp.tolist()] for i, logp in enumerate(logps)]
        A, ref = normal(rng, 6).float(), -normal(rng, 6, 4).abs().float()
        beta = 0.5 if kl_form == "loss" else 0.0
        kept = [5, 1, 2, 3]
        loss = 0.0
        for i in kept:
            ratio, here = (logps[i] - logps[i].detach()).exp(), ref[i, :len(rows[i])]
            penalty = (here - logps[i]).exp() - 1 - (here - logps[i])
            loss = loss + (-ratio * A[i] + beta * penalty).sum() / 6
        loss.backward()
        phase = {"kl": kl_form, "beta": beta, "temperature": temperature}
        given = ref if kl_form == "loss" else None
        for parts in ([kept], [[5], [1, 2], [3]]):
            args = [prompts, rows, drawn], A, given, parts, phase
            found = student("probes.backward", seed, *args)
            claim(close(found[2], probes.grads(net), 1e-3),
                  "the gradient is that of the sum over rows, divided by all rollouts")
            claim(close(found[0], loss.item(), 1e-4), "the loss is that sum")
            claim(all(isinstance(value, float) for value in found[:2]), "both are plain numbers")
            claim(close(found[1], 0.06, 1e-3), "gap is the largest difference of a log-prob")
    found = student("probes.backward", 0, *args[:3], [], phase)
    claim(found[:2] == [0.0, 0.0] and (found[2] == 0).all(), "without a part nothing is added")


# --- 7 to 9: a world that one can count ---------------------------------------------------------

def world(rng, zeros=False):
    """P (X,Z,Y), Q (X,Y,Z), prior (X,Z), D_x (X,), D_xy (X,Y). zeros: some chances are 0."""
    X, Z, Y = (number(rng, 2, 5) for _ in range(3))
    P, Q, prior, D_x = table(rng, X, Z, Y), table(rng, X, Y, Z), table(rng, X, Z), table(rng, X)
    D_xy = D_x[:, None] * table(rng, X, Y)
    if zeros:
        P[:, :, 0], prior[0] = 0.0, 0.0
        prior[0, 1] = 1.0
        D_xy[1] = 0.0
        P, D_xy = P / P.sum(-1, keepdim=True), D_xy / D_xy.sum()
    return P, Q, prior, D_x, D_xy


def worlds(rng):
    return [world(rng), world(rng), world(rng, zeros=True)]


def every(*shape):
    """All indices."""
    return itertools.product(*map(range, shape))


def log(p):
    return math.log(p) if p > 0 else -math.inf


def joint_of(P, prior, D_x):
    """[(x, z, y, chance)] of all that can happen."""
    X, Z, Y = P.shape
    found = [(x, z, y, (D_x[x] * prior[x, z] * P[x, z, y]).item()) for x, z, y in every(X, Z, Y)]
    return [row for row in found if row[3] > 0]


def bayes(P, prior, x, z, y):
    """P(z | x, y) as a number; the prior where y is impossible."""
    chances = [(prior[x, k] * P[x, k, y]).item() for k in range(P.shape[1])]
    return chances[z] / sum(chances) if sum(chances) else prior[x, z].item()


def at_once(student, name, *args):
    """Two worlds side by side give what each gives alone."""
    both = student(name, *(torch.stack([a, a.flip(0)]) for a in args))
    alone = [student(name, *args), student(name, *(a.flip(0) for a in args))]
    claim(close(both, torch.stack(alone)), "several worlds at once give what each gives alone")


def belief(student, rng):
    for _, Q, _, _, D_xy in worlds(rng):
        found = student("mi_bounds.belief", D_xy, Q)
        X, Y, Z = Q.shape
        for x, z in every(X, Z):
            weight = D_xy[x] / D_xy[x].sum() if D_xy[x].sum() > 0 else torch.full((Y,), 1 / Y)
            mean = sum(weight[y] * Q[x, y, z] for y in range(Y))
            claim(close(found[x, z], mean), "the mean of Q(z|x,y) over y ~ D(y|x)")
    at_once(student, "mi_bounds.belief", D_xy, Q)


def true_posterior(student, rng):
    for P, _, prior, _, _ in worlds(rng):
        found = student("mi_bounds.true_posterior", P, prior)
        for x, y, z in every(*found.shape):
            claim(close(found[x, y, z], bayes(P, prior, x, z, y)),
                  "Bayes' rule; the prior where y is impossible")
    at_once(student, "mi_bounds.true_posterior", P, prior)


def information(P, prior, D_x):
    """I(Z; Y | X) as an expected log-ratio."""
    total = 0.0
    for x, z, y, chance in joint_of(P, prior, D_x):
        total += chance * math.log(bayes(P, prior, x, z, y) / prior[x, z].item())
    return total


def exact_mi(student, rng):
    for P, _, prior, D_x, _ in worlds(rng):
        found = student("mi_bounds.exact_mi", P, prior, D_x)
        claim(found.shape == () and close(found, information(P, prior, D_x)),
              "E log P(z|x,y) / prior(z|x), over all x, z, y")
    at_once(student, "mi_bounds.exact_mi", P, prior, D_x)


def read_well(P, Q, prior, D_x):
    """E log Q(z | x, y_hat)."""
    return sum(p * log(Q[x, y, z].item()) for x, z, y, p in joint_of(P, prior, D_x))


def blind(Q):
    """Q that rules out z = 0."""
    Q = Q.clone()
    Q[:, :, 0] = 0.0
    return Q / Q.sum(-1, keepdim=True)


def phase1_objective(student, rng):
    for P, Q, prior, D_x, _ in worlds(rng):
        for q in (Q, blind(Q)):
            found = student("mi_bounds.phase1_objective", P, q, prior, D_x)
            claim(found.shape == () and close(found, read_well(P, q, prior, D_x)),
                  "E log Q(z|x,y_hat), over all x, z, y_hat; -inf where Q rules out what happens")
    at_once(student, "mi_bounds.phase1_objective", P, Q, prior, D_x)


def barber_agakov(student, rng):
    for P, Q, prior, D_x, _ in worlds(rng):
        entropy = -sum(D_x[x].item() * p * math.log(p) for x in range(len(D_x))
                       for p in prior[x].tolist() if p > 0)
        found = student("mi_bounds.barber_agakov", P, Q, prior, D_x)
        claim(found.shape == () and close(found, entropy + read_well(P, Q, prior, D_x)),
              "H(Z|X) + E log Q(z|x,y_hat)")
    at_once(student, "mi_bounds.barber_agakov", P, Q, prior, D_x)


def barber_agakov_slack(student, rng):
    for P, Q, prior, D_x, _ in worlds(rng):
        total = sum(p * (log(bayes(P, prior, x, z, y)) - log(Q[x, y, z].item()))
                    for x, z, y, p in joint_of(P, prior, D_x))
        found = student("mi_bounds.barber_agakov_slack", P, Q, prior, D_x)
        claim(found.shape == () and close(found, total), "E KL( P(z|x,y_hat) || Q )")
    at_once(student, "mi_bounds.barber_agakov_slack", P, Q, prior, D_x)
    found = student("mi_bounds.barber_agakov_slack", P, blind(Q), prior, D_x)
    claim(found == math.inf, "it is +inf where Q rules out a z that happens")


def evidence(P, prior, x, y):
    return sum((prior[x, z] * P[x, z, y]).item() for z in range(P.shape[1]))


def log_evidence(student, rng):
    for P, _, prior, _, _ in worlds(rng):
        found = student("mi_bounds.log_evidence", P, prior)
        claim(found.shape == (P.shape[0], P.shape[2]), "one number for each pair (x, y)")
        for x, y in every(*found.shape):
            claim(close(found[x, y], log(evidence(P, prior, x, y))),
                  "log sum_z prior(z|x) P(y|x,z); -inf where y is impossible")
    at_once(student, "mi_bounds.log_evidence", P, prior)


def elbo_of(P, Q, prior, beta, x, y):
    total = 0.0
    for z in range(P.shape[1]):
        q, p, believed = Q[x, y, z].item(), P[x, z, y].item(), prior[x, z].item()
        if q > 0:
            total += q * log(p)
            total -= beta * q * (math.log(q) - log(believed)) if beta else 0.0
    return total


def elbo(student, rng):
    for P, Q, prior, _, _ in worlds(rng):
        for beta, q in itertools.product((1.0, 0.3, 2.0, 0.0), (Q, blind(Q))):
            found = student("mi_bounds.elbo", P, q, prior, beta)
            claim(found.shape == (P.shape[0], P.shape[2]), "one number for each pair (x, y)")
            for x, y in every(*found.shape):
                claim(close(found[x, y], elbo_of(P, q, prior, beta, x, y)),
                      f"E_Q log P(y|x,z) - beta KL(Q || prior), beta = {beta}")
    default = student("mi_bounds.elbo", P, Q, prior)
    claim(close(default, student("mi_bounds.elbo", P, Q, prior, 1.0)), "the default of beta is 1")
    at_once(student, "mi_bounds.elbo", P, Q, prior)


def elbo_slack(student, rng):
    for P, Q, prior, _, _ in worlds(rng):
        found = student("mi_bounds.elbo_slack", P, Q, prior)
        for x, y in every(P.shape[0], P.shape[2]):
            if evidence(P, prior, x, y) and prior[x].min() > 0:
                missed = sum(q * math.log(q / bayes(P, prior, x, z, y))
                             for z, q in enumerate(Q[x, y].tolist()))
                claim(close(found[x, y], missed), "KL( Q || P(z|x,y) )")
    at_once(student, "mi_bounds.elbo_slack", P, Q, prior)


# --- 10 and 11: the phases ----------------------------------------------------------------------

READ = ["turn off", "open the door", "lamp"]               # an action for each of PAIRS


def reward_is(student, name, model, prompts, targets, said):
    """The reward `name` of PAIRS and READ is log p of each target behind its prompt."""
    xs, ys = map(list, zip(*PAIRS))
    R = student("probes.reward", name, 2, xs, READ, ys)
    with torch.no_grad():
        for prompt, target, r in zip(prompts, targets, R):
            logp = naive(model.net, prompt, target).sum()
            claim(close(r, logp, 1e-4), said)


def phase1_reward(student, rng):
    _, Q = probes.models(2)
    prompts = [Q.prompt(x, y) for x, y in PAIRS]
    reward_is(student, "phase1_reward", Q, prompts, map(Q.target, READ),
              "log Q(z | x, y_hat), with the end of z")


def phase2_reward(student, rng):
    P, _ = probes.models(2)
    prompts = [P.prompt(x, z) for (x, _), z in zip(PAIRS, READ)]
    reward_is(student, "phase2_reward", P, prompts, (P.target(y) for _, y in PAIRS),
              "log P(y | x, z), with the end of y")


# A min_p so small that it drops nothing still has to arrive
FORMS = [{}, {"form": "mean"}, {"floor": 30.0},
         {"temperature": 0.7, "group_size": 2, "min_p": 1e-30}]


def check_drawn(found, model, phase):
    """The rollouts of a phase are its policy's, drawn and scored at the phase's temperature."""
    claim(not found["needs_grad"], "no gradient flows through the reward")
    claim(found["temperature"] == phase["temperature"], "drawn at the phase's temperature")
    claim(found["min_p"] == phase.get("min_p", 0.0), "drawn with the phase's min_p")
    G = phase["group_size"]
    with torch.no_grad():
        for i, (row, said) in enumerate(zip(found["rows"], found["logps"], strict=True)):
            logp = naive(model.net, found["prompts"][i // G], row, phase["temperature"])
            claim(close(torch.tensor(said), logp, 1e-4), "each row comes with its log-probs")


def shaped(R, row, phase):
    R = R / len(row) if phase["form"] == "mean" else R
    return max(R, -phase["floor"]) if phase["floor"] else R


@torch.no_grad()
def phase1_rollouts(student, rng):
    pairs = PAIRS + [[y, x] for x, y in PAIRS] * 2
    for seed, form in enumerate(FORMS):
        P, Q = probes.models(seed)
        phase = PHASE | form
        found = student("probes.phase1", seed, pairs, phase, seed)
        check_drawn(found, P, phase)
        guessed = named(found, Q, pairs)
        claim(len(guessed) == len(found["prompts"]), "a prompt for each pair where Q reads z")
        G = phase["group_size"]
        for i, (x, z_row, y) in enumerate(guessed):
            z = Q.read(z_row)
            claim(found["prompts"][i] == P.prompt(x, z), "P is asked about x and the z of Q")
            example = found["examples"][i]
            futures = [P.read(row) for row in found["rows"][i * G:i * G + G]]
            said = [example[key] for key in ("x", "z", "y", "y_hat")]
            claim(said == [x, z, y, futures[0]], "an example shows the first future of a pair")
            for k, y_hat in enumerate(futures):
                R = naive(Q.net, Q.prompt(x, y_hat), z_row).sum().item()
                claim(close(found["R"][i, k], shaped(R, z_row, phase), 1e-4),
                      "R[i, k] is log Q(z | x, y_hat) of the ids that Q drew, shaped")
            claim(close(example["reward"], found["R"][i, 0], 1e-5), "and the reward of that future")


def named(found, Q, pairs):
    """[(x, ids of z, y)]: what Q drew for the pairs, without those where it names no action."""
    drawn = [call for call in found["drawn"] if call["who"] == "frozen"]
    prompts = [prompt for call in drawn for prompt in call["prompts"]]
    claim(prompts == [Q.prompt(x, y) for x, y in pairs], "Q reads each pair (x, y) once")
    claim(all(call["n"] == 1 for call in drawn), "Q draws one z for each pair")
    rows = [row for call in drawn for row in call["rows"]]
    return [(x, row, y) for (x, y), row in zip(pairs, rows) if Q.named(row)]


@torch.no_grad()
def phase2_rollouts(student, rng):
    for seed, form in enumerate(FORMS):
        P, Q = probes.models(seed)
        phase = PHASE | form | ({"floor": 39.5} if "floor" in form else {})
        found = student("probes.phase2", seed, PAIRS, phase, seed)
        check_drawn_without_refusal(found, Q, phase)
        G = phase["group_size"]
        claim(found["prompts"] == [Q.prompt(x, y) for x, y in PAIRS], "Q is asked about x and y")
        for i, (x, y) in enumerate(PAIRS):
            zs = [Q.read(row) for row in found["rows"][i * G:i * G + G]]
            example = found["examples"][i]
            said = [example[key] for key in ("x", "y", "z_hat")]
            claim(said == [x, y, zs[0]], "an example shows the first action of a pair")
            for k, z in enumerate(zs):
                row = P.target(y)
                R = naive(P.net, P.prompt(x, z), row).sum().item()
                claim(close(found["R"][i, k], shaped(R, row, phase), 1e-4),
                      "R[i, k] is log P(y | x, z), shaped")
            claim(close(example["reward"], found["R"][i, 0], 1e-5), "and the reward of that action")


def check_drawn_without_refusal(found, Q, phase):
    """Rows of Q that do not begin with their end, which is ruled out and renormalised."""
    claim(not found["needs_grad"], "no gradient flows through the reward")
    claim(found["temperature"] == phase["temperature"], "drawn at the phase's temperature")
    claim(found["min_p"] == phase.get("min_p", 0.0), "drawn with the phase's min_p")
    eos, G = Q.tok.eos_token_id, phase["group_size"]
    for i, (row, said) in enumerate(zip(found["rows"], found["logps"], strict=True)):
        claim(row[0] != eos, "Q may not refuse")
        prompt = found["prompts"][i // G]
        logp = naive(Q.net, prompt, row, phase["temperature"])
        end = naive(Q.net, prompt, [eos], phase["temperature"])
        logp[0] -= torch.log1p(-end[0].exp())
        claim(close(torch.tensor(said), logp, 1e-4), "each row comes with its log-probs")


def with_kl(student, rng):
    for seed, beta in ((0, 0.5), (1, 1.0)):
        _, prompts, rows, logps = some_rollouts(rng, seed, 0.7)
        drawn = [prompts, rows, [logp.tolist() for logp in logps]]
        other = probes.net(seed + 10)
        ref = [naive(other, prompts[i // 2], row, 0.7).detach() for i, row in enumerate(rows)]
        R = normal(rng, 3, 2).float()
        phase = {"temperature": 0.7, "beta": beta, "kl": "reward"}
        seeds = [seed, seed + 10]
        shaped, kl, logp_ref = student("probes.with_kl", seeds, drawn, R, phase)
        filtered = student("probes.with_kl", seeds, drawn, R, phase | {"min_p": 0.9})
        claim(close(filtered[1], kl, 1e-4), "min_p is off where ref scores")
        exact = torch.stack([a.detach().sum() - b.sum() for a, b in zip(logps, ref)]).view(3, 2)
        claim(close(kl, exact, 1e-4), "kl is log pi(row) - log ref(row), summed over tokens")
        claim(close(shaped, R - beta * exact, 1e-4), "R loses beta times the KL of its row")
        for row, right in zip(logp_ref, ref, strict=True):
            claim(close(row[:len(right)], right, 1e-4), "logp_ref is ref's log-prob of each token")
        phase["kl"] = "loss"
        shaped, kl, _ = student("probes.with_kl", seeds, drawn, R, phase)
        claim(close(shaped, R) and close(kl, exact, 1e-4), 'with kl="loss" R stays as it is')
    empty = student("probes.with_kl", [0, 1], [[], [], []], torch.zeros(0, 2), phase)
    claim(empty[0].shape == (0, 2) and empty[1:] == [None, None], "no prompts, no KL")


# --- 12: the alternation ------------------------------------------------------------------------

def stages(student, rng):
    known = {
        "sft": ([], []), "bootstrap": (["bootstrap"], []), "phase1": ([], ["phase1"]),
        "swirl": ([], ["phase1", "phase2"]), "em+swirl": ([], ["em", "phase1", "phase2"]),
        "share": (["joint"], ["phase1", "phase2"]),
    }
    for (method, (once, in_turn)), n in itertools.product(known.items(), (1, 3)):
        wanted = [[kind, 0] for kind in once]
        for i in range(n):
            wanted += [[kind, i + 1] for kind in in_turn]
        claim(student("probes.stages", method, n) == wanted, f"the stages of {method}, {n} times")


def follow(student, rng):
    kinds = [["bootstrap", 0], ["phase1", 1], ["phase2", 1],
             ["em", 2], ["phase1", 2], ["phase2", 2]]
    names = ["bootstrap"] + [f"iteration{i}/{kind}" for kind, i in kinds[1:]]
    for finished in ([], names[:2], [names[0], names[4]]):
        P, Q, wanted = "P", "Q", []
        for (kind, i), name in zip(kinds, names):
            if name in finished:
                continue
            if kind == "phase1":
                wanted.append(["run_phase", "phase1_rollouts", P, Q, f"phase1 {i}", name])
            elif kind == "phase2":
                wanted.append(["run_phase", "phase2_rollouts", Q, P, f"phase2 {i}", name])
            else:
                wanted.append(["likelihood", P, Q, name])
                P, Q = P + "'", Q + "'"
            steps = 7 if kind.startswith("phase") else 5
            wanted.append(["end_stage", name, P, Q, steps])
        calls, end = student("probes.follow", kinds, finished)
        claim(calls == wanted, "each unfinished stage in turn, with who moves and who is frozen")
        claim(end == [P, Q], "it returns the models as the last stage left them")


def run_phase(student, rng):
    phase = {"steps": 12, "peak": 0.02, "batch": 4, "beta": 0.1, "group_size": 2}
    seen = student("probes.run_phase", phase)
    claim(seen["returned"] == 12 and len(seen["rates"]) == 12, "as many steps as the phase has")
    rates = [grpo.Phase(**phase).rate(t) for t in range(1, 13)]
    claim(close(torch.tensor(seen["rates"]), torch.tensor(rates)), "step t has the rate of t")
    claim(all(close(ref, seen["start"][0], 0) for ref in seen["ref"]),
          "the reference is the policy as the phase began, in every step")
    claim(seen["optimizers"] == ["AdamW"], "one AdamW makes all steps (muon=False)")
    states = set(map(tuple, seen["generator"]))
    claim(len(states) == 12, "each step draws other random numbers")
    claim(close(seen["policy"][0], seen["start"][0], 0), "the first rollouts are of the start")
    moved = [not close(a, b, 0) for a, b in zip(seen["policy"], seen["policy"][1:])]
    claim(all(moved), "rollouts come from the policy as it stands")
    claim(close(seen["end"][1], seen["start"][1], 0), "the frozen model does not move")
    check_batches(seen["batches"])
    fixed = student("probes.run_phase", phase | {"beta": 0.0})
    claim(all(ref is None or close(ref, seen["start"][0], 0) for ref in fixed["ref"]),
          "also without beta a reference is the policy as the phase began")
    holes = student("probes.run_phase", phase, silent_at=[2, 5])
    claim(len(holes["rates"]) == 10, "a step in which nothing is drawn moves nothing")
    rates = [rate for t, rate in enumerate(rates, 1) if t not in (2, 5)]
    claim(close(torch.tensor(holes["rates"]), torch.tensor(rates)), "and counts as a step")
    answer = student.ask("probes.run_phase", phase, moves=True)
    claim(answer.get("error", "").startswith("AssertionError"),
          "it raises AssertionError if the frozen model moved")
    shared = student("probes.run_phase", phase, shared=True)
    claim(all(close(now, shared["start"][0], 0) for now in shared["frozen"]),
          "where P and Q are one network, the judge is a frozen copy of it")


def check_batches(batches):
    claim(len(batches) == 12, "each step draws once")
    claim(all(len(batch) == 4 for batch in batches), "each step gets a batch of pairs")
    pairs = [(f"x{i}", f"y{i}") for i in range(12)]
    counts = Counter(tuple(pair) for batch in batches for pair in batch)
    claim(set(counts) == set(pairs), "the pairs are the state-only ones")
    claim(max(counts.values()) - min(counts.values()) <= 1, "no pair comes more often than others")


# --- 14: the rival ------------------------------------------------------------------------------

def some_pairs(rng):
    """(labelled, state-only pairs, those of them that change as pseudo-labels)"""
    kind = random.Random(number(rng, 0, 10**6))
    states = [f"s{i}" for i in range(6)]
    labelled = [[kind.choice(states), f"do {i}", kind.choice(states)] for i in range(5)]
    pairs = [[kind.choice(states), kind.choice(states)] for _ in range(7)] + [["s", "s"]]
    return labelled, pairs, [[x, f"z of {x}, {y}", y] for x, y in pairs if x != y]


def pseudo_labels(student, rng):
    for _ in TIMES:
        labelled, pairs, read = some_pairs(rng)
        found = student("probes.likelihood", "pseudo_labels", labelled, pairs, 0)
        claim(found == read, "(x, what Q reads, y) of each pair that changes")
        some = [[x, y] for x, _, y in read[:2]]
        found = student("probes.likelihood", "pseudo_labels", labelled, pairs, 0, some)
        claim(found == read[:2], "(x, what Q reads, y) of the pairs that are given")


def check_stage(student, rng, name, with_labels, steps, net):
    for _ in TIMES:
        labelled, pairs, read = some_pairs(rng)
        rows = read + labelled * with_labels
        found = student("probes.likelihood", name, labelled, pairs, len(rows))
        seen = Counter(tuple(row) for batch in found["rows"] for row in batch)
        wanted = Counter({tuple(row): 4 * n for row, n in Counter(map(tuple, rows)).items()})
        claim(seen == wanted, "P learns from the right rows, each as often as the others")
        claim(found["steps"] == steps == found["returned"], f"{name} has its number of steps")
        claim(found["net"] == net, "P goes on from the right weights")
        claim(found["kept"], "P and Q come back")


def bootstrap(student, rng):
    check_stage(student, rng, "bootstrap", 1, 5, "same")


def continue_(student, rng):
    check_stage(student, rng, "continue_", 0, 5, "same")


def merge(student, rng):
    check_stage(student, rng, "merge", 1, 8, "fresh")
