"""Make the tiny model that ships in data/tiny again, from nothing: `python pretrain.py`, about an hour on two cores.

Claim: a model that has learnt to copy a state and to change what an action names needs a few hundred labels of a new world.
The paper starts from models of 3 to 7 billion parameters, which can do that. This one has 1.1 million.

It learns the transitions of made-up worlds (`envs/made_up.py`) in both directions, in the prompts of `swirl_fwm.py` and
`swirl_idm.py`: y after x and z, and z after x and y, of which it sees the changed lines or all.
"""
import argparse
import random
import sys
import time

import torch

import lm
import pretrained
import sft
import swirl_fwm
import swirl_idm
import tiny
from envs import made_up
from evals import metrics


def make_tokenizer(rng, n=8000):
    """Fitted on n made-up transitions and on the words that stand between the parts of a prompt."""
    texts = []
    for _ in range(n):
        x, z, y = made_up.transition(rng)
        texts += ["\n" + x, " " + z, "\nnext:", "\naction: " + z, *("\n" + line for line in swirl_idm.line_diff(x, y))]
    return tiny.make_tokenizer(texts)


def rows(tok, transitions, rng):
    """[((prompt, target), side)]: a row for P (side 0) and, where something changes, one for Q (side 1)."""
    out = []
    for x, z, y in transitions:
        out.append(((swirl_fwm.prompt(tok, x, z), swirl_fwm.target(tok, y)), 0))
        if x != y:
            view = "full" if rng.random() < 0.1 else "diff"
            out.append(((swirl_idm.prompt(tok, x, y, view), swirl_idm.target(tok, z)), 1))
    return out


def draw(tok, step, args, rng):
    """Rows of about args.tokens tokens. Worlds of a few cells come first: in short rows a model finds out how to copy."""
    most = int(4 + 60 * min(1.0, 4 * step / args.steps) ** 2)
    out, tokens = [], 0
    while tokens < args.tokens or not any(side for _, side in out):
        new = rows(tok, [made_up.transition(rng, most)], rng)
        out += new
        tokens += sum(len(prompt) + len(target) for (prompt, target), _ in new)
    return out


def loss_of(model, pairs):
    """Mean of -log p(token) over all y, plus the mean over all z; adds its gradient. z is short: one mean of both would
    leave Q a twentieth of the weight."""
    sides = [[pair for pair, which in pairs if which == side] for side in (0, 1)]
    return sum(sft.backward(model, some, sum(len(target) for _, target in some)) for some in sides)


def held_out(model, tok, n=200):
    """Scores of n made-up transitions of another seed, decoded freely."""
    rng = random.Random("held out")
    xs, zs, ys = map(list, zip(*(made_up.transition(rng) for _ in range(n))))
    longest = max(len(swirl_fwm.target(tok, y)) for y in ys) + 8
    y_hat = swirl_fwm.predict(model, tok, xs, zs, longest)
    z_hat = swirl_idm.predict(model, tok, xs, ys, 64, "diff")
    kept, right = 0, 0
    for x, y, predicted in zip(xs, ys, y_hat):
        same = set(x.split("\n")) & set(y.split("\n"))
        kept += len(same)
        right += len(same & set(predicted.split("\n")))
    return {"exact": metrics.exact(y_hat, ys), "exact_changed": metrics.exact_changed(xs, y_hat, ys),
            "unchanged_lines": right / kept, "idm_exact": metrics.exact(z_hat, zs)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="data/tiny", help="folder for the model")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--tokens", type=int, default=6000, help="tokens a step, about")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)
    tok = make_tokenizer(rng)
    model = tiny.make_model(tok, seed=args.seed)
    optimizers = lm.make_optimizers(model, args.lr, decay=0.1)
    begin, losses = time.monotonic(), []
    for step in range(1, args.steps + 1):
        losses.append(loss_of(model, draw(tok, step, args, rng)))
        lm.encode.cache_clear()                                 # no text comes twice
        lm.optimizer_step(model, optimizers, sft.rate(step, args.steps, args.lr, rise=100))
        if step % 100 == 0:
            print(f"step {step} of {args.steps}: loss {sum(losses[-100:]) / 100:.4f}, "
                  f"{(time.monotonic() - begin) / 60:.1f} minutes", flush=True)
        if step % 1000 == 0 or step == args.steps:
            print({name: round(value, 4) for name, value in held_out(model, tok).items()}, flush=True)
            pretrained.save(model, tok, args.out)


if __name__ == "__main__":
    sys.exit(main())
