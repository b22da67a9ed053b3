"""A causal language model as this project uses it: sample rows, score rows.

Claim: P(y|x,z) and Q(z|x,y) are both  log p(row | prefix) = sum_t log p(row_t | prefix, row_<t).
`sample` draws rows and returns the log-probabilities of their tokens. `logprobs` scores given rows.

| symbol  | shape        | meaning                                                              |
| ------- | ------------ | -------------------------------------------------------------------- |
| prefix  | B lists      | token ids of a prompt                                                |
| row     | N lists      | token ids that follow a prefix; `owner[n]` in 0..B-1 says which one  |
| logp    | (N, T)       | log p of each scored token; 0 where nothing is scored                |

Two ideas make this fast, and both are exact.
1. Shared prefix. A prompt goes through the model once for all its rows. Its keys and values are
   cached, and the rows go on from there. Gradients flow through the cache.
2. Masks come from lengths, never from token ids. So a padding token that equals the end token
   does no harm. Positions are always explicit.

Models stay in eval mode (no dropout): sampler and trainer see the same distribution.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from models import parallel
from models.batches import as_lists, chunks, distinct, pad, places, scored_mask, take
from models.cache import Room


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


def freeze(net, options):
    """A copy that does not learn. Under autocast its weights stay marked as learning, so that each
    is cast once."""
    return parallel.plain(net).eval().requires_grad_(options.half)


# --- the shared prefix -----------------------------------------------------------------------

def check_mode(net):
    """Refuse what would change the numbers."""
    assert not net.training, "dropout is on: call eval()"
    assert not net.is_activation_checkpointing, "checkpointing drops the cache silently"


def prefill(net, prefixes):
    """Run the prefixes without their last token, which predicts a row's first token and is fed
    again with each row. Returns (cache, mask (B, P-1), last token (B, 1), its position (B, 1))."""
    check_mode(net)
    ids, mask = pad(prefixes, "left", net.device)    # (B, P)
    position = (mask.cumsum(1) - 1).clamp(min=0)    # (B, P)
    cache = DynamicCache(config=net.config)
    kinds = {type(layer) for layer in cache.layers}
    assert kinds <= {DynamicLayer, DynamicSlidingWindowLayer}, "only attention can branch"
    cache.layers = [Room() for _ in cache.layers]
    if ids.shape[1] > 1:
        net(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=position[:, :-1],
            cache=cache, use_cache=True, logits_to_keep=1)
    return cache, mask[:, :-1], ids[:, -1:], position[:, -1:]


# --- the distribution of the next token ------------------------------------------------------

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
    out = logits < logits.amax(-1, keepdim=True) + math.log(min_p)
    if drawn is not None:
        out = out.scatter(1, drawn[:, None], False)
    return logits.masked_fill(out, -torch.inf)


def nucleus(logits, top_p):
    """Keep the smallest set of likeliest tokens whose mass reaches top_p (Holtzman et al. 2020)."""
    value, index = logits.sort(descending=True)
    p = value.softmax(-1)
    mass_before = p.cumsum(-1) - p
    return logits.scatter(1, index, value.masked_fill(mass_before >= top_p, -torch.inf))


def draw(logp, at, u):
    """The token of row logp[at[n]] at u[n] in [0, 1), by inversion. All rows lie end to end on one
    line, row b from b to b + 1. The clamp keeps rounding from stepping into the next row."""
    mass = logp.double().exp().cumsum(-1)    # (U, V)
    mass = mass / mass[:, -1:]
    line = (mass + torch.arange(len(mass), device=logp.device)[:, None]).flatten()
    place = torch.searchsorted(line, at + u.clamp(max=1 - 2**-30), right=True)
    return place - at * logp.shape[-1]


# --- sample ----------------------------------------------------------------------------------

def sample(net, prefixes, n, longest, options, generator=None, at_once=True):
    """n rows after each prefix: (rows, logps), lists of B*n; rows of one prefix are side by side.
    A row holds ids up to and including eos; a row without eos was cut at `longest`. at_once: in one
    batch, so that the draws do not depend on `options.tokens`."""
    size = batch_size(prefixes, n, longest, options)
    if at_once:
        size = max(1, len(prefixes))
    order = sorted(range(len(prefixes)), key=lambda b: len(prefixes[b]))
    rows, logps = [None] * len(prefixes), [None] * len(prefixes)
    for i in range(0, len(order), size):
        part = order[i:i + size]
        drawn = sample_batch(net, [prefixes[b] for b in part], n, longest, options, generator)
        for k, b in enumerate(part):
            rows[b], logps[b] = (lists[k * n:k * n + n] for lists in drawn)
    return sum(rows, []), sum(logps, [])


def batch_size(prefixes, n, longest, options):
    """Prompts at a time: 256 rows, or as many as hold 16 micro-batches of tokens (keys, not
    activations)."""
    size = 256 // n
    if options.tokens and prefixes:
        size = min(size, 16 * options.tokens // (max(map(len, prefixes)) + longest) // n)
    return max(1, size)


@torch.no_grad()
def sample_batch(net, prefixes, n, longest, options, generator=None):
    """`sample` for one batch. Rollouts of a prompt that are equal so far are one row of it."""
    with autocast(net, options):
        cache, mask, token, position = prefill(net, prefixes)
        N = len(prefixes) * n
        ids = torch.full((N, longest), options.eos, device=net.device)
        logps = torch.zeros(N, longest, device=net.device)
        live = torch.arange(N, device=net.device)              # (m,) rollouts that go on
        at = live // n                                         # (m,) where each is in the batch
        for t in range(longest):
            mask = torch.cat([mask, torch.ones_like(token)], 1)                       # (U, L)
            logits = net(token, attention_mask=mask, position_ids=position,
                         cache=cache, use_cache=True).logits[:, -1]                   # (U, V)
            logp = log_policy(logits, torch.tensor(t), options)
            if options.temperature:
                drawn = draw(logp, at, uniform(at.shape, net.device, generator))      # (m,)
            else:
                drawn = logp.argmax(-1)[at]
            ids[live, t], logps[live, t] = drawn, logp[at, drawn]
            going = drawn != options.eos
            if not going.any():
                break
            live, V = live[going], logp.shape[-1]
            children = at[going] * V + drawn[going]
            children, at = torch.unique(children, return_inverse=True)                # (U,), (m,)
            parent, token = children // V, (children % V)[:, None]
            if len(parent) != len(mask) or len(parent.unique()) != len(mask):
                cache.batch_select_indices(parent)
                mask, position = mask[parent], position[parent]
            position = position + 1
    return as_lists(ids, logps, options.eos)


def uniform(shape, device, generator):
    """Random numbers in [0, 1)."""
    return torch.rand(shape, dtype=torch.float64, device=device, generator=generator)


def autocast(net, options):
    """Products in bfloat16 if the options say so: each weight is cast once within."""
    return torch.autocast(net.device.type, torch.bfloat16, enabled=options.half)


# --- score -----------------------------------------------------------------------------------

def logprobs(net, prefixes, rows, owner, options, n_scored=None):
    """(N, T) log p(row_t | prefix, row_<t) of the last n_scored[n] tokens of each row (all by
    default). Differentiable. Equal rows of a prefix are computed once. Memory: see `chunks`."""
    n_scored = n_scored or [len(row) for row in rows]
    first, where = distinct(rows, list(zip(owner, n_scored)))
    rows, owner, n_scored = ([values[n] for n in first] for values in (rows, owner, n_scored))
    with autocast(net, options):
        if len(set(owner)) == len(rows):
            logits, targets, t = run_whole(net, [prefixes[o] for o in owner], rows, n_scored)
        else:
            logits, targets, t = run_shared(net, prefixes, rows, owner, n_scored)
    logp = log_policy(logits, t, options, targets)    # (M, V)
    logp = -F.nll_loss(logp, targets, reduction="none")    # (M,)
    T = max(map(len, rows))
    out = torch.zeros(len(rows), T, device=net.device)
    out = out.masked_scatter(scored_mask(rows, n_scored, T, net.device), logp)
    return out[where]


def run_whole(net, prefixes, rows, n_scored):
    """One pass over prefix + row: (logits (M, V), targets (M,), t (M,)) of the M scored tokens.
    No mask is needed, since nothing real stands behind the padding."""
    check_mode(net)
    whole = [[*prefix, *row] for prefix, row in zip(prefixes, rows)]
    ids, _ = pad(whole, "right", net.device)    # (N, L)
    scored = scored_mask(whole, n_scored, ids.shape[1], net.device)[:, 1:]    # (N, L - 1)
    logits = net(ids[:, :-1], use_cache=False, logits_to_keep=scored).logits
    return logits.view(-1, logits.shape[-1]), ids[:, 1:][scored], places(scored)


def run_shared(net, prefixes, rows, owner, n_scored):
    """One pass over the prefixes and one over the rows. Returns the same as `run_whole`."""
    cache, mask, last, position = prefill(net, prefixes)
    owner = torch.as_tensor(owner, device=net.device)
    cache.batch_select_indices(owner)
    ids, live = pad(rows, "right", net.device)    # (N, T)
    T = ids.shape[1]
    scored = scored_mask(rows, n_scored, T, net.device)    # (N, T)
    logits = net(torch.cat([last[owner], ids[:, :-1]], 1),
                 attention_mask=torch.cat([mask[owner], live], 1),
                 position_ids=position[owner] + torch.arange(T, device=net.device),
                 cache=cache, use_cache=True, logits_to_keep=scored).logits
    return logits.view(-1, logits.shape[-1]), ids[scored], places(scored)


@torch.no_grad()
def score_tokens(net, prefixes, rows, owner, options, n_scored=None):
    """`logprobs` without gradient, in chunks."""
    out = torch.zeros(len(rows), max(map(len, rows), default=0), device=net.device)
    for part in chunks(prefixes, rows, owner, budget(net, options)):
        n = n_scored and [n_scored[i] for i in part]
        logp = logprobs(net, *take(prefixes, rows, owner, part), options, n)
        out[part, :logp.shape[1]] = logp
    return out


def score(net, prefixes, rows, options, n_scored=None):
    """(N,) log p(row | prefix) of a prefix and a row each. Equal prefixes are computed once."""
    prefixes = [tuple(prefix) for prefix in prefixes]
    kinds = {prefix: o for o, prefix in enumerate(dict.fromkeys(prefixes))}
    owner = [kinds[prefix] for prefix in prefixes]
    return score_tokens(net, list(kinds), rows, owner, options, n_scored).sum(1)


def budget(net, options):
    """Tokens at a time: memory grows with them, and a CPU gains nothing from more."""
    return options.tokens or (1024 if net.device.type == "cpu" else 16384)
