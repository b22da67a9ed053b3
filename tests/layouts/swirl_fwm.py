import grpo


def phase1_reward(Q, xs, z_rows, y_hats):
    rows = [list(row) for row in z_rows]
    return Q.score(list(xs), rows, list(y_hats), Q.options)


def phase1_rollouts(P, Q, pairs, phase, generator):
    guessed = Q.label(pairs, generator)
    if len(guessed) == 0:
        return None
    G = phase.group_size
    xs = [x for x, _, _ in guessed]
    zs = [Q.read(z) for _, z, _ in guessed]
    drawn = P.rollouts(xs, zs, G, grpo.sampling(P.options, phase), generator)
    futures = [P.read(row) for row in drawn.rows]
    groups, examples = [], []
    for i, (x, z_row, y) in enumerate(guessed):
        mine = futures[i * G:(i + 1) * G]
        R = grpo.shape(phase1_reward(Q, [x] * G, [z_row] * G, mine), [z_row] * G, phase)
        groups.append(R)
        examples.append({"x": x, "z": zs[i], "y": y, "y_hat": mine[0], "reward": R[0].item()})
    return drawn, grpo.torch.stack(groups), examples
