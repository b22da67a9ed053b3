import sft
from methods import METHODS, Stage, go_on, kept_pairs, rng_of


def stages(method, iterations):
    once, again = METHODS[method]
    turns = [Stage(kind, i + 1) for i in range(iterations) for kind in again]
    return [Stage(kind, 0) for kind in once] + turns


def pseudo_labels(Q, lab, pairs=None):
    if pairs is None:
        pairs = kept_pairs(lab)
    read = Q.predict([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    return [(pair[0], z, pair[1]) for pair, z in zip(pairs, read)]


def bootstrap(P, Q, lab, stage):
    rows = P.rows([*pseudo_labels(Q, lab), *lab.labelled])
    batches = sft.shuffled(rows, lab.cfg.warmup_batch, rng_of(lab, stage))
    steps = lab.cfg.bootstrap_steps
    return sft.fit(P, stage.name, batches, steps, sft.validate_P, lab), Q, steps


def continue_(P, Q, lab, stage):
    return go_on(P, Q, lab, stage, pseudo_labels(Q, lab), lab.cfg.bootstrap_steps)


def merge(P, Q, lab, stage):
    read = pseudo_labels(Q, lab)
    P.net = lab.fresh_net(P.net.device)
    return go_on(P, Q, lab, stage, read + lab.labelled,
                 lab.cfg.bootstrap_steps + lab.cfg.warmup_steps)
