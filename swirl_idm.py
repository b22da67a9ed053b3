"""Q_phi(z | x, y), the inverse dynamics model (IDM), and Phase II, which trains it without actions.

Claim (Theorem 3.2). With R = log P(y | x, z), beta = 1 and the prior P(z|x) = pi_ref, Phase II
raises

    J(phi) = E_{z~Q(.|x,y)} [R] - beta * KL(Q(. | x, y) || pi_ref)                        (Eq. 5)

which is the ELBO of log P(y | x): Q finds actions that explain what happened. P is frozen.

| symbol | in code         | meaning                                                               |
| ------ | --------------- | --------------------------------------------------------------------- |
| x, y   | str             | state before, state after; both are observed                          |
| z      | ids, then str   | one of G actions that Q draws; reward R = log P(y | x, z), in nats    |
| pi_ref | `ref`           | Q as it stood when the phase began                                    |

Departures from the paper
1. pi_ref reads (x, y), as Q does, as in the paper's experiments. Theorem 3.2 wants a prior of x
   only. At beta = 1, J is the ELBO under the prior "what Q believed before the phase".
2. beta = .1, as in the paper's experiments, is not the ELBO; beta = 1 is.
3. The KL is part of the reward, for each row (`grpo.step`).
4. The reward is the summed log-probability, without a floor. The released scripts take the mean
   over tokens with a floor (`--reward-form mean --floor 10`).
5. With `--spoiled` (by default only for images) Q also learns to refuse: it sees labelled pairs
   with a wrong y and an empty action. Only Phase I's reward and its guesses of z see refusals.
   Scores, rollouts of Phase II and labels exclude them and renormalise.
6. `--view diff` shows Q the lines that change from x to y; the paper's Q reads both (`--view
   full`).
7. Pairs with y = x are left out, as in Phase I.
"""

import dataclasses
import difflib

import torch

import grpo
import lm
from models import refusals
from models.batches import columns, dicts, repeat, take_best
from models.next_token import PAPER
from models.refusals import REFUSAL
from models.text import decode, encode, frame

# --- Q as a language model -------------------------------------------------------------------

class IDM:
    """Q_phi(z | x, y): a language model with its tokenizer; how it reads (x, y) and writes z."""

    def __init__(self, net, tok, options=None, longest=32, view="diff"):
        self.net, self.tok = net, tok
        self.frame = frame(tok)
        self.options = options or lm.Options(tok.eos_token_id)
        self.longest = longest                             # tokens of the longest z to draw
        self.view = view                                   # diff: changed lines; full: x and y

    # Text to ids and back

    def changes(self, x, y):
        """What Q reads in view "diff", as lines."""
        return line_diff(x, y)

    def before(self, lines):
        """The ids of the lines, each encoded by itself."""
        texts = [self.frame.line + lines[0]]
        texts += ["\n" + line for line in lines[1:]]
        ids = [*self.frame.head]
        for text in texts:
            ids += encode(self.tok, text)
        return ids

    def prompt(self, x, y):
        """The ids before z."""
        if self.view == "full":
            seen = [x, "next:", y]
        else:
            seen = self.changes(x, y)
        question = self.before([*seen, "action:"])
        return [*question, *self.frame.tail]

    def target(self, z):
        """The ids of z with its end. The refusal is the end and nothing else."""
        end = self.tok.eos_token_id
        if z == REFUSAL:
            return [end]
        action = encode(self.tok, self.frame.space + z)
        return [*action, end]

    def read(self, ids):
        """The action that sampled ids spell."""
        return decode(self.tok, ids).removeprefix(self.frame.space)

    def rows(self, triples):
        """[(prompt, target)] of (x, z, y): what likelihood learns from."""
        xs, zs, ys = columns(triples, 3)
        prompts = map(self.prompt, xs, ys)
        targets = map(self.target, zs)
        return list(zip(prompts, targets))

    def spoil(self, x, y, other, rng):
        """y with one wrong line, as a careless P would write it; None if there is none."""
        return refusals.spoil(x, y, other, rng)

    # Score and sample

    def no_refusal(self):
        """The options without the refusal: a row cannot begin with its end."""
        allowed = self.options.allowed                                                # (T, V)
        if allowed is None:
            V = self.net.config.vocab_size
            allowed = torch.ones(1, V, dtype=torch.bool)
        first, later = allowed[:1].clone(), allowed[1:]
        if not len(later):
            later = allowed
        first[0, self.tok.eos_token_id] = False
        allowed = torch.cat([first, later]).to(self.net.device)
        return dataclasses.replace(self.options, allowed=allowed)

    def logp(self, xs, zs, ys, options=None):
        """(N,) log Q(z | x, y), summed over tokens, in nats. Q may refuse, unless the options say
        `no_refusal()`."""
        return self.score(xs, map(self.target, zs), ys, options)

    def score(self, xs, z_rows, ys, options=None):
        """`logp` of the very ids that spell z, with its end: what Q drew, token by token."""
        prompts = list(map(self.prompt, xs, ys))
        shared = None
        if self.view == "full":
            shared = [len(self.before([x])) for x in xs]   # an x that comes twice is computed once
        options = options or self.options
        return lm.score(self.net, prompts, list(z_rows), options, shared)

    def rollouts(self, xs, ys, n, options, generator=None):
        """n actions for each (x, y) as ids, side by side, with their log-probs."""
        prompts = list(map(self.prompt, xs, ys))
        rows, logps = lm.sample(self.net, prompts, n, self.longest, options, generator)
        return grpo.Rollouts(prompts, rows, logps, options)

    def label(self, pairs, generator=None):
        """[(x, z, y)]: one action z ~ Q(. | x, y) for each pair, as ids. Pairs where Q refuses, or
        where z is cut, are left out."""
        xs, ys = columns(pairs)
        rows = self.rollouts(xs, ys, 1, self.options, generator).rows
        labelled = zip(xs, rows, ys)
        return [triple for triple in labelled if self.named(triple[1])]

    def named(self, ids):
        """Whether sampled ids are an action and its end."""
        whole = ids[-1] == self.tok.eos_token_id
        return whole and self.read(ids) != REFUSAL

    def sample(self, xs, ys, n=1, generator=None, options=None):
        """n actions for each (x, y), side by side. By default Q may not refuse."""
        rollouts = self.rollouts(xs, ys, n, options or self.no_refusal(), generator)
        return list(map(self.read, rollouts.rows))

    def predict(self, xs, ys):
        """The greedy z_hat for each (x, y). Q may not refuse."""
        greedy = dataclasses.replace(self.no_refusal(), temperature=0)
        rollouts = self.rollouts(xs, ys, 1, greedy)
        return list(map(self.read, rollouts.rows))

    def refuses(self, xs, ys):
        """[bool] whether Q would refuse to name an action, if it may."""
        prompts = list(map(self.prompt, xs, ys))
        greedy = dataclasses.replace(self.options, temperature=0)
        rows, _ = lm.sample(self.net, prompts, 1, 1, greedy)
        return [row == self.target(REFUSAL) for row in rows]


def line_diff(x, y):
    """The lines that x loses ("- ") and that y gains ("+ "), in order."""
    before, after = x.split("\n"), y.split("\n")
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    lines = []
    for tag, i, j, k, l in matcher.get_opcodes():
        if tag != "equal":
            lines += ["- " + line for line in before[i:j]]
            lines += ["+ " + line for line in after[k:l]]
    return lines


def best_of_n(Q, P, xs, ys, n=8, generator=None):
    """The action, among n drawn as the paper draws, under which P expects y most."""
    options = dataclasses.replace(Q.no_refusal(), **PAPER)
    zs = Q.sample(xs, ys, n, generator, options)
    R = phase2_reward(P, repeat(xs, n), zs, repeat(ys, n))                            # (B * n,)
    return take_best(zs, R.view(-1, n))


# --- Phase II --------------------------------------------------------------------------------

def phase2_reward(P, xs, zs, ys):
    """(N,) how well the action z explains what happened, in nats."""
    # Eq. 5: R = log P(y | x, z); `grpo.step` subtracts beta * KL(Q || pi_ref)
    return P.logp(xs, zs, ys)


def phase2_rollouts(Q, P, pairs, phase, generator):
    """G actions for each pair (x, y), and their rewards: (rollouts, R (B, G), examples)."""
    xs, ys = columns(pairs)

    # z_1, .., z_G ~ Q(. | x, y)
    G = phase.group_size
    options = grpo.sampling(Q.no_refusal(), phase)
    rollouts = Q.rollouts(xs, ys, G, options, generator)
    zs = list(map(Q.read, rollouts.rows))
    R = phase2_reward(P, repeat(xs, G), zs, repeat(ys, G))                            # (B * G,)
    y_rows = repeat(map(P.target, ys), G)
    R = grpo.shape(R, y_rows, phase)
    R = R.view(-1, G)                                                                 # (B, G)
    examples = dicts(
        x=xs,
        y=ys,
        z_hat=zs[::G],
        reward=R[:, 0].tolist(),
    )
    return rollouts, R, examples
