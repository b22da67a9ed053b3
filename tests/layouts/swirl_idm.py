import torch

import grpo


def phase2_reward(P, xs, zs, ys):
    return torch.cat([P.logp([x], [z], [y]) for x, z, y in zip(xs, zs, ys)])


def phase2_rollouts(Q, P, pairs, phase, generator):
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    G = phase.group_size
    drawn = Q.rollouts(xs, ys, G, grpo.sampling(Q.no_refusal(), phase), generator)
    actions = [Q.read(row) for row in drawn.rows]
    R = torch.empty(len(pairs), G)
    for i, (x, y) in enumerate(pairs):
        raw = phase2_reward(P, [x] * G, actions[i * G:i * G + G], [y] * G)
        R[i] = grpo.shape(raw, [P.target(y)] * G, phase)
    examples = [{"x": x, "y": y, "z_hat": actions[i * G], "reward": float(R[i, 0])}
                for i, (x, y) in enumerate(pairs)]
    return drawn, R, examples
