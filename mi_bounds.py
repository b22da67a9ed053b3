"""Both theorems of SWIRL (arXiv:2602.06130) as numbers: exact on small worlds, estimated from real
samples.

Claim. Phase I raises a lower bound of the mutual information between latent action and generated
next state (Theorem 3.1); Phase II raises a lower bound of the evidence of the observed next state
(Theorem 3.2). Each misses its target by one KL to or from the true posterior
P(z|x,y) = prior(z|x) P(y|x,z) / P(y|x):

  Eq. 1  I(Z;Y_hat|X) = H(Z|X) - H(Z|Y_hat,X)             where Z ~ P~(z|x) = E_{y~D(y|x)} Q(z|x,y)
  Eq. 2       >= H(Z|X) + E_{x,z,y_hat} log Q(z|x,y_hat)  slack E_{x,y_hat} KL( P(z|x,y_hat) || Q )
  Eq. 3  the second term alone: H(Z|X) does not move with theta, so this is what Phase I maximises
  Eq. 5  log P(y|x)
              >= E_{z~Q} log P(y|x,z) - KL( Q || prior )  slack KL( Q || P(z|x,y) )
  EM     the bound of Eq. 5 moves theta, too:             E_{z~Q} grad_theta log P(y|x,z)

Why. For Eq. 2 write log P(z|x,y_hat) = log Q + log (P(z|x,y_hat) / Q) and average; for Eq. 5 write
log P(y|x) = log P(y|x,z) + log prior(z|x) - log P(z|x,y), add and subtract log Q, and average over
z ~ Q. The two slacks face opposite ways: Q is the second argument in Phase I and the first one in
Phase II. For EM: at Q = P(z|x,y) Eq. 5 touches log P(y|x), so a P that raises Eq. 5 raises log
P(y|x) at least as far. From any other Q only the bound is sure to rise, and log P(y|x) may fall.

    Symbol   Shape     Meaning
    P        (X,Z,Y)   forward world model P_theta(y|x,z); rows over y sum to 1
    Q        (X,Y,Z)   inverse dynamics model Q_phi(z|x,y); rows over z sum to 1
    prior    (X,Z)     belief P~(z|x) in Phase I, reference pi_ref(z|x) in Phase II
    D_x      (X,)      data D(x);  D_xy (X,Y): data joint D(x,y)
    B, K, G            pairs (x,y); actions drawn for one pair; rollouts in one group

An exact function also takes many worlds at once: the same axes in front of each table, which stay
in front of the result. Everything is in nats, 0 log 0 = 0, log 0 = -inf where that is the answer.

Departures from the paper:
 1. The exact half enumerates a world; the paper has none and reports none of these numbers.
 2. Theorem 3.2 needs a prior of x alone, so no function here takes a reference that also reads y.
 3. `collapse` counts words where the paper counts tokens, and its perplexity is that of word counts
    or of a model that the caller names, where the paper's is GPT-2's.
 4. EM: the paper moves only phi by Eq. 5.
"""
import math
from collections import Counter
from typing import NamedTuple

import torch

AXES = {"P": "xzy", "Q": "xyz", "prior": "xz", "D_x": "x", "D_xy": "xy"}


def _checked(**tables):
    """The tables as float64 (gradients flow), or ValueError: wrong shapes, no distributions."""
    sizes, worlds, out = {}, None, []
    for name, table in tables.items():
        p, axes = torch.as_tensor(table, dtype=torch.float64), AXES[name]
        first, shape = p.shape[:-len(axes)], p.shape[-len(axes):]
        worlds = first if worlds is None else worlds
        fits = first == worlds and len(shape) == len(axes) and 0 not in p.shape
        if not fits or any(sizes.setdefault(a, n) != n for a, n in zip(axes, shape)):
            want = [f"{a.upper()}={sizes[a]}" if a in sizes else a.upper() for a in axes]
            want = ", ".join([*map(str, worlds), *want])
            raise ValueError(f"{name}: shape {tuple(p.shape)}, expected ({want})")
        if not (p >= 0).all():
            raise ValueError(f"{name}: entries must be probabilities, found {p.min().item():.6g}")
        sums = p.sum(-1)
        joint = name == "D_xy" and (sums.sum(-1) - 1).abs().max() <= 1e-6
        if (sums - 1).abs().max() > 1e-6 and not joint:
            worst = sums.flatten()[(sums - 1).abs().argmax()].item()
            raise ValueError(f"{name}: must sum to 1 over {axes[-1]}, a row sums to {worst:.6g}")
        out.append(p)
    return out


def _plogq(p, q):
    """p log q with 0 log 0 = 0, in the gradient too (torch.xlogy alone gives NaN there)."""
    return torch.xlogy(p, torch.where((p == 0) & (q == 0), 1.0, q))


def _kl(p, q):
    """KL(p || q) over the last axis; +inf where q lacks some of p's support."""
    return (_plogq(p, p) - _plogq(p, q)).sum(-1)


def _average(weight, value):
    """E value: (X,Y), (X,Y) -> (). A pair without weight does not count, infinite or not."""
    return (weight * value.masked_fill(weight == 0, 0.0)).sum((-2, -1))


# ---- Phase I: mutual information and its Barber-Agakov bound

def belief(D_xy, Q):
    """P~(z|x), the belief of Eq. 1: (X,Y), (X,Y,Z) -> (X,Z). D_xy: the joint, or rows D(y|x).

    An x that the data never show has no belief; its row is Q's mean over y, and D(x) = 0 gives it
    no weight. ValueError on shapes that disagree or rows that do not sum to 1, here and below."""
    D_xy, Q = _checked(D_xy=D_xy, Q=Q)
    D_x = D_xy.sum(-1, keepdim=True)                                         # (X,1)
    D_y = torch.where(D_x > 0, D_xy / D_x, 1 / D_xy.shape[-1])               # (X,Y)  D(y|x)
    # Eq. 1: P~(z|x) = E_{y ~ D(y|x)} Q(z|x,y)
    return torch.einsum("...xy,...xyz->...xz", D_y, Q)                       # (X,Z)


def true_posterior(P, prior):
    """P(z|x,y) by Bayes' rule: (X,Z,Y), (X,Z) -> (X,Y,Z); the prior where y is impossible."""
    P, prior = _checked(P=P, prior=prior)
    p_zy = prior[..., None] * P                                              # (X,Z,Y)  P(z,y|x)
    p_y = p_zy.sum(-2, keepdim=True)                                         # (X,1,Y)  P(y|x)
    posterior = torch.where(p_y > 0, p_zy / torch.where(p_y > 0, p_y, 1.0), prior[..., None])
    return posterior.transpose(-2, -1)                                       # (X,Y,Z)


def entropy_z_given_x(prior, D_x):
    """H(Z|X) in nats, a scalar: (X,Z), (X,). It knows no theta, so Phase I may ignore it."""
    prior, D_x = _checked(prior=prior, D_x=D_x)
    return -(D_x * _plogq(prior, prior).sum(-1)).sum(-1)                     # ()


def exact_mi(P, prior, D_x):
    """Eq. 1 in nats, a scalar; Z ~ prior(z|x), Y_hat ~ P(y|x,z): (X,Z,Y), (X,Z), (X,)."""
    P, prior, D_x = _checked(P=P, prior=prior, D_x=D_x)
    joint = torch.einsum("...x,...xz,...xzy->...xyz", D_x, prior, P)         # (X,Y,Z)
    H_z_given_yx = -_plogq(joint, true_posterior(P, prior)).sum((-3, -2, -1))    # ()
    # Eq. 1: I(Z;Y_hat|X) = H(Z|X) - H(Z|Y_hat,X)
    return entropy_z_given_x(prior, D_x) - H_z_given_yx


def phase1_objective(P, Q, prior, D_x):
    """Eq. 3, the bound's part in theta, a scalar <= 0 in nats: (X,Z,Y), (X,Y,Z), (X,Z), (X,).

    With prior = belief(D_xy, Q) it is the paper's E_{(x,y)~D} E_{z~Q}: y only draws z."""
    P, Q, prior, D_x = _checked(P=P, Q=Q, prior=prior, D_x=D_x)
    joint = torch.einsum("...x,...xz,...xzy->...xyz", D_x, prior, P)         # (X,Y,Z)
    # Eq. 3: E_x E_{z ~ P~(z|x)} E_{y_hat ~ P(.|x,z)} log Q(z|x,y_hat)
    return _plogq(joint, Q).sum((-3, -2, -1))                                # ()


def barber_agakov(P, Q, prior, D_x):
    """Eq. 2: lower bound of exact_mi(P, prior, D_x), a scalar in nats; shapes as in Eq. 3. Any Q
    will do, but only the true posterior is tight, and below zero it says nothing (MI >= 0)."""
    # Eq. 2: H(Z|X) + E log Q(z|x,y_hat)
    return entropy_z_given_x(prior, D_x) + phase1_objective(P, Q, prior, D_x)


def barber_agakov_slack(P, Q, prior, D_x):
    """What Eq. 2 misses, a scalar >= 0 in nats: barber_agakov + this = exact_mi. Shapes as there.
    It is +inf (and the bound -inf) where Q rules out a z that happens."""
    P, Q, prior, D_x = _checked(P=P, Q=Q, prior=prior, D_x=D_x)
    p_xy = torch.einsum("...x,...xz,...xzy->...xy", D_x, prior, P)           # (X,Y)  of x and y_hat
    kl = _kl(true_posterior(P, prior), Q)                                    # (X,Y)
    # slack of Eq. 2: E_{x,y_hat} KL( P(z|x,y_hat) || Q )
    return _average(p_xy, kl)                                                # ()


# ---- Phase II: the evidence and its lower bound

def log_evidence(P, prior):
    """log P(y|x) = log sum_z prior(z|x) P(y|x,z), in nats: (X,Z,Y), (X,Z) -> (X,Y)."""
    P, prior = _checked(P=P, prior=prior)
    return torch.einsum("...xz,...xzy->...xy", prior, P).log()               # (X,Y)


def elbo(P, Q, prior, beta=1.0):
    """Eq. 5's J(phi) for each pair, in nats: (X,Z,Y), (X,Y,Z), (X,Z) -> (X,Y).

    At beta >= 1 a lower bound of log_evidence, tight at beta = 1 with Q = true posterior. Below 1
    (the paper trains with 0.1) NO bound: its best Q, prior * P^(1/beta) normalised, is sharper."""
    P, Q, prior = _checked(P=P, Q=Q, prior=prior)
    reward = _plogq(Q, P.transpose(-2, -1)).sum(-1)                          # (X,Y)  E_Q log P
    # Eq. 5: J = E_{z~Q} log P(y|x,z) - beta KL( Q(z|x,y) || prior(z|x) ), and no 0 * inf
    return reward - beta * _kl(Q, prior[..., None, :]) if beta else reward   # (X,Y)


def elbo_slack(P, Q, prior):
    """What the ELBO (beta = 1) misses, in nats, shapes as in elbo -> (X,Y). elbo + this =
    log_evidence where all three are finite; it has no meaning for a y that cannot happen."""
    P, Q, prior = _checked(P=P, Q=Q, prior=prior)
    # slack of Eq. 5: KL( Q || P(z|x,y) )
    return _kl(Q, true_posterior(P, prior))                                  # (X,Y)


# ---- EM: the same bound moves theta, too (method "em")

def elbo_gradient(P, Q, D_xy):
    """The gradient of E_D[elbo] in theta, P = softmax(theta): (X,Z,Y), (X,Y,Z), (X,Y) -> (X,Z,Y).
    At Q = true posterior it is also the gradient of E_D[log_evidence] (Fisher's identity)."""
    P, Q, D_xy = _checked(P=P, Q=Q, D_xy=D_xy)
    reads = torch.einsum("...xy,...xyz->...xzy", D_xy, Q)                    # (X,Z,Y)
    # grad_theta J = E_{z~Q} grad_theta log P(y|x,z); for a softmax that is one_hot(y) - P(.|x,z)
    return reads - reads.sum(-1, keepdim=True) * P                           # (X,Z,Y)


def m_step(P, Q, D_xy):
    """The P of the highest E_D[elbo], where elbo_gradient is zero; shapes as there -> (X,Z,Y). A z
    that Q never reads at x keeps its row."""
    P, Q, D_xy = _checked(P=P, Q=Q, D_xy=D_xy)
    reads = torch.einsum("...xy,...xyz->...xzy", D_xy, Q)                    # (X,Z,Y)
    total = reads.sum(-1, keepdim=True)                                      # (X,Z,1)
    # M-step: P(y|x,z) = D(x,y) Q(z|x,y) / sum_y D(x,y) Q(z|x,y)
    return torch.where(total > 0, reads / total, P)                          # (X,Z,Y)


def coordinate_ascent(P, prior, D_xy, rounds):
    """(X,Z,Y), (X,Z), (X,Y) -> P after `rounds` of EM, and E_D[log_evidence] before and after each,
    (rounds + 1,), which never falls."""
    P, prior, D_xy = _checked(P=P, prior=prior, D_xy=D_xy)
    trace = [_average(D_xy, log_evidence(P, prior))]                         # ()
    for _ in range(rounds):
        # E-step: the bound rises to log P(y|x). M-step: it rises further, and log P(y|x) above it
        P = m_step(P, true_posterior(P, prior), D_xy)                        # (X,Z,Y)
        trace.append(_average(D_xy, log_evidence(P, prior)))
    return P, torch.stack(trace)


# ---- The same quantities from samples of real models

class Estimate(NamedTuple):
    mean: float               # nats
    standard_error: float     # over independent pairs; NaN from a single pair
    per_pair: torch.Tensor    # (B,) the values behind the mean


def _estimate(per_pair, offset=0.0):
    v = per_pair + offset                                                    # (B,)
    error = v.std().item() / math.sqrt(len(v)) if len(v) > 1 else math.nan
    return Estimate(v.mean().item(), error, v)


def _logps(dims, axes, **logps):
    """float64 without gradients, or ValueError: shapes, NaN, values above 0."""
    out = [torch.as_tensor(t).detach().double() for t in logps.values()]
    for name, t in zip(logps, out):
        if t.dim() not in dims or t.numel() == 0 or t.shape != out[0].shape:
            raise ValueError(f"{name}: shape {tuple(t.shape)}, expected {axes}, alike, not empty")
        if not (t <= 1e-4).all():
            raise ValueError(f"{name}: must be <= 0, found {t.max().item():.6g} (a loss?)")
        if name == "logq_z" and t.isinf().any():
            raise ValueError("logq_z: -inf for a drawn z; score with what sampled it")
    return out


def barber_agakov_from_samples(logq_of_z, H_z_given_x=None):
    """Eq. 3 from rollouts, or Eq. 2 if H(Z|X) is given (nats, taken as exact) -> Estimate.

    logq_of_z: log Q(z|x,y_hat) summed over tokens, (N,) independent or (B,G), G rollouts of one
    (x,z) a row. A group shares x and z, so the standard error counts groups."""
    logq, = _logps((1, 2), "(N,) or (B, G)", logq_of_z=logq_of_z)            # (N,) or (B,G)
    per_pair = logq.mean(1) if logq.dim() == 2 else logq                     # (B,)
    return _estimate(per_pair, 0.0 if H_z_given_x is None else float(H_z_given_x))


def elbo_from_samples(logp_y, logq_z, logprior_z, beta=1.0):
    """Eq. 5 averaged over pairs, from z_k ~ Q(.|x,y) -> Estimate, in nats.

    logp_y = log P(y|x,z_k), logq_z = log Q(z_k|x,y), logprior_z = log pi_ref(z_k|x): each (B,K),
    summed over tokens, not clamped, not averaged per token (both break the bound)."""
    logps = dict(logp_y=logp_y, logq_z=logq_z, logprior_z=logprior_z)
    logp_y, logq_z, logprior_z = _logps((2,), "(B, K)", **logps)             # three of (B,K)
    # Eq. 5: J = mean_k [ log P(y|x,z_k) - beta (log Q - log prior) ]
    return _estimate((logp_y - beta * (logq_z - logprior_z) if beta else logp_y).mean(1))


# ---- Have the latent actions collapsed?

def collapse(z_hat, z_true=None, logp=None):
    """Diversity of actions -> {"unique", "mean_length", "true_unique", "true_mean_length",
    "perplexity_ratio"}; the last three are None without z_true.

    unique = distinct / all (spacing aside), mean_length in words. unique falls as a list grows, so
    compare lists of one length, and with true_unique: true actions repeat in a small world. The
    ratio is perplexity a word, z_hat's / z_true's (below 1 worn phrases, above 1 gibberish), under
    the language model logp(zs) -> log p of each z with its end, or the word counts of z_true.
    Paper: over 94% unique, 16.8 tokens against 7.2 in the truth, ratio near 1."""
    def measure(name, zs):
        if isinstance(zs, str) or not len(zs) or not all(isinstance(z, str) for z in zs):
            raise ValueError(f"{name}: expected a non-empty list of strings")
        words = [tuple(z.split()) for z in zs]
        return len(set(words)) / len(words), sum(map(len, words)) / len(words)

    unique, mean_length = measure("z_hat", z_hat)
    true_unique = true_mean_length = ratio = None
    if z_true is not None:
        true_unique, true_mean_length = measure("z_true", z_true)
        logp = logp or _word_counts(z_true)
        nats, true_nats = (-float(sum(logp(zs))) / len(zs) for zs in (z_hat, z_true))
        # + 1: the end of an action is a word, too
        ratio = math.exp(nats / (mean_length + 1) - true_nats / (true_mean_length + 1))
    return {"unique": unique, "mean_length": mean_length, "true_unique": true_unique,
            "true_mean_length": true_mean_length, "perplexity_ratio": ratio}


def _word_counts(zs):
    """A language model: counts of words in zs, plus one for each word and one for all unknown ones.
    The end of an action is the word ""."""
    counts = Counter(word for z in zs for word in [*z.split(), ""])
    total = counts.total() + len(counts) + 1
    logp = lambda z: sum(math.log((counts[word] + 1) / total) for word in [*z.split(), ""])
    return lambda zs: map(logp, zs)


def main():
    """One state x, three actions, three next states: action z leads to y = z four times in five."""
    P = (0.7 * torch.eye(3, dtype=torch.float64) + 0.1)[None]                # (1,3,3)  P[x,z,y]
    prior, D_x = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64), torch.ones(1)   # (1,3), (1,)
    bad_Q = torch.tensor([[[.5, .4, .1], [.4, .5, .1], [.1, .1, .8]]])       # (1,3,3)  Q[x,y,z]
    mi, logp = exact_mi(P, prior, D_x), log_evidence(P, prior)               # (), (1,3)
    print(f"in nats                {'I(Z;Y|X)':>9} {'Eq. 2':>8} {'slack':>8}   "
          f"{'log P(y=0|x)':>12} {'Eq. 5':>8} {'slack':>8}")
    posterior = true_posterior(P, prior)                                     # (1,3,3)
    for name, Q in [("Q blurs two actions", bad_Q), ("Q = true posterior", posterior)]:
        bound, slack = barber_agakov(P, Q, prior, D_x), barber_agakov_slack(P, Q, prior, D_x)
        J, gap = elbo(P, Q, prior), elbo_slack(P, Q, prior)                  # (1,3), (1,3)
        # Theorems 3.1 and 3.2
        assert torch.isclose(bound + slack, mi) and torch.allclose(J + gap, logp)
        print(f"{name:22} {mi:9.4f} {bound:8.4f} {slack:8.4f}   "
              f"{logp[0, 0]:12.4f} {J[0, 0]:8.4f} {gap[0, 0]:8.4f}")

    D_xy = torch.tensor([[0.2, 0.2, 0.6]], dtype=torch.float64)              # (1,3)
    theta = P.log().requires_grad_()                                         # (1,3,3)
    (D_xy * elbo(theta.softmax(-1), posterior, prior)).sum().backward()
    error = theta.grad - elbo_gradient(P, posterior, D_xy)                   # (1,3,3)
    rounds = coordinate_ascent(P, prior, D_xy, 3)[1].flatten().tolist()
    print(f"grad_theta of Eq. 5    differs from autograd's by {error.abs().max():.0e} at most")
    print("E log P(y|x) under EM  ", *(f"{value:8.4f}" for value in rounds),
          f"  at most -H(Y|X) ={_plogq(D_xy, D_xy).sum():8.4f}")
    true = ["open the red door", "take the key", "go north", "wait"]
    for name, z_hat in [("collapsed", ["wait"] * 4), ("diverse", ["take the door", *true[1:]])]:
        unique, *_, ratio = collapse(z_hat, true).values()
        print(f"{name + ' actions':22} {unique:9.2f} unique, perplexity ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
