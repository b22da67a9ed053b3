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

import copy
import dataclasses

import grpo
import lm
from models import parallel
from models.text import decode, encode, frame

# --- P as a language model -------------------------------------------------------------------

class FWM:
    """P_theta(y | x, z): a language model with its tokenizer; how it reads (x, z) and writes y."""

    def __init__(self, net, tok, options=None, longest=128):
        self.net, self.tok = net, tok
        self.options = options or lm.Options(tok.eos_token_id)
        self.longest = longest                             # tokens of the longest y to draw

    def with_net(self, net):
        """The same with other weights."""
        twin = copy.copy(self)
        twin.net = net
        return twin

    def frozen(self):
        """A copy that does not learn: pi_ref, P as it stands now."""
        return self.with_net(lm.freeze(self.net, self.options))

    def before(self, x):
        """The ids of x. They come first, so that all that is asked about x shares this prefix."""
        return [*frame(self.tok).head, *encode(self.tok, frame(self.tok).line + x)]

    def prompt(self, x, z):
        """The ids before y."""
        action = encode(self.tok, "\naction: " + z)
        question = encode(self.tok, "\nnext:")
        return [*self.before(x), *action, *question, *frame(self.tok).tail]

    def target(self, y):
        """The ids of y with its end. Without the end, log P would score "y as a beginning"."""
        return [*encode(self.tok, frame(self.tok).line + y), self.tok.eos_token_id]

    def read(self, ids):
        """The state that sampled ids spell."""
        return decode(self.tok, ids).removeprefix(frame(self.tok).line)

    def rows(self, triples):
        """[(prompt, target)] of (x, z, y): what likelihood learns from."""
        return [(self.prompt(x, z), self.target(y)) for x, z, y in triples]

    def logp(self, xs, zs, ys, options=None):
        """(N,) log P(y | x, z), summed over tokens, in nats."""
        prefixes = [self.before(x) for x in xs]            # an x that comes twice is computed once
        prompts = [self.prompt(x, z) for x, z in zip(xs, zs)]
        targets = [self.target(y) for y in ys]
        rows = [prompt[len(prefix):] + target
                for prefix, prompt, target in zip(prefixes, prompts, targets)]
        return lm.score(self.net, prefixes, rows, options or self.options,
                        n_scored=[len(target) for target in targets])

    def draw(self, prompts, n, options, generator=None, guess=None, at_once=False):
        """(rows, logps) of `lm.sample`. guess: states near the answer, which only images use."""
        return lm.sample(self.net, prompts, n, self.longest, options, generator, at_once)

    def sample(self, xs, zs, n=1, generator=None):
        """n futures y_hat for each (x, z); those of one pair are side by side."""
        prompts = [self.prompt(x, z) for x, z in zip(xs, zs)]
        rows, _ = self.draw(prompts, n, self.options, generator, guess=xs)
        return [self.read(row) for row in rows]

    def predict(self, xs, zs):
        """The greedy y_hat for each (x, z)."""
        prompts = [self.prompt(x, z) for x, z in zip(xs, zs)]
        greedy = dataclasses.replace(self.options, temperature=0)
        rows, _ = self.draw(prompts, 1, greedy, guess=xs)
        return [self.read(row) for row in rows]

    def rollouts(self, xs, zs, phase, generator, guess=None):
        """G futures for each (x, z), with what GRPO needs to know of them."""
        prompts = [self.prompt(x, z) for x, z in zip(xs, zs)]
        options = dataclasses.replace(self.options, temperature=phase.temperature,
                                      min_p=phase.min_p)
        rows, logps = self.draw(prompts, phase.group_size, options, generator, guess, at_once=True)
        return grpo.Rollouts(prompts, rows, logps, options)


def best_of_n(P, Q, xs, zs, n=8, generator=None):
    """The future, among n drawn, in which Q reads z best: the paper's test-time verification."""
    y_hats = P.sample(xs, zs, n, generator)
    z_rows = [Q.target(z) for z in zs]
    R = phase1_reward(Q, grpo.repeat(xs, n), grpo.repeat(z_rows, n), y_hats).view(len(xs), n)
    return [y_hats[i * n + k] for i, k in enumerate(R.argmax(1).tolist())]


# --- Phase I ---------------------------------------------------------------------------------

def phase1_reward(Q, xs, z_rows, y_hats):
    """(N,) how well Q reads the action z in the predicted future y_hat, in nats. z_rows: the ids of
    z as Q drew them."""
    # Eq. 3: R = log Q(z | x, y_hat)
    return Q.score(xs, z_rows, y_hats)


def phase1_step(P, Q, ref, optimizers, pairs, phase, lr, generator):
    """One step on pairs [(x, y)]: theta moves, phi is frozen. Returns (log, examples); log is None
    if Q reads no action in any pair."""
    xs, ys = zip(*pairs)
    # z ~ Q(. | x, y): one guess for each pair, as ids; None where Q reads no action
    z_rows = Q.label(xs, ys, generator)
    read = [(x, z_row, y) for x, z_row, y in zip(xs, z_rows, ys) if z_row is not None]
    if not parallel.total(len(read)):
        return None, []
    xs, z_rows, ys = zip(*read) if read else ((), (), ())
    zs = [Q.read(z_row) for z_row in z_rows]

    # y_hat_1, .., y_hat_G ~ P(. | x, z)
    G = phase.group_size
    rollouts = P.rollouts(xs, zs, phase, generator, guess=ys)
    y_hats = [P.read(row) for row in rollouts.rows]
    z_rows = grpo.repeat(z_rows, G)
    R = phase1_reward(Q, grpo.repeat(xs, G), z_rows, y_hats)               # (B * G,)
    R = grpo.shape(R, [len(z_row) for z_row in z_rows], phase)

    log = grpo.step(P, ref, optimizers, rollouts, R.view(len(xs), G), phase, lr)
    examples = [dict(x=x, z=z, y=y, y_hat=y_hat, reward=r)
                for x, z, y, y_hat, r in zip(xs, zs, ys, y_hats[::G], R[::G].tolist())]
    return log, examples
