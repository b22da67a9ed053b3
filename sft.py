"""SFT, the stage before Algorithm 1: both directions learn log p(target | prompt) from the labelled pairs.

Claim: Phase I and II can only be judged against a warm-up that has converged; otherwise their gain is training that the
warm-up had not finished. So it ends when a validation share of the labelled half stops improving, and says how it ended.

Departures from the paper: constant rate and a running mean of the weights in place of a cosine schedule; for tiny models
weight decay 1 and 8 rows a step (`settings.Config.warmup_decay`, `warmup_batch`); Muon on the weight matrices (`lm.make_optimizers`).
"""
import random
import time

import torch
from tqdm import tqdm

import lm
import parallel


def batches(rows, size, rng):
    """Endless batches of `size`, shuffled anew when fewer are left (these are passed over)."""
    order = []
    while True:
        if len(order) < size:
            order = rng.sample(rows, len(rows))
        yield order[:size]
        order = order[size:]


def warm_up(model, name, rows, size, decay, validate, cfg, run, seconds):
    """SFT: raise log p(target | prompt) of rows [(prompt, target)], `size` a step, until `patience` validations in a row
    bring no better one, or `warmup_steps`, or `seconds`, are over. The best checkpoint is kept.

    The rate is constant, and what is validated and kept is `mean`, the running mean of the weights: it stands where a falling
    rate would end, at every step. So it shows when more steps would not help; a flat end of a falling rate does not.
    """
    begin, batch = time.time(), batches(rows, size, random.Random(cfg.seed))
    optimizers = lm.make_optimizers(model, cfg.warmup_lr, cfg.muon, decay)
    mean, best, best_at, weights, ended, step = lm.freeze(model), -1e9, 0, None, "", 0
    bar = tqdm(total=cfg.warmup_steps, desc=f"warm-up {name}", leave=False, disable=parallel.rank() > 0 or None)
    while not ended:
        part, loss, step = next(batch), 0.0, step + 1
        tokens = sum(len(target) for _, target in part)                            # of all ranks
        prompts, targets = zip(*parallel.share(part))
        owner = range(len(targets))
        for chosen in lm.chunks(prompts, targets, owner, lm.budget(model)):     # of like length: little is padded
            piece = -lm.logprobs(model, *lm.take(prompts, targets, owner, chosen)).sum() / tokens
            piece.backward()
            loss += piece.item()
        norm = lm.optimizer_step(model, optimizers, cfg.warmup_lr * min(1.0, step / 20))
        with torch.no_grad():
            for m, p in zip(mean.parameters(), model.parameters()):
                m.lerp_(p, 9 / (step + 9))                             # the last ninth of the steps so far, roughly
        bar.update()
        if parallel.agree(step == cfg.warmup_steps or time.time() - begin > seconds):
            ended = "cut off by " + ("warmup_steps" if step == cfg.warmup_steps else "the budget")
        score = validate(mean) if step % cfg.warmup_every == 0 or ended else None
        loss = parallel.total(loss)
        run.log("metrics.jsonl", phase="warmup", model=name, iteration=0, step=step, seconds=run.elapsed(), loss=loss,
                grad_norm=norm, validation=score)
        if score is None:
            continue
        if score > best or best == 0:                                              # nothing right yet: not converged
            best, best_at, weights = score, step, {k: v.to("cpu", copy=True) for k, v in mean.state_dict().items()}
        elif step - best_at >= cfg.patience * cfg.warmup_every:
            ended = "converged"
        bar.set_postfix(loss=f"{loss:.3f}", validation=f"{score:.3f}")
    bar.close()
    parallel.load(model, weights)
    run.log("metrics.jsonl", phase="warmup", model=name, iteration=0, step=step, seconds=run.elapsed(), best_step=best_at,
            best_validation=best, ended=ended)
    print(f"  warm-up {name}: best validation {best:.3f} at step {best_at} of {step} ({ended})")
