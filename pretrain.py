"""Make the tiny model that ships in data/tiny again, from nothing: `python pretrain.py`, about 40 minutes on two cores.

Claim: a model that has learnt to copy a state and to change what an action names needs a few hundred labels of a new world.
The paper starts from models of 3 to 7 billion parameters, which can do that. This one has 1.1 million.

It first learns to say a random row of tokens again: without that, it takes ten times as long to learn anything else.
Then come the transitions of made-up worlds (`envs/made_up.py`) in both directions, in the prompts of `swirl_fwm.py` and
`swirl_idm.py`: y after x and z, and z after x and y, of which it sees the changed lines or all.

loss = mean of -log p over the copied tokens of y  +  .3 of the mean over its changed ones  +  the mean over z
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


COPIED, CHANGED, ACTION = range(3)                  # the parts of a target: of y what x has and what it has not; z
WEIGHT = torch.tensor([1.0, 0.3, 1.0])              # a mean for each part: changed tokens and z are few


def make_tokenizer(rng, n=8000):
    """Fitted on n made-up transitions and on the words that stand between the parts of a prompt."""
    texts = []
    for _ in range(n):
        x, z, y = made_up.transition(rng)
        texts += ["\n" + x, " " + z, "\nnext:", "\naction: " + z, *("\n" + line for line in swirl_idm.line_diff(x, y))]
    return tiny.make_tokenizer(texts)


def changed(x, y):
    """(begin, end) of the stretch of y that x has not, for two lists of tokens: y[:begin] and y[end:] are copied.
    Where something is only taken out, it is the token that follows."""
    begin, behind, shorter = 0, 0, min(len(x), len(y))
    while begin < shorter and x[begin] == y[begin]:
        begin += 1
    while behind < shorter - begin and x[-1 - behind] == y[-1 - behind]:
        behind += 1
    end = len(y) - behind
    return begin, end if end > begin or x == y else end + 1


def rows_of(tok, x, z, y, rng):
    """A row for P and, where something changes, one for Q: [(prompt, target, part of each token of the target)]."""
    target, copied = swirl_fwm.target(tok, y), swirl_fwm.target(tok, x)
    begin, end = changed(copied, target)
    parts = [CHANGED if begin <= t < end else COPIED for t in range(len(target))]
    out = [(swirl_fwm.prompt(tok, x, z), target, parts)]
    if x != y:
        view = "full" if rng.random() < 0.1 else "diff"
        z_ids = swirl_idm.target(tok, z)
        out.append((swirl_idm.prompt(tok, x, y, view), z_ids, [ACTION] * len(z_ids)))
    return out


def babble(tok, rng):
    """A row of random tokens, and then the same row again."""
    ids = [rng.randrange(len(tok)) for _ in range(rng.randint(4, 24))] + [tok.eos_token_id]
    return ids, ids, [COPIED] * len(ids)


def draw(tok, step, args, rng):
    """Rows of about args.tokens tokens. At first all of them babble, from a tenth of the steps on a tenth of them.
    Worlds of a few cells come first: the more transitions, the sooner it learns what z does."""
    done = step / args.steps
    most = int(4 + 60 * done ** 3)
    random_share = max(0.1, 1 - 9 * done)
    out, tokens = [], 0
    while tokens < args.tokens:
        if tokens < random_share * args.tokens:
            new = [babble(tok, rng)]
        else:
            new = rows_of(tok, *made_up.transition(rng, most), rng)
        out += new
        tokens += sum(len(prompt) + len(target) for prompt, target, _ in new)
    return out


def backward(model, rows):
    """Adds the gradient of the loss; returns the mean of -log p of each part."""
    prompts, targets, parts = zip(*rows)
    counts = torch.bincount(torch.tensor(sum(parts, [])), minlength=3).clamp(min=1)            # (3,)
    owner, means = range(len(rows)), torch.zeros(3)
    for chosen in lm.chunks(prompts, targets, owner, lm.budget(model)):
        logp = lm.logprobs(model, *lm.take(prompts, targets, owner, chosen))                   # (N, T), 0 where nothing is
        part, _ = lm.pad([parts[n] for n in chosen], "right", 0, model.device)                 # (N, T)
        mean_of = torch.stack([-logp[part == which].sum() / counts[which] for which in range(3)])
        (WEIGHT * mean_of).sum().backward()
        means += mean_of.detach()
    return means


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
    parser.add_argument("--tokens", type=int, default=4000, help="tokens a step, about")
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
        losses.append(backward(model, draw(tok, step, args, rng)))
        lm.encode.cache_clear()                                 # no text comes twice
        lm.optimizer_step(model, optimizers, sft.rate(step, args.steps, args.lr, rise=100))
        if step % 100 == 0:
            copied, new, action = torch.stack(losses[-100:]).mean(0).tolist()
            print(f"step {step} of {args.steps}: -log p of copied tokens {copied:.4f}, changed {new:.4f}, "
                  f"z {action:.4f}; {(time.monotonic() - begin) / 60:.1f} minutes", flush=True)
        if step % 1000 == 0 or step == args.steps:
            print({name: round(value, 4) for name, value in held_out(model, tok).items()}, flush=True)
            pretrained.save(model, tok, args.out)


if __name__ == "__main__":
    sys.exit(main())
