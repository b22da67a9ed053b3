"""Learning by likelihood: the warm-up of both directions on labels (SFT), and Bootstrap, the rival that stays with it.

Claim: Phase I and II can only be judged against a warm-up that has converged, and against the obvious use of the same pairs:
let Q label them once and go on with likelihood. So both are here, with fixed numbers of steps.

SFT           max over theta of E_{(x,z,y) labelled} log P(y | x, z);  of phi likewise with log Q(z | x, y)
Bootstrap     z' = argmax Q(z | x, y) for each state-only pair, once;  then SFT of P on (x, z', y) and the labels together

Departures from the paper: the rate stays, then falls to 0 over the last half of the steps, in place of a cosine;
Muon on the weight matrices (`lm.make_optimizers`).
"""
import random

import torch

import lm
from models import parallel
import swirl_fwm
import swirl_idm


def batches(rows, size, rng):
    """Endless batches of `size`; when fewer rows are left, all are shuffled anew behind these."""
    order = []
    while True:
        while len(order) < size:
            order += rng.sample(rows, len(rows))
        yield order[:size]
        order = order[size:]


def rate(step, steps, peak, rise=20):
    """Rises for `rise` steps, stays, and falls to 0 over the last half."""
    return peak * min(1.0, step / rise, 2 * (steps - step + 1) / steps)


def backward(model, rows, tokens):
    """Add the gradient of the sum of -log p over the targets of rows [(prompt, target)], divided by `tokens`; returns its value."""
    if not rows:
        return 0.0
    prompts, targets = zip(*rows)
    owner, loss = range(len(rows)), 0.0
    for chosen in lm.chunks(prompts, targets, owner, lm.budget(model)):
        part = -lm.logprobs(model, *lm.take(prompts, targets, owner, chosen)).sum() / tokens
        part.backward()
        loss += part.item()
    return loss


def step(model, rows, optimizers, lr):
    """One step on rows [(prompt, target)] of all processes: (mean of -log p of a target's token, gradient norm)."""
    tokens = sum(len(target) for _, target in rows)
    loss = backward(model, parallel.share(rows), tokens)
    norm = lm.optimizer_step(model, optimizers, lr)
    return parallel.total(loss), norm


def fit(model, name, rows, size, steps, lab, validate):
    """SFT of `model` on rows [(prompt, target)], `size` a step; validate(model, lab) -> share right, four times on the way."""
    cfg, run = lab.cfg, lab.run
    batch = batches(rows, size, random.Random(f"{cfg.seed} {name}"))
    optimizers = lm.make_optimizers(model, cfg.warmup_lr, cfg.muon, cfg.decay)
    bar = run.bar(f"warm-up of the {name}" if name != "Bootstrap" else name, steps)
    for t in range(1, steps + 1):
        loss, norm = step(model, next(batch), optimizers, rate(t, steps, cfg.warmup_lr))
        score = validate(model, lab) if t % max(1, steps // 4) == 0 else None
        run.log("metrics.jsonl", phase="warmup", model=name, iteration=0, step=t, seconds=run.elapsed(), loss=loss,
                grad_norm=norm, validation=score)
        bar.show(t, loss=loss, validation=score)
    bar.close()
    return model


def bootstrap(P, Q, lab, validate):
    """Bootstrap: Q labels the state-only pairs once, P goes on with labels and pseudo-labels."""
    cfg, tok = lab.cfg, lab.tok
    xs, ys = map(list, zip(*lab.state_only))
    z_hat = parallel.divide(lambda xs, ys: swirl_idm.predict(Q, tok, xs, ys, lab.max_z, cfg.view), xs, ys)
    triples = lab.labelled + list(zip(xs, z_hat, ys))
    return fit(P, "Bootstrap", swirl_fwm.warmup_rows(tok, triples), cfg.warmup_batch, cfg.bootstrap_steps, lab, validate)


def replay(model, rows, n, rng):
    """Mean of -log p over n of the rows, drawn anew at each call: joins a step of a phase (`--replay`; paper: none)."""
    chosen = parallel.share(rng.choices(rows, k=n))
    if not chosen:                                                                 # fewer rows than processes
        return torch.zeros((), requires_grad=True)
    prompts, targets = zip(*chosen)
    return -lm.logprobs(model, prompts, targets, range(len(chosen))).sum() / n
