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

Why. For Eq. 2 write log P(z|x,y_hat) = log Q + log (P(z|x,y_hat) / Q) and average; for Eq. 5 write
log P(y|x) = log P(y|x,z) + log prior(z|x) - log P(z|x,y), add and subtract log Q, and average over
z ~ Q. The two slacks face opposite ways: Q is the second argument in Phase I and the first one in
Phase II.

    Symbol   Shape     Meaning
    P        (X,Z,Y)   forward world model P_theta(y|x,z); rows over y sum to 1
    Q        (X,Y,Z)   inverse dynamics model Q_phi(z|x,y); rows over z sum to 1
    prior    (X,Z)     belief P~(z|x) in Phase I, reference pi_ref(z|x) in Phase II
    D_x      (X,)      data D(x);  D_xy (X,Y): data joint D(x,y)
    B, K, G            pairs (x,y); actions drawn for one pair; rollouts in one group

Everything is in nats, 0 log 0 = 0, and log 0 = -inf is kept where it is the right answer.

Departures from the paper:
 1. The exact half enumerates a world; the paper has no such world and reports none of these
    numbers.
 2. Theorem 3.2 needs a prior of x alone, so no function here takes a reference that also reads y.
 3. `collapse` counts words where the paper counts tokens, and leaves out its perplexity ratio under
    GPT-2.
"""
import math
from typing import NamedTuple

import torch

AXES = {"P": "xzy", "Q": "xyz", "prior": "xz", "D_x": "x", "D_xy": "xy"}


def _checked(**tables):
    """The tables as float64 (gradients flow), or ValueError: shapes disagree, or a row is no
    distribution."""
    sizes, out = {}, []
    for name, table in tables.items():
        p, axes = torch.as_tensor(table, dtype=torch.float64), AXES[name]
        fits = p.dim() == len(axes) and 0 not in p.shape
        if not fits or any(sizes.setdefault(a, n) != n for a, n in zip(axes, p.shape)):
            want = ", ".join(f"{a.upper()}={sizes[a]}" if a in sizes else a.upper() for a in axes)
            raise ValueError(f"{name}: shape {tuple(p.shape)}, expected ({want})")
        if not (p >= 0).all():
            raise ValueError(f"{name}: entries must be probabilities, found {p.min().item():.6g}")
        sums = p.sum(-1)
        joint = name == "D_xy" and abs(p.sum().item() - 1) <= 1e-6
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


# ---- Phase I: mutual information and its Barber-Agakov bound

def belief(D_xy, Q):
    """P~(z|x), the belief of Eq. 1: (X,Y), (X,Y,Z) -> (X,Z). D_xy is the joint D(x,y) or the rows
    D(y|x).

    An x that the data never show has no belief; its row is Q's mean over y, and D(x) = 0 gives it
    no weight. Like every exact function here: ValueError on shapes that disagree or rows that do
    not sum to 1."""
    D_xy, Q = _checked(D_xy=D_xy, Q=Q)
    D_x = D_xy.sum(1, keepdim=True)                                          # (X,1)
    D_y = torch.where(D_x > 0, D_xy / D_x, 1 / D_xy.shape[1])                # (X,Y)  D(y|x)
    # Eq. 1: P~(z|x) = E_{y ~ D(y|x)} Q(z|x,y)
    return torch.einsum("xy,xyz->xz", D_y, Q)                                # (X,Z)


def true_posterior(P, prior):
    """P_theta(z|x,y) by Bayes' rule: (X,Z,Y), (X,Z) -> (X,Y,Z). A y of probability zero leaves the
    prior."""
    P, prior = _checked(P=P, prior=prior)
    p_zy = prior[:, :, None] * P                                             # (X,Z,Y)  P(z,y|x)
    p_y = p_zy.sum(1, keepdim=True)                                          # (X,1,Y)  P(y|x)
    posterior = torch.where(p_y > 0, p_zy / torch.where(p_y > 0, p_y, 1.0), prior[:, :, None])
    return posterior.transpose(1, 2)                                         # (X,Y,Z)


def entropy_z_given_x(prior, D_x):
    """H(Z|X) in nats, a scalar: (X,Z), (X,). It knows no theta: the reason why Phase I may ignore
    it."""
    prior, D_x = _checked(prior=prior, D_x=D_x)
    return -(D_x * _plogq(prior, prior).sum(1)).sum()                        # ()


def exact_mi(P, prior, D_x):
    """I(Z;Y_hat|X) in nats, a scalar (Eq. 1); Z ~ prior(z|x), Y_hat ~ P(y|x,z): (X,Z,Y), (X,Z),
    (X,)."""
    P, prior, D_x = _checked(P=P, prior=prior, D_x=D_x)
    joint = torch.einsum("x,xz,xzy->xyz", D_x, prior, P)                     # (X,Y,Z)
    H_z_given_yx = -_plogq(joint, true_posterior(P, prior)).sum()            # ()
    # Eq. 1: I(Z;Y_hat|X) = H(Z|X) - H(Z|Y_hat,X)
    return entropy_z_given_x(prior, D_x) - H_z_given_yx


def phase1_objective(P, Q, prior, D_x):
    """Eq. 3, what of the bound moves with theta, a scalar <= 0 in nats: (X,Z,Y), (X,Y,Z), (X,Z),
    (X,).

    With prior = belief(D_xy, Q) it is the paper's E_{(x,y)~D} E_{z~Q}: Eq. 3 uses y only to draw
    z."""
    P, Q, prior, D_x = _checked(P=P, Q=Q, prior=prior, D_x=D_x)
    joint = torch.einsum("x,xz,xzy->xyz", D_x, prior, P)                     # (X,Y,Z)
    # Eq. 3: E_x E_{z ~ P~(z|x)} E_{y_hat ~ P(.|x,z)} log Q(z|x,y_hat); -inf if Q rules out a z that
    # happens
    return _plogq(joint, Q).sum()                                            # ()


def barber_agakov(P, Q, prior, D_x):
    """Eq. 2: lower bound of exact_mi(P, prior, D_x), a scalar in nats; shapes as in
    phase1_objective. Any Q will do, but only the true posterior is tight, and below zero it says
    nothing (MI >= 0 is free)."""
    # Eq. 2: H(Z|X) + E log Q(z|x,y_hat)
    return entropy_z_given_x(prior, D_x) + phase1_objective(P, Q, prior, D_x)


def barber_agakov_slack(P, Q, prior, D_x):
    """What Eq. 2 misses, a scalar >= 0 in nats: barber_agakov + this = exact_mi. Shapes as there.
    It is +inf (and the bound -inf) where Q rules out a z that happens."""
    P, Q, prior, D_x = _checked(P=P, Q=Q, prior=prior, D_x=D_x)
    p_xy = D_x[:, None] * torch.einsum("xz,xzy->xy", prior, P)               # (X,Y)  of x and y_hat
    kl = _kl(true_posterior(P, prior), Q)                                    # (X,Y)
    # slack of Eq. 2: E_{x,y_hat} KL( P(z|x,y_hat) || Q ); a y_hat that never comes may have an
    # infinite KL
    return (p_xy * kl.masked_fill(p_xy == 0, 0.0)).sum()                     # ()


# ---- Phase II: the evidence and its lower bound

def log_evidence(P, prior):
    """log P(y|x) = log sum_z prior(z|x) P(y|x,z), in nats: (X,Z,Y), (X,Z) -> (X,Y); -inf if
    impossible."""
    P, prior = _checked(P=P, prior=prior)
    return torch.einsum("xz,xzy->xy", prior, P).log()                        # (X,Y)


def elbo(P, Q, prior, beta=1.0):
    """Eq. 5's J(phi) for each pair, in nats: (X,Z,Y), (X,Y,Z), (X,Z) -> (X,Y).

    At beta >= 1 a lower bound of log_evidence, tight at beta = 1 with Q = true posterior. A beta
    below 1 (the paper trains with 0.1) is NOT a bound: its best Q, proportional to prior *
    P^(1/beta), is sharper."""
    P, Q, prior = _checked(P=P, Q=Q, prior=prior)
    # (X,Y)  E_{z~Q} log P(y|x,z)
    reward = _plogq(Q, P.transpose(1, 2)).sum(-1)
    # Eq. 5: J = E_{z~Q} log P(y|x,z) - beta KL( Q(z|x,y) || prior(z|x) ); 0 * inf must not make a
    # NaN
    return reward - beta * _kl(Q, prior[:, None, :]) if beta else reward     # (X,Y)


def elbo_slack(P, Q, prior):
    """What the ELBO (beta = 1) misses: KL( Q || true posterior ) in nats, shapes as in elbo ->
    (X,Y). elbo + this = log_evidence wherever all three are finite; it has no meaning for a y that
    cannot happen."""
    P, Q, prior = _checked(P=P, Q=Q, prior=prior)
    return _kl(Q, true_posterior(P, prior))                                  # (X,Y)


# ---- The same quantities from samples of real models

class Estimate(NamedTuple):
    mean: float               # nats
    standard_error: float     # over independent pairs; NaN from a single pair
    per_pair: torch.Tensor    # (B,) the values behind the mean


def _estimate(per_pair, offset=0.0):
    v = per_pair + offset  # (B,)
    return Estimate(
        v.mean().item(), v.std().item() / math.sqrt(len(v)) if len(v) > 1 else math.nan, v
    )


def _logps(dims, axes, **logps):
    """Log-probabilities as float64 without gradients, or ValueError: shapes, NaN, values above
    0."""
    out = [torch.as_tensor(t).detach().double() for t in logps.values()]
    for name, t in zip(logps, out):
        if t.dim() not in dims or t.numel() == 0 or t.shape != out[0].shape:
            raise ValueError(
                f"{name}: shape {tuple(t.shape)}, expected {axes}, the same for all, not empty"
            )
        if not (t <= 1e-4).all():
            raise ValueError(
                f"{name}: log-probabilities must be <= 0, found {t.max().item():.6g} (a loss?)"
            )
        if name == "logq_z" and t.isinf().any():
            raise ValueError(
                "logq_z: -inf for a z that was drawn from Q; score with what sampled it"
            )
    return out


def barber_agakov_from_samples(logq_of_z, H_z_given_x=None):
    """Eq. 3 from rollouts, or Eq. 2 if H(Z|X) is given (nats, taken as exact) -> Estimate.

    logq_of_z: log Q(z|x,y_hat) summed over tokens, (N,) independent or (B,G), G rollouts of one
    (x,z) a row. A group shares x and z, so the standard error counts groups. ValueError on NaN or
    values above 0."""
    logq, = _logps((1, 2), "(N,) or (B, G)", logq_of_z=logq_of_z)            # (N,) or (B,G)
    per_pair = logq.mean(1) if logq.dim() == 2 else logq                     # (B,)
    return _estimate(per_pair, 0.0 if H_z_given_x is None else float(H_z_given_x))


def elbo_from_samples(logp_y, logq_z, logprior_z, beta=1.0):
    """Eq. 5 averaged over pairs, from z_k ~ Q(.|x,y) -> Estimate, in nats.

    logp_y = log P(y|x,z_k), logq_z = log Q(z_k|x,y), logprior_z = log pi_ref(z_k|x): each (B,K),
    summed over tokens, not clamped, not averaged per token (both break the bound). ValueError on
    bad shapes or values."""
    logp_y, logq_z, logprior_z = _logps(
        (2,), "(B, K)", logp_y=logp_y, logq_z=logq_z, logprior_z=logprior_z
    )
    # Eq. 5: J = mean_k [ log P(y|x,z_k) - beta (log Q - log prior) ]
    return _estimate((logp_y - beta * (logq_z - logprior_z) if beta else logp_y).mean(1))


# ---- Have the latent actions collapsed?

def collapse(z_hat, z_true=None):
    """Diversity and length of actions -> {"unique", "mean_length", "true_unique",
    "true_mean_length"}.

    unique = distinct / all (spacing aside), in (0, 1]; mean_length in words; true_* None without
    z_true. The share falls as a list grows, so compare lists of one length, and with true_unique:
    in a small world true actions repeat too. Paper: over 94% unique, 16.8 tokens against 7.2 in the
    truth. ValueError unless the arguments are non-empty lists of strings."""
    def measure(name, zs):
        if isinstance(zs, str) or not len(zs) or not all(isinstance(z, str) for z in zs):
            raise ValueError(f"{name}: expected a non-empty list of strings")
        words = [tuple(z.split()) for z in zs]
        return len(set(words)) / len(words), sum(map(len, words)) / len(words)

    unique, mean_length = measure("z_hat", z_hat)
    true_unique, true_mean_length = (None, None) if z_true is None else measure("z_true", z_true)
    return {"unique": unique, "mean_length": mean_length,
            "true_unique": true_unique, "true_mean_length": true_mean_length}


def main():
    """One state x, three actions, three next states: action z leads to y = z four times in five."""
    P = (0.7 * torch.eye(3, dtype=torch.float64) + 0.1)[None]                # (1,3,3)  P[x,z,y]
    prior, D_x = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64), torch.ones(1)   # (1,3), (1,)
    bad_Q = torch.tensor([[[.5, .4, .1], [.4, .5, .1], [.1, .1, .8]]])       # (1,3,3)  Q[x,y,z]
    mi, logp = exact_mi(P, prior, D_x), log_evidence(P, prior)               # (), (1,3)
    print(f"in nats                {'I(Z;Y|X)':>9} {'Eq. 2':>8} {'slack':>8}   "
          f"{'log P(y=0|x)':>12} {'Eq. 5':>8} {'slack':>8}")
    for name, Q in (
        ("Q blurs two actions", bad_Q),
        ("Q = true posterior", true_posterior(P, prior)),
    ):
        bound, slack = barber_agakov(P, Q, prior, D_x), barber_agakov_slack(P, Q, prior, D_x)
        J, gap = elbo(P, Q, prior), elbo_slack(P, Q, prior)                  # (1,3), (1,3)
        # Theorems 3.1 and 3.2
        assert torch.isclose(bound + slack, mi) and torch.allclose(J + gap, logp)
        print(f"{name:22} {mi:9.4f} {bound:8.4f} {slack:8.4f}   "
              f"{logp[0, 0]:12.4f} {J[0, 0]:8.4f} {gap[0, 0]:8.4f}")


if __name__ == "__main__":
    main()
