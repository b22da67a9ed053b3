"""--minutes: measure a few steps, then fix the number of steps of every stage, before the run
begins.

The steps go into config.json, and from there into a resumed run. So no result depends on the clock
afterwards.
"""
import copy
import json
import random
import time
from pathlib import Path

import grpo
import lm
import methods
import sft
import swirl_fwm
import swirl_idm
from models import optim, parallel, presets
from support import aside
from support.evaluate import evaluate_P, evaluate_Q

STEPS = ("warmup_steps", "warmup_steps_idm", "bootstrap_steps", "phase1_steps", "phase2_steps")
SOME = 64       # transitions of the timed evaluation


def fix_steps(cfg, P, Q, lab):
    """Scale the steps of all stages alike, so that the run takes about cfg.minutes. Does nothing
    without --minutes."""
    if cfg.minutes and not saved(cfg):
        for name, n in scaled(cfg, measure(P, Q, lab), len(lab.test)).items():
            setattr(cfg, name, n)


def restore(cfg):
    """Set what an earlier run of this folder was planned with: the steps of --minutes, and settings
    of a real model that wait for their value. Free memory decides the micro-batch anew."""
    old = saved(cfg) or {}
    planned = {name: value for name, value in old.get("preset", {}).items() if name != "tokens"}
    presets.fill(cfg, planned)
    if cfg.minutes and old:
        for name in STEPS:
            setattr(cfg, name, old[name])


def scaled(cfg, seconds, tests):
    """{stage: steps}, from the seconds of one step of each stage and of one "evaluate"; tests:
    number of test transitions."""
    evaluation = seconds["evaluate"] * tests / min(tests, SOME)
    wanted = {name: seconds[name] * getattr(cfg, name) for name in STEPS}
    steps, scores = path(cfg, wanted, evaluation)
    room = max(0.0, cfg.minutes * 60 - scores)
    factor = parallel.agree(room / steps if steps else 1.0)
    print(
        f"--minutes {cfg.minutes:g}: about {scores / 60:.1f} go to scores, {steps / 60:.1f} would "
        f"go to the steps as set; now {factor:.2f} times as many"
    )
    return {name: max(1, round(getattr(cfg, name) * factor)) for name in STEPS}


def path(cfg, seconds, evaluation):
    """(seconds of all steps, seconds of all scores) on the longest way from the start to the
    end."""
    beside = aside.possible(cfg)
    warmups = seconds["warmup_steps"], seconds["warmup_steps_idm"]
    begin = 0.0 if cfg.start else max(warmups) if beside else sum(warmups)
    steps, scores = cost(methods.stages(cfg.method, cfg.iterations), cfg, seconds)
    if cfg.has_rivals():
        more, scores_rivals = cost(methods.stages("bootstrap+swirl", 1), cfg, seconds)
        rivals = more, scores_rivals + 1                   # best of 8 takes as long as one
        if beside:
            steps, scores = max((steps, scores), rivals)
        else:
            steps, scores = steps + rivals[0], scores + rivals[1]
    return begin + steps, (1 + scores) * evaluation


def cost(stages, cfg, seconds):
    """(seconds of the steps of stages, number of scores)."""
    of = {"phase1": seconds["phase1_steps"], "phase2": seconds["phase2_steps"],
          "joint": seconds["warmup_steps"], "em": seconds["bootstrap_steps"] / cfg.iterations,
          "merge": seconds["warmup_steps"] + seconds["bootstrap_steps"]}
    each = [of.get(stage.kind, seconds["bootstrap_steps"]) for stage in stages]
    return sum(each), len(each)


def measure(P, Q, lab):
    """{stage: seconds of one step}, on copies of the models."""
    cfg, rng = lab.cfg, random.Random(lab.cfg.seed)
    P, Q = copy.copy(P), copy.copy(Q)
    P.net, Q.net = parallel.plain(P.net), parallel.plain(Q.net)
    frozen_P, frozen_Q = lm.frozen(P), lm.frozen(Q)
    for_P = optim.make_optimizers(P.net, cfg.warmup_lr, cfg.muon)
    for_Q = optim.make_optimizers(Q.net, cfg.warmup_lr, cfg.muon)
    rows_P = sft.shuffled(P.rows(lab.labelled), cfg.warmup_batch, rng)
    rows_Q = sft.shuffled(sft.rows_of(Q, lab), cfg.warmup_batch_idm, rng)
    changed = [(x, y) for x, y in lab.state_only if x != y]
    pairs = sft.shuffled(changed, cfg.batch, rng)
    some = lab.test[:SOME]

    def warm_up_P():
        sft.step(P, next(rows_P), for_P, cfg.warmup_lr)

    def warm_up_Q():
        sft.step(Q, next(rows_Q), for_Q, cfg.warmup_lr)

    def phase1():
        phase, mine = cfg.phase1(1), parallel.share(next(pairs))
        ref = frozen_P if cfg.beta_fwm else None
        drawn = swirl_fwm.phase1_rollouts(P, frozen_Q, mine, phase, None)
        if drawn:
            grpo.step(P, ref, for_P, *drawn[:2], phase, 0.0)

    def phase2():
        phase, mine = cfg.phase2(1), parallel.share(next(pairs))
        rollouts, R, _ = swirl_idm.phase2_rollouts(Q, frozen_P, mine, phase, None)
        grpo.step(Q, frozen_Q, for_Q, rollouts, R, phase, 0.0)

    def evaluate():
        evaluate_P(P, some)
        evaluate_Q(Q, some)

    stages = {
        "warmup_steps": warm_up_P,
        "bootstrap_steps": warm_up_P,
        "warmup_steps_idm": warm_up_Q,
        "phase1_steps": phase1,
        "phase2_steps": phase2,
        "evaluate": evaluate,
    }
    return {name: seconds_of(f) for name, f in stages.items()}


def seconds_of(f, times=3):
    """Least seconds of a call, after one that does not count."""
    f()
    out = []
    for _ in range(times):
        begin = time.monotonic()
        f()
        out.append(time.monotonic() - begin)
    return min(out)


def saved(cfg):
    """The settings of the run that this folder holds, if it was planned alike; None without one."""
    try:
        config = (Path(cfg.out) / "config.json").read_text()
        old = json.loads(config)["settings"]
        same = (old["minutes"], old["model"]) == (cfg.minutes, cfg.model)
        return old if same and not cfg.fresh and set(STEPS) <= set(old) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
