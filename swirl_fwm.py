"""P_theta(y | x, z), the forward world model (FWM), and Phase I, which trains it on pairs (x, y) whose actions nobody saw.

Claim (Theorem 3.1): raising  I(theta) = E_{(x,y)~D} E_{z~Q(.|x,y)} E_{y_hat~P(.|x,z)} log Q(z | x, y_hat)   (Eq. 3)
raises a variational lower bound of the conditional mutual information  I(Z; Y_hat | X) = H(Z|X) - H(Z|Y_hat,X)  (Eq. 1),
since  -H(Z|Y_hat,X) >= E log Q(z | x, y_hat)  (Eq. 2) and H(Z|X) does not depend on theta. In words: predict futures in
which the inverse model can read the action. Q is frozen throughout. `mi_bounds.py` shows the bound as numbers.

| symbol | in code          | meaning                                                                                |
| ------ | ---------------- | -------------------------------------------------------------------------------------- |
| x, y   | str              | state before, state after                                                              |
| z      | str              | the action; in Phase I a guess of Q's, drawn once per pair                             |
| y_hat  | ids, then str    | one of G futures that P draws; its reward is R_k = log Q(z | x, y_hat_k), in nats      |

Departures from the paper:
1. The reward is the summed log-probability of z with its end token (Eq. 3), without a floor. `--reward-form mean` with `--floor 10`
   is the released scripts' form; it is the default for files of your own and for real models, whose rows are long.
2. No KL by default (Eq. 3 and 4 have none; the released scripts add .04).
3. Q may read the line diff of x and y instead of both states (`swirl_idm.prompt`, `view`); the paper's Q reads both.
4. Pairs with y = x are left out by default (`skip_unchanged`): no action can be read in them, so P would be paid for inventing an
   effect. If Q has learnt to refuse (`--spoiled`), a pair in which it refuses is left out, too.
5. P is sampled and scored at temperature 1 (paper: .75, top-p .96), as z and the reward are: Eq. 3. For pixels at 1.3, among the
   tokens at least .05 times as likely as the likeliest (`min_p`): at 1 a third of its groups have no spread, and 1.3 alone spoils
   patches that P is sure of.
6. Where the state is an image (`envs/images.py`), z comes before x, so that each patch of y stands as far behind the same patch
   of x, whatever z; the paper's images come first.
"""
import re

import torch

import grpo
import lm
from models import parallel
import swirl_idm
from envs import images
from models.pretrained import frame


# --- P as a language model ----------------------------------------------------------------------------------------------

def before(tok, x):
    """The ids of x. It comes first, so that everything that is asked about one x shares this prefix."""
    return [*frame(tok).head, *lm.encode(tok, frame(tok).line + x)]


def prompt(tok, x, z):
    """The ids before y."""
    action = lm.encode(tok, "\naction: " + z)
    if images.is_image(x):                                                         # departure 7
        return [*frame(tok).head, *action, *lm.encode(tok, frame(tok).line + x), *frame(tok).tail]
    return [*before(tok, x), *action, *lm.encode(tok, "\nnext:"), *frame(tok).tail]


def target(tok, y):
    """The ids of y with its end: without the end, log P would score "y as a beginning"."""
    return [*lm.encode(tok, frame(tok).line + y), tok.eos_token_id]


def warmup_rows(tok, triples):
    """[(prompt, target)] of (x, z, y): what SFT and Bootstrap learn from."""
    return [(prompt(tok, x, z), target(tok, y)) for x, z, y in triples]


def read(tok, ids):
    """The state that sampled ids spell."""
    return lm.decode(tok, ids).removeprefix(frame(tok).line)


def guess(tok, states):
    """Rows for `lm.sample` to begin with: of images, which P draws nearly so. None of texts, where one word more moves all that follow."""
    return [target(tok, s) for s in states] if states and images.is_image(states[0]) else None


def logp(P, tok, xs, zs, ys, temperature=1.0, top_p=1.0):
    """(N,) log P(y | x, z), summed over tokens, in nats. A text x that comes several times goes through P once."""
    prompts, targets = [prompt(tok, x, z) for x, z in zip(xs, zs)], [target(tok, y) for y in ys]
    cuts = [len(p) if images.is_image(x) else len(before(tok, x)) for p, x in zip(prompts, xs)]
    return lm.score(P, [p[:cut] for p, cut in zip(prompts, cuts)], [p[cut:] + row for p, cut, row in zip(prompts, cuts, targets)],
                    n_scored=[len(row) for row in targets], temperature=temperature, top_p=top_p)


def codes_only(P, tok, y):
    """(T, V) bool for `lm.restrict`: where the image y has a code any code may stand, elsewhere what stands in y."""
    ids = target(tok, y)
    allowed = torch.zeros(len(ids), P.config.vocab_size, dtype=torch.bool)
    allowed[range(len(ids)), ids] = True
    codes = [i for token, i in tok.get_added_vocab().items() if re.fullmatch(r"<c\d+>", token)]
    at = [t for t, i in enumerate(ids) if i in codes]
    allowed[at] = torch.zeros(P.config.vocab_size, dtype=torch.bool).index_fill(0, torch.tensor(codes), True)
    return allowed


def predict(P, tok, xs, zs, max_new):
    """Greedy y_hat for each (x, z)."""
    return [read(tok, row) for row in lm.greedy(P, [prompt(tok, x, z) for x, z in zip(xs, zs)], max_new,
                                                tok.eos_token_id, guess=guess(tok, xs))]


def futures(P, tok, xs, zs, n, max_new, generator=None):
    """n sampled y_hat for each (x, z), those of one side by side."""
    return [read(tok, row) for row in lm.sample_all(P, [prompt(tok, x, z) for x, z in zip(xs, zs)], n, max_new, tok.eos_token_id,
                                                    generator, guess=guess(tok, xs))]


def best_of_n(P, Q, tok, xs, zs, max_new, view, n=8, generator=None):
    """Of n sampled futures, the one in which Q reads z best: the paper's test-time verification, and the forecast of what
    Phase I can bring. Costs n times the sampling and needs z at test time."""
    y_hat = futures(P, tok, xs, zs, n, max_new, generator)
    R = swirl_idm.logp(Q, tok, [x for x in xs for _ in range(n)], [z for z in zs for _ in range(n)], y_hat, view)
    return [y_hat[i * n + k] for i, k in enumerate(R.view(-1, n).argmax(1).tolist())]


# --- Phase I ------------------------------------------------------------------------------------------------------------

def phase1_step(P, Q, ref, optimizers, tok, pairs, cfg, view="diff", form="sum", floor=10.0, max_z=32, generator=None,
                replay=None):
    """One step on pairs [(x, y)]; theta moves, phi is frozen. replay: as in `grpo.step`.
    Returns (log, examples [{x, z, y, y_hat, reward}]); log is None if Q reads no action in any pair."""
    xs, ys = zip(*pairs)
    rows, _ = lm.sample(Q, [swirl_idm.prompt(tok, x, y, view) for x, y in pairs], 1, max_z, tok.eos_token_id,
                        generator=generator)
    zs = [swirl_idm.read(tok, row) for row in rows]                                # z ~ Q(. | x, y), one a pair
    readable = [i for i, row in enumerate(rows) if row[-1] == tok.eos_token_id and zs[i] != swirl_idm.IMPOSSIBLE]
    if not parallel.total(len(readable)):                                          # on no rank
        return None, []
    xs, ys, zs, z_rows = ([values[i] for i in readable] for values in (xs, ys, zs, rows))

    def reward(owner, rows):                                                       # -> (N,)
        at = lambda values: [values[o] for o in owner]
        y_hat = [read(tok, row) for row in rows]
        logq = swirl_idm.score(Q, tok, at(xs), y_hat, at(z_rows), view)
        return grpo.shape(logq, [len(z) for z in at(z_rows)], form, floor)         # Eq. 3: R = log Q(z | x, y_hat)

    log, rows, R = grpo.step(P, ref, optimizers, [prompt(tok, x, z) for x, z in zip(xs, zs)], reward, cfg,
                             tok.eos_token_id, generator, replay, guess(tok, ys))
    log["floored"] = grpo.floored(R, floor)
    G = cfg.group_size
    return log, [dict(x=x, z=z, y=y, y_hat=read(tok, rows[i * G]), reward=R[i * G].item())
                 for i, (x, z, y) in enumerate(zip(xs, zs, ys))]
