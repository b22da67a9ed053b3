"""Problem 13: bugs to plant, and the small world in which they show. Each lets the reward rise and
the held-out score fall. NOTES.md has the curves.

A bug sits in a function that no other problem blanks, so that it is there whatever the student
writes.
"""
import inspect
import random
from pathlib import Path
from typing import NamedTuple

from assignments import lamps
from envs import records


class Bug(NamedTuple):
    file: str
    function: str       # where it sits
    right: str          # the text in the project
    wrong: str          # the text in the student's tree
    why: str            # what it does, for the teacher


BUGS = [
    Bug("swirl_idm.py", "IDM.score",
        "def score(self, xs, z_rows, ys, options=None):",
        "def score(self, ys, z_rows, xs, options=None):",
        "Phase I's reward reads the change backwards: P learns to undo what z names."),
    Bug("swirl_fwm.py", "FWM.logp",
        "targets = list(map(self.target, ys))\n        shared",
        "targets = list(map(self.target, xs))\n        shared",
        "Phase II's reward is log P(x | x, z): Q learns to name actions that change nothing."),
    Bug("methods.py", "kept_pairs",
        "if x != y or not",
        "if x == y or not",
        "Both phases see only pairs in which nothing changes: P is paid for inventing an effect."),
    Bug("swirl_idm.py", "IDM.score",
        "list(z_rows)",
        "sorted(z_rows, key=len)",
        "The actions are scored shortest first, against futures that are not: P is paid for the "
        "action of another pair."),
    Bug("swirl_fwm.py", "FWM.logp",
        "def logp(self, xs, zs, ys, options=None):",
        "def logp(self, ys, zs, xs, options=None):",
        "Phase II's reward is log P(x | y, z): Q learns to name the way back."),
    Bug("grpo.py", "shape",
        "R = R.clamp(min=-phase.floor)\n    return R",
        "R = R.clamp(min=-phase.floor)\n    return -R",
        "The reward is a surprise, which is positive: P and Q learn to be wrong."),
]
PLACES = sorted({(bug.file, bug.function) for bug in BUGS})

LIAR = '''import torch


def best_liar(Q):
    """Q (X,Y,Z) -> the P (X,Z,Y) of the highest Eq. 3: for each x and z the y in which Q reads z
    best."""
    best = Q.transpose(1, 2).argmax(-1)
    return torch.nn.functional.one_hot(best, Q.shape[1]).double()
'''
# A teacher's answers to problems 15 and 16, for make --solved
ANSWERS = {"envs/mine.py": inspect.getsource(lamps), "hack.py": LIAR}


def plant(folder, seed):
    """Put one of the bugs into a copy of the project. Fails if its place has changed."""
    bug = BUGS[seed % len(BUGS)]
    path = Path(folder, bug.file)
    text = path.read_text()
    if text.count(bug.right) != 1:
        records.fail(f"bugs.py: {bug.file} no longer holds {bug.right!r} once")
    path.write_text(text.replace(bug.right, bug.wrong))


def write_world(path, seed=0):
    """A transitions file: training logs are busy, the others are clean."""
    rows = []
    for split, n, busy in (("train", lamps.EPISODES, 0.5), ("dev", 6, 0.0), ("test", 40, 0.0)):
        for i in range(n):
            steps = lamps.episode(random.Random(f"{seed} {split} {i}"), busy)
            rows += [records.Transition(f"{split}-{i}", t, *row) for t, row in enumerate(steps)]
    records.write(path, rows)
