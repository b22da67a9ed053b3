"""Several steps ahead: P reads its own output. `evals/rollout.py` is the command.

Claim: y_hat_1 = P(x_0, z_1), y_hat_t = P(y_hat_{t-1}, z_t), each scored against the true state.
"""
import sys

from envs import images
from evals import metrics


def windows(episodes, T, every=sys.maxsize):
    """T steps [(x, z, y)] of an episode, one state after the other: the first of each episode that
    has as many, then those that begin `every` so many steps later."""
    longest = max(map(len, episodes), default=0)
    whole = [
        steps[i : i + T]
        for i in range(0, longest - T + 1, every)
        for steps in episodes
        if len(steps) >= i + T
    ]
    return [steps for steps in whole if all(a[2] == b[0] for a, b in zip(steps, steps[1:]))]


def rollout(predict, steps, T=6):
    """[[y_hat of each window] for t = 1..T]; predict(xs, zs) -> ys, steps: [window of (x, z,
    y)]."""
    state, out = [window[0][0] for window in steps], []
    for t in range(T):
        state = predict(state, [window[t][1] for window in steps])
        out.append(state)
    return out


def score(y_hat, steps):
    """[{"score", "exact", "changed"}] for t = 1..T, means over windows; `changed` is None for
    texts."""
    firsts = [window[0][0] for window in steps]
    scores = []
    for t, predicted in enumerate(y_hat):
        truth = [window[t][2] for window in steps]
        scores.append(step_score(firsts, predicted, truth))
    return scores


def step_score(firsts, predicted, truth):
    exact = metrics.exact(predicted, truth)
    if not images.is_image(truth[0]):
        return {"score": metrics.mean_rouge_l(predicted, truth), "exact": exact, "changed": None}
    return {"score": 100 * metrics.right_patches(predicted, truth), "exact": exact,
            "changed": metrics.right_patches(predicted, truth, firsts)}
