"""What `python -m assignments.check` tries: properties that every right function has. A function
here is named after the one that it tests. student(name, ..) runs in a process of its own.

The grader tries these as well, and holds each function against an independent computation on other
random numbers.
"""
from collections import defaultdict

import torch

from assignments.student import claim

ABC = [[1, 2, 3], [4], [2, 5, 1, 1]]            # prompts


def close(a, b, tolerance=1e-6):
    """Whether two tensors are equal up to rounding, relative to the largest number."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.shape != b.shape:
        return False
    same = (a == b) | (a - b).abs().le(tolerance * (1 + b.abs().nan_to_num(posinf=0, neginf=0)))
    return bool(same.all())


def normal(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def table(rng, *shape):
    """Random distributions over the last axis."""
    return (normal(rng, *shape)).softmax(-1)


# --- 1 to 3 -----------------------------------------------------------------------------------

def advantages(student, rng):
    A = student("grpo.advantages", torch.tensor([[1.0, 2.0, 6.0]]))
    claim(close(A, torch.tensor([[-2.0, -1.0, 3.0]])), "rewards 1, 2, 6 give -2, -1, 3")
    R = normal(rng, 4, 3)
    for scale in ("mean", "std", "loo"):
        A = student("grpo.advantages", R, scale)
        claim(close(A.sum(1), torch.zeros(4).double()), "the advantages of a group add up to 0")
        moved = student("grpo.advantages", R + normal(rng, 4, 1), scale)
        claim(close(moved, A), "a constant on all rewards of a group changes nothing")
        equal = student("grpo.advantages", torch.full((2, 3), 0.1), scale)
        claim((equal == 0).all(), "equal rewards give exactly 0")
    small = student("grpo.advantages", 100 * R, "std")
    large = student("grpo.advantages", 1000 * R, "std")
    claim(close(small, large, 1e-4), 'with "std" the unit of the reward does not matter')


def scored_mask(student, rng):
    mask = student("models.batches.scored_mask", [[7, 7, 7], [7]], [2, 1], 4, "cpu")
    wanted = [[False, True, True, False], [True, False, False, False]]
    claim(mask.tolist() == wanted, "of rows of 3 and 1 tokens the last 2 and 1 are scored")


def run_whole(student, rng):
    prompts, rows = [[1, 2, 3], [4]], [[5, 0], [2, 3, 1]]
    ones = torch.ones(4)
    together = student("probes.run_whole", 1, prompts, rows, [1, 3], ones)
    claim(together[1].tolist() == [0, 2, 3, 1], "the targets are the scored tokens, row by row")
    claim(together[2].tolist() == [0, 0, 1, 2], "t counts the scored tokens of each row from 0")
    alone = [student("probes.run_whole", 1, [prompt], [row], [n], ones[:n])[0]
             for prompt, row, n in zip(prompts, rows, [1, 3])]
    claim(close(together[0], torch.cat(alone), 1e-4), "a row is scored alike alone and in a batch")


def run_shared(student, rng):
    prompts, rows, owner = [[1, 2, 3], [4]], [[5, 0], [2, 3, 1], [5, 5]], [0, 1, 0]
    n_scored, ones = [1, 3, 2], torch.ones(6)
    shared = student("probes.run_shared", 1, prompts, rows, owner, n_scored, ones)
    whole = student("probes.run_whole", 1, [prompts[o] for o in owner], rows, n_scored, ones)
    claim(shared[1].tolist() == whole[1].tolist() and shared[2].tolist() == whole[2].tolist(),
          "targets and t are those of run_whole")
    claim(close(shared[0], whole[0], 1e-4), "the logits are those of run_whole")
    claim(close(shared[3], whole[3], 1e-3), "the gradient is that of run_whole")


def sample_batch(student, rng):
    u = torch.rand(6, 5, generator=rng, dtype=torch.float64)
    for temperature in (1.0, 0.6):
        rows, logps, again = student("probes.rescored", 1, ABC, 2, u, temperature)
        claim([len(group) for group in rows] == [2, 2, 2], "each prompt has n rows")
        flat = [row for group in rows for row in group]
        claim(all(0 not in row[:-1] for row in flat), "a row ends with its first end token")
        claim(all(row[-1] == 0 or len(row) == 5 for row in flat), "other rows have all tokens")
        said = [logp for group in logps for logp in group]
        for row, logp, right in zip(flat, said, again, strict=True):
            claim(close(logp, right[:len(row)], 1e-4), "the log-probs are those of lm.logprobs")
    greedy, _, _ = student("probes.sample_batch", 1, ABC, 2, u, 0.0)
    claim(all(a == b for a, b in greedy), "at temperature 0 all rows of a prompt are equal")


# --- 4 to 6 -----------------------------------------------------------------------------------

def k1(student, rng):
    p = table(rng, 5).log()
    claim((student("grpo.k1", p, p) == 0).all(), "k1 of equal models is 0")


def k3(student, rng):
    p, q = table(rng, 5).log(), table(rng, 5).log()
    claim((student("grpo.k3", p, p) == 0).all(), "k3 of equal models is 0")
    claim((student("grpo.k3", p, q) > 0).all(), "k3 is positive for every token")
    far = student("grpo.k3", torch.tensor(-1000.0), torch.tensor(0.0))
    claim(far.isfinite(), "k3 does not overflow where pi is tiny and ref is not")


def surrogate(student, rng):
    logp, A = normal(rng, 5), normal(rng, 5)
    value, slope = student("probes.gradient", "grpo.surrogate", [logp, logp, A, 0.2], 0)
    claim(close(value, A), "at ratio 1 the value is A")
    claim(close(slope, A), "at ratio 1 the gradient in logp is A")
    far = student("probes.gradient", "grpo.surrogate", [logp + 1, logp, A.abs(), 0.2], 0)
    claim((far[1] == 0).all(), "a good row beyond the range has no gradient")


def loss_sum(student, rng):
    logps = [-normal(rng, 3, 4).abs() for _ in range(3)]
    live = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).double()
    for kl in ("loss", "reward"):
        phase = {"kl": kl, "beta": 0.5}
        loss, slope = student("probes.loss_sum", logps, normal(rng, 3), live, phase)
        claim(loss.shape == (), "the loss is one number")
        claim((slope[live == 0] == 0).all(), "tokens behind the end of a row have no gradient")
        claim((slope[live == 1] != 0).any(), "other tokens have a gradient")


def backward(student, rng):
    drawn = [[[1, 2], [3]], [[1, 0], [4, 4, 2], [5], [2, 0]],
             [[-1.0, -1.0], [-1.0] * 3, [-1.0], [-2.0, -1.0]]]
    A, phase = torch.tensor([1.0, -2.0, 0.5, 0.5]), {"temperature": 1.0}
    whole = student("probes.backward", 1, drawn, A, None, [[0, 1, 2, 3]], phase)
    for parts in ([[0, 1], [2, 3]], [[3], [0, 2], [1]]):
        cut = student("probes.backward", 1, drawn, A, None, parts, phase)
        claim(close(cut[2], whole[2], 1e-4), "micro-batches do not change the gradient")
        claim(close(cut[0], whole[0], 1e-4), "micro-batches do not change the loss")
        claim(close(cut[1], whole[1], 1e-4), "micro-batches do not change the gap")


# --- 7 to 9 -----------------------------------------------------------------------------------

def belief(student, rng):
    D, Q = table(rng, 2, 3), table(rng, 2, 3, 4)
    found = student("mi_bounds.belief", D, Q)
    claim(found.shape == (2, 4) and close(found.sum(-1), torch.ones(2).double()),
          "the belief is a distribution over z for each x")
    first = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    found = student("mi_bounds.belief", first, Q)
    claim(close(found, torch.stack([Q[0, 0], Q[1, 2]])), "of a single y the belief is Q's row")


def true_posterior(student, rng):
    P, prior = table(rng, 2, 3, 4), table(rng, 2, 3)
    found = student("mi_bounds.true_posterior", P, prior)
    claim(found.shape == (2, 4, 3) and close(found.sum(-1), torch.ones(2, 4).double()),
          "the posterior is a distribution over z for each x and y")
    same = P[:, :1].expand(2, 3, 4)
    found = student("mi_bounds.true_posterior", same, prior)
    claim(close(found, prior[:, None].expand(2, 4, 3)),
          "where y does not depend on z, the posterior is the prior")


def exact_mi(student, rng):
    prior, D_x = table(rng, 2, 3), table(rng, 2)
    same = table(rng, 2, 1, 4).expand(2, 3, 4)
    found = student("mi_bounds.exact_mi", same, prior, D_x)
    claim(close(found, torch.tensor(0.0).double()), "where y does not depend on z it is 0")
    sure = torch.eye(3).double().expand(2, 3, 3)
    even = torch.full((2, 3), 1 / 3).double()
    found = student("mi_bounds.exact_mi", sure, even, D_x)
    claim(close(found, torch.tensor(3.0).double().log()), "three actions that show are log 3 nats")


def phase1_objective(student, rng):
    P, prior, D_x = table(rng, 2, 3, 4), table(rng, 2, 3), table(rng, 2)
    even = torch.full((2, 4, 3), 1 / 3).double()
    found = student("mi_bounds.phase1_objective", P, even, prior, D_x)
    claim(close(found, -torch.tensor(3.0).double().log()), "a Q that guesses among 3 gives -log 3")


def barber_agakov(student, rng):
    P, prior, D_x = table(rng, 2, 3, 4), table(rng, 2, 3), table(rng, 2)
    low = student("mi_bounds.barber_agakov", P, table(rng, 2, 4, 3), prior, D_x)
    claim(low < student("mi_bounds.exact_mi", P, prior, D_x), "it is below the information")


def barber_agakov_slack(student, rng):
    P, prior, D_x = table(rng, 2, 3, 4), table(rng, 2, 3), table(rng, 2)
    best = student("mi_bounds.true_posterior", P, prior)
    found = student("mi_bounds.barber_agakov_slack", P, best, prior, D_x)
    claim(close(found, torch.tensor(0.0).double()), "with the true posterior nothing is missed")
    found = student("mi_bounds.barber_agakov_slack", P, table(rng, 2, 4, 3), prior, D_x)
    claim(found > 0, "with another Q something is missed")


def log_evidence(student, rng):
    P, prior = table(rng, 2, 3, 4), table(rng, 2, 3)
    found = student("mi_bounds.log_evidence", P, prior)
    claim(close(found.exp().sum(-1), torch.ones(2).double()), "the chances of all y add up to 1")


def elbo(student, rng):
    P, prior = table(rng, 2, 3, 4), table(rng, 2, 3)
    J = student("mi_bounds.elbo", P, table(rng, 2, 4, 3), prior)
    claim(J.shape == (2, 4), "one number for each pair (x, y)")
    claim((J < student("mi_bounds.log_evidence", P, prior)).all(), "it is below the evidence")


def elbo_slack(student, rng):
    P, prior = table(rng, 2, 3, 4), table(rng, 2, 3)
    best = student("mi_bounds.true_posterior", P, prior)
    found = student("mi_bounds.elbo_slack", P, best, prior)
    claim(close(found, torch.zeros(2, 4).double()), "with the true posterior nothing is missed")


# --- 10 to 12, 14 -----------------------------------------------------------------------------

PAIRS = [["lamp is on\ndoor is shut", "lamp is off\ndoor is shut"],
         ["lamp is off\ndoor is shut", "lamp is off\ndoor is open"],
         ["lamp is on\ndoor is open", "lamp is off\ndoor is open"]]
PHASE = {"group_size": 3, "temperature": 1.0, "form": "sum", "floor": 0.0, "batch": 3}


def phase1_reward(student, rng):
    (x, y), _, _ = PAIRS
    zs = ["turn off", "open"]
    R = student("probes.reward", "phase1_reward", 1, [x, x], zs, [y, y])
    claim(R.shape == (2,) and (R < 0).all(), "a log-probability for each future")
    twice = student("probes.reward", "phase1_reward", 1, [x, x], ["open"] * 2, [y, y])
    claim(twice[0] == twice[1], "equal futures have equal rewards")


def phase1_rollouts(student, rng):
    found = student("probes.phase1", 3, PAIRS * 2, PHASE, 0)
    B = len(found["prompts"])
    claim(len(found["rows"]) == 3 * B and found["R"].shape == (B, 3), "G futures for each pair")
    again = student("probes.phase1", 3, PAIRS * 2, PHASE, 0)
    claim(found["rows"] == again["rows"], "the same generator draws the same")
    claim(len(found["examples"]) == B, "one example for each pair")
    claim({"x", "z", "y", "y_hat", "reward"} <= set(found["examples"][0]),
          "an example has x, z, y, y_hat and reward")
    claim(student("probes.silent", PAIRS, PHASE) is None, "None where Q reads no action")


def phase2_reward(student, rng):
    (x, y), _, _ = PAIRS
    R = student("probes.reward", "phase2_reward", 1, [x, x], ["turn off", "open"], [y, y])
    claim(R.shape == (2,) and (R < 0).all(), "a log-probability for each action")


def phase2_rollouts(student, rng):
    found = student("probes.phase2", 1, PAIRS, PHASE, 0)
    claim(len(found["rows"]) == 9 and found["R"].shape == (3, 3), "G actions for each pair")
    again = student("probes.phase2", 1, PAIRS, PHASE, 0)
    claim(found["rows"] == again["rows"], "the same generator draws the same")
    claim({"x", "y", "z_hat", "reward"} <= set(found["examples"][0]),
          "an example has x, y, z_hat and reward")


def with_kl(student, rng):
    drawn = [[[1, 2]], [[1, 0], [4, 4, 2]], [[-1.0, -1.0], [-1.0] * 3]]
    R, phase = torch.tensor([[1.0, 2.0]]), {"temperature": 1.0, "beta": 0.5}
    shaped, kl, logp_ref = student("probes.with_kl", [1, None], drawn, R, phase)
    claim(close(shaped, R) and kl is None and logp_ref is None, "without ref R stays as it is")
    shaped, kl, logp_ref = student("probes.with_kl", [1, 2], drawn, R, {**phase, "kl": "loss"})
    claim(close(shaped, R), 'with kl="loss" R stays as it is')
    claim(kl.shape == (1, 2) and logp_ref.shape == (2, 3), "a KL for each row, ref for each token")


def stages(student, rng):
    found = student("probes.stages", "swirl", 2)
    claim(found == [["phase1", 1], ["phase2", 1], ["phase1", 2], ["phase2", 2]],
          "SWIRL is Phase I and Phase II, twice")


def follow(student, rng):
    calls, end = student("probes.follow", [["phase1", 1], ["phase2", 1]], [])
    trained = [call[2] for call in calls if call[0] == "run_phase"]
    claim(trained == ["P", "Q"], "Phase I trains P, Phase II trains Q")
    claim(end == ["P", "Q"], "it returns P and Q")


def run_phase(student, rng):
    phase = {"steps": 3, "peak": 0.01, "batch": 4, "beta": 0.1, "group_size": 2}
    seen = student("probes.run_phase", phase)
    claim(seen["returned"] == 3 and len(seen["rates"]) == 3, "as many steps as the phase has")
    claim(not close(seen["end"][0], seen["start"][0]), "the policy moves")
    claim(close(seen["end"][1], seen["start"][1], 0), "the frozen model does not move")


LABELLED = [["a", "go", "b"], ["b", "stay", "b"]]
STATE_ONLY = [["a", "c"], ["c", "c"], ["c", "d"]]


def pseudo_labels(student, rng):
    found = student("probes.likelihood", "pseudo_labels", LABELLED, STATE_ONLY, 0)
    claim(["a", "z of a, c", "c"] in found, "Q reads the action of each pair")


def bootstrap(student, rng):
    found = student("probes.likelihood", "bootstrap", LABELLED, STATE_ONLY, 2)
    claim(found["kept"] and found["returned"] == found["steps"], "it returns P, Q and the steps")


def continue_(student, rng):
    found = student("probes.likelihood", "continue_", LABELLED, STATE_ONLY, 2)
    claim(found["kept"] and found["returned"] == found["steps"], "it returns P, Q and the steps")


def merge(student, rng):
    found = student("probes.likelihood", "merge", LABELLED, STATE_ONLY, 2)
    claim(found["returned"] == found["steps"], "it returns P, Q and the steps")
    claim(found["net"] == "fresh", "P begins again from the pretrained weights")


# --- 15 and 16: what the student adds ----------------------------------------------------------

def own_world(student, rng):
    world = student("probes.own_world", 200, 0.0)
    again = student("probes.own_world", 200, 0.0)
    claim(world == again, "an episode depends on nothing but rng")
    claim(all(isinstance(world[name], int) and world[name] > 0
              for name in ("EPISODES", "STEPS", "STATE_ONLY")), "EPISODES, STEPS, STATE_ONLY")
    claim(isinstance(world["PRESET"], dict), "PRESET is a dict of settings")
    check_rows(world["episodes"], world["STEPS"])
    rows = [row for steps in world["episodes"] for row in steps]
    after, named = defaultdict(set), defaultdict(set)
    for x, z, y in rows:
        after[x, z].add(y)
        named[x, y].add(z)
    claim(all(len(ys) == 1 for ys in after.values()), "in clean logs y follows from x and z")
    changed = [row for row in rows if row[0] != row[2]]
    claim(len(changed) >= 0.6 * len(rows), "at least 60% of the transitions change something")
    read = sum(len(named[x, y]) == 1 for x, _, y in changed)
    claim(read >= 0.9 * len(changed), "at least 90% of the changes name one action")
    claim(len({x for x, _, _ in rows}) >= 100, "there are at least 100 states")
    busy = student("probes.own_world", 200, 1.0)["episodes"]
    check_rows(busy, world["STEPS"])
    claim(busy != world["episodes"], "with busy=1 somebody else acts as well")


def check_rows(episodes, steps):
    for rows in episodes:
        claim(len(rows) == steps, "an episode has STEPS transitions")
        for x, z, y in rows:
            plain = [isinstance(text, str) and text == text.strip() != "" for text in (x, z, y)]
            claim(all(plain), "x, z and y are texts without spaces around them")
        follows = [a[2] == b[0] for a, b in zip(rows, rows[1:])]
        claim(all(follows), "y is the x of the next transition")


def best_liar(student, rng):
    sure = torch.eye(3).double()[None]
    claim(close(student("hack.best_liar", sure), sure), "if Q is sure of each z, so is P")
    P = student("hack.best_liar", table(rng, 2, 4, 3))
    claim(P.shape == (2, 3, 4) and close(P.sum(-1), torch.ones(2, 3).double()),
          "P (X, Z, Y) holds distributions over y")
