"""GRPO by hand: group advantage, clipped surrogate, KL to the reference, one step.

Claim (Eq. 4). (1/G) sum_k A_k grad log pi(row_k | prompt), with A_k = R_k - mean_j R_j, estimates
the gradient of E[R]. Its expectation is (1 - 1/G) times the exact gradient, since the mean holds
the row's own reward; `scale="loo"` undoes that.

With the KL in the reward, R_k - beta * log(pi(row_k) / pi_ref(row_k)), the same estimator ascends
Eq. 5. At beta = 1 and R = log P(y|x,z) it is the gradient of the ELBO (Theorem 3.2). That is
`kl="reward"`, the default, and it is exact.

| symbol           | shape      | meaning                                                         |
| ---------------- | ---------- | --------------------------------------------------------------- |
| R, A             | (B, G)     | reward and advantage of G rollouts for each of B prompts        |
| logp, logp_ref   | (N, T)     | token log-probs of N rollouts under pi and pi_ref               |

Departures from the paper and its released scripts
1. The loss is the sum over a row's tokens, divided by the fixed number B * G. A mean for each row
   or micro-batch would be another objective. The released scripts divide by the batch's token
   count.
2. The advantage is R - mean (Eq. 4) with `scale="mean"`. The released scripts, and `train.py` by
   default, divide by the standard deviation (`scale="std"`).
3. The KL is in the reward, for each row (`k1`). The released scripts put `k3` into the loss, for
   each token: `kl="loss"`.
4. Only the first of several `updates` on one batch is on-policy. There the ratio is 1 and the
   gradient of the loss is -A grad log pi; a loss near 0 is normal. Later ones clip the ratio.
5. Rows without advantage are not run through the model. This is exact.
6. Rollouts are scored at the temperature and with the `min_p` that drew them.
7. Under torchrun the prompts of a step are divided among the processes; B counts all of them.
"""
import dataclasses
from dataclasses import dataclass

import torch

import lm
from models import batches, optim, parallel


@dataclass
class Phase:
    """Settings of one phase."""
    steps: int = 0              # the rate falls to 0 within them
    peak: float = 1e-4          # learning rate
    batch: int = 8              # B, pairs (x, y) a step
    group_size: int = 8         # G, rollouts a prompt. Paper: 8; 16 recommended
    temperature: float = 1.0    # of drawing and scoring. Paper: .75 with top-p .96, scored at 1
    min_p: float = 0.0          # 0 is off; see `lm.Options`
    form: str = "sum"           # reward: sum of token log-probs (theorems) or mean (released)
    floor: float = 0.0          # least reward is -floor; 0 is none (theorems)
    scale: str = "mean"         # advantage: mean (Eq. 4), std (released), loo (leave-one-out)
    beta: float = 0.0           # weight of the KL to the reference. Paper: .1; 1 is the exact ELBO
    kl: str = "reward"          # reward (exact for Eq. 5) or loss (k3, as released)
    updates: int = 1            # optimizer steps on one batch of rollouts. Paper: 1
    clip: float = 0.2           # the ratio's range is 1 - clip .. 1 + clip
    max_norm: float = 1.0       # gradient norm clip


@dataclass
class Rollouts:
    """G rows after each of B prompts."""
    prompts: list               # B lists of ids
    rows: list                  # B * G lists of ids; those of one prompt are side by side
    logps: list                 # B * G lists: log-prob of each token when it was drawn
    options: lm.Options         # how they were drawn, and are scored


def repeat(values, n):
    """Each value n times, side by side."""
    return [value for value in values for _ in range(n)]


# --- Eq. 4, piece by piece -------------------------------------------------------------------

def advantages(R, scale="mean"):
    """R (B, G) -> A (B, G)."""
    # Eq. 4: A_k = R_k - mean_j R_j
    A = R - R.mean(1, keepdim=True)
    # Rewards that are equal up to rounding give exactly 0: Adam would blow the noise up to a step
    A = A.masked_fill(flat(R)[:, None], 0.0)
    if scale == "std":
        return A / (R.std(1, keepdim=True) + 1e-4)
    if scale == "loo":
        # R_k minus the mean of the others
        return A * R.shape[1] / (R.shape[1] - 1)
    return A


def flat(R):
    """(B,) whether the rewards of a group are equal, up to rounding. R (B, G)."""
    return R.amax(1) - R.amin(1) < 1e-5


def shape(logp, lengths, phase):
    """Reward from summed log-probs (N,): their sum (theorems) or mean over tokens (released
    scripts), not below -floor."""
    R = logp / torch.tensor(lengths).to(logp) if phase.form == "mean" else logp
    return R.clamp(min=-phase.floor) if phase.floor else R


def k1(logp_pi, logp_ref):
    """log(pi / ref), an unbiased value of KL(pi || ref) under samples of pi. Only for the reward:
    as a loss its gradient is 0."""
    return logp_pi - logp_ref


def k3(logp_pi, logp_ref):
    """ref/pi - 1 - log(ref/pi) >= 0: unbiased as well, smaller variance. As a loss it descends
    KL(ref || pi)."""
    d = (logp_ref - logp_pi).clamp(max=20)     # exp must not overflow
    return d.exp() - 1 - d


def surrogate(logp, logp_old, A, clip):
    """min(ratio * A, clip(ratio) * A), for each token. The gradient is off where the ratio has left
    the range on the side of A."""
    ratio = (logp - logp_old).exp()
    return torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)


def loss_sum(logp, logp_old, logp_ref, A, live, phase):
    """Sum of the loss over rows and their tokens. logp, logp_old, logp_ref, live (N, T); A (N,)."""
    loss = -surrogate(logp, logp_old, A[:, None], phase.clip)                         # (N, T)
    if phase.kl == "loss" and phase.beta:
        loss = loss + phase.beta * k3(logp, logp_ref)
    return (loss * live).sum()


# --- one step --------------------------------------------------------------------------------

def step(policy, ref, optimizers, rollouts, R, phase, lr):
    """One GRPO step on rollouts with rewards R (B, G). Returns a dict to log: `kl` is the KL of a
    whole row to ref, in nats (None without ref); `gap` is the largest difference of a token's
    log-prob between sampler and trainer. ref may be None if beta is 0."""
    R, (B, G) = R.cpu(), R.shape
    eos, rows = rollouts.options.eos, rollouts.rows
    kl, logp_ref, shaped = None, None, R
    if ref is not None and B:
        # What pi may draw, ref may draw: min_p is off for ref
        options = dataclasses.replace(rollouts.options, min_p=0.0)
        logp_ref = score(ref.net, rollouts, options)                                  # (B * G, T)
        kl = k1(logp_of(policy, rollouts), logp_ref.sum(1)).view(B, G)
        if phase.kl == "reward":
            # Eq. 5: R - beta * log(pi / pi_ref)
            shaped = R - phase.beta * kl
    A = advantages(shaped, phase.scale)                                               # (B, G)
    no_spread = flat(R)                                                               # (B,)
    if phase.scale == "std":
        # The reward says nothing here: only the noise of the KL would be blown up to 1
        A = A.masked_fill(no_spread[:, None], 0.0)
    loss, norm, gap = update(policy, optimizers, rollouts, A.flatten(), logp_ref, phase, lr)
    log = {"loss": loss, "grad_norm": norm, "gap": gap, "tokens": sum(map(len, rows))}
    if B:
        log |= {"reward": R.mean().item(), "reward_std": R.std(1).mean().item(),
                "zero_std_groups": no_spread.float().mean().item(),
                "kl": None if kl is None else kl.mean().item(),
                "floored": floored(R, phase.floor),
                "truncated": sum(row[-1] != eos for row in rows) / len(rows)}
    return parallel.merge(log, B)


def update(policy, optimizers, rollouts, A, logp_ref, phase, lr):
    """`phase.updates` optimizer steps on rollouts with advantages A (N,), N = B * G. Returns (mean
    loss, mean gradient norm, largest gap between sampler and trainer)."""
    net, prompts, rows = policy.net, rollouts.prompts, rollouts.rows
    total = parallel.total(len(rows))
    owner = [n // phase.group_size for n in range(len(rows))]
    has_gradient = (A.abs() > 1e-6) | (phase.kl == "loss" and phase.beta > 0)         # (N,)
    kept = has_gradient.nonzero()[:, 0].tolist()
    size = lm.budget(net, rollouts.options)
    parts = batches.chunks(prompts, [rows[n] for n in kept], [owner[n] for n in kept], size)
    parts = [[kept[i] for i in part] for part in parts]
    old, losses, norms, gaps = {}, [], [], [0.0]
    for _ in range(phase.updates if parallel.total(len(kept)) else 0):     # all ranks step, or none
        for i, part in enumerate(parts):
            logp = lm.logprobs(net, *batches.take(prompts, rows, owner, part), rollouts.options)
            drawn, live = batches.as_tensor([rollouts.logps[n] for n in part])             # (n, T)
            if i not in old:
                # The first update is on-policy: the ratio is 1
                old[i] = logp.detach()
                gaps.append(float((old[i].cpu() - drawn).abs().max()))
            ref = None if logp_ref is None else logp_ref[part][:, :logp.shape[1]].to(logp)
            loss = loss_sum(logp, old[i], ref, A[part].to(logp), live.to(logp), phase)
            (loss / total).backward()
            losses.append(loss.item() / total)
        norms.append(optim.step(net, optimizers, lr, phase.max_norm))
    gap = torch.tensor(gaps).max().item()                  # of nan, nan
    check_gap(gap, rollouts.options)
    times = max(1, len(norms))
    return sum(losses) / times, sum(norms) / times, gap


def check_gap(gap, options):
    """Sampler and trainer must see the same distribution, up to rounding. bfloat16 rounds by more
    than any bound that would be worth a stop."""
    limit = float("inf") if options.half else 1e-3 + options.min_p
    if not gap <= limit:
        raise RuntimeError(f"sampler and trainer disagree by {gap} nats a token")


def score(net, rollouts, options):
    """(B * G, T) token log-probs of all rollouts, on the CPU, without gradient."""
    G = len(rollouts.rows) // len(rollouts.prompts)
    owner = [n // G for n in range(len(rollouts.rows))]
    return lm.score_tokens(net, rollouts.prompts, rollouts.rows, owner, options).cpu()


def logp_of(policy, rollouts):
    """(B * G,) log pi(row): what the sampler saw, or scored anew where the sampler rounds."""
    if rollouts.options.half:
        return score(policy.net, rollouts, rollouts.options).sum(1)
    return torch.tensor([sum(logp) for logp in rollouts.logps])


def floored(R, floor):
    """Share of the rewards that lie on the floor: a group of these teaches nothing."""
    return float((R <= -floor).float().mean()) if floor else 0.0
