"""Can `lm` work with a model? Asked once, before a run.

Claim: where `check` is silent, three ways to the log-probability of a row agree: as it is drawn
behind a cached prompt, as it is scored beside others, and by a plain forward pass without cache,
mask or padding. Models without keys and values to cache (Mamba) cannot be sampled.
"""
import random

import torch

import lm
from models import pretrained

# nats a token, in float32 and in what rounds more
LIMIT, ROUGH = 0.01, 0.5


@torch.no_grad()
def gap(net, size, longest, T=6, n=2):
    """The largest difference between the three ways, in nats a token. size: ids to draw prompts
    from; longest: tokens of the longest prompt and its row."""
    rng = random.Random(0)
    T = min(T, longest - 1)
    prompts = [rng.choices(range(size), k=k) for k in (longest - T, (longest - T + 1) // 2)]
    options = lm.Options(eos=-1)                           # rows do not end
    generator = torch.Generator(net.device).manual_seed(0)
    rows, drawn = lm.sample(net, prompts, n, T, options, generator)
    owner = [i // n for i in range(len(rows))]
    truth = torch.stack([plain(net, prompts[o], row) for o, row in zip(owner, rows)])     # (N, T)
    shared = lm.logprobs(net, prompts, rows, owner, options)
    whole = lm.logprobs(net, prompts, rows[::n], [0, 1], options)
    gaps = [torch.tensor(drawn).to(truth) - truth, shared - truth, whole - truth[::n]]
    return max(gap.abs().max().item() for gap in gaps)


def plain(net, prompt, row):
    """(T,) log p(row_t | prompt, row_<t) by one forward pass."""
    ids = torch.tensor([[*prompt, *row]], device=net.device)
    logits = net(ids, use_cache=False).logits[0, len(prompt) - 1:-1]                  # (T, V)
    return logits.float().log_softmax(-1).gather(1, ids[0, len(prompt):, None])[:, 0]


def check(net, size, longest):
    """ValueError if the ways differ by more than rounding, or if the model cannot be run."""
    try:
        found = gap(net, size, longest)
    except Exception as error:                             # whatever a model makes of a cache
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"it cannot be sampled ({reason})") from None
    limit = LIMIT if net.dtype == torch.float32 else ROUGH
    if not found <= limit:
        window = pretrained.window(net)
        short = f" and a window of {window}" if window and window < longest else ""
        raise ValueError(f"drawn and scored rows differ by {found:.2g} nats a token, with a prompt "
                         f"of {longest} tokens{short}")
