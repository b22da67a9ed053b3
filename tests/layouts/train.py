import random
import time

import torch

import grpo
import lm
import methods
import sft
import swirl_fwm
import swirl_idm
from models import optim
from support.results import end_stage


def follow(stages, P, Q, lab):
    for stage in stages:
        if not lab.run.done(stage.name):
            P, Q = one_stage(stage, P, Q, lab)
    return P, Q


def one_stage(stage, P, Q, lab):
    since = time.monotonic()
    if stage.kind not in ("phase1", "phase2"):
        P, Q, steps = methods.likelihood(stage, P, Q, lab)
    elif stage.kind == "phase1":
        draw = swirl_fwm.phase1_rollouts
        steps = run_phase(draw, P, Q, lab.cfg.phase1(stage.iteration), stage, lab)
    else:
        draw = swirl_idm.phase2_rollouts
        steps = run_phase(draw, Q, P, lab.cfg.phase2(stage.iteration), stage, lab)
    end_stage(stage, P, Q, lab, since, steps)
    return P, Q


def run_phase(draw, policy, frozen, phase, stage, lab):
    ref = lm.frozen(policy)
    judge = lm.frozen(frozen) if frozen.net is policy.net else frozen
    before = {name: p.clone() for name, p in judge.net.state_dict().items()}
    optimizers = optim.make_optimizers(policy.net, phase.peak, muon=False)
    rng = random.Random(1)
    batches = sft.shuffled(methods.pairs_of(stage, phase, lab), phase.batch, rng)
    generator = torch.Generator().manual_seed(2)
    for t, batch in zip(range(1, phase.steps + 1), batches):
        found = draw(policy, judge, batch, phase, generator)
        if found:
            grpo.step(policy, ref, optimizers, found[0], found[1], phase, phase.rate(t))
    after = judge.net.state_dict()
    assert all(torch.equal(p, after[name]) for name, p in before.items()), "the judge moved"
    return phase.steps
