"""The one door to a language model: make or load it, sample from it, score with it.

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
2. While sampling, rollouts of a group that are equal so far are one row, and a finished row leaves the batch; logits
   are computed only where a token is scored.
3. Masks come from lengths, never from token ids, so pad == eos is harmless. Positions are always explicit.
4. Models stay in eval mode (no dropout): the sampler and the trainer see the same distribution.
"""
import copy
import functools

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)


# --- make, load, copy ---------------------------------------------------------------------------------------------------

def make_tokenizer(texts, vocab_size=1024):
    """A byte-level BPE fitted on `texts`. Frequent words become one token; a rare word falls back to pieces, at worst to
    bytes, so that no character is unknown. A word keeps the space or line break before it (segments start with it)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\s?[^\s]+|\s"), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>",
                                   clean_up_tokenization_spaces=False)


def make_tiny(tokenizer, width=128, layers=4, heads=4, context=2048, seed=0):
    """A small Llama (about 1M parameters) with random weights and an induction head: nothing is downloaded."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=context, attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)).eval()
    if layers > 1:
        write_induction_head(model)
    return model


@torch.no_grad()
def write_induction_head(model, previous=8.0, match=4.0, gain=2.0, scale=0.1):
    """Write into the first two layers what every pretrained model can and a random one finds late: after "a b .. a" comes
    "b" (Olsson et al. 2022, In-context Learning and Induction Heads). All of it stays trainable.

    Layer 0, head 0 attends to the token before: constant query and key (biases), turned apart by one position of RoPE. It
    adds a sketch of that token. Layer 1 looks for the place whose sketch is the current token, and copies what stands there.
    The constants were found by trying: an untrained model then continues a repeated random string in four of five places.
    """
    W, D, E = model.config.hidden_size, model.model.layers[0].self_attn.head_dim, model.model.embed_tokens.weight
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    E.normal_(0, scale)
    turn = model.model.rotary_emb.inv_freq.to(E)                                   # (D/2,) radians a position
    first.k_proj.bias[:D] = previous * torch.cat([torch.ones_like(turn), torch.zeros_like(turn)])
    first.q_proj.bias[:D] = previous * torch.cat([turn.cos(), -turn.sin()])        # score sum_i cos(turn_i (distance - 1))
    sketch, place = (torch.linalg.qr(torch.randn(W, D))[0].to(E) for _ in range(2))   # (W, D) orthonormal columns
    sketch = sketch.T * (torch.cat([turn, turn]) < 0.02)[:, None]                  # only where RoPE hardly turns
    first.v_proj.weight[:D], first.o_proj.weight[:, :D] = sketch, gain * scale * place
    second.q_proj.weight.copy_(match * sketch.repeat(W // D, 1))                   # every head: the current token's sketch
    second.k_proj.weight.copy_(match * place.T.repeat(W // D, 1))                  # meets the sketch of the token before
    second.v_proj.weight.copy_(torch.eye(W))                                       # and each copies its share of the
    second.o_proj.weight.copy_(2 * scale * torch.eye(W))                           # embedding that stands there


def load(name):
    """(model, tokenizer) of a local folder or a Hub id; safetensors only, no remote code. OSError if it is not there."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token          # harmless: masks never look at ids
    return model.eval(), tokenizer


def save(model, tokenizer, folder):
    """A Hugging Face folder that `from_pretrained` loads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def freeze(model):
    """A copy that does not learn: the reference, pi_ref, as the policy stands now."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def context(model):
    """The longest prefix + row that the model takes, in tokens."""
    return getattr(model.config, "max_position_embeddings", None) or 10**9


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
    a third of the steps, and AdamW keeps the embeddings and norms. Both take the same learning rate and weight decay."""
    matrix = [p for n, p in model.named_parameters() if p.requires_grad and muon and p.ndim == 2 and "layers." in n]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is m for m in matrix)]
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=decay, fused=True)]
    if matrix:
        optimizers.append(torch.optim.Muon(matrix, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def optimizer_step(model, optimizers, lr, clip=1.0):
    """Clip the gradient's norm, step at learning rate `lr`, clear. Returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm.item()


# --- the shared prefix --------------------------------------------------------------------------------------------------

def pad(rows, side, value, device):
    """(N, T) ids and the (N, T) 0/1 mask of their lengths."""
    T = max(map(len, rows))
    ids = [[value] * (T - len(r)) + list(r) if side == "left" else list(r) + [value] * (T - len(r)) for r in rows]
    mask = [[0] * (T - len(r)) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * (T - len(r)) for r in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def prefill(model, prefixes):
    """Run the prefixes but for their last token: (cache, mask (B, P-1), last token (B, 1), its position (B, 1))."""
    assert not model.training and not model.is_activation_checkpointing, "checkpointing would drop the cache silently"
    ids, mask = pad(prefixes, "left", 0, model.device)                             # (B, P)
    position = (mask.cumsum(1) - 1).clamp(min=0)                                   # (B, P)
    cache = DynamicCache(config=model.config)
    if ids.shape[1] > 1:
        model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=position[:, :-1], past_key_values=cache,
              use_cache=True, logits_to_keep=1)
    return cache, mask[:, :-1], ids[:, -1:], position[:, -1:]


# --- sample -------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def sample(model, prefixes, G, max_new, eos, temperature=1.0, top_p=1.0, top_k=0, allowed=None, generator=None):
    """Draw G rows after each prefix; temperature 0 takes the likeliest token.

    allowed: (V,) bool, the tokens that may be emitted (it must hold eos); top_p, top_k: as usual, off by default, since
    the trainer scores the unfiltered distribution. Returns (rows, logps), B*G lists each, prompt-major (p0g0, p0g1, ..):
    ids up to and including eos (a row without eos was cut at max_new) and their log-probs under what was sampled from.
    """
    cache, mask, token, position = prefill(model, prefixes)                        # one row a prefix, U = B at first
    N, rows, logps = len(prefixes) * G, [[] for _ in range(len(prefixes) * G)], [[] for _ in range(len(prefixes) * G)]
    live = torch.arange(N, device=model.device)                                    # (n,) rollouts that go on
    at = live // G                                                                 # (n,) the row that each stands on
    for _ in range(max_new):
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        logits = model(token, attention_mask=mask, position_ids=position, past_key_values=cache,
                       use_cache=True).logits[:, -1].float()                       # (U, V)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        logp_all = truncate(logits / (temperature or 1.0), top_p, top_k).log_softmax(-1)
        drawn = logp_all.argmax(-1)[at] if temperature == 0 else \
            torch.multinomial(logp_all.exp()[at], 1, generator=generator)[:, 0]    # (n,)
        for n, t, lp in zip(live.tolist(), drawn.tolist(), logp_all[at, drawn].tolist()):
            rows[n].append(t)
            logps[n].append(lp)
        going = drawn != eos
        if not going.any():
            break
        # rollouts that are equal so far stand on one row; a row goes when its last rollout has ended
        row, at = torch.unique(at[going] * logits.shape[-1] + drawn[going], return_inverse=True)
        live, parent, token = live[going], row // logits.shape[-1], row[:, None] % logits.shape[-1]
        if not torch.equal(parent, torch.arange(len(mask), device=model.device)):
            cache.batch_select_indices(parent)
            mask, position = mask[parent], position[parent]
        position = position + 1
    return rows, logps


def greedy(model, prefixes, max_new, eos, batch=128):
    """The likeliest row after each prefix, in batches sorted by length."""
    order, out = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i])), [None] * len(prefixes)
    for i in range(0, len(order), batch):
        part = order[i:i + batch]
        for n, row in zip(part, sample(model, [prefixes[n] for n in part], 1, max_new, eos, temperature=0)[0]):
            out[n] = row
    return out


def sample_all(model, prefixes, n, max_new, eos, generator=None, batch=32):
    """n rows after each prefix, in batches."""
    return [row for i in range(0, len(prefixes), batch)
            for row in sample(model, prefixes[i:i + batch], n, max_new, eos, generator=generator)[0]]


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

def logprobs(model, prefixes, rows, owner, n_scored=None, temperature=1.0):
    """(N, T) log p(row_t | prefix, row_<t) of the last n_scored[n] tokens of each row (all by default), else 0.

    Right-padded; differentiable; one pass over the prefixes and one over the rows. Use `chunks` to bound its memory.
    """
    cache, mask, last, position = prefill(model, prefixes)
    if list(owner) != list(range(len(prefixes))):
        cache.batch_select_indices(torch.as_tensor(owner, device=model.device))
        mask, last, position = mask[owner], last[owner], position[owner]
    ids, live = pad(rows, "right", 0, model.device)                                # (N, T)
    scored = live.bool()
    if n_scored is not None:
        first = torch.tensor([len(r) - k for r, k in zip(rows, n_scored)], device=model.device)
        scored &= torch.arange(ids.shape[1], device=model.device) >= first[:, None]
    logits = model(torch.cat([last, ids[:, :-1]], 1), attention_mask=torch.cat([mask, live], 1),
                   position_ids=position + torch.arange(ids.shape[1], device=model.device), past_key_values=cache,
                   use_cache=True, logits_to_keep=scored).logits.float()           # (scored tokens, V), flat
    logp = -torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]) / temperature, ids[scored],
                                              reduction="none")
    return torch.zeros(ids.shape, device=model.device).masked_scatter(scored, logp)


def chunks(prefixes, rows, owner, budget):
    """Split the rows into lists of row numbers of about `budget` tokens, padding included: sorted by length, so that
    little is padded, the rows of one prefix side by side, so that it is computed once."""
    order = sorted(range(len(rows)), key=lambda n: (len(prefixes[owner[n]]), owner[n], len(rows[n])))
    out, P, T, owners = [[]], 0, 0, set()
    for n in order:
        p, t, o = max(P, len(prefixes[owner[n]])), max(T, len(rows[n])), owners | {owner[n]}
        if out[-1] and p * len(o) + t * (len(out[-1]) + 1) > budget:
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
def score(model, prefixes, rows, owner=None, n_scored=None, temperature=1.0, budget=16384):
    """(N,) summed log-probs of the scored tokens, without gradient, in chunks. Same arguments as `logprobs`; without `owner`
    there is a prefix a row, and equal ones go through the model once."""
    if owner is None:
        prefixes = [tuple(p) for p in prefixes]
        at = {p: i for i, p in enumerate(dict.fromkeys(prefixes))}
        prefixes, owner = list(at), [at[p] for p in prefixes]
    total = torch.zeros(len(rows), device=model.device)
    for chosen in chunks(prefixes, rows, owner, budget):
        k = None if n_scored is None else [n_scored[n] for n in chosen]
        total[chosen] = logprobs(model, *take(prefixes, rows, owner, chosen), k, temperature).sum(1)
    return total
