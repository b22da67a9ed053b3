"""Scores of P and Q on held-out transitions, as they stand in results.json, and the samples and
pictures beside them."""
import dataclasses
import math

import torch

import swirl_fwm
import swirl_idm
from envs import images, pixels
from evals import metrics
from models import parallel
from models.batches import columns
from models.next_token import PAPER
from models.text import encode
from support import pictures, rollouts


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
    fwm, y_hats = lab.held_out["fwm"]
    idm, z_hats = lab.held_out["idm"]
    samples = log_samples(Q, lab, name, y_hats, z_hats)
    return {"fwm": fwm, "idm": idm}, samples[0]


def log_samples(Q, lab, name, y_hats, z_hats, n=20):
    """The first n test transitions beside what P and Q predict, also written to samples.jsonl with
    the reward of y_hat in Phase I, and that of y."""
    xs, zs, ys = columns(lab.test[:n])
    z_rows = [Q.target(z) for z in zs]
    rewards = swirl_fwm.phase1_reward(Q, xs, z_rows, y_hats[:n]).tolist()
    of_y = swirl_fwm.phase1_reward(Q, xs, z_rows, ys).tolist()
    samples = []
    for i in range(len(xs)):
        sample = {
            "x": xs[i],
            "z": zs[i],
            "y": ys[i],
            "y_hat": y_hats[i],
            "z_hat": z_hats[i],
        }
        samples.append(sample)
        lab.run.log("samples.jsonl", stage=name, **sample, reward=rewards[i],
                    reward_of_y=of_y[i])
    return samples


# --- scores -----------------------------------------------------------------------------------

def logp_of(model, data, options=None):
    """[log-probability of the true y, or z] of each (x, z, y), in nats."""
    def logp(xs, zs, ys):
        return model.logp(xs, zs, ys, options).tolist()

    return parallel.divide(logp, *columns(data))


def evaluate_P(P, data):
    """(FWM scores, greedy y_hat) on held-out (x, z, y)."""
    xs, zs, ys = columns(data)
    y_hats = parallel.divide(P.predict, xs, zs)
    scores = metrics.fwm_scores(xs, y_hats, ys, logp_of(P, data))
    return scores | {"sampled": sampled(P, data)}, y_hats


def sampled(P, data):
    """Chance that a future drawn as the paper draws it is y, over the changed transitions; None
    without any. Nothing is drawn: the chance of a row is the product of its tokens' chances. (Other
    tokens that spell y, too, are left out: a lower bound, equal for all that was compared.)"""
    changed = [(x, z, y) for x, z, y in data if x != y]
    if not changed:
        return None
    options = dataclasses.replace(P.options, **PAPER)
    logp = logp_of(P, changed, options)
    return sum(map(math.exp, logp)) / len(logp)


def evaluate_Q(Q, data):
    """(IDM scores, greedy z_hat). Q may not refuse; `refused` is the share in which it would."""
    xs, zs, ys = columns(data)
    z_hats = parallel.divide(Q.predict, xs, ys)
    refused = parallel.divide(Q.refuses, xs, ys)
    logp = logp_of(Q, data, Q.no_refusal())
    scores = metrics.idm_scores(z_hats, zs, logp)
    return scores | {"refused": sum(refused) / len(refused)}, z_hats


def best_of_8(P, Q, lab):
    """Test-time verification on the first test transitions, since drawing 8 is slow, with the
    greedy scores there under "sft"."""
    few = lab.test[:tests_of_best(lab)]
    same = {"fwm": evaluate_P(P, few)[0], "idm": evaluate_Q(Q, few)[0]}
    return verify(P, Q, few, 8, lab.cfg.seed) | {"sft": same}


def tests_of_best(lab):
    """Test transitions for best of 8: 60, or for a real model a quarter of what is scored."""
    return 60 if lab.cfg.model == "tiny" else min(60, max(20, len(lab.test) // 4))


def verify(P, Q, data, n, seed):
    """Test-time verification: the best of n futures and of n actions, each judged by the other
    model."""
    xs, zs, ys = columns(data)
    generator = torch.Generator(P.net.device)
    generator.manual_seed(seed + parallel.rank())

    def best_futures(xs, zs):
        return swirl_fwm.best_of_n(P, Q, xs, zs, n, generator)

    def best_actions(xs, ys):
        return swirl_idm.best_of_n(Q, P, xs, ys, n, generator)

    y_hats = parallel.divide(best_futures, xs, zs)
    z_hats = parallel.divide(best_actions, xs, ys)
    return {
        "fwm": metrics.fwm_scores(xs, y_hats, ys),
        "idm": metrics.idm_scores(z_hats, zs),
    }


def roll_out(P, lab):
    """Scores of P at T = 1..6 when it reads its own output, from some windows; pictures of
    frames."""
    if not lab.windows:
        return {}

    def step(xs, zs):
        return parallel.divide(P.predict, xs, zs)

    y_hats = rollouts.rollout(step, lab.windows, 6)
    if lab.book:
        draw_rollouts(lab, y_hats)
    scores = rollouts.score(y_hats, lab.windows)
    return {
        "rollout": [at_T["score"] for at_T in scores],
        "rollout_exact": [at_T["exact"] for at_T in scores],
        "rollout_changed": [at_T["changed"] for at_T in scores],
    }


# --- frames -----------------------------------------------------------------------------------

def draw_rollouts(lab, y_hats):
    """Pictures of the first three windows, true and predicted; the first one as a film, too."""
    rows = []
    for i, window in enumerate(lab.windows[:3]):
        _, zs, ys = columns(window)
        truth = images.frames(lab.book, [window[0][0], *ys])
        predicted = images.frames(lab.book, [states[i] for states in y_hats])
        rows.append((zs, truth, predicted))
    lab.run.picture(pictures.rollouts, "rollout.png", rows)
    _, truth, predicted = rows[0]
    lab.run.picture(pictures.animation, "rollout.gif", [truth[0], *predicted])


def look(lab, name, y_hats):
    """Draw some predictions of frames. Returns {"kinds": scores by kind of sentence}, and those of
    the kinds of motion together."""
    xs, zs, ys = columns(lab.test)
    draw_predictions(lab, name, y_hats)
    kinds = [pixels.kind(z) for z in zs]
    groups = ["motion" if kind in pixels.MOTION else "edits" for kind in kinds]
    by_kind = metrics.by_group(kinds, xs, y_hats, ys)
    return {"kinds": by_kind | metrics.by_group(groups, xs, y_hats, ys)}


def draw_predictions(lab, name, y_hats):
    """A picture of the first six transitions that change something."""
    xs, zs, ys = columns(lab.test)
    changed = [i for i in range(len(xs)) if xs[i] != ys[i]]
    some = changed[:6]

    def frames(states):
        return images.frames(lab.book, [states[i] for i in some])

    actions = [zs[i] for i in some]
    rows = list(zip(frames(xs), actions, frames(ys), frames(y_hats)))
    file = f"picture-{name.replace('/', '-')}.png"
    lab.run.picture(pictures.predictions, file, rows)


# --- which transitions ------------------------------------------------------------------------

def affordable(tok, test):
    """The first of the test transitions: as many as hold 60,000 tokens of y, at least 20."""
    tokens = sum(len(encode(tok, "\n" + y)) for _, _, y in test)
    return test[:max(20, 60000 * len(test) // tokens)]
