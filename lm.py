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
import copy

import torch
import torch.nn.functional as F

from models import parallel
from models.batches import as_lists, chunks, distinct, groups, pad, places, scored_mask, take
from models.cache import new_cache
from models.next_token import Options, draw, log_policy, uniform


def frozen(model):
    """A copy of an FWM or IDM that does not learn: pi_ref. Under autocast its weights stay marked
    as learning, so that each is cast once."""
    twin = copy.copy(model)
    twin.net = parallel.plain(model.net).eval()
    twin.net.requires_grad_(model.options.half)
    return twin


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
    position = mask.cumsum(1) - 1
    position = position.clamp(min=0)
    ids, last = ids[:, :-1], ids[:, -1:]
    mask = mask[:, :-1]
    cache = new_cache(net)
    if ids.shape[1]:
        net(ids, attention_mask=mask, position_ids=position[:, :-1],
            cache=cache, use_cache=True, logits_to_keep=1)
    return cache, mask, last, position[:, -1:]


# --- sample ----------------------------------------------------------------------------------

def sample(net, prefixes, n, longest, options: Options, generator=None):
    """n rows after each prefix: (rows, logps), lists of B*n; rows of one prefix are side by side.
    A row holds ids up to and including eos; a row without eos was cut at `longest`."""
    B = len(prefixes)
    # The random numbers come first: then no draw depends on the batches
    u = uniform((B, n, longest), net.device, generator)
    by_length = sorted(range(B), key=lambda b: len(prefixes[b]))
    size = batch_size(prefixes, n, longest, options)
    rows = [None] * B
    logps = [None] * B
    for i in range(0, B, size):
        part = by_length[i:i + size]
        some = [prefixes[b] for b in part]
        u_part = u[part].flatten(0, 1)    # (N, T)
        drawn = sample_batch(net, some, n, u_part, options)
        for b, *lists in zip(part, *drawn):
            rows[b], logps[b] = lists
    return sum(rows, []), sum(logps, [])


def batch_size(prefixes, n, longest, options):
    """Prompts at a time: 256 rows, or as many as the cache may hold; without a number, 16
    micro-batches of tokens (keys, not activations)."""
    size = 256 // n
    most = options.cached or 16 * options.tokens
    if most and prefixes:
        length = max(map(len, prefixes)) + longest
        size = min(size, most // length // n)
    return max(1, size)


@torch.no_grad()
def sample_batch(net, prefixes, n, u, options):
    """`sample` for one batch: (rows, logps), a list of n for each prefix. u (N, T): random numbers
    of N = B*n rollouts. Rollouts of a prompt that are equal so far are one row of the batch."""
    N, longest = u.shape
    ids = torch.full((N, longest), options.eos, device=net.device)
    logps = torch.zeros(N, longest, device=net.device)
    live = torch.arange(N, device=net.device)              # (m,) rollouts that go on
    at = live // n                                         # (m,) where each is in the batch
    with autocast(net, options):
        cache, mask, token, position = prefill(net, prefixes)
        for t in range(longest):
            mask = torch.cat([mask, torch.ones_like(token)], 1)                       # (U, L)
            out = net(token, attention_mask=mask, position_ids=position,
                      cache=cache, use_cache=True)
            logp = log_policy(out.logits[:, -1], torch.tensor(t), options)            # (U, V)
            if options.temperature:
                drawn = draw(logp, at, u[live, t])                                    # (m,)
            else:
                drawn = logp.argmax(-1)[at]
            ids[live, t] = drawn
            logps[live, t] = logp[at, drawn]
            going = drawn != options.eos
            if not going.any():
                break
            live, V = live[going], logp.shape[-1]
            # A child is a row of the batch with one token more
            children = at[going] * V + drawn[going]
            children, at = children.unique(return_inverse=True)                       # (U,), (m,)
            parent, token = children // V, (children % V)[:, None]
            if len(parent) != len(mask) or len(parent.unique()) != len(mask):
                cache.batch_select_indices(parent)
                mask, position = mask[parent], position[parent]
            position = position + 1
    rows, logps = as_lists(ids, logps, options.eos)
    return groups(rows, n), groups(logps, n)


def autocast(net, options):
    """Products in bfloat16 if the options say so: each weight is cast once within."""
    return torch.autocast(net.device.type, torch.bfloat16, enabled=options.half)


# --- score -----------------------------------------------------------------------------------

def logprobs(net, prefixes, rows, owner, options: Options, n_scored=None):
    """(N, T) log p(row_t | prefix, row_<t) of the last n_scored[n] tokens of each row (all by
    default). Differentiable. Equal rows of a prefix are computed once. Memory: see `chunks`."""
    n_scored = n_scored or [len(row) for row in rows]
    first, where = distinct(zip(owner, n_scored, map(tuple, rows)))
    rows = [rows[n] for n in first]
    owner = [owner[n] for n in first]
    n_scored = [n_scored[n] for n in first]
    with autocast(net, options):
        if len(set(owner)) == len(rows):
            logits, targets, t = run_whole(net, [prefixes[o] for o in owner], rows, n_scored)
        else:
            logits, targets, t = run_shared(net, prefixes, rows, owner, n_scored)
    logp = log_policy(logits, t, options, targets)    # (M, V)
    logp = -F.nll_loss(logp, targets, reduction="none")    # (M,)
    T = max(map(len, rows))
    scored = scored_mask(rows, n_scored, T, net.device)    # (N, T)
    out = torch.zeros(scored.shape, device=net.device)
    return out.masked_scatter(scored, logp)[where]


def run_whole(net, prefixes, rows, n_scored):
    """One pass over prefix + row: (logits (M, V), targets (M,), t (M,)) of the M scored tokens.
    No mask is needed, since nothing real stands behind the padding."""
    check_mode(net)
    whole = [[*prefix, *row] for prefix, row in zip(prefixes, rows)]
    ids, _ = pad(whole, "right", net.device)    # (N, L)
    scored = scored_mask(whole, n_scored, ids.shape[1], net.device)
    scored = scored[:, 1:]    # (N, L - 1)
    targets = ids[:, 1:][scored]    # (M,)
    out = net(ids[:, :-1], use_cache=False, logits_to_keep=scored)
    return out.logits.flatten(0, -2), targets, places(scored)


def run_shared(net, prefixes, rows, owner, n_scored):
    """One pass over the prefixes and one over the rows. Returns the same as `run_whole`."""
    cache, mask, last, position = prefill(net, prefixes)
    owner = torch.as_tensor(owner, device=net.device)
    cache.batch_select_indices(owner)
    ids, live = pad(rows, "right", net.device)    # (N, T)
    T = ids.shape[1]
    scored = scored_mask(rows, n_scored, T, net.device)    # (N, T)
    fed = torch.cat([last[owner], ids[:, :-1]], 1)
    mask = torch.cat([mask[owner], live], 1)    # (N, P - 1 + T)
    position = position[owner] + torch.arange(T, device=net.device)
    out = net(fed, attention_mask=mask, position_ids=position,
              cache=cache, use_cache=True, logits_to_keep=scored)
    return out.logits.flatten(0, -2), ids[scored], places(scored)


@torch.no_grad()
def score_tokens(net, prefixes, rows, owner, options, n_scored=None):
    """`logprobs` without gradient, in chunks."""
    T = max(map(len, rows), default=0)
    out = torch.zeros(len(rows), T, device=net.device)
    for part in chunks(prefixes, rows, owner, budget(net, options)):
        some = take(prefixes, rows, owner, part)
        n = n_scored and [n_scored[i] for i in part]
        logp = logprobs(net, *some, options, n)
        out[part, :logp.shape[1]] = logp
    return out


def score(net, prompts, rows, options, shared=None):
    """(N,) log p(row | prompt) of a prompt and a row each. The first shared[n] tokens of prompt n
    (all by default) are computed once for all prompts that begin with them."""
    shared = shared or [len(prompt) for prompt in prompts]
    prefixes = [tuple(prompt[:k]) for prompt, k in zip(prompts, shared)]
    rest = [[*prompt[k:], *row] for prompt, k, row in zip(prompts, shared, rows)]
    n_scored = [len(row) for row in rows]
    first, owner = distinct(prefixes)
    prefixes = [prefixes[n] for n in first]
    return score_tokens(net, prefixes, rest, owner, options, n_scored).sum(1)


def budget(net, options):
    """Tokens at a time: memory grows with them, and a CPU gains nothing from more."""
    return options.tokens or (1024 if net.device.type == "cpu" else 16384)
