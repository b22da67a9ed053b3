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

import copy
import dataclasses
import difflib

import torch

import grpo
import lm
from models.text import decode, encode, frame

REFUSAL = ""        # an action without a word


# --- Q as a language model -------------------------------------------------------------------

class IDM:
    """Q_phi(z | x, y): a language model with its tokenizer; how it reads (x, y) and writes z."""

    def __init__(self, net, tok, options=None, longest=32, view="diff"):
        self.net, self.tok = net, tok
        self.options = options or lm.Options(tok.eos_token_id)
        self.longest = longest                             # tokens of the longest z to draw
        self.view = view                                   # diff: changed lines; full: x and y

    def with_net(self, net):
        """The same with other weights."""
        twin = copy.copy(self)
        twin.net = net
        return twin

    def frozen(self):
        """A copy that does not learn: pi_ref, Q as it stands now."""
        return self.with_net(lm.freeze(self.net, self.options))

    def no_refusal(self):
        """The options without the refusal: a row cannot begin with its end."""
        allowed = self.options.allowed
        if allowed is None:
            allowed = torch.ones(1, self.net.config.vocab_size, dtype=torch.bool)
        first, then = allowed[:1].clone(), allowed[1:] if len(allowed) > 1 else allowed
        first[0, self.tok.eos_token_id] = False
        allowed = torch.cat([first, then]).to(self.net.device)                        # (T, V)
        return dataclasses.replace(self.options, allowed=allowed)

    def changes(self, x, y):
        """What Q reads in view "diff", as lines."""
        return line_diff(x, y)

    def shared(self, prompt, x):
        """The part of a prompt that is computed once: in view "full" x, else all of it."""
        return self.ids([x]) if self.view == "full" else prompt

    def prompt(self, x, y):
        """The ids before z."""
        lines = [x, "next:", y] if self.view == "full" else self.changes(x, y)
        return [*self.ids([*lines, "action:"]), *frame(self.tok).tail]

    def ids(self, lines):
        """The head and the lines, each encoded alone."""
        first, *rest = [frame(self.tok).line + lines[0], *("\n" + line for line in lines[1:])]
        out = [*frame(self.tok).head, *encode(self.tok, first)]
        for line in rest:
            out += encode(self.tok, line)
        return out

    def target(self, z):
        """The ids of z with its end."""
        text = frame(self.tok).space + z if z != REFUSAL else ""
        return [*encode(self.tok, text), self.tok.eos_token_id]

    def read(self, ids):
        """The action that sampled ids spell."""
        return decode(self.tok, ids).removeprefix(frame(self.tok).space)

    def rows(self, labelled, spoiled=0.0, rng=None, times=8):
        """[(prompt, target)] of labelled (x, z, y): what likelihood learns from. With a share
        `spoiled`, the rows `times` over, and for a share of these also a wrong y and a refusal."""
        rows = [(self.prompt(x, y), self.target(z)) for x, z, y in labelled]
        if not spoiled:
            return rows
        real = {tuple(self.changes(x, y)) for x, _, y in labelled}
        out = []
        for row, (x, _, y) in zip(rows, labelled):
            out += [row] * times
            for _ in range(times):
                if rng.random() >= spoiled:
                    continue
                bad = self.spoil(x, y, rng.choice(labelled)[0], rng)
                if bad is not None and tuple(self.changes(x, bad)) not in real:
                    out.append((self.prompt(x, bad), self.target(REFUSAL)))
        return out

    def spoil(self, x, y, other, rng):
        """y with one wrong line, as a careless P would write it; None if there is none."""
        return spoil(x, y, other, rng)

    def logp(self, xs, zs, ys, options=None):
        """(N,) log Q(z | x, y), summed over tokens, in nats. Q may refuse, unless the options say
        `no_refusal()`."""
        return self.score(xs, [self.target(z) for z in zs], ys, options)

    def score(self, xs, z_rows, ys, options=None):
        """`logp` of the very ids that spell z, with its end: what Q drew, token by token."""
        prompts = [self.prompt(x, y) for x, y in zip(xs, ys)]
        prefixes = [self.shared(prompt, x) for prompt, x in zip(prompts, xs)]
        rows = [[*prompt[len(prefix):], *z_row]
                for prefix, prompt, z_row in zip(prefixes, prompts, z_rows)]
        return lm.score(self.net, prefixes, rows, options or self.options,
                        n_scored=[len(z_row) for z_row in z_rows])

    def draw(self, xs, ys, n, options, generator=None, at_once=False):
        """(prompts, rows, logps): n rows for each (x, y)."""
        prompts = [self.prompt(x, y) for x, y in zip(xs, ys)]
        return prompts, *lm.sample(self.net, prompts, n, self.longest, options, generator, at_once)

    def label(self, xs, ys, generator=None):
        """One action z ~ Q(. | x, y) for each pair, as ids; None where it refuses or is cut."""
        _, rows, _ = self.draw(xs, ys, 1, self.options, generator, at_once=True)
        ended = [row[-1] == self.tok.eos_token_id for row in rows]
        return [row if end and self.read(row) != REFUSAL else None for row, end in zip(rows, ended)]

    def sample(self, xs, ys, n=1, generator=None):
        """n actions for each (x, y), side by side. Q may not refuse."""
        _, rows, _ = self.draw(xs, ys, n, self.no_refusal(), generator)
        return [self.read(row) for row in rows]

    def predict(self, xs, ys):
        """The greedy z_hat for each (x, y). Q may not refuse."""
        _, rows, _ = self.draw(xs, ys, 1, dataclasses.replace(self.no_refusal(), temperature=0))
        return [self.read(row) for row in rows]

    def refuses(self, xs, ys):
        """[bool] whether Q would refuse to name an action, if it may."""
        prompts = [self.prompt(x, y) for x, y in zip(xs, ys)]
        greedy = dataclasses.replace(self.options, temperature=0)
        rows, _ = lm.sample(self.net, prompts, 1, 1, greedy)
        return [row == [self.tok.eos_token_id] for row in rows]

    def rollouts(self, xs, ys, phase, generator):
        """G actions for each (x, y), with what GRPO needs to know of them. Q may not refuse."""
        options = dataclasses.replace(self.no_refusal(), temperature=phase.temperature)
        prompts, rows, logps = self.draw(xs, ys, phase.group_size, options, generator, at_once=True)
        return grpo.Rollouts(prompts, rows, logps, options)


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


def spoil(x, y, other, rng):
    """y with one wrong line; None if nothing changes from x to y, or no line can be exchanged.

    Half of the time a line that should have stayed comes from the state `other`. Where y changes
    several lines, one of them comes from `other`, or stays as it was in x, a quarter each."""
    before, after = x.split("\n"), y.split("\n")
    changed = []
    if len(before) == len(after):
        changed = [i for i, (old, new) in enumerate(zip(before, after)) if old != new]
    like = {}                                              # lines of `other` by their first word
    for line in other.split("\n"):
        like.setdefault(line.split(" ")[0], []).append(line)

    def exchanges(places):
        return [(i, line) for i in places for line in like.get(after[i].split(" ")[0], ())
                if line not in (after[i], *before[i:i + 1])]

    stray = exchanges([i for i, line in enumerate(after) if line in before])
    several = []
    if len(changed) > 1:
        several = [exchanges(changed), [(i, before[i]) for i in changed]]
    options = [choices for choices in (stray, stray, *several) if choices]
    if x == y or not options:
        return None
    i, line = rng.choice(rng.choice(options))
    return "\n".join(after[:i] + [line] + after[i + 1:])


def best_of_n(Q, P, xs, ys, n=8, generator=None):
    """The action, among n drawn, under which P expects y most."""
    zs = Q.sample(xs, ys, n, generator)
    R = phase2_reward(P, grpo.repeat(xs, n), zs, grpo.repeat(ys, n)).view(len(xs), n)
    return [zs[i * n + k] for i, k in enumerate(R.argmax(1).tolist())]


# --- Phase II --------------------------------------------------------------------------------

def phase2_reward(P, xs, zs, ys):
    """(N,) how well the action z explains what happened, in nats."""
    # Eq. 5: R = log P(y | x, z); `grpo.step` subtracts beta * KL(Q || pi_ref)
    return P.logp(xs, zs, ys)


def phase2_step(Q, P, ref, optimizers, pairs, phase, lr, generator):
    """One step on pairs [(x, y)]: phi moves, theta is frozen. Returns (log, examples)."""
    xs, ys = zip(*pairs)
    # z_1, .., z_G ~ Q(. | x, y)
    G = phase.group_size
    rollouts = Q.rollouts(xs, ys, phase, generator)
    zs = [Q.read(row) for row in rollouts.rows]
    R = phase2_reward(P, grpo.repeat(xs, G), zs, grpo.repeat(ys, G))                  # (B * G,)
    R = grpo.shape(R, [len(P.target(y)) for y in grpo.repeat(ys, G)], phase)

    log = grpo.step(Q, ref, optimizers, rollouts, R.view(len(xs), G), phase, lr)
    examples = [dict(x=x, y=y, z_hat=z, reward=r)
                for x, y, z, r in zip(xs, ys, zs[::G], R[::G].tolist())]
    return log, examples
