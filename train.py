"""SWIRL, Algorithm 1, straight down the page.

    python train.py                                 the tools world, a pretrained tiny model
    python train.py --env physics --seed 1
    python train.py --data transitions.jsonl.gz     your own (x, z, y)
    torchrun --nproc-per-node 4 train.py --shard    four GPUs, or four processes on the CPU

Splits are by episode. Half of the training episodes keep their actions, for the warm-up. The other
half lose them: Phase I, Phase II and Bootstrap get their pairs (x, y) and nothing else.
Every stage has a fixed number of steps, and no number depends on a clock. The same command again
goes on with an unfinished run where it was saved (docs/RELIABILITY.md).

Departures from the paper: the models are tiny, and pretrained on made-up worlds only; a phase is
some dozens of steps, not an epoch over 30,000 pairs. The other departures stand in `swirl_fwm.py`,
`swirl_idm.py`, `grpo.py` and `sft.py`.
"""
import dataclasses
import random
import sys
import time
from pathlib import Path

import torch
import transformers

import grpo
import lm
import methods
import sft
import swirl_fwm
import swirl_idm
from models import optim, parallel
from settings import parse
from support import aside, checkpoint, forecast, guard, loading, plan, rundir, tables
from support.evaluate import best_of_8
from support.results import end_stage, finish


def train(cfg):
    """Algorithm 1: warm up on labels, then Phase I and Phase II in turn on pairs (x, y)."""
    started = time.monotonic()
    plan.restore(cfg)                                      # what an unfinished run was planned with
    if not cfg.fresh and (Path(cfg.out) / "results.json").is_file():
        return tables.report(rundir.Run(cfg, started).load("results.json"))
    device = begin(cfg)
    bytes_free = forecast.size_up(cfg, device)             # settings of a real model
    start, scores = loading.check_start(cfg)               # only with --start
    P, Q, lab = loading.open_lab(cfg, device)
    forecast.make(P, Q, lab, bytes_free)                   # prints what the run will do
    if cfg.dry_run:
        return 0
    run = lab.run = rundir.Run(cfg, started)               # nothing is written before this
    run.check_room(P, Q, 1 + cfg.has_rivals())
    P, Q = loading.settle(P, Q, lab, device, run.progress["folder"] or start)
    run.save_codebook(lab.book)                            # only of images
    loading.warn_of_long_diffs(lab)                        # only of files

    if start and not run.done("sft"):
        run.keep("sft", P, Q)
        run.finish_stage(scores, P, Q)
    elif not run.done("sft"):
        P, Q = warm_up(P, Q, lab)

    # The rivals start from the same P and Q, beside Algorithm 1
    beside = aside.start(cfg, rivals, cfg) if cfg.has_rivals() else None
    P, Q = follow(methods.stages(cfg.method, cfg.iterations), P, Q, lab)
    rows = beside.result() if beside else {}
    return finish(P, Q, lab, rows)


def warm_up(P, Q, lab):
    """SFT of both directions on the labelled half, side by side."""
    since = time.monotonic()
    beside = aside.start(lab.cfg, sft.warm_up_Q, Q, lab)
    lab.tally.clear()                                      # the row of SFT counts P's
    P = sft.warm_up_P(P, lab)
    Q = beside.result()
    lab.run.in_order()
    lab.run.keep("sft", P, Q)
    end_stage(methods.Stage("sft"), P, Q, lab, since, lab.cfg.warmup_steps)
    return P, Q


def follow(stages, P, Q, lab):
    """The stages of a method, each with its scores. Those of SWIRL are Phase I and Phase II in
    turn."""
    cfg = lab.cfg
    for stage in stages:
        if lab.run.done(stage.name):
            continue
        since = time.monotonic()
        if stage.kind == "phase1":
            # Phase I: theta moves, phi is frozen (Eq. 3, Theorem 3.1)
            phase = cfg.phase1(stage.iteration)
            steps = run_phase(swirl_fwm.phase1_rollouts, P, Q, phase, stage, lab)
        elif stage.kind == "phase2":
            # Phase II: phi moves, theta is frozen (Eq. 5, Theorem 3.2)
            phase = cfg.phase2(stage.iteration)
            steps = run_phase(swirl_idm.phase2_rollouts, Q, P, phase, stage, lab)
        else:
            P, Q, steps = methods.likelihood(stage, P, Q, lab)
        end_stage(stage, P, Q, lab, since, steps)
    return P, Q


def run_phase(draw, policy, frozen, phase, stage, lab):
    """GRPO steps of `policy` on what `draw` makes of pairs (x, y): rollouts that `frozen`
    rewards. Returns their number."""
    run, rng = lab.run, random.Random(f"{lab.cfg.seed} {stage.name}")
    batches = sft.shuffled(methods.pairs_of(stage, phase, lab), phase.batch, rng)
    generator = torch.Generator(policy.net.device)
    generator.manual_seed(rng.randrange(2**31) + parallel.rank())
    ref = lm.frozen(policy)                                # pi_ref: pi as the phase begins
    if frozen.net is policy.net:                           # --method share: theta = phi
        frozen = lm.frozen(frozen)
    optimizers = optim.make_optimizers(policy.net, phase.peak, muon=False)
    before = weights(frozen)
    moving = checkpoint.Moving(policy.net, optimizers, batches, generator)
    bar = run.bar(run.label + stage.name, phase.steps)
    for t in run.steps(stage.name, phase.steps, lab.tally, moving):
        since = time.monotonic()
        log, examples = {"reward": None, "kl": None}, []   # where Q reads no action
        drawn = draw(policy, frozen, parallel.share(next(batches)), phase, generator)
        if drawn is not None:
            rollouts, R, examples = drawn
            # Without beta the KL is only logged, now and then
            some_ref = ref if phase.beta or t % 10 == 1 else None
            log = grpo.step(policy, some_ref, optimizers, rollouts, R, phase, phase.rate(t))
            lab.tally += {"examples": phase.batch, "tokens": log["tokens"]}
            log["tokens_per_second"] = log.pop("tokens") / (time.monotonic() - since)
        run.log("metrics.jsonl", phase=stage.kind, iteration=stage.iteration, step=t,
                seconds=run.elapsed(), **log)
        bar.show(t, reward=log["reward"], kl=log["kl"])
        for example in examples if t in (1, phase.steps) else []:
            run.log("samples.jsonl", stage=stage.name, **example)
    bar.close()
    assert all(map(torch.equal, before, weights(frozen))), "the frozen model moved"
    tables.warn(stage.name, run.logged("metrics.jsonl"))
    return phase.steps


def weights(model):
    """Copies of a model's weights, on the CPU."""
    return [p.detach().to("cpu", copy=True) for p in model.net.parameters()]


def rivals(cfg):
    """What else the same P, Q and pairs are good for: best of 8, Bootstrap, and Bootstrap followed
    by one iteration of Algorithm 1. A run of its own in DIR/rivals. Returns its rows of the
    table."""
    started, folder = time.monotonic(), str(Path(cfg.out) / "rivals")
    device = begin(cfg)
    P, Q, lab = loading.open_lab(cfg, device)
    own = dataclasses.replace(cfg, out=folder, fresh=False)
    run = lab.run = rundir.Run(own, started, "bootstrap, ")
    P, Q = loading.settle(P, Q, lab, device, run.progress["folder"] or "../sft")

    if not run.progress["baselines"]:
        run.progress["baselines"] = {"best_of_8": best_of_8(P, Q, lab)}
        run.save_progress()
    follow(methods.stages("bootstrap+swirl", 1), P, Q, lab)
    return {"baselines": run.progress["baselines"], "stages": run.progress["stages"]}


def begin(cfg):
    """Threads, seed, silence; returns the device."""
    if cfg.threads or cfg.model == "tiny":
        torch.set_num_threads(cfg.threads or 1)
    available = "cuda" if torch.cuda.is_available() else "cpu"
    device = available if cfg.device == "auto" else cfg.device
    loading.check_processes(cfg, device)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(cfg.seed)
    return device


def main(argv=None):
    parallel.start()
    cfg = parse(argv)
    with guard.ending(cfg) as end:
        return train(cfg)
    if end.again:                                          # with less memory, where it was saved
        with guard.ending(cfg, last=True) as end:
            return train(cfg)
    return end.code


if __name__ == "__main__":
    sys.exit(main())
