"""Other right ways to write the functions of the course: with loops, without helpers."""
import statistics

import torch

import lm
from grpo import logp_of, score
from models import parallel

EDGE = 1e-5


def advantages(R, scale="mean"):
    rows = []
    for group in R.tolist():
        if max(group) - min(group) < EDGE:
            rows.append([0.0] * len(group))
            continue
        centre = statistics.fmean(group)
        if scale == "loo":
            rows.append([r - (sum(group) - r) / (len(group) - 1) for r in group])
        elif scale == "std":
            spread = statistics.stdev(group) + 1e-4
            rows.append([(r - centre) / spread for r in group])
        else:
            rows.append([r - centre for r in group])
    return torch.tensor(rows, dtype=R.dtype, device=R.device).view(R.shape)


def k1(logp_pi, logp_ref):
    return -(logp_ref - logp_pi)


def k3(logp_pi, logp_ref):
    gap = torch.where(logp_ref - logp_pi > 30, 30.0, logp_ref - logp_pi)
    return torch.expm1(gap) - gap


def surrogate(logp, logp_old, A, clip):
    ratio = torch.exp(logp) / torch.exp(logp_old)
    high, low = torch.as_tensor(1 + clip), torch.as_tensor(1 - clip)
    stopped = ((A > 0) & (ratio > high)) | ((A < 0) & (ratio < low))
    edge = torch.where(A > 0, high, low).to(ratio)
    return torch.where(stopped, edge, ratio) * A


def loss_sum(objective, logp, logp_ref, live, phase):
    total = logp.new_zeros(())
    for i in range(len(logp)):
        for t in range(logp.shape[1]):
            if not live[i, t]:
                continue
            total = total - objective[i, t]
            if phase.kl == "loss" and phase.beta != 0:
                total = total + phase.beta * k3(logp[i, t], logp_ref[i, t])
    return total


def backward(net, rollouts, A, logp_ref, parts, phase):
    everything, widest = 0.0, 0.0
    share = 1 / parallel.total(len(A))
    for part in parts:
        logp = lm.logprobs(net, *rollouts.take(part), rollouts.options)
        live = torch.zeros_like(logp)
        for i, k in enumerate(part):
            n = len(rollouts.rows[k])
            live[i, :n] = 1.0
            then = torch.tensor(rollouts.logps[k])
            widest = max(widest, (logp[i, :n].detach().cpu() - then).abs().max().item())
        ref = None if logp_ref is None else logp_ref[part][:, :logp.shape[1]]
        aim = surrogate(logp, logp.detach(), A[part].unsqueeze(1), phase.clip)
        loss = loss_sum(aim, logp, ref, live, phase) * share
        loss.backward()
        everything += float(loss)
    return everything, widest


def with_kl(policy, ref, rollouts, R, phase):
    if ref is None or R.numel() == 0:
        return R, None, None
    options = lm.Options(**vars(rollouts.options) | {"min_p": 0.0})
    theirs = score(ref.net, rollouts, options)
    kl = (logp_of(policy, rollouts) - theirs.sum(-1)).reshape(R.shape)
    weight = phase.beta if phase.kl == "reward" else 0.0
    return R - weight * kl, kl, theirs
