"""--minutes: measure a few steps, then fix the number of steps of every stage, once, before the run begins.

The steps go into config.json and from there into a resumed run, so that no result depends on the clock afterwards.
"""
import json
import time
from pathlib import Path

from support import aside
from models import parallel

STEPS = ("warmup_steps", "warmup_steps_idm", "bootstrap_steps", "phase1_steps", "phase2_steps")


def fix_steps(cfg, stages):
    """Scale the steps of all stages alike, so that the run takes about cfg.minutes. Does nothing without --minutes.
    stages: {name in STEPS: f() takes one step of it}, and "evaluate": f() scores 64 transitions."""
    if not cfg.minutes:
        return
    settings = saved(cfg)
    if settings is None:
        seconds = {name: seconds_of(f) for name, f in stages.items()}
        evaluation = seconds["evaluate"] * cfg.eval_size / 64
        steps, scores = path(cfg, {name: seconds[name] * getattr(cfg, name) for name in STEPS}, evaluation)
        factor = parallel.agree(max(0.0, cfg.minutes * 60 - scores) / steps)
        settings = {name: max(1, round(getattr(cfg, name) * factor)) for name in STEPS}
        print(f"--minutes {cfg.minutes:g}: about {scores / 60:.1f} go to scores, {steps / 60:.1f} would go to the steps as set; "
              f"now {factor:.2f} times as many")
    for name, n in settings.items():
        setattr(cfg, name, n)


def path(cfg, seconds, evaluation):
    """(seconds of all steps, of all scores) on the way from the start to the end that takes longest."""
    once = seconds["phase1_steps"] + seconds["phase2_steps"]
    warmups, swirl = (seconds["warmup_steps"], seconds["warmup_steps_idm"]), cfg.iterations * once
    rivals = seconds["bootstrap_steps"] + once
    scores_swirl, scores_rivals = 1 + 2 * cfg.iterations, 4        # best of 8 takes as long as one
    if not cfg.rivals:
        return sum(warmups) + swirl, scores_swirl * evaluation
    if aside.possible(cfg):
        longest = max((swirl, scores_swirl - 1), (rivals, scores_rivals))
        return max(warmups) + longest[0], (1 + longest[1]) * evaluation
    return sum(warmups) + rivals + swirl, (scores_swirl + scores_rivals) * evaluation


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
    """The steps that an unfinished run of this folder was planned with."""
    try:
        old = json.loads((Path(cfg.out) / "config.json").read_text())["settings"]
        return {name: old[name] for name in STEPS} if old["minutes"] == cfg.minutes and not cfg.fresh else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
