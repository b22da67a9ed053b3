"""GRPO by hand: group advantage, clipped surrogate, KL to the reference, one step. It knows nothing of worlds.

Claim (Eq. 4): the gradient of E[R] is estimated by (1/G) sum_k A_k grad log pi(row_k | prompt), A_k = R_k - mean_j R_j.
Its expectation is (1 - 1/G) times the exact gradient (the mean holds the row's own reward); `scale="loo"` undoes that.

With the KL in the reward, R_k - beta * log(pi(row_k) / pi_ref(row_k)), the same estimator ascends Eq. 5: at beta = 1 and
R = log P(y|x,z) it is the gradient of the ELBO (Theorem 3.2). That is `kl="reward"`, the default, and exact.

Departures from the paper and its released scripts:
1. The loss is the SUM over a row's tokens, over the fixed number B*G of the step's rows: a mean per row or per micro-batch would be
   another objective. The released scripts divide by the token count of the batch.
2. The advantage is R - mean (Eq. 4). The released scripts divide by the standard deviation: `scale="std"`.
3. The KL is in the reward, per row (k1). The released scripts put k3 into the loss, per token: `kl="loss"`.
4. Later optimizer steps on one batch of rollouts (`updates` > 1; the paper takes one, as does our default) clip the ratio to
   the sampling policy. At the first the ratio is 1 and the loss's gradient is -A grad log pi: a loss near 0 is normal.
5. Equal rows of a group are scored once and weighted by their count; rows without advantage are not run. Both exact.
6. `replay`, if given, is a loss whose gradient joins each optimizer step: labelled rows, so that the policy does not forget what it
   was taught. The logged `loss` leaves it out, `grad_norm` and its clip do not. None, the default: the paper.
7. Rollouts are sampled and scored at one temperature (1) and one `min_p` (0): at any other the objective is that policy's, exactly
   (with `min_p`, but for the instants at which a token enters or leaves its set).
8. Under torchrun the prompts of a step are cut among the processes (`parallel.py`); B is then the number of all.
"""
from dataclasses import dataclass

import torch

import lm
from models import parallel


@dataclass
class GRPO:
    """Settings of one phase. (B prompts, G rollouts each.)"""
    group_size: int = 16        # G. Paper: 8, 16 recommended
    max_new: int = 128          # longest rollout, in tokens; one that is cut counts as truncated and is kept
    temperature: float = 1.0    # of sampling and scoring alike. Paper: .75 with top-p .96, scored at 1 (not exact)
    min_p: float = 0.0          # 0 = off. Of sampling and scoring alike: tokens less than min_p times as likely as the likeliest are out
    top_p: float = 1.0          # 1 = off. Anything else samples from another policy than the one that is scored
    top_k: int = 0              # 0 = off; as top_p
    scale: str = "mean"         # advantage: mean (Eq. 4), std (released scripts), loo (leave-one-out, unbiased)
    beta: float = 0.0           # weight of the KL to the reference. Paper: .1, and 1 for the exact ELBO
    kl: str = "reward"          # reward (exact for Eq. 5) or loss (k3 per token, as released)
    updates: int = 1            # optimizer steps on one batch of rollouts. Paper: 1
    clip: float = 0.2           # the ratio's range is 1 - clip .. 1 + clip
    steps: int = 0              # of the phase; the rate falls to 0 within them
    lr: float = 1e-4            # learning rate of the next step
    max_norm: float = 1.0       # gradient norm clip
    budget: int = 0             # tokens a micro-batch: bounds memory, changes no gradient. 0 = lm.budget


def advantages(R, scale="mean"):
    """R (B, G) -> A (B, G). Rewards that are equal up to rounding give exactly 0: Adam would blow the noise up to a step."""
    A = R - R.mean(1, keepdim=True)                                                # Eq. 4
    A = torch.where(R.amax(1, keepdim=True) - R.amin(1, keepdim=True) < 1e-5, 0.0, A)
    if scale == "std":
        return A / (R.std(1, keepdim=True) + 1e-4)                                 # 1e-4: no blown-up noise
    if scale == "loo":
        return A * R.shape[1] / (R.shape[1] - 1)                                   # R_k minus the mean of the others
    return A


def shape(logp, lengths, form="sum", floor=10.0):
    """Reward from summed log-probs (N,): "sum" is the theorems', "mean" per token the released scripts'. Nothing falls
    below -floor (0: no floor, as in the theorems; the released scripts floor the mean at -10)."""
    R = logp / torch.tensor(lengths).to(logp) if form == "mean" else logp
    return R.clamp(min=-floor) if floor else R


def floored(R, floor):
    """Share of the rewards of all processes that lie on the floor: no group of these alone can teach."""
    low = int((R <= -floor).sum()) if floor else 0
    return parallel.total(low) / max(1, parallel.total(len(R)))


def k1(logp_pi, logp_ref):
    """log(pi/ref): under samples of pi, an unbiased value of KL(pi || ref). As a loss its gradient is 0: reward only."""
    return logp_pi - logp_ref


def k3(logp_pi, logp_ref):
    """ref/pi - 1 - log(ref/pi) >= 0: unbiased as well, smaller variance. As a loss it descends KL(ref || pi)."""
    d = (logp_ref - logp_pi).clamp(max=20)                                         # exp must not overflow
    return d.exp() - 1 - d


def surrogate(logp, logp_old, A, clip):
    """min(ratio * A, clip(ratio) * A), elementwise: the gradient is off where the ratio has left the range on A's side."""
    ratio = (logp - logp_old).exp()
    return torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)


def loss_sum(logp, logp_old, A, live, cfg, logp_ref=None, count=None):
    """Sum of the loss over rows and their tokens; logp, logp_old, logp_ref (N, T), live (N, T) bool, A and count (N,)."""
    loss = -surrogate(logp, logp_old, A[:, None], cfg.clip)                        # (N, T)
    if cfg.kl == "loss" and cfg.beta:
        loss = loss + cfg.beta * k3(logp, logp_ref) * count[:, None]
    return (loss * live).sum()


def unique(rows, G):
    """Equal rows within a group, once: (rows, owner, where (B*G,) the number of each rollout's row, count a row)."""
    seen, where, kept, owner = {}, [], [], []
    for n, row in enumerate(rows):
        key = (n // G, tuple(row))
        if key not in seen:
            seen[key] = len(kept)
            kept.append(row)
            owner.append(n // G)
        where.append(seen[key])
    where = torch.tensor(where)
    return kept, owner, where, torch.bincount(where, minlength=len(kept))


def update(policy, optimizers, prompts, rows, owner, A, count, total, cfg, logp_ref=None, replay=None):
    """`cfg.updates` optimizer steps on the given rows. A (N,) counts duplicates already; `total` = B*G is the normaliser,
    whatever the number of micro-batches. Returns (mean loss, mean gradient norm, {row: its token log-probs before the
    first step})."""
    needed = (A.abs() > 1e-6) | (cfg.kl == "loss" and cfg.beta > 0)                # the others have no gradient
    keep = needed.nonzero()[:, 0].tolist()
    parts = [[keep[i] for i in part] for part in lm.chunks(
        prompts, [rows[n] for n in keep], [owner[n] for n in keep], cfg.budget or lm.budget(policy))] if keep else []
    old, losses, norms = [None] * len(parts), [], []
    for _ in range(cfg.updates if parallel.total(len(keep)) or replay else 0):    # all ranks step, or none
        for i, part in enumerate(parts):
            logp = lm.logprobs(policy, *lm.take(prompts, rows, owner, part), temperature=cfg.temperature, min_p=cfg.min_p)  # (n, T)
            live = torch.arange(logp.shape[1]) < torch.tensor([[len(rows[n])] for n in part])              # (n, T)
            old[i] = logp.detach() if old[i] is None else old[i]                   # at the first step the ratio is 1
            ref = None if logp_ref is None else logp_ref[part][:, :logp.shape[1]].to(logp)
            loss = loss_sum(logp, old[i], A[part].to(logp), live.to(logp.device), cfg, ref, count[part].to(logp))
            (loss / total).backward()
            losses.append(loss.item() / total)
        if replay is not None:
            replay().backward()
        norms.append(lm.optimizer_step(policy, optimizers, cfg.lr, cfg.max_norm))
    times = max(1, len(norms))
    return sum(losses) / times, sum(norms) / times, {n: lp for part, o in zip(parts, old) for n, lp in zip(part, o.cpu())}


def step(policy, ref, optimizers, prompts, reward, cfg, eos, generator=None, replay=None, guess=None):
    """One GRPO step. prompts: B lists of ids. reward(owner, rows) -> (N,) of the distinct rows. ref may be None if
    beta is 0 (then no KL is logged); replay() -> a loss, see departure 6; guess: as in `lm.sample`. Returns (log, rollouts, their rewards (B*G,)). In the log, `kl` is the KL of a whole
    row to ref, in nats, and `gap` the largest difference of a token's log-prob between sampler and trainer."""
    B, G = len(prompts), cfg.group_size
    total = parallel.total(B * G)
    if not prompts:                                                                # other ranks have some: step with them
        loss, norm, _ = update(policy, optimizers, [], [], [], torch.zeros(0), torch.zeros(0), total, cfg, None, replay)
        return parallel.merge({"loss": loss, "grad_norm": norm, "tokens": 0}, 0), [], torch.zeros(0)
    sampled, logp_sampled = lm.sample(policy, prompts, G, cfg.max_new, eos, cfg.temperature, cfg.top_p, cfg.top_k, generator, cfg.min_p, guess)
    rows, owner, where, count = unique(sampled, G)                                 # N distinct rows
    R = reward(owner, rows).cpu()                                                  # (N,)
    log = {"reward": R[where].mean().item(), "reward_std": R[where].view(B, G).std(1).mean().item(),
           "kl": None, "truncated": sum(r[-1] != eos for r in sampled) / (B * G), "tokens": sum(map(len, sampled))}
    logp_pi = {n: torch.tensor(lp) for n, lp in zip(where.tolist(), logp_sampled)}   # row: (T,)
    logp_ref, shaped = None, R
    scores = lambda model, min_p: lm.score_tokens(model, prompts, rows, owner, temperature=cfg.temperature, tokens=cfg.budget, min_p=min_p)
    if ref is not None:
        logp_ref = scores(ref, 0).cpu()                                            # (N, T) of all tokens: what pi may draw, ref may
        other = cfg.top_p < 1 or cfg.top_k > 0 or lm.HALF                          # then the sampler's are not pi's, or rounded otherwise
        own = scores(policy, cfg.min_p).cpu().sum(1) if other else \
            torch.stack([logp_pi[n].sum() for n in range(len(rows))])
        kl = k1(own, logp_ref.sum(1))                                              # (N,)
        log["kl"] = kl[where].mean().item()
        if cfg.kl == "reward":
            shaped = R - cfg.beta * kl                                             # Eq. 5: the KL belongs to the reward
    A = advantages(shaped[where].view(B, G), cfg.scale)                            # (B, G)
    flat = (advantages(R[where].view(B, G)) == 0).all(1)                           # (B,) the reward alone, without the KL
    log["zero_std_groups"] = flat.float().mean().item()
    if cfg.scale == "std":
        A = A.masked_fill(flat[:, None], 0.0)                                      # else the KL's noise would be blown up to 1
    A = torch.zeros(len(rows)).index_add(0, where, A.flatten())                    # (N,) duplicates add up
    log["loss"], log["grad_norm"], logp_old = update(policy, optimizers, prompts, rows, owner, A, count, total, cfg,
                                                      logp_ref, replay)
    log["gap"] = max((float((lp[:len(rows[n])] - logp_pi[n]).abs().max()) for n, lp in logp_old.items()), default=0.0)
    return parallel.merge(log, B), sampled, R[where]
