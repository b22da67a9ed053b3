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
4. One optimizer step on each batch of rollouts, as in the paper. So the ratio is 1, the clip never
   acts, and the gradient of the loss is -A grad log pi. A loss near 0 is normal.
5. Rows without advantage are not run through the model. This is exact.
6. Rollouts are scored at the temperature and with the `min_p` that drew them.
7. Under torchrun the prompts of a step are divided among the processes; B counts all of them.
"""
import dataclasses
import math
from dataclasses import dataclass

import torch

import lm
from models import batches, optim, parallel


@dataclass
class Phase:
    """Settings of one phase."""
    steps: int = 0              # the rate falls towards 0 within them
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
    clip: float = 0.2           # the ratio's range is 1 - clip .. 1 + clip
    max_norm: float = 1.0       # gradient norm clip

    def rate(self, t):
        """The learning rate of step t = 1, 2, ..: rises for ten steps, and falls towards 0."""
        rise, fall = min(1, t / 10), 1 - (t - 1) / self.steps
        return self.peak * rise * fall


@dataclass
class Rollouts:
    """G rows after each of B prompts."""
    prompts: list               # B lists of ids
    rows: list                  # B * G lists of ids; those of one prompt are side by side
    logps: list                 # B * G lists: log-prob of each token when it was drawn
    options: lm.Options         # how they were drawn, and are scored

    def take(self, part):
        """(prompts, rows, owner) of some rollouts, as `lm.logprobs` takes them."""
        G = len(self.rows) // max(1, len(self.prompts))
        owner = [n // G for n in range(len(self.rows))]
        return batches.take(self.prompts, self.rows, owner, part)


def sampling(options, phase):
    """A model's options, as a phase draws with them."""
    return dataclasses.replace(
        options,
        temperature=phase.temperature,
        min_p=phase.min_p,
    )


# --- Eq. 4, piece by piece -------------------------------------------------------------------

def advantages(R, scale="mean"):
    """R (B, G) -> A (B, G)."""
    # Eq. 4: A_k = R_k - mean_j R_j
    A = R - R.mean(1, keepdim=True)
    # Rewards that are equal up to rounding give exactly 0: Adam would blow the noise up to a step
    A = unless_flat(A, R)
    if scale == "std":
        return A / (R.std(1, keepdim=True) + 1e-4)
    if scale == "loo":
        # R_k minus the mean of the others
        G = R.shape[1]
        return A * G / (G - 1)
    return A


def flat(R):
    """(B,) whether the rewards of a group are equal, up to rounding. R (B, G)."""
    return R.amax(1) - R.amin(1) < 1e-5


def unless_flat(A, R):
    """A (B, G), with 0 in the groups whose rewards R (B, G) are equal."""
    return A.masked_fill(flat(R)[:, None], 0.0)


def shape(R, rows, phase):
    """Rewards from summed log-probs R (N,) of rows: their sum (theorems) or mean over tokens
    (released scripts), not below -floor."""
    if phase.form == "mean":
        lengths = [len(row) for row in rows]
        R = R / torch.tensor(lengths).to(R)
    if phase.floor:
        R = R.clamp(min=-phase.floor)
    return R


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
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.minimum(ratio * A, clipped * A)


def loss_sum(objective, logp, logp_ref, live, phase):
    """Sum of the loss over rows and their tokens. objective, logp, logp_ref, live (N, T)."""
    loss = -objective
    if phase.kl == "loss" and phase.beta:
        loss = loss + phase.beta * k3(logp, logp_ref)
    return (loss * live).sum()


# --- one step --------------------------------------------------------------------------------

def step(policy, ref, optimizers, rollouts, R, phase, lr):
    """One GRPO step on rollouts with rewards R (B, G). Returns a dict to log: `kl` is the KL of a
    whole row to ref, in nats (None without ref); `gap` is the largest difference of a token's
    log-prob between sampler and trainer. ref may be None if beta is 0."""
    net, R = policy.net, R.cpu()
    shaped, kl, logp_ref = with_kl(policy, ref, rollouts, R, phase)
    A = advantages(shaped, phase.scale)                                               # (B, G)
    if phase.scale == "std":
        # A flat reward says nothing: only the noise of the KL would be blown up to 1
        A = unless_flat(A, R)
    A = A.flatten()                                                                   # (N,)
    broken = parallel.total(not A.isfinite().all())        # then the step is skipped
    parts = [] if broken else micro_batches(net, rollouts, A, phase)
    loss, gap = backward(net, rollouts, A, logp_ref, parts, phase)
    check_gap(gap, rollouts.options)
    norm = 0.0
    if parallel.total(len(parts)):                                    # all ranks step, or none
        norm = optim.step(net, optimizers, lr, phase.max_norm)

    log = {
        "loss": loss,
        "grad_norm": norm,
        "gap": gap,
        "tokens": sum(map(len, rollouts.rows)),
        "skipped": bool(broken) or not math.isfinite(norm),
    }
    if len(R):
        log["kl"] = None if kl is None else kl.mean().item()
        log |= summary(R, rollouts, phase)
    return parallel.merge(log, len(R))


def with_kl(policy, ref, rollouts, R, phase):
    """(R (B, G) less the KL if it belongs there, the KL of each row (B, G), ref's token log-probs
    (N, T)). The last two are None without ref."""
    if ref is None or not len(R):
        return R, None, None
    # What pi may draw, ref may draw: min_p is off for ref
    wide = dataclasses.replace(rollouts.options, min_p=0.0)
    logp_ref = score(ref.net, rollouts, wide)                                         # (N, T)
    kl = k1(logp_of(policy, rollouts), logp_ref.sum(1))
    kl = kl.view(R.shape)                                                             # (B, G)
    if phase.kl == "reward":
        # Eq. 5: R - beta * log(pi / pi_ref)
        R = R - phase.beta * kl
    return R, kl, logp_ref


def backward(net, rollouts, A, logp_ref, parts, phase):
    """Add the gradient of the loss: the sum over the rollouts in `parts` (lists of their numbers,
    one micro-batch each), divided by the number of all rollouts, A (N,), of all ranks. Returns
    (loss, gap)."""
    N = parallel.total(A.numel())
    total, gaps = 0.0, [0.0]
    for part in parts:
        logp = lm.logprobs(net, *rollouts.take(part), rollouts.options)               # (n, T)
        drawn, live = batches.as_tensor([rollouts.logps[k] for k in part])            # (n, T)
        gap = logp.detach().cpu() - drawn
        gaps.append(gap.abs().max().item())
        ref_part = None
        if logp_ref is not None:
            ref_part = logp_ref[part, :logp.shape[1]].to(logp)
        # One step a batch: pi_old is pi, the ratio is 1, and the clip never acts
        A_part = A[part].to(logp)[:, None]                                            # (n, 1)
        objective = surrogate(logp, logp.detach(), A_part, phase.clip)                # (n, T)
        loss = loss_sum(objective, logp, ref_part, live.to(logp), phase) / N
        loss.backward()
        total += loss.item()
    return total, torch.tensor(gaps).max().item()                                     # of nan, nan


def micro_batches(net, rollouts, A, phase):
    """The numbers of the rollouts that have a gradient, in lists that fit into memory."""
    has_gradient = A.abs() > 1e-6                                                     # (N,)
    if phase.kl == "loss" and phase.beta:
        has_gradient = torch.ones_like(has_gradient)
    kept = has_gradient.nonzero()[:, 0].tolist()
    size = lm.budget(net, rollouts.options)
    parts = batches.chunks(*rollouts.take(kept), size)
    return [[kept[i] for i in part] for part in parts]


def check_gap(gap, options):
    """Sampler and trainer must see the same distribution, up to rounding. bfloat16 rounds by more
    than any bound that would be worth a stop. A gap of nan has a gradient of nan, which is
    skipped."""
    limit = float("inf") if options.half else 1e-3 + options.min_p
    if gap > limit:
        raise RuntimeError(f"sampler and trainer disagree by {gap} nats a token")


def summary(R, rollouts, phase):
    """What a step says about its rewards R (B, G)."""
    cut = [row[-1] != rollouts.options.eos for row in rollouts.rows]
    on_floor = R <= -phase.floor if phase.floor else torch.zeros(1)
    return {
        "reward": R.mean().item(),
        "reward_std": R.std(1).mean().item(),
        "zero_std_groups": flat(R).float().mean().item(),
        "floored": on_floor.float().mean().item(),         # a group of these teaches nothing
        "truncated": sum(cut) / len(cut),
    }


def score(net, rollouts, options):
    """(B * G, T) token log-probs of all rollouts, on the CPU, without gradient."""
    every = range(len(rollouts.rows))
    return lm.score_tokens(net, *rollouts.take(every), options).cpu()


def logp_of(policy, rollouts):
    """(B * G,) log pi(row): what the sampler saw, or scored anew where the sampler rounds."""
    if rollouts.options.half:
        return score(policy.net, rollouts, rollouts.options).sum(1)
    return torch.tensor([sum(logp) for logp in rollouts.logps])
