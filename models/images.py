"""Everything that P and Q do differently for images: one door, used by `support/loading.py`.

Claim: an image is a string of code tokens (`envs/images.py`), so P and Q stay language models. What
differs is here: the order of the prompt, what may be emitted, how rows are drawn, what Q reads, and
how the tiny model starts.

Departures from the paper, whose images come first in the prompt and from a large VQ model
1. z comes before x, so that each patch of y stands as far behind the same patch of x, whatever z.
2. P may emit only codes, and exactly as many as an image has. Q may emit only words.
3. Rows are drawn all tokens at once and corrected (`settle`). This is exact up to rounding.
4. In view "diff" Q reads the patches that change, and those beside them.
5. The tiny model starts from random weights with heads that copy (`write_copy_heads`).
"""
import re

import torch
import torch.nn.functional as F

import lm
import swirl_fwm
import swirl_idm
from envs import images
from models import tiny
from models.batches import as_lists
from models.next_token import draw, log_policy, uniform
from models.text import encode, frame


class ImageFWM(swirl_fwm.FWM):
    """P for images."""

    def prompt(self, x, z):
        action = encode(self.tok, "\naction: " + z)
        state = encode(self.tok, frame(self.tok).line + x)
        return [*frame(self.tok).head, *action, *state, *frame(self.tok).tail]

    def logp(self, xs, zs, ys, options=None):
        prompts = list(map(self.prompt, xs, zs))
        targets = list(map(self.target, ys))
        return lm.score(self.net, prompts, targets, options or self.options)

    def draw(self, prompts, n, options, generator, guess):
        guess = list(map(self.target, guess))
        u = uniform((len(prompts), n, self.longest), self.net.device, generator)
        # The float32 logits of the rows take half a gigabyte at most
        size = 2**27 // (n * self.longest * self.net.config.vocab_size)
        size = max(1, min(size, lm.batch_size(prompts, n, self.longest, options)))
        rows, logps = [], []
        for i in range(0, len(prompts), size):
            part = slice(i, i + size)
            some = settle(self.net, prompts[part], guess[part], n, u[part].flatten(0, 1), options)
            rows += some[0]
            logps += some[1]
        return rows, logps


class ImageIDM(swirl_idm.IDM):
    """Q for images."""

    def changes(self, x, y):
        return images.diff(x, y) if x != y else []

    def spoil(self, x, y, other, rng):
        return images.spoil(x, y, other, rng)


def codes_only(tok, vocab_size, y):
    """(T, V) bool for `lm.Options`: where the image y has a code, any code may stand; elsewhere
    only what stands in y."""
    ids = [*encode(tok, frame(tok).line + y), tok.eos_token_id]
    codes = [i for token, i in tok.get_added_vocab().items() if re.fullmatch(r"<c\d+>", token)]
    any_code = torch.zeros(vocab_size, dtype=torch.bool)
    any_code[codes] = True
    allowed = F.one_hot(torch.tensor(ids), vocab_size).bool()                         # (T, V)
    allowed[torch.isin(torch.tensor(ids), torch.tensor(codes))] = any_code
    return allowed


def words_only(tok, vocab_size):
    """(1, V) bool for `lm.Options`: all but the tokens of images."""
    allowed = torch.ones(1, vocab_size, dtype=torch.bool)
    allowed[0, [i for token, i in tok.get_added_vocab().items() if images.is_token(token)]] = False
    return allowed


# --- draw all tokens at once -----------------------------------------------------------------

@torch.no_grad()
def settle(net, prefixes, guess, n, u, options):
    """`lm.sample` from B rows that are nearly right, in a few passes over whole rows instead of one
    pass a token.

    With the random numbers u (N, T) drawn beforehand, each token is a function of those before it,
    row_t = F(row_<t, u_t). One pass computes F at all t from the guess (Jacobi iteration; Song et
    al. 2021). Up to the first token that differs, all are right; the pass's output is the next
    guess. A row that a pass leaves unchanged is the row that the sampler draws.
    """
    (N, T), device = u.shape, net.device
    with lm.autocast(net, options):
        cache, mask, last, position = lm.prefill(net, prefixes)
        # (B, T)
        rows = torch.tensor([[*row, *[options.eos] * T][:T] for row in guess], device=device)
        # fed[:, t] stands before the t-th token
        fed = torch.cat([last, rows], 1).repeat_interleave(n, 0)                      # (N, 1 + T)
        logps = torch.zeros(N, T, device=device)
        live, s = torch.arange(N, device=device), 0        # rollouts that move; s tokens are right
        node = live // n                                   # the row of the cache of each
        while len(live):
            # Rollouts with equal cache and equal guess are computed once
            both = torch.cat([node[:, None], fed[live, s:-1]], 1)
            # (U, 1 + T - s)
            same, at = torch.unique(both, dim=0, return_inverse=True)
            cache.batch_select_indices(same[:, 0])
            mask, position = mask[same[:, 0]], position[same[:, 0]]
            ids = same[:, 1:]                                                         # (U, T - s)
            t = torch.arange(s, T, device=device)
            logits = net(ids, attention_mask=torch.cat([mask, torch.ones_like(ids)], 1),
                         position_ids=position + t - s, cache=cache, use_cache=True).logits
            logp = log_policy(logits.flatten(0, 1), t.repeat(len(ids)), options)
            place = at[:, None] * (T - s) + t - s                                     # (m, T - s)
            if options.temperature:
                new = draw(logp, place.flatten(), u[live, s:].flatten()).view(place.shape)
            else:
                new = logp.argmax(-1)[place]
            equal = (new == fed[live, s + 1:]).long().cumprod(1)                      # (m, T - s)
            right = equal.sum(1) + 1                       # the first that differs is right, too
            fed[live, s + 1:], logps[live, s:] = new, logp[place, new]
            ended = ((new == options.eos) & (t - s < right[:, None])).any(1)
            going = (right < T - s) & ~ended
            live, node = live[going], at[going]
            if len(live):
                # What all of them have right stays in the cache
                more = right[going].min().item()
                cache.crop(more - (T - s))
                mask = torch.cat([mask, mask.new_ones(len(mask), more)], 1)
                position, s = position + more, s + more
    return as_lists(fed[:, 1:], logps, options.eos)


# --- the tiny model for images ---------------------------------------------------------------

def start(tok, added, states, book, seed):
    """(P's net, Q's net, tok): random weights, embeddings that say what a code looks like, copy
    heads in P. An untrained P then copies, as a pretrained one does."""
    tok.add_tokens(added)
    nets = [tiny.make_model(tok, seed=seed, bias=True) for _ in "PQ"]
    codes, places = (tok.convert_tokens_to_ids([token for token in added if mark in token])
                     for mark in ("<c", ","))
    looks = torch.tensor(book.features()) if book else None
    seen, _ = (embed_images(net, codes, places, looks) for net in nets)
    write_copy_heads(nets[0], seen, len(encode(tok, "\n" + states[0])))
    return *nets, tok


@torch.no_grad()
def embed_images(net, codes, places, features=None, scale=0.1):
    """Write embeddings that say what the tokens of images mean, in a random basis. Returns `seen`
    (W, D): all that a code embeds lies in these D dimensions, so that one head can carry it.

    codes (K,) ids: half of an embedding encodes the patch's appearance (features (K, F); random
    without them). places (n * n,) ids, row by row: the row and the column.
    """
    W, D = net.config.hidden_size, net.model.layers[0].self_attn.head_dim
    E = net.model.embed_tokens.weight
    E.normal_(0, scale)
    seen = torch.linalg.qr(torch.randn(W, D))[0].to(E)     # orthonormal columns
    told = F.normalize(torch.randn(len(codes), D), dim=1)
    if features is not None:
        # Half of it: patches that look alike must still differ
        told[:, :features.shape[1]] += F.normalize(features.to(told), dim=1)
    E[codes] = scale * W ** 0.5 * (F.normalize(told, dim=1).to(E) @ seen.T)
    side, octave = round(len(places) ** 0.5), torch.tensor([1.0, 2, 4, 8])
    angle = torch.linspace(0, torch.pi / 2, side)[:, None] * octave                   # (side, 4)
    wave = torch.cat([angle.cos(), angle.sin()], 1) / octave.repeat(2) ** 0.5
    wave = F.normalize(wave, dim=1)                                                   # (side, 8)
    # at right angles
    bases = torch.linalg.qr(torch.randn(W, 16))[0].T.view(2, 8, W)
    # (side, W) each
    rows, columns = (wave @ bases).to(E)
    E[places] = scale * (W / 2) ** 0.5 * (rows[:, None] + columns).flatten(0, 1)
    return seen


@torch.no_grad()
def write_copy_heads(net, seen, period, sharp=8.0, scale=0.1):
    """Heads that look at the patch where the next token stood in the picture before, and at those
    beside, above and below it, as a convolution does. Only the first head writes to the output, so
    an untrained model copies. All of it stays trainable. Constant queries and keys (biases) are
    turned apart by RoPE.

    seen: of `embed_images`; period: tokens from a patch of x to the same patch of y.
    """
    W, D = net.config.hidden_size, net.model.layers[0].self_attn.head_dim
    line = round((period - 3) ** 0.5)          # patches of a row; <image>, </image>, \n are none
    first, second = (layer.self_attn for layer in net.model.layers[:2])
    heads = [(first, 0, period - 1, 3 * scale), (first, 1, period, 2 * scale),
             (first, 2, period - 2, 2 * scale), (first, 3, period - 1 + line, 2 * scale),
             (second, 0, period - 1 - line, 2 * scale)]
    for i, (layer, head, distance, strength) in enumerate(heads):
        basis = seen if i == 0 else torch.linalg.qr(torch.randn(W, D))[0].to(seen)    # (W, D)
        turn = distance * net.model.rotary_emb.inv_freq.to(seen)                      # (D/2,)
        part = slice(head * D, head * D + D)
        layer.k_proj.bias[part] = sharp * torch.cat([torch.ones_like(turn), torch.zeros_like(turn)])
        layer.q_proj.bias[part] = sharp * torch.cat([turn.cos(), -turn.sin()])
        layer.v_proj.weight[part], layer.o_proj.weight[:, part] = seen.T, strength * basis
