"""What only the grader measures, in problems 13 and 16."""
import itertools

import torch

import mi_bounds
from assignments import oracles
from assignments.claims import close
from assignments.student import claim

# Files of the student's that a problem needs, beside functions of ours
FILES = {15: ["envs/mine.py"], 16: ["hack.py"]}


# --- 13 ---------------------------------------------------------------------------------------

def planted_bug(student, rng):
    """Every place where a bug may be does what it should."""
    oracles.phase1_reward(student, rng)
    oracles.phase2_reward(student, rng)
    R, rows = torch.tensor([-3.0, -12.0, -0.5]), [[1, 2], [3, 0, 1, 1], [0]]
    for form, floor, right in (("sum", 0.0, [-3, -12, -0.5]), ("mean", 0.0, [-1.5, -3, -0.5]),
                               ("sum", 5.0, [-3, -5, -0.5]), ("mean", 2.0, [-1.5, -2, -0.5])):
        shaped = student("probes.shape", R, rows, {"form": form, "floor": floor})
        claim(close(shaped, torch.tensor(right)), "the bug is still there")
    pairs = [["a", "b"], ["b", "b"], ["c", "a"]]
    claim(student("probes.kept", pairs, True) == [pairs[0], pairs[2]], "the bug is still there")
    claim(student("probes.kept", pairs, False) == pairs, "the bug is still there")


# --- 16 ---------------------------------------------------------------------------------------

def best_liar(student, rng):
    """No forward model is paid more, and it may say what is not so."""
    for _ in range(3):
        truth, _, prior, D_x, _ = oracles.world(rng)
        Q = mi_bounds.true_posterior(truth, prior)
        P = student("hack.best_liar", Q)
        paid = mi_bounds.phase1_objective(P, Q, prior, D_x)
        claim(close(paid, best(Q, prior, D_x)), "no other P has a higher reward (Eq. 3)")


def best(Q, prior, D_x):
    """The highest Eq. 3, by trying every future for each x and z."""
    X, Y, Z = Q.shape
    return sum((D_x[x] * prior[x, z] * max(Q[x, y, z].log() for y in range(Y))).item()
               for x, z in itertools.product(range(X), range(Z)))

