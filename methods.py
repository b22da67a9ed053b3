"""The methods of the tables: what else can be made of the same SFT models and state-only pairs.

A method is a list of stages after the warm-up: some once, some in each iteration. Phase I and
Phase II are in `swirl_fwm.py` and `swirl_idm.py`. All other stages are likelihood, and here.

| stage       | P goes on with                                                                 |
| ----------- | ------------------------------------------------------------------------------ |
| longer      | the labels                                                                     |
| continue    | pseudo-labels: (x, z', y), z' = argmax_z Q(z | x, y), Q as it stands           |
| bootstrap   | labels and pseudo-labels                                                       |
| merge       | the same, but from the pretrained start, for all the steps                     |
| oracle      | labels and the true actions, which no other method sees: the ceiling           |
| em          | labels, and (x, z, y) with z ~ Q(. | x, y) drawn anew each time                |
| joint       | the labels of both directions: one model that is P and Q                       |

`em` is the other half of Eq. 5. The ELBO  E_{z~Q} log P(y|x,z) - KL(Q || prior)  has a gradient in
theta, too:  E_{z~Q} grad log P(y|x,z).  Together with Phase II this is Monte Carlo EM.
"""
import dataclasses
import random

import torch

import envs
import sft
from models import parallel
from models.batches import columns


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of the final table."""
    kind: str               # sft, phase1, phase2, or a name of the table above
    iteration: int = 0      # 1, 2, .. for what comes in each iteration

    @property
    def name(self):
        return f"iteration{self.iteration}/{self.kind}" if self.iteration else self.kind


# method: (stages once, stages of each iteration)
METHODS = {
    "sft": ((), ()),
    "sft-longer": (("longer",), ()),
    "sft-continue": (("continue",), ()),
    "sft-merge": (("merge",), ()),
    "bootstrap": (("bootstrap",), ()),
    "phase1": ((), ("phase1",)),
    "swirl": ((), ("phase1", "phase2")),
    "share": (("joint",), ("phase1", "phase2")),
    "em": ((), ("em", "phase2")),
    "em+swirl": ((), ("em", "phase1", "phase2")),
    "bootstrap+swirl": (("bootstrap",), ("phase1", "phase2")),
    "oracle": (("oracle",), ()),
}


def stages(method, iterations):
    """The stages of a method, in order: Algorithm 1 for "swirl"."""
    once, in_turn = METHODS[method]
    out = [Stage(kind) for kind in once]
    for i in range(1, iterations + 1):
        out += [Stage(kind, i) for kind in in_turn]
    return out


def pairs_of(stage, phase, lab):
    """The pairs (x, y) of an iteration: its own share, or all where a share is less than the phase
    takes."""
    cfg, i = lab.cfg, stage.iteration
    pairs = kept_pairs(lab)
    size = len(pairs) // cfg.iterations
    enough = size >= phase.steps * phase.batch
    return pairs[(i - 1) * size:i * size] if enough else pairs


def kept_pairs(lab):
    """The state-only pairs that all methods learn from."""
    return [(x, y) for x, y in lab.state_only if x != y or not lab.cfg.skip_unchanged]


def likelihood(stage, P, Q, lab):
    """A stage of likelihood. Returns (P, Q, steps made)."""
    run = {"longer": longer, "continue": continue_, "bootstrap": bootstrap, "merge": merge,
           "oracle": oracle, "em": em, "joint": joint}
    return run[stage.kind](P, Q, lab, stage)


# --- a stage: (P, Q, lab, stage) -> (P, Q, steps) ---------------------------------------------

def longer(P, Q, lab, stage):
    """SFT for longer."""
    return go_on(P, Q, lab, stage, lab.labelled)


def continue_(P, Q, lab, stage):
    """SFT-continue of the paper."""
    return go_on(P, Q, lab, stage, pseudo_labels(Q, lab))


def bootstrap(P, Q, lab, stage):
    """Q labels the state-only pairs once; P goes on with labels and pseudo-labels. Pairs that no
    step would take are not labelled."""
    labelled, pairs = lab.labelled, kept_pairs(lab)
    share = rows_taken(lab)
    if share < 1:
        rng = rng_of(lab, stage)
        labelled = rng.sample(labelled, round(share * len(labelled)))
        pairs = rng.sample(pairs, round(share * len(pairs)))
    return go_on(P, Q, lab, stage, labelled + pseudo_labels(Q, lab, pairs))


def rows_taken(lab):
    """The share of labels and pairs that Bootstrap's steps take; above 1, some come again."""
    rows = lab.cfg.bootstrap_steps * lab.cfg.warmup_batch
    return rows / (len(lab.labelled) + len(kept_pairs(lab)))


def merge(P, Q, lab, stage):
    """SFT-merge of the paper: from the pretrained start, for the steps of SFT and of Bootstrap."""
    triples = lab.labelled + pseudo_labels(Q, lab)
    P.net = lab.fresh_net(P.net.device)
    steps = lab.cfg.warmup_steps + lab.cfg.bootstrap_steps
    return go_on(P, Q, lab, stage, triples, steps)


def oracle(P, Q, lab, stage):
    """Likelihood on the true actions of the state-only half."""
    kept = set(kept_pairs(lab))
    true = [(x, z, y) for x, z, y in envs.with_actions(lab.cfg) if (x, y) in kept]
    return go_on(P, Q, lab, stage, lab.labelled + true)


def em(P, Q, lab, stage):
    """Steps on the ELBO in theta."""
    steps = max(1, lab.cfg.bootstrap_steps // lab.cfg.iterations)
    P = sft.fit(P, stage.name, Relabelled(P, Q, lab, stage), steps, sft.validate_P, lab)
    return P, Q, steps


def joint(P, Q, lab, stage):
    """theta = phi: one model learns both directions from the pretrained start."""
    P.net = Q.net = lab.fresh_net(P.net.device)
    rows = P.rows(lab.labelled)
    rows += rng_of(lab, stage).sample(sft.rows_of(Q, lab), len(rows))
    batches = sft.shuffled(rows, 2 * lab.cfg.warmup_batch, rng_of(lab, stage))
    steps = lab.cfg.warmup_steps
    sft.fit(P, stage.name, batches, steps, sft.validate_P, lab)
    return P, Q, steps


# --- what they share --------------------------------------------------------------------------

def go_on(P, Q, lab, stage, triples, steps=None):
    """SFT of P on (x, z, y), from where it stands."""
    steps = steps or lab.cfg.bootstrap_steps
    batches = sft.shuffled(P.rows(triples), lab.cfg.warmup_batch, rng_of(lab, stage))
    P = sft.fit(P, stage.name, batches, steps, sft.validate_P, lab)
    return P, Q, steps


def pseudo_labels(Q, lab, pairs=None):
    """[(x, z', y)] of the state-only pairs (default: all): what Q reads in each."""
    xs, ys = columns(kept_pairs(lab) if pairs is None else pairs)
    zs = parallel.divide(Q.predict, xs, ys)
    return list(zip(xs, zs, ys))


class Relabelled:
    """Endless batches of labels and of state-only pairs; these get a fresh z ~ Q(. | x, y)."""

    def __init__(self, P, Q, lab, stage):
        self.P, self.Q = P, Q
        triples = lab.labelled + [(x, None, y) for x, y in kept_pairs(lab)]
        rng = rng_of(lab, stage)
        self.generator = torch.Generator(Q.net.device).manual_seed(rng.randrange(2**31))
        self.drawn = sft.shuffled(triples, lab.cfg.warmup_batch, rng)

    def __next__(self):
        batch = next(self.drawn)
        known = [(x, z, y) for x, z, y in batch if z is not None]
        pairs = [(x, y) for x, z, y in batch if z is None]
        xs, ys = columns(pairs, 2)
        zs = self.Q.sample(xs, ys, 1, self.generator)
        return self.P.rows(known + list(zip(xs, zs, ys)))


def rng_of(lab, stage):
    return random.Random(f"{lab.cfg.seed} {stage.name}")
