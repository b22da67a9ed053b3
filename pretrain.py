"""Make the tiny model that ships in data/tiny again, from nothing: `python pretrain.py`, 36 minutes
on two cores.

Claim: a model that has learnt to copy a state and to change what an action names needs a few
hundred labels of a new world. The paper starts from models of 3 to 7 billion parameters, which can
do that. This one has 1.1 million.

It first learns to say random rows of tokens again: without that, it takes ten times as long to
learn anything else. Then come the transitions of made-up worlds (`envs/made_up.py`) in both
directions, in the prompts of `swirl_fwm.py` and `swirl_idm.py`: y after x and z, and z after x and
y, of which it sees the changed lines or all.

loss = mean of -log p over the tokens of y  +  half the mean over the tokens of z
"""
import argparse
import random
import sys
import time

import torch

import sft
from envs import made_up, records
from evals import metrics
from models import optim, pretrained, tiny
from models.text import encode
from swirl_fwm import FWM
from swirl_idm import IDM, line_diff

WEIGHT_Z = 0.5          # weight of z in the loss: half of its words, as the verb, cannot be known


def make_tokenizer(rng, n=8000):
    """Fitted on n made-up transitions and on the words that stand between the parts of a prompt."""
    texts = []
    for _ in range(n):
        x, z, y = made_up.transition(rng)
        texts += ["\n" + x, " " + z, "\nnext:", "\naction: " + z]
        texts += ["\n" + line for line in line_diff(x, y)]
    return tiny.make_tokenizer(texts)


def rows_of(P, Q, x, z, y, rng):
    """(rows for P, rows for Q) of a transition, each [(prompt, target)]; none for Q where nothing
    changes. One row in ten shows Q both states."""
    rows_P = P.rows([(x, z, y)])
    view = "full" if x != y and rng.random() < 0.1 else "diff"
    if x == y:
        return rows_P, []
    return rows_P, IDM(Q.net, Q.tok, view=view).rows([(x, z, y)])


def babble(tok, longest, rng):
    """A row of random tokens, and then the same row again. In half of the rows they are few, so
    that each comes several times: what follows is then known from more than the last token."""
    known = (
        range(len(tok))
        if rng.random() < 0.5
        else rng.sample(range(len(tok)), 2 ** rng.randint(3, 7))
    )
    ids = rng.choices(known, k=rng.randint(4, longest)) + [tok.eos_token_id]
    return ids, ids


def draw(P, Q, step, args, rng):
    """(rows for P, rows for Q) of about args.tokens tokens. At first all of them babble, from a
    tenth of the steps on a tenth of them. Short rows and worlds of a few cells come first: in them
    a model finds out how to copy."""
    done = step / args.steps
    most, longest = int(4 + 60 * min(1.0, 2 * done) ** 2), int(24 + 200 * done)
    random_share = max(0.1, 1 - 9 * done)
    rows_P, rows_Q, tokens = [], [], 0
    while tokens < args.tokens:
        if tokens < random_share * args.tokens:
            new_P, new_Q = [babble(P.tok, longest, rng)], []
        else:
            new_P, new_Q = rows_of(P, Q, *made_up.transition(rng, most), rng)
        rows_P += new_P
        rows_Q += new_Q
        tokens += sum(len(prompt) + len(target) for prompt, target in new_P + new_Q)
    return rows_P, rows_Q


def backward(P, Q, rows_P, rows_Q):
    """Add the gradient of the loss. Returns the means over y and over z."""
    y, z = (sum(len(target) for _, target in rows) for rows in (rows_P, rows_Q))
    return sft.backward(P, rows_P, y), sft.backward(Q, rows_Q, z / WEIGHT_Z) / WEIGHT_Z


def held_out(P, Q, n=200):
    """Scores of n made-up transitions of another seed, decoded freely."""
    rng = random.Random("held out")
    xs, zs, ys = map(list, zip(*(made_up.transition(rng) for _ in range(n))))
    longest = max(len(P.target(y)) for y in ys) + 8
    y_hat = FWM(P.net, P.tok, longest=longest).predict(xs, zs)
    z_hat = Q.predict(xs, ys)
    kept, right = 0, 0
    for x, y, predicted in zip(xs, ys, y_hat):
        same = set(x.split("\n")) & set(y.split("\n"))
        kept += len(same)
        right += len(same & set(predicted.split("\n")))
    return {
        "exact": metrics.exact(y_hat, ys),
        "exact_changed": metrics.exact_changed(xs, y_hat, ys),
        "unchanged_lines": right / kept,
        "idm_exact": metrics.exact(z_hat, zs),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="data/tiny", help="folder for the model")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--tokens", type=int, default=4000, help="tokens a step, about")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.error = records.fail
    args = parser.parse_args(argv)
    if min(args.steps, args.tokens, args.threads) < 1 or not 0 < args.lr < float("inf"):
        records.fail("--steps, --tokens, --threads and --lr must be more than 0")
    torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)
    tok = make_tokenizer(rng)
    net = tiny.make_model(tok, seed=args.seed)
    P, Q = FWM(net, tok), IDM(net, tok, longest=64)             # one net for both directions
    optimizers = optim.make_optimizers(net, args.lr, decay=0.1)
    begin, losses = time.monotonic(), []
    for step in range(1, args.steps + 1):
        losses.append(backward(P, Q, *draw(P, Q, step, args, rng)))
        encode.cache_clear()                                    # no text comes twice
        optim.step(net, optimizers, sft.rate(step, args.steps, args.lr, rise=100))
        if step % 100 == 0:
            y, z = (sum(part) / 100 for part in zip(*losses[-100:]))
            print(f"step {step} of {args.steps}: -log p of a token of y {y:.4f}, of z {z:.4f}; "
                  f"{(time.monotonic() - begin) / 60:.1f} minutes", flush=True)
        if step % 1000 == 0 or step == args.steps:
            print({name: round(value, 4) for name, value in held_out(P, Q).items()}, flush=True)
            pretrained.save(net, tok, args.out)


if __name__ == "__main__":
    sys.exit(main())
