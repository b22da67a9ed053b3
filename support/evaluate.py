"""Scores of P and Q on held-out transitions, as they stand in results.json, and the samples and
pictures beside them."""
import dataclasses
import math

import torch

import swirl_fwm
import swirl_idm
from envs import images, pixels
from evals import metrics, rollout
from models import parallel
from models.text import encode
from support import pictures

PAPER = dict(temperature=0.75, top_p=0.96)      # how the paper draws the futures that it scores


def evaluate(P, Q, lab, name, moved=("fwm", "idm")):
    """({"fwm": scores, "idm": scores}, an example). A side that did not move keeps the scores of
    the last stage. Writes samples.jsonl, and pictures of frames."""
    if "fwm" in moved or "fwm" not in lab.held_out:
        scores, y_hats = evaluate_P(P, lab.test)
        scores |= roll_out(P, lab)
        if lab.book:
            scores |= look(lab, name, y_hats)
        lab.held_out["fwm"] = scores, y_hats
    if "idm" in moved or "idm" not in lab.held_out:
        lab.held_out["idm"] = evaluate_Q(Q, lab.test)
    (fwm, y_hats), (idm, z_hats) = lab.held_out["fwm"], lab.held_out["idm"]
    samples = [dict(x=x, z=z, y=y, y_hat=y_hat, z_hat=z_hat)
               for (x, z, y), y_hat, z_hat in zip(lab.test[:20], y_hats, z_hats)]
    xs, zs, some = ([sample[key] for sample in samples] for key in ("x", "z", "y_hat"))
    R = swirl_fwm.phase1_reward(Q, xs, [Q.target(z) for z in zs], some)
    for sample, r in zip(samples, R.tolist()):
        lab.run.log("samples.jsonl", stage=name, **sample, reward=r)
    return {"fwm": fwm, "idm": idm}, samples[0]


def evaluate_P(P, data):
    """(FWM scores, greedy y_hat) on held-out (x, z, y)."""
    xs, zs, ys = map(list, zip(*data))
    y_hats = parallel.divide(P.predict, xs, zs)
    logp = parallel.divide(lambda *rows: P.logp(*rows).tolist(), xs, zs, ys)
    scores = metrics.fwm_scores(xs, y_hats, ys, logp)
    return scores | {"sampled": sampled(P, data)}, y_hats


def sampled(P, data):
    """Chance that a future drawn as the paper draws it is y, over the changed transitions; None
    without any. Nothing is drawn: the chance of a row is the product of its tokens' chances. (Other
    tokens that spell y, too, are left out: a lower bound, equal for all that was compared.)"""
    changed = [(x, z, y) for x, z, y in data if x != y]
    if not changed:
        return None
    options = dataclasses.replace(P.options, **PAPER)
    logp = parallel.divide(lambda *rows: P.logp(*rows, options).tolist(),
                           *map(list, zip(*changed)))
    return sum(map(math.exp, logp)) / len(logp)


def evaluate_Q(Q, data):
    """(IDM scores, greedy z_hat). Q may not refuse; `refused` is the share in which it would."""
    xs, zs, ys = map(list, zip(*data))
    options = Q.no_refusal()
    z_hats = parallel.divide(Q.predict, xs, ys)
    logp = parallel.divide(lambda *rows: Q.logp(*rows, options).tolist(), xs, zs, ys)
    refused = parallel.divide(Q.refuses, xs, ys)
    scores = metrics.idm_scores(z_hats, zs, logp)
    return scores | {"refused": sum(refused) / len(refused)}, z_hats


def roll_out(P, lab):
    """What P makes of some windows when it reads its own output: the scores of T = 1..6."""
    if not lab.windows:
        return {}

    def step(xs, zs):
        return parallel.divide(P.predict, xs, zs)

    y_hats = rollout.rollout(step, lab.windows, 6)
    if lab.book:
        rows = []
        for i, window in enumerate(lab.windows[:3]):
            truth = [window[0][0], *(y for _, _, y in window)]
            predicted = [row[i] for row in y_hats]
            rows.append(([z for _, z, _ in window], images.frames(lab.book, truth),
                         images.frames(lab.book, predicted)))
        lab.run.picture(pictures.rollouts, "rollout.png", rows)
        lab.run.picture(pictures.animation, "rollout.gif", [rows[0][1][0], *rows[0][2]])
    scores = rollout.score(y_hats, lab.windows)
    return {"rollout": [at_T["score"] for at_T in scores],
            "rollout_exact": [at_T["exact"] for at_T in scores],
            "rollout_changed": [at_T["changed"] for at_T in scores]}


def look(lab, name, y_hats):
    """Draw some predictions of frames. Returns {"kinds": scores by kind of sentence}, and those of
    the kinds of motion together."""
    xs, zs, ys = map(list, zip(*lab.test))
    some = [i for i in range(len(xs)) if xs[i] != ys[i]][:6]
    x, y, predicted = (images.frames(lab.book, [states[i] for i in some])
                       for states in (xs, ys, y_hats))
    file = f"picture-{name.replace('/', '-')}.png"
    lab.run.picture(pictures.predictions, file, list(zip(x, [zs[i] for i in some], y, predicted)))
    kinds = [pixels.kind(z) for z in zs]
    groups = ["motion" if kind in pixels.MOTION else "edits" for kind in kinds]
    by_kind = metrics.by_group(kinds, xs, y_hats, ys)
    return {"kinds": by_kind | metrics.by_group(groups, xs, y_hats, ys)}


def best_of_8(P, Q, data, seed):
    """Test-time verification with the warm-up's models, in both directions."""
    xs, zs, ys = map(list, zip(*data))
    generator = torch.Generator(P.net.device).manual_seed(seed + parallel.rank())
    y_hats = parallel.divide(lambda xs, zs: swirl_fwm.best_of_n(P, Q, xs, zs, 8, generator), xs, zs)
    z_hats = parallel.divide(lambda xs, ys: swirl_idm.best_of_n(Q, P, xs, ys, 8, generator), xs, ys)
    return {"fwm": metrics.fwm_scores(xs, y_hats, ys), "idm": metrics.idm_scores(z_hats, zs)}


def affordable(tok, test):
    """The first of the test transitions: as many as hold 60,000 tokens of y, at least 20."""
    tokens = sum(len(encode(tok, "\n" + y)) for _, _, y in test)
    return test[:max(20, 60000 * len(test) // tokens)]
