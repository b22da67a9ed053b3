"""The one door to a language model: sample from it, score with it. (`tiny.py` makes one, `pretrained.py` loads one.)

Claim: P(y|x,z) and Q(z|x,y) are both  log p(row | prefix) = sum_t log p(row_t | prefix, row_<t),  and everything in this
project is one of two calls: `sample` draws rows and returns their token log-probs, `logprobs` scores given rows.

| symbol  | shape        | meaning                                                                     |
| ------- | ------------ | --------------------------------------------------------------------------- |
| prefix  | B lists      | token ids of a prompt; the rows of a group share it                          |
| row     | N lists      | token ids that follow a prefix; `owner[n]` in 0..B-1 says which one          |
| logp    | (N, T)       | log p of each scored token, 0 where nothing is scored                        |

Departures from a plain Hugging Face loop, each exact:
1. A prefix goes through the model once for all its rows: its keys and values are cached, copied to the rows, and the
   last prefix token is fed again with each row, since it predicts the row's first token. Gradients flow through the copy.
2. While sampling, the rollouts of a prompt are a tree in one row of the batch: a beginning that they share is computed once, and
   no key is copied when they part; the price is that attention looks past the keys of the other branches. A prompt whose
   rollouts have ended leaves. Logits only where a token is drawn or scored.
   Rows that can be guessed, as pictures can, are drawn all tokens at once and corrected instead (`settle`: each copies its keys).
3. Masks come from lengths, never from token ids, so pad == eos is harmless. Positions are always explicit.
4. Models stay in eval mode (no dropout): the sampler and the trainer see the same distribution.
5. With `HALF` the products are bfloat16 (autocast); weights, their gradients, the optimizer and log-probs stay float32.
"""
import functools
import math

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from models import parallel

HALF, TOKENS = False, 0                                                            # `--dtype bfloat16`, `--tokens`


def in_half(f):
    """f(model, ..), under autocast if `HALF`: each weight is cast once a call."""
    @functools.wraps(f)
    def call(model, *args, **kwargs):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=HALF):
            return f(model, *args, **kwargs)
    return call


def freeze(model):
    """A copy that does not learn: the reference, pi_ref, as the policy stands now."""
    return parallel.plain(model).eval().requires_grad_(HALF)                       # autocast keeps its casts of learning weights alone


@functools.lru_cache(maxsize=100_000)
def encode(tokenizer, text):
    """Token ids (a tuple) of one segment, alone, without special tokens. Prompts are joined from ids, never from text:
    BPE merges across a joint would change the tokens on both sides. A state that spells "<eos>" stays text."""
    return tuple(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def decode(tokenizer, ids):
    """The text of sampled ids without their end. Other special tokens stay visible: a wrong row must not look right."""
    return tokenizer.decode(ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids)


def make_optimizers(model, lr, muon=True, decay=0.0):
    """AdamW; with `muon`, the weight matrices of the layers get Muon (orthogonalised momentum), which trains small models in
    a third of the steps, and AdamW keeps the embeddings, norms and LoRA's factors. Both take the same rate and weight decay."""
    with parallel.masters(model):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrix = [p for n, p in named if muon and p.ndim == 2 and "layers." in n and ".lora_" not in n]
    others = [p for _, p in named if not any(p is m for m in matrix)]
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=decay, fused=True)]
    if matrix:
        optimizers.append(Muon(matrix, dict(lr=lr, weight_decay=decay)))
    return optimizers


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon(.., adjust_lr_fn="match_rms_adamw")` in float32, the matrices of one shape at once. torch's turns to bfloat16, for
    which a CPU without such products takes four times as long as for all else in a step of a small model."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}                                                             # of one shape; a shard (DTensor) stays alone
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.shape, p if hasattr(p, "to_local") else None), []).append(p)
            for params in alike.values():
                updates = []
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p.grad)
                    momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)
                    updates.append(p.grad.lerp(momentum, 0.95))                    # Nesterov's
                for p, update in zip(params, orthogonal(torch.stack(updates))):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])


def orthogonal(M):
    """(N, a, b) with the singular values of M brought near 1, by five Newton-Schulz steps (Jordan et al. 2024, Muon)."""
    X = M.mT if M.shape[1] > M.shape[2] else M
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        S = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(S, S, S, beta=-4.7750, alpha=2.0315), X, beta=3.4445)   # 3.4 X - 4.8 S X + 2.0 S S X
    return X.mT if M.shape[1] > M.shape[2] else X


def optimizer_step(model, optimizers, lr, clip=1.0):
    """Sum the gradient over all ranks, clip its norm, step at learning rate `lr`, clear. Returns the norm before clipping."""
    with parallel.reduced(model):
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return parallel.norm(norm)


# --- the shared prefix --------------------------------------------------------------------------------------------------

def pad(rows, side, value, device):
    """(N, T) ids and the (N, T) 0/1 mask of their lengths."""
    T = max(map(len, rows))
    ids = [[value] * (T - len(r)) + list(r) if side == "left" else list(r) + [value] * (T - len(r)) for r in rows]
    mask = [[0] * (T - len(r)) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * (T - len(r)) for r in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class Room(DynamicLayer):
    """Keys and values of one layer. DynamicLayer copies them all to append a token; this one, without gradient, when a quarter
    more has come, and writes the others in place. It stands in for sliding windows too, since all fits in one (`context`)."""

    def update(self, key_states, value_states, *args, **kwargs):
        if torch.is_grad_enabled() or not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = append(self.keys, key_states), append(self.values, value_states)
        return self.keys, self.values


def append(old, new):
    """cat([old, new], 2) of (B, heads, L, D) tensors: behind `old` where its stride shows room, else in new memory."""
    B, H, L, D = old.shape
    T = L + new.shape[2]
    if old.stride(2) != D or old.stride(1) < T * D:
        whole = new.new_empty(B, H, T + T // 4 + 32, D)
        whole[:, :, :L] = old
    else:
        whole = old.as_strided((B, H, T, D), old.stride())
    whole[:, :, L:T] = new
    return whole[:, :, :T]


def check_mode(model):
    assert not model.training and not model.is_activation_checkpointing, "checkpointing would drop the cache silently"


def prefill(model, prefixes):
    """Run the prefixes but for their last token: (cache, mask (B, P-1), last token (B, 1), its position (B, 1))."""
    check_mode(model)
    ids, mask = pad(prefixes, "left", 0, model.device)                             # (B, P)
    position = (mask.cumsum(1) - 1).clamp(min=0)                                   # (B, P)
    cache = DynamicCache(config=model.config)
    assert all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers), "only attention can branch"
    cache.layers = [Room() for _ in cache.layers]
    if ids.shape[1] > 1:
        model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=position[:, :-1], cache=cache,
              use_cache=True, logits_to_keep=1)
    return cache, mask[:, :-1], ids[:, -1:], position[:, -1:]


# --- sample -------------------------------------------------------------------------------------------------------------

@torch.no_grad()
@in_half
def sample(model, prefixes, G, max_new, eos, temperature=1.0, top_p=1.0, top_k=0, generator=None, min_p=0.0, guess=None):
    """Draw G rows after each prefix; temperature 0 takes the likeliest token. min_p: as in `logprobs`. top_p, top_k: as usual, off by
    default, since the trainer scores the unfiltered distribution. Returns (rows, logps), B*G lists each, prompt-major (p0g0, p0g1, ..):
    ids up to and including eos (a row without eos was cut at max_new) and their log-probs under what was sampled from.
    guess: B rows that are thought to be nearly right, which are corrected in place of drawing one token after the other (`settle`)."""
    policy = lambda logits, t: truncate(likely(restrict(model, logits.float(), t) / (temperature or 1.0), min_p), top_p, top_k).log_softmax(-1)
    pick = lambda logp, at, u: logp.argmax(-1)[at] if temperature == 0 else draw(logp, at, u)
    numbers = lambda shape: torch.rand(shape, dtype=torch.float64, device=model.device, generator=generator) if temperature else torch.zeros(shape, device=model.device)
    if guess is not None:
        size = max(1, 2**27 // (G * max_new * model.config.vocab_size))            # prompts whose rows' logits take half a gigabyte
        parts = [settle(model, prefixes[i:i + size], guess[i:i + size], G, max_new, eos, policy, pick, numbers)
                 for i in range(0, len(prefixes), size)]
        return tuple(sum(lists, []) for lists in zip(*parts))
    cache, mask, token, position = prefill(model, prefixes)                        # token, position (B, W), W = 1 at first
    N, rows, logps = len(prefixes) * G, [[] for _ in range(len(prefixes) * G)], [[] for _ in range(len(prefixes) * G)]
    seen = mask[:, None].bool()                                                    # (B, W, L) what of the cache each token sees
    node = torch.arange(len(prefixes), device=model.device)                        # (U,) the places of (B, W) that are taken
    live = torch.arange(N, device=model.device)                                    # (n,) rollouts that go on
    at = live // G                                                                 # (n,) the node, 0..U-1, that each stands on
    for t in range(max_new):
        B, W = token.shape
        seen = torch.cat([seen, torch.eye(W, dtype=torch.bool, device=model.device).expand(B, W, W)], 2)
        bias = torch.zeros(seen.shape, dtype=model.dtype, device=model.device).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
        taken = torch.zeros(B * W, dtype=torch.bool, device=model.device).index_fill(0, node, True).view(B, W)
        logits = model(token, attention_mask=bias[:, None], position_ids=position, cache=cache, use_cache=True, logits_to_keep=taken).logits
        logp_all = policy(logits.view(len(node), -1), torch.tensor(t))             # (U, V)
        drawn = pick(logp_all, at, numbers(at.shape))                              # (n,)
        for n, token_id, lp in zip(live.tolist(), drawn.tolist(), logp_all[at, drawn].tolist()):
            rows[n].append(token_id)
            logps[n].append(lp)
        going = drawn != eos
        if not going.any():
            break
        # a tree: rollouts that are equal so far stand on one node, and a prompt's nodes side by side in its row
        key, at = torch.unique(at[going] * logp_all.shape[-1] + drawn[going], return_inverse=True)   # (U,), (n,)
        live, parent = live[going], node[key // logp_all.shape[-1]]
        alive, b = torch.unique(parent // W, return_inverse=True)                  # prompts that go on; each node's, rising
        if len(alive) < B:
            cache.batch_select_indices(alive)
        place = torch.arange(len(b), device=model.device) - torch.searchsorted(b, b)
        shape = len(alive), place.max().item() + 1                                 # the new (B, W)
        node = b * shape[1] + place
        token, position, seen = (new.new_zeros(shape[0] * shape[1], *new.shape[1:]).index_copy(0, node, new).unflatten(0, shape)
                                 for new in (key % logp_all.shape[-1], position.flatten()[parent] + 1, seen.flatten(0, 1)[parent]))
    return rows, logps


def settle(model, prefixes, guess, G, max_new, eos, policy, pick, numbers):
    """`sample` from B rows that are nearly right, in a few passes over whole rows in place of one pass a token.

    With its random numbers u_t drawn beforehand each token is a function of those before it, row_t = F(row_<t, u_t). One pass computes F
    of the guess at all t (Jacobi iteration; Song et al. 2021). Where it first gives another token, this one is right, as are all
    before it; what it gave is the next guess. A row that it leaves as it is, is what the sampler draws: exact but for rounding.
    """
    T, N, device = max_new, len(prefixes) * G, model.device
    cache, mask, last, position = prefill(model, prefixes)
    rows = torch.tensor([[*row, *[eos] * T][:T] for row in guess], device=device)  # (B, T)
    fed = torch.cat([last, rows], 1).repeat_interleave(G, 0)                       # (N, 1 + T) fed[:, t] stands before the t-th token
    u, logps = numbers((N, T)), torch.zeros(N, T, device=device)
    live, s = torch.arange(N, device=device), 0                                    # (n,) rollouts that move; their first s tokens are right
    node = live // G                                                               # (n,) the row of the cache that each goes on from
    while len(live):
        same, at = torch.unique(torch.cat([node[:, None], fed[live, s:-1]], 1), dim=0, return_inverse=True)      # (U, 1 + T - s), (n,)
        cache.batch_select_indices(same[:, 0])
        mask, position = mask[same[:, 0]], position[same[:, 0]]
        ids = same[:, 1:]                                                          # (U, T - s)
        logits = model(ids, attention_mask=torch.cat([mask, torch.ones_like(ids)], 1), position_ids=position + torch.arange(T - s, device=device),
                       cache=cache, use_cache=True).logits
        t = torch.arange(s, T, device=device)
        logp_all = policy(logits.view(ids.numel(), -1), t.repeat(len(ids)))        # (U (T - s), V)
        place = at[:, None] * (T - s) + t - s                                      # (n, T - s)
        new = pick(logp_all, place.flatten(), u[live, s:].flatten()).view(place.shape)
        right = (new == fed[live, s + 1:]).long().cumprod(1).sum(1) + 1            # (n,) tokens of `new` that are right, if so many are left
        fed[live, s + 1:], logps[live, s:] = new, logp_all[place, new]
        going = (right < T - s) & ~((new == eos) & (t - s < right[:, None])).any(1)
        live, node = live[going], at[going]
        if len(live):                                                              # what all have right stays in the cache
            more = right[going].min().item()
            cache.crop(more - (T - s))
            mask, position, s = torch.cat([mask, mask.new_ones(len(mask), more)], 1), position + more, s + more
    rows = [row[:row.index(eos) + 1] if eos in row else row for row in fed[:, 1:].tolist()]
    return rows, [logp[:len(row)] for row, logp in zip(rows, logps.tolist())]


def restrict(model, logits, t):
    """-inf where the model may not go: row t of `model.allowed` (T, V) bool, if it has that, is what its t-th token may be; the last
    row holds for all that follow. A P of images may draw codes alone, and the right number of them."""
    allowed = getattr(model, "allowed", None)
    return logits if allowed is None else logits.masked_fill(~allowed[t.clamp(max=len(allowed) - 1)], -torch.inf)


def draw(logp, at, u):
    """The token of row logp[at[n]] at u[n] in [0, 1), by inversion; one of probability 0 is never drawn, one of 1e-9 is. `torch.multinomial`
    draws V numbers for one token. All rows lie end to end on one line, the b-th from b to b + 1, so that none is copied; the clamp keeps
    rounding from stepping into the next."""
    mass = logp.double().exp_().cumsum_(-1)                                        # (U, V)
    line = mass.div_(mass[:, -1:].clone()).add_(torch.arange(len(mass), device=logp.device)[:, None]).flatten()
    return torch.searchsorted(line, at + u.clamp(max=1 - 2**-30), right=True) - at * logp.shape[-1]


def greedy(model, prefixes, max_new, eos, batch=128, guess=None):
    """The likeliest row after each prefix, in batches sorted by length. guess: as in `sample`."""
    order, out = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i])), [None] * len(prefixes)
    batch = max(1, min(batch, 16 * TOKENS // (len(prefixes[order[-1]]) + max_new))) if TOKENS else batch     # keys, not activations
    for i in range(0, len(order), batch):
        part = order[i:i + batch]
        for n, row in zip(part, sample(model, [prefixes[n] for n in part], 1, max_new, eos, 0, guess=guess and [guess[n] for n in part])[0]):
            out[n] = row
    return out


def sample_all(model, prefixes, n, max_new, eos, generator=None, batch=None, guess=None):
    """n rows after each prefix, in batches (of 256 rows). guess: as in `sample`."""
    batch = batch or max(1, 256 // n)
    batch = max(1, min(batch, 16 * TOKENS // (max(map(len, prefixes)) + max_new) // n)) if TOKENS else batch
    return [row for i in range(0, len(prefixes), batch)
            for row in sample(model, prefixes[i:i + batch], n, max_new, eos, generator=generator,
                              guess=guess and guess[i:i + batch])[0]]


def likely(logits, min_p, drawn=None):
    """(n, V) with -inf for tokens less than min_p times as likely as the likeliest (min-p, Nguyen et al. 2024): where a model is sure nothing
    else is drawn. `drawn` (n,) stay in, whatever rounding in another batch, or a step of the optimizer, has made of them; where rounding
    takes another token in or out, log p differs by log(1 + min_p) at most."""
    if not min_p:
        return logits
    out = logits < logits.amax(-1, keepdim=True) + math.log(min_p)
    return logits.masked_fill(out if drawn is None else out.scatter(1, drawn[:, None], False), -torch.inf)


def truncate(logits, top_p, top_k):
    """Keep the top_k likeliest tokens, then the smallest set whose mass reaches top_p."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        value, index = logits.sort(descending=True)
        before = value.softmax(-1).cumsum(-1) - value.softmax(-1)                  # mass of the likelier tokens
        logits = logits.scatter(1, index, value.masked_fill(before >= top_p, -torch.inf))
    return logits


# --- score --------------------------------------------------------------------------------------------------------------

@in_half
def logprobs(model, prefixes, rows, owner, n_scored=None, temperature=1.0, min_p=0.0, top_p=1.0):
    """(N, T) log p(row_t | prefix, row_<t) of the last n_scored[n] tokens of each row (all by default), else 0; p at `temperature` and
    among what `likely` and `truncate` leave of it.

    Right-padded; differentiable. Rows that share a prefix: one pass over the prefixes and one over the rows. A row for each prefix:
    one pass over both, and no mask, since nothing real stands behind the padding. Use `chunks` to bound its memory.
    """
    scored_of = n_scored or [len(row) for row in rows]
    if len(set(owner)) == len(rows):
        check_mode(model)
        ids, live = pad([[*prefixes[o], *row] for o, row in zip(owner, rows)], "right", 0, model.device)   # (N, L)
        ends = live.sum(1)                                                         # (N,)
        t = torch.arange(ids.shape[1], device=model.device) - (ends - torch.tensor(scored_of, device=model.device))[:, None]
        scored = (live.bool() & (t >= 0))[:, 1:]                                   # (N, L - 1)
        logits = model(ids[:, :-1], use_cache=False, logits_to_keep=scored).logits.float()
        targets, t = ids[:, 1:][scored], t[:, 1:][scored]
    else:
        cache, mask, last, position = prefill(model, prefixes)
        cache.batch_select_indices(torch.as_tensor(owner, device=model.device))
        mask, last, position = mask[owner], last[owner], position[owner]
        ids, live = pad(rows, "right", 0, model.device)                            # (N, T)
        first = torch.tensor([len(r) - k for r, k in zip(rows, scored_of)], device=model.device)
        t = torch.arange(ids.shape[1], device=model.device) - first[:, None]       # (N, T) place in what is scored
        scored = live.bool() & (t >= 0)
        logits = model(torch.cat([last, ids[:, :-1]], 1), attention_mask=torch.cat([mask, live], 1),
                       position_ids=position + torch.arange(ids.shape[1], device=model.device), cache=cache,
                       use_cache=True, logits_to_keep=scored).logits.float()       # (scored tokens, V), flat
        targets, t = ids[scored], t[scored]
    logits = likely(restrict(model, logits.view(-1, logits.shape[-1]), t) / temperature, min_p, targets)
    logits = truncate(logits, top_p, 0)
    logp = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    out = torch.zeros(len(rows), max(map(len, rows)), device=model.device)
    T = torch.arange(out.shape[1], device=model.device)
    lengths = torch.tensor([len(row) for row in rows], device=model.device)[:, None]
    where = (T < lengths) & (T >= lengths - torch.tensor(scored_of, device=model.device)[:, None])
    return out.masked_scatter(where, logp)


def budget(model):
    """Tokens at a time: memory grows with them, and a CPU gains nothing from more."""
    return TOKENS or (1024 if model.device.type == "cpu" else 16384)


def chunks(prefixes, rows, owner, budget):
    """Split the rows into lists of row numbers of about `budget` tokens, padding included: sorted by length, so that
    little is padded, the rows of one prefix side by side, so that it is computed once. A list with one prefix may hold as
    many tokens of rows: a prefix as long as the budget would be computed for every row."""
    if len(set(owner)) == len(rows):                                               # `logprobs` pads prefix and row as one
        order = sorted(range(len(rows)), key=lambda n: len(prefixes[owner[n]]) + len(rows[n]))
    else:
        order = sorted(range(len(rows)), key=lambda n: (len(prefixes[owner[n]]), owner[n], len(rows[n])))
    out, P, T, owners = [[]], 0, 0, set()
    for n in order:
        p, t, o = max(P, len(prefixes[owner[n]])), max(T, len(rows[n])), owners | {owner[n]}
        if out[-1] and p * len(o) * (len(o) > 1) + t * (len(out[-1]) + 1) > budget:
            out.append([])
            p, t, o = len(prefixes[owner[n]]), len(rows[n]), {owner[n]}
        out[-1].append(n)
        P, T, owners = p, t, o
    return out


def take(prefixes, rows, owner, chosen):
    """The chosen rows with only the prefixes that they need: (prefixes, rows, owner) for `logprobs`."""
    used = sorted({owner[n] for n in chosen})
    where = {o: i for i, o in enumerate(used)}
    return [prefixes[o] for o in used], [rows[n] for n in chosen], [where[owner[n]] for n in chosen]


@torch.no_grad()
def score_tokens(model, prefixes, rows, owner, n_scored=None, temperature=1.0, tokens=None, min_p=0.0, top_p=1.0):
    """As `logprobs`, without gradient, in chunks of `tokens` (None or 0: `budget`)."""
    out = torch.zeros(len(rows), max(map(len, rows)), device=model.device)         # (N, T)
    for chosen in chunks(prefixes, rows, owner, tokens or budget(model)):
        k = None if n_scored is None else [n_scored[n] for n in chosen]
        logp = logprobs(model, *take(prefixes, rows, owner, chosen), k, temperature, min_p, top_p)
        out[chosen, :logp.shape[1]] = logp
    return out


def score(model, prefixes, rows, owner=None, n_scored=None, temperature=1.0, tokens=None, top_p=1.0):
    """(N,) the sums of `score_tokens`; without `owner` there is a prefix a row, and equal ones go through the model once."""
    if owner is None:
        prefixes = [tuple(p) for p in prefixes]
        at = {p: i for i, p in enumerate(dict.fromkeys(prefixes))}
        prefixes, owner = list(at), [at[p] for p in prefixes]
    return score_tokens(model, prefixes, rows, owner, n_scored, temperature, tokens, top_p=top_p).sum(1)
