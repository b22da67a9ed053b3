"""Q_phi(z | x, y), the inverse dynamics model (IDM), and Phase II, which trains it on pairs (x, y) without actions.

Claim (Theorem 3.2): with R = log P(y | x, z), beta = 1 and the prior P(z|x) = pi_ref,
    J(phi) = E_{z~Q(.|x,y)} [R] - beta * KL(Q(. | x, y) || pi_ref)                                                 (Eq. 5)
is the ELBO of log P(y | x): raising it finds actions that explain what happened. P is frozen throughout.

| symbol | in code          | meaning                                                                                |
| ------ | ---------------- | -------------------------------------------------------------------------------------- |
| x, y   | str              | state before, state after, both observed                                               |
| z_k    | ids, then str    | one of G actions that Q draws; its reward is R_k = log P(y | x, z_k), in nats          |
| pi_ref | `ref`            | Q as it stood when the phase began                                                     |

Departures from the paper:
1. pi_ref here reads (x, y), as Q does: the IDM at the phase's start, which is what the paper uses in practice. Theorem 3.2
   wants a prior of x alone; then at beta = 1 this J is the ELBO under the prior "what Q believed before the phase".
2. beta = .1 as in the paper's experiments is not the ELBO, only beta = 1 is. The KL sits in the reward, per row (`grpo`).
3. The reward is the summed log-probability (the ELBO's), without a floor; the released scripts use the mean per token, floored at
   -10 (`--reward-form mean --floor 10`).
4. With `--spoiled` (images only, by default) Q also learns to refuse, on spoiled copies of the labelled pairs, each with a wrong
   line (`spoil`): one that should have stayed, one that changed to something else, or one that did not change. The refusal is the
   empty action. Only Phase I's reward sees it: scores, candidates of Phase II and labels are drawn without it (`no_refusal`).
5. `view="diff"` shows Q only the lines that change from x to y; the paper's Q reads both states: `view="full"`.
6. Pairs with y = x are left out by default, as in Phase I.
7. For images "diff" lists the patches that change (place, code before, code after), then those beside them (place, code), after a
   shift of the whole if the camera moved (`envs/images.py`); a patch, or two side by side, stand for a wrong line.
"""
import contextlib
import difflib

import torch

import grpo
import lm
import swirl_fwm
from envs import images
from models.pretrained import frame


# --- Q as a language model ----------------------------------------------------------------------------------------------

def line_diff(x, y):
    """The lines that x loses ("- ") and that y gains ("+ "), in order; of images, a line of what changes and one of what is beside. A function of x and y alone."""
    if images.is_image(x):
        return images.diff(x, y) if x != y else []
    a, b = x.split("\n"), y.split("\n")
    out = []
    for tag, i, j, k, l in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag != "equal":
            out += ["- " + line for line in a[i:j]] + ["+ " + line for line in b[k:l]]
    return out


IMPOSSIBLE = ""     # the refusal: an action without a word


@contextlib.contextmanager
def no_refusal(Q, tok):
    """Within, Q may not refuse: the empty action is ruled out of sampling and scoring, the rest is renormalised."""
    before = getattr(Q, "allowed", None)
    allowed = torch.ones(1, Q.config.vocab_size, dtype=torch.bool, device=Q.device) if before is None else before
    allowed = torch.cat([allowed[:1], allowed[1:] if len(allowed) > 1 else allowed])   # (2 or more, V) row 0: the first token
    allowed[0, tok.eos_token_id] = False
    Q.allowed = allowed
    try:
        yield
    finally:
        Q.allowed = before


def spoil(x, y, other, rng):
    """y with one wrong line, as a careless P would write it. Half of the time a line that should have stayed is taken from
    another state; where y changes several lines, a quarter of the time one of them is, and a quarter of the time one of them
    stays as it was in x. None if nothing changes from x to y (the wrong line alone could be a true change) or no line can
    be exchanged."""
    if images.is_image(x):
        return images.spoil(x, y, other, rng)
    before, after = x.split("\n"), y.split("\n")
    changed = [i for i, (old, new) in enumerate(zip(before, after)) if old != new] if len(before) == len(after) else []
    like = {}                                                                      # lines of the other state by their first word
    for line in other.split("\n"):
        like.setdefault(line.split(" ")[0], []).append(line)
    take = lambda some: [(i, line) for i in some for line in like.get(after[i].split(" ")[0], ())
                         if line not in (after[i], *before[i:i + 1])]
    stray = take([i for i, line in enumerate(after) if line in before])
    several = [take(changed), [(i, before[i]) for i in changed]] if len(changed) > 1 else []
    options = [choices for choices in (stray, stray, *several) if choices]
    if x == y or not options:
        return None
    i, line = rng.choice(rng.choice(options))
    return "\n".join(after[:i] + [line] + after[i + 1:])


def warmup_rows(tok, labelled, view, spoiled, rng, times=8):
    """[(prompt, target)] of the labelled (x, z, y), `times` over, and of a share `spoiled` of these with a wrong y, each time
    another one, and no action: P must not be paid for a future that holds the right change and a wrong one. Eq. 2 holds
    for every Q, this one included. A spoiled y whose change some labelled action does make is left out."""
    rows, real = [], {tuple(line_diff(x, y)) for x, _, y in labelled}
    for x, z, y in labelled:
        rows += [(prompt(tok, x, y, view), target(tok, z))] * (times if spoiled else 1)
        for _ in range(times):
            bad = spoil(x, y, rng.choice(labelled)[0], rng) if rng.random() < spoiled else None
            if bad is not None and tuple(line_diff(x, bad)) not in real:
                rows.append((prompt(tok, x, bad, view), target(tok, IMPOSSIBLE)))
    return rows


def prompt(tok, x, y, view="diff"):
    """The ids before z. view "full" (the paper's): both states. "diff" (our default): only the lines that change, which
    a small Q learns from far fewer labels, and which is shorter."""
    first, *rest = [*(line_diff(x, y) if view == "diff" else (x, "next:", y)), "action:"]
    return [*swirl_fwm.before(tok, first), *(t for part in rest for t in lm.encode(tok, "\n" + part)), *frame(tok).tail]


def target(tok, z):
    """The ids of z with its end."""
    return [*lm.encode(tok, frame(tok).space + z if z != IMPOSSIBLE else ""), tok.eos_token_id]


def read(tok, ids):
    """The action that sampled ids spell."""
    return lm.decode(tok, ids).removeprefix(frame(tok).space)


def logp(Q, tok, xs, zs, ys, view="diff"):
    """(N,) log Q(z | x, y), summed over tokens, in nats."""
    return score(Q, tok, xs, ys, [target(tok, z) for z in zs], view)


def score(Q, tok, xs, ys, rows, view="diff"):
    """As `logp`, of the ids that spell z. A prompt that comes several times goes through Q once; in view "full" x alone does."""
    prompts = [prompt(tok, x, y, view) for x, y in zip(xs, ys)]
    shared = [p if view == "diff" else p[:len(swirl_fwm.before(tok, x))] for p, x in zip(prompts, xs)]
    rows_after = [[*p[len(s):], *row] for p, s, row in zip(prompts, shared, rows)]
    return lm.score(Q, shared, rows_after, n_scored=[len(row) for row in rows])


def words_only(Q, tok):
    """(1, V) bool for `lm.restrict`: all but the tokens of images."""
    return torch.ones(1, Q.config.vocab_size, dtype=torch.bool).index_fill(
        1, torch.tensor([i for token, i in tok.get_added_vocab().items() if images.is_token(token)]), False)


def predict(Q, tok, xs, ys, max_new, view="diff"):
    """Greedy z_hat for each (x, y); Q may not refuse."""
    with no_refusal(Q, tok):
        rows = lm.greedy(Q, [prompt(tok, x, y, view) for x, y in zip(xs, ys)], max_new, tok.eos_token_id)
    return [read(tok, row) for row in rows]


def refuses(Q, tok, xs, ys, view="diff"):
    """[bool]: would Q refuse to name an action, if it may?"""
    rows = lm.greedy(Q, [prompt(tok, x, y, view) for x, y in zip(xs, ys)], 1, tok.eos_token_id)
    return [row == [tok.eos_token_id] for row in rows]


def best_of_n(Q, P, tok, xs, ys, max_new, view, n=8, generator=None):
    """Of n sampled actions, the one under which P expects y most."""
    with no_refusal(Q, tok):
        rows = lm.sample_all(Q, [prompt(tok, x, y, view) for x, y in zip(xs, ys)], n, max_new, tok.eos_token_id, generator)
    z_hat = [read(tok, row) for row in rows]
    R = swirl_fwm.logp(P, tok, [x for x in xs for _ in range(n)], z_hat, [y for y in ys for _ in range(n)])
    return [z_hat[i * n + k] for i, k in enumerate(R.view(-1, n).argmax(1).tolist())]


# --- Phase II -----------------------------------------------------------------------------------------------------------

def phase2_step(Q, P, ref, optimizers, tok, pairs, cfg, view="diff", form="sum", floor=10.0, generator=None, replay=None):
    """One step on pairs [(x, y)]; phi moves, theta is frozen. Returns (log, examples [{x, y, z_hat, reward}])."""
    xs, ys = zip(*pairs)

    def reward(owner, rows):                                                       # -> (N,)
        at = lambda values: [values[o] for o in owner]
        logp_y = swirl_fwm.logp(P, tok, at(xs), [read(tok, row) for row in rows], at(ys))  # Eq. 5: R = log P(y | x, z)
        return grpo.shape(logp_y, [len(swirl_fwm.target(tok, y)) for y in at(ys)], form, floor)

    with no_refusal(Q, tok), no_refusal(ref, tok) if ref is not None else contextlib.nullcontext():
        log, rows, R = grpo.step(Q, ref, optimizers, [prompt(tok, x, y, view) for x, y in pairs], reward, cfg,
                                 tok.eos_token_id, generator, replay=replay)
    log["floored"] = grpo.floored(R, floor)
    G = cfg.group_size
    return log, [dict(x=x, y=y, z_hat=read(tok, rows[i * G]), reward=R[i * G].item()) for i, (x, y) in enumerate(pairs)]
