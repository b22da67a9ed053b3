"""The distribution of the next token: what a row may hold, temperature, min-p, top-p, one draw.

Claim: `log_policy` is the log-probability of what `draw` draws, so that sampling and scoring agree.
"""
import math
from dataclasses import dataclass

import torch

PAPER = dict(temperature=0.75, top_p=0.96)      # how the paper draws what it scores


@dataclass(frozen=True)
class Options:
    """How rows are drawn and scored. The sampler and the trainer get the same options."""
    eos: int                                # the token that ends a row
    temperature: float = 1.0                # 0 takes the likeliest token
    top_p: float = 1.0                      # keep the likeliest tokens of this mass. 1 is off
    min_p: float = 0.0                      # drop tokens this much less likely than the likeliest
    allowed: torch.Tensor | None = None     # (T, V) bool: what token t may be; the last row goes on
    half: bool = False                      # products in bfloat16; weights, log-probs stay float32
    tokens: int = 0                         # tokens at a time. 0: 1024 on a CPU, 16384 on a GPU
    cached: int = 0                         # tokens that the sampler's cache may hold. 0: 16 times


def log_policy(logits, t, options, drawn=None):
    """(n, V) logits of the t-th tokens (n,) -> log-probabilities of what is drawn from. min_p never
    drops `drawn` (n,): a step of the optimizer must not turn a drawn token's log p into -inf."""
    logits = logits.float()
    if options.allowed is not None:
        row = t.clamp(max=len(options.allowed) - 1)
        logits = logits.masked_fill(~options.allowed[row], -torch.inf)
    logits = logits / (options.temperature or 1.0)
    if options.min_p:
        logits = drop_unlikely(logits, options.min_p, drawn)
    if options.top_p < 1:
        logits = nucleus(logits, options.top_p)
    return logits.log_softmax(-1)


def drop_unlikely(logits, min_p, drawn=None):
    """(n, V) with -inf for tokens less than min_p times as likely as the likeliest (min-p, Nguyen
    et al. 2024)."""
    likeliest = logits.amax(-1, keepdim=True)
    out = logits < likeliest + math.log(min_p)
    if drawn is not None:
        out = out.scatter(1, drawn[:, None], False)
    return logits.masked_fill(out, -torch.inf)


def nucleus(logits, top_p):
    """Keep the smallest set of likeliest tokens whose mass reaches top_p (Holtzman et al. 2020)."""
    value, index = logits.sort(descending=True)
    p = value.softmax(-1)
    mass_before = p.cumsum(-1) - p
    value = value.masked_fill(mass_before >= top_p, -torch.inf)
    return logits.scatter(1, index, value)


def draw(logp, at, u):
    """The token of row logp[at[n]] at u[n] in [0, 1), by inversion. All rows lie end to end on one
    line, row b from b to b + 1. The clamp keeps rounding from stepping into the next row."""
    mass = logp.double().exp().cumsum(-1)    # (U, V)
    # Of logits that are no numbers: any token. Its log p is none, so the step is skipped
    mass = (mass / mass[:, -1:]).nan_to_num(1.0)
    begin = torch.arange(len(mass), device=logp.device)[:, None]
    line = (begin + mass).flatten()
    u = u.clamp(max=1 - 2**-30)
    place = torch.searchsorted(line, at + u, right=True)
    return place - at * logp.shape[-1]


def uniform(shape, device, generator):
    """Random numbers in [0, 1) for `draw`."""
    return torch.rand(shape, dtype=torch.float64, device=device, generator=generator)
