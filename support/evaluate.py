"""Scores of P and Q on held-out transitions, as they stand in results.json, and the pictures and samples beside them."""
import math

import torch

import lm
from models import parallel
from support import pictures
import swirl_fwm
import swirl_idm
from envs import images, pixels
from evals import metrics, rollout

TEMPERATURE, TOP_P = 0.75, 0.96              # at which the paper draws the futures that it scores


def evaluate_P(P, lab, data):
    """(FWM scores, greedy y_hat) on held-out (x, z, y)."""
    xs, zs, ys = map(list, zip(*data))
    y_hat = parallel.divide(lambda xs, zs: swirl_fwm.predict(P, lab.tok, xs, zs, lab.max_y), xs, zs)
    logp = parallel.divide(lambda *rows: swirl_fwm.logp(P, lab.tok, *rows).tolist(), xs, zs, ys)
    scores = metrics.fwm_scores(xs, y_hat, ys, logp)
    return scores | {"sampled": sampled(P, lab, data)}, y_hat


def sampled(P, lab, data):
    """Chance that a future drawn as the paper draws it is y, over the changed transitions; None without any.
    No draw is made: the chance of a row is the product of its tokens' chances, among what top-p leaves of them."""
    changed = [row for row in data if row[0] != row[2]]
    if not changed:
        return None
    xs, zs, ys = map(list, zip(*changed))
    logp = parallel.divide(lambda *rows: swirl_fwm.logp(P, lab.tok, *rows, TEMPERATURE, TOP_P).tolist(), xs, zs, ys)
    return sum(map(math.exp, logp)) / len(logp)


def evaluate_Q(Q, lab, data):
    """(IDM scores, greedy z_hat): Q may not refuse; `refused` is the share in which it would."""
    xs, zs, ys = map(list, zip(*data))
    view = lab.cfg.view
    z_hat = parallel.divide(lambda xs, ys: swirl_idm.predict(Q, lab.tok, xs, ys, lab.max_z, view), xs, ys)
    with swirl_idm.no_refusal(Q, lab.tok):
        logp = parallel.divide(lambda *rows: swirl_idm.logp(Q, lab.tok, *rows, view).tolist(), xs, zs, ys)
    refused = parallel.divide(lambda xs, ys: swirl_idm.refuses(Q, lab.tok, xs, ys, view), xs, ys)
    return metrics.idm_scores(z_hat, zs, logp) | {"refused": sum(refused) / len(refused)}, z_hat


def evaluate(P, Q, lab, name, moved=("fwm", "idm")):
    """{"fwm": scores, "idm": scores}; a side that did not move keeps the scores of the last stage.
    Writes what there is to look at: samples.jsonl, and pictures of frames."""
    if "fwm" in moved or "fwm" not in lab.held_out:
        scores, y_hat = evaluate_P(P, lab, lab.test)
        scores |= roll_out(P, lab)
        if lab.book:
            scores |= look(lab, name, y_hat)
        lab.held_out["fwm"] = scores, y_hat
    if "idm" in moved or "idm" not in lab.held_out:
        lab.held_out["idm"] = evaluate_Q(Q, lab, lab.test)
    (fwm, y_hat), (idm, z_hat) = lab.held_out["fwm"], lab.held_out["idm"]
    samples = [dict(x=x, z=z, y=y, y_hat=a, z_hat=b) for (x, z, y), a, b in zip(lab.test, y_hat, z_hat)][:20]
    R = swirl_idm.logp(Q, lab.tok, *([s[k] for s in samples] for k in ("x", "z", "y_hat")), lab.cfg.view)
    for sample, r in zip(samples, R.tolist()):                                     # log Q(z | x, y_hat)
        lab.run.log("samples.jsonl", stage=name, **sample, reward=r)
    return {"fwm": fwm, "idm": idm}, samples[0]


def roll_out(P, lab):
    """What P makes of some windows when it reads its own output: the scores of T = 1..6 ({} without windows)."""
    if not lab.windows:
        return {}
    step = lambda xs, zs: parallel.divide(lambda *rows: swirl_fwm.predict(P, lab.tok, *rows, lab.max_y), xs, zs)
    y_hat = rollout.rollout(step, lab.windows, 6)
    if lab.book:
        rows = []
        for i, window in enumerate(lab.windows[:3]):
            truth = [window[0][0], *(y for _, _, y in window)]
            rows.append(([z for _, z, _ in window], images.frames(lab.book, truth),
                         images.frames(lab.book, [row[i] for row in y_hat])))
        lab.run.picture(pictures.rollouts, "rollout.png", rows)
        lab.run.picture(pictures.animation, "rollout.gif", [rows[0][1][0], *rows[0][2]])
    scores = rollout.score(y_hat, lab.windows)
    return {"rollout": [step["score"] for step in scores], "rollout_exact": [step["exact"] for step in scores],
            "rollout_changed": [step["changed"] for step in scores]}


def look(lab, name, y_hat):
    """Draw some predictions of frames; {"kinds": scores by kind of sentence, and of the kinds of motion together}."""
    xs, zs, ys = map(list, zip(*lab.test))
    some = [i for i in range(len(xs)) if xs[i] != ys[i]][:6]
    x, y, predicted = (images.frames(lab.book, [states[i] for i in some]) for states in (xs, ys, y_hat))
    file = f"picture-{name.replace('/', '-')}.png"
    lab.run.picture(pictures.predictions, file, list(zip(x, [zs[i] for i in some], y, predicted)))
    kinds = [pixels.kind(z) for z in zs]
    groups = ["motion" if kind in pixels.MOTION else "edits" for kind in kinds]
    return {"kinds": metrics.by_group(kinds, xs, y_hat, ys) | metrics.by_group(groups, xs, y_hat, ys)}


def best_of_8(P, Q, lab, data):
    """Test-time verification with the warm-up's models, in both directions."""
    xs, zs, ys = map(list, zip(*data))
    generator = torch.Generator(P.device).manual_seed(lab.cfg.seed + parallel.rank())
    view = lab.cfg.view
    y_hat = parallel.divide(
        lambda xs, zs: swirl_fwm.best_of_n(P, Q, lab.tok, xs, zs, lab.max_y, view, 8, generator), xs, zs)
    z_hat = parallel.divide(
        lambda xs, ys: swirl_idm.best_of_n(Q, P, lab.tok, xs, ys, lab.max_z, view, 8, generator), xs, ys)
    return {"fwm": metrics.fwm_scores(xs, y_hat, ys), "idm": metrics.idm_scores(z_hat, zs)}


def affordable(tok, test):
    """The first of the test transitions: as many as hold 60,000 tokens of y, to be decoded at every evaluation; at least 20."""
    return test[:max(20, 60000 * len(test) // sum(len(lm.encode(tok, "\n" + y)) for _, _, y in test))]
