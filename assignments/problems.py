"""The problems, and the functions that the student writes. To blank another function, add a line to
FUNCTIONS; to test it, add a function of its name to `claims.py` (the student sees it) or to
`oracles.py` (only the grader has it)."""
from typing import NamedTuple


class Function(NamedTuple):
    file: str       # in the project
    name: str       # in the file; "IDM.label" is a method
    problem: int    # 0: left out of the student's tree, since it shows the answer to a problem
    points: int


FUNCTIONS = [
    Function("grpo.py", "advantages", 1, 5),
    Function("models/batches.py", "scored_mask", 2, 2),
    Function("lm.py", "run_whole", 2, 4),
    Function("lm.py", "run_shared", 3, 4),
    Function("lm.py", "sample_batch", 3, 8),
    Function("grpo.py", "k1", 4, 1),
    Function("grpo.py", "k3", 4, 3),
    Function("grpo.py", "surrogate", 5, 4),
    Function("grpo.py", "loss_sum", 6, 3),
    Function("grpo.py", "backward", 6, 6),
    Function("mi_bounds.py", "belief", 7, 2),
    Function("mi_bounds.py", "true_posterior", 7, 2),
    Function("mi_bounds.py", "exact_mi", 7, 4),
    Function("mi_bounds.py", "phase1_objective", 8, 2),
    Function("mi_bounds.py", "barber_agakov", 8, 2),
    Function("mi_bounds.py", "barber_agakov_slack", 8, 3),
    Function("mi_bounds.py", "log_evidence", 9, 2),
    Function("mi_bounds.py", "elbo", 9, 4),
    Function("mi_bounds.py", "elbo_slack", 9, 2),
    Function("swirl_fwm.py", "phase1_reward", 10, 2),
    Function("swirl_fwm.py", "phase1_rollouts", 10, 7),
    Function("swirl_idm.py", "phase2_reward", 11, 1),
    Function("swirl_idm.py", "phase2_rollouts", 11, 4),
    Function("grpo.py", "with_kl", 11, 4),
    Function("methods.py", "stages", 12, 3),
    Function("train.py", "follow", 12, 4),
    Function("train.py", "run_phase", 12, 6),
    Function("methods.py", "pseudo_labels", 14, 2),
    Function("methods.py", "bootstrap", 14, 2),
    Function("methods.py", "continue_", 14, 1),
    Function("methods.py", "merge", 14, 1),
    Function("models/images.py", "settle", 0, 0),
]

# What the grader measures where the student hands in no function of ours: (name, problem, points)
MEASURED = [
    ("planted_bug", 13, 4),
    ("own_world", 15, 5),
    ("best_liar", 16, 4),
]

# problem: (title, points that a person gives by the rubric of NOTES.md)
TITLES = {
    1: ("Group advantages", 2),
    2: ("Log-probs with masks from lengths", 0),
    3: ("Sampling with a shared prefix", 0),
    4: ("Two estimates of one KL", 2),
    5: ("The clipped surrogate", 0),
    6: ("One loss over micro-batches", 0),
    7: ("Mutual information by enumeration", 0),
    8: ("The Barber-Agakov bound", 1),
    9: ("The ELBO", 2),
    10: ("Phase I", 1),
    11: ("Phase II, with the KL in the reward", 1),
    12: ("The alternation", 1),
    13: ("A planted bug", 6),
    14: ("The rival", 4),
    15: ("A world of your own", 3),
    16: ("Reward hacking on purpose", 6),
}

SECONDS = 20        # of CPU time for a problem
WALL = 40           # seconds on the clock for a problem
MEMORY = 2 << 30    # bytes that a problem may take on top of the libraries


def functions(problem):
    """The Functions of a problem."""
    return [f for f in FUNCTIONS if f.problem == problem]


def graded(problem):
    """[(name, points)] of all that the grader decides in a problem."""
    written = [(f.name, f.points) for f in functions(problem)]
    return written + [(name, points) for name, p, points in MEASURED if p == problem]
