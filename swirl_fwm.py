"""P_theta(y | x, z), the forward world model (FWM), and Phase I, which trains it without actions.

Claim (Theorem 3.1). Phase I raises

    I(theta) = E_{(x,y)~D} E_{z~Q(.|x,y)} E_{y_hat~P(.|x,z)} log Q(z | x, y_hat)           (Eq. 3)

and with it a lower bound of  I(Z; Y_hat | X) = H(Z|X) - H(Z|Y_hat,X)  (Eq. 1), since
-H(Z|Y_hat,X) >= E log Q(z | x, y_hat)  (Eq. 2) and H(Z|X) does not depend on theta. In words:
P learns to predict futures in which the inverse model can read the action. Q is frozen.
`mi_bounds.py` shows the bound as numbers.

| symbol | in code         | meaning                                                               |
| ------ | --------------- | --------------------------------------------------------------------- |
| x, y   | str             | state before, state after                                             |
| z      | str             | the action; in Phase I a guess of Q, drawn once for each pair         |
| y_hat  | ids, then str   | one of G futures that P draws; reward R = log Q(z | x, y_hat), nats   |

Departures from the paper
1. The reward is the summed log-probability of z with its end token, as in Eq. 3, without a floor.
   The released scripts take the mean over tokens with a floor (`--reward-form mean --floor 10`).
   That is the default for your own files and for real models, whose rows are long.
2. No KL by default: Eq. 3 and 4 have none. The released scripts add .04 (`--beta-fwm`).
3. Q may read the changed lines instead of both states (`--view`).
4. Pairs with y = x are left out (`--no-skip-unchanged` is the paper's). No action can be read in
   them, so P would be paid for inventing an effect. Pairs that Q refuses are left out, too.
5. Futures are drawn and scored at temperature 1, so that Eq. 3 is exact. The paper draws at .75
   with top-p .96.
6. For images, see `models/images.py`.
"""

import dataclasses

import grpo
import lm
from models import parallel
from models.batches import columns, dicts, repeat, take_best
from models.next_token import PAPER
from models.text import decode, encode, frame

# --- P as a language model -------------------------------------------------------------------

class FWM:
    """P_theta(y | x, z): a language model with its tokenizer; how it reads (x, z) and writes y."""

    def __init__(self, net, tok, options=None, longest=128):
        self.net, self.tok = net, tok
        self.frame = frame(tok)
        self.options = options or lm.Options(tok.eos_token_id)
        self.longest = longest                             # tokens of the longest y to draw

    # Text to ids and back

    def before(self, x):
        """The ids of x. They come first, so that all that is asked about x shares this prefix."""
        state = encode(self.tok, self.frame.line + x)
        return [*self.frame.head, *state]

    def prompt(self, x, z):
        """The ids before y."""
        action = encode(self.tok, "\naction: " + z)
        question = encode(self.tok, "\nnext:")
        tail = self.frame.tail
        return [*self.before(x), *action, *question, *tail]

    def target(self, y):
        """The ids of y with its end. Without the end, log P would score "y as a beginning"."""
        state = encode(self.tok, self.frame.line + y)
        return [*state, self.tok.eos_token_id]

    def read(self, ids):
        """The state that sampled ids spell."""
        return decode(self.tok, ids).removeprefix(self.frame.line)

    def rows(self, triples):
        """[(prompt, target)] of (x, z, y): what likelihood learns from."""
        xs, zs, ys = columns(triples, 3)
        prompts = map(self.prompt, xs, zs)
        targets = map(self.target, ys)
        return list(zip(prompts, targets))

    # Score and sample

    def logp(self, xs, zs, ys, options=None):
        """(N,) log P(y | x, z), summed over tokens, in nats."""
        prompts = list(map(self.prompt, xs, zs))
        targets = list(map(self.target, ys))
        shared = [len(self.before(x)) for x in xs]         # an x that comes twice is computed once
        options = options or self.options
        return lm.score(self.net, prompts, targets, options, shared)

    def draw(self, prompts, n, options, generator, guess):
        """(rows, logps) of `lm.sample`. guess: states near the answer, which only images use."""
        return lm.sample(self.net, prompts, n, self.longest, options, generator)

    def rollouts(self, xs, zs, n, options, generator=None, guess=None):
        """n futures for each (x, z) as ids, side by side, with their log-probs."""
        prompts = list(map(self.prompt, xs, zs))
        rows, logps = self.draw(prompts, n, options, generator, guess or xs)
        return grpo.Rollouts(prompts, rows, logps, options)

    def sample(self, xs, zs, n=1, generator=None, options=None):
        """n futures y_hat for each (x, z); those of one pair are side by side."""
        rollouts = self.rollouts(xs, zs, n, options or self.options, generator)
        return list(map(self.read, rollouts.rows))

    def predict(self, xs, zs):
        """The greedy y_hat for each (x, z)."""
        greedy = dataclasses.replace(self.options, temperature=0)
        rollouts = self.rollouts(xs, zs, 1, greedy)
        return list(map(self.read, rollouts.rows))


def best_of_n(P, Q, xs, zs, n=8, generator=None):
    """The future, among n drawn as the paper draws, in which Q reads z best: the paper's test-time
    verification."""
    options = dataclasses.replace(P.options, **PAPER)
    y_hats = P.sample(xs, zs, n, generator, options)
    z_rows = map(Q.target, zs)
    R = phase1_reward(Q, repeat(xs, n), repeat(z_rows, n), y_hats)                    # (B * n,)
    return take_best(y_hats, R.view(-1, n))


# --- Phase I ---------------------------------------------------------------------------------

def phase1_reward(Q, xs, z_rows, y_hats):
    """(N,) how well Q reads the action z in the predicted future y_hat, in nats. z_rows: the ids of
    z as Q drew them."""
    # Eq. 3: R = log Q(z | x, y_hat)
    return Q.score(xs, z_rows, y_hats)


def phase1_rollouts(P, Q, pairs, phase, generator):
    """G futures for each pair (x, y), and their rewards: (rollouts, R (B, G), examples). None if Q
    reads no action in any pair."""
    # z ~ Q(. | x, y): one guess for each pair, as ids; without pairs where Q reads no action
    guessed = Q.label(pairs, generator)
    if not parallel.total(len(guessed)):
        return None
    xs, z_rows, ys = columns(guessed, 3)
    zs = list(map(Q.read, z_rows))

    # y_hat_1, .., y_hat_G ~ P(. | x, z)
    G = phase.group_size
    options = grpo.sampling(P.options, phase)
    rollouts = P.rollouts(xs, zs, G, options, generator, guess=ys)
    y_hats = list(map(P.read, rollouts.rows))
    z_rows = repeat(z_rows, G)
    R = phase1_reward(Q, repeat(xs, G), z_rows, y_hats)                               # (B * G,)
    R = grpo.shape(R, z_rows, phase)
    R = R.view(-1, G)                                                                 # (B, G)
    examples = dicts(
        x=xs,
        z=zs,
        y=ys,
        y_hat=y_hats[::G],
        reward=R[:, 0].tolist(),
    )
    return rollouts, R, examples
