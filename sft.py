"""Likelihood (SFT): the warm-up of both models on labels. `methods.py` goes on from there.

Ascend  E_{(x,z,y) with labels} log P(y | x, z)  in theta, and log Q(z | x, y) in phi.

Departures from the paper: the rate stays, then falls towards 0 over the last half of the steps, in
place of a cosine; Muon on the weight matrices (`models/optim.py`).
"""
import math
import random

import lm
from evals import metrics
from models import batches, optim, parallel, refusals
from models.batches import columns
from support import checkpoint


def shuffled(rows, size, rng):
    """Endless batches of `size`; when fewer rows are left, all are shuffled anew behind these."""
    order = []
    while True:
        while len(order) < size:
            order += rng.sample(rows, len(rows))
        yield order[:size]
        order = order[size:]


def rate(step, steps, peak, rise=20):
    """Rises for `rise` steps, stays, and falls towards 0 over the last half."""
    left = steps - step + 1
    return peak * min(1.0, step / rise, 2 * left / steps)


def backward(model, rows, tokens):
    """Add the gradient of the sum of -log p over the targets of rows [(prompt, target)], divided by
    `tokens`. Returns that sum. model: an FWM or IDM."""
    if not rows:
        return 0.0
    prompts, targets = columns(rows)
    owner, loss = range(len(rows)), 0.0
    size = lm.budget(model.net, model.options)
    for part in batches.chunks(prompts, targets, owner, size):
        some = batches.take(prompts, targets, owner, part)
        logp = lm.logprobs(model.net, *some, model.options)
        nll = -logp.sum() / tokens
        nll.backward()
        loss += nll.item()
    return loss


def step(model, rows, optimizers, lr):
    """One step on rows [(prompt, target)]: (mean of -log p of a target's token, gradient norm)."""
    tokens = sum(len(target) for _, target in rows)
    loss = backward(model, parallel.share(rows), tokens)
    norm = optim.step(model.net, optimizers, lr)
    return parallel.total(loss), norm


def fit(model, name, endless, steps, validate, lab):
    """SFT of an FWM or IDM on endless batches of rows [(prompt, target)]. validate(model, lab) ->
    share right, called four times on the way at most."""
    cfg, run = lab.cfg, lab.run
    decay = 0.1 if cfg.muon else 0.0
    optimizers = optim.make_optimizers(model.net, cfg.warmup_lr, cfg.muon, decay)
    moving = checkpoint.Moving(
        model.net, optimizers, endless, getattr(endless, "generator", None))
    bar, every = run.bar(name, steps), math.ceil(steps / 4)
    for t in run.steps(name, steps, lab.tally, moving):
        lr = rate(t, steps, cfg.warmup_lr)
        rows = next(endless)
        loss, norm = step(model, rows, optimizers, lr)
        tokens = sum(len(target) for _, target in rows)
        lab.tally += {"examples": len(rows), "tokens": tokens}
        share = validate(model, lab) if t % every == 0 else None
        run.log("metrics.jsonl", phase="warmup", model=name, iteration=0, step=t,
                seconds=run.elapsed(), loss=loss, grad_norm=norm, validation=share,
                skipped=not math.isfinite(norm))
        bar.show(t, loss=loss, validation=share)
    bar.close()
    return model


def warm_up_P(P, lab):
    """SFT of P on the labelled transitions."""
    cfg, rng = lab.cfg, random.Random(f"{lab.cfg.seed} FWM")
    rows = shuffled(P.rows(lab.labelled), cfg.warmup_batch, rng)
    return fit(P, "FWM", rows, cfg.warmup_steps, validate_P, lab)


def warm_up_Q(Q, lab):
    """SFT of Q on the labelled transitions."""
    cfg, rng = lab.cfg, random.Random(f"{lab.cfg.seed} IDM")
    rows = shuffled(rows_of(Q, lab), cfg.warmup_batch_idm, rng)
    return fit(Q, "IDM", rows, cfg.warmup_steps_idm, validate_Q, lab)


def rows_of(Q, lab):
    """What Q learns from in the warm-up; with `--spoiled` also to refuse."""
    rng = random.Random(lab.cfg.seed)
    if lab.cfg.spoiled:
        return refusals.rows(Q, lab.labelled, lab.cfg.spoiled, rng)
    return Q.rows(lab.labelled)


def validate_P(P, lab):
    """Share of the validation futures that P predicts right, greedily."""
    xs, zs, ys = columns(lab.validation)
    y_hats = parallel.divide(P.predict, xs, zs)
    return metrics.exact(y_hats, ys)


def validate_Q(Q, lab):
    """Share of the validation actions that Q reads right, greedily."""
    xs, zs, ys = columns(lab.validation)
    z_hats = parallel.divide(Q.predict, xs, ys)
    return metrics.exact(z_hats, zs)
