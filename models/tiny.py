"""How the tiny model is made: a tokenizer, a Llama of a million random weights, and what images need.

For texts `pretrain.py` trains it and data/tiny holds the result. For images it starts from random weights with heads written in
that copy the picture: an untrained model then copies, as a pretrained one does.
Departure from the paper: it stands in place of a pretrained 3B to 7B model.
"""
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lm


FOLDER = Path(__file__).parents[1] / "data" / "tiny"     # made by `pretrain.py`

# A word, a digit or some punctuation, each with the space or line break before it; the rest of white space
PIECES = r"\s?\p{L}+|\s?\d|\s?[^\s\p{L}\d]+|\s+(?!\S)|\s"


def make_tokenizer(texts, vocab_size=2048):
    """A byte-level BPE fitted on `texts`. A frequent word is one token; a rare one falls to pieces, at worst to bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>",
                                   clean_up_tokenization_spaces=False)


def make_model(tokenizer, width=128, layers=4, heads=4, context=4096, seed=0, bias=False):
    """A small Llama (about 1M parameters) with random weights; bias: of queries and keys, for `write_copy_heads`."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=context, attention_bias=bias,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)).eval()


def for_images(tok, added, states, book, seed):
    """(P, Q, tok) for a world of images: random weights, embeddings that say what a code looks like, copy heads in P."""
    tok.add_tokens(added)
    P, Q = make_model(tok, seed=seed, bias=True), make_model(tok, seed=seed, bias=True)
    codes, places = (tok.convert_tokens_to_ids([token for token in added if mark in token]) for mark in ("<c", ","))
    looks = torch.tensor(book.features()) if hasattr(book, "features") else None
    seen, _ = (embed_images(model, codes, places, looks) for model in (P, Q))
    write_copy_heads(P, seen, len(lm.encode(tok, "\n" + states[0])))
    return P, Q, tok


@torch.no_grad()
def embed_images(model, codes, places, features=None, scale=0.1):
    """Embeddings of the tokens of images that say what they mean, as those of a VQ model and of a vision model's positions do, in a random
    basis: codes (K,) ids, of which half is what the patch looks like (features (K, F); random without them), all of it in the D dimensions
    of `seen` (W, D), which is returned: one head can carry it. places (n * n,) ids, row by row: what row and what column."""
    W, D, E = model.config.hidden_size, model.model.layers[0].self_attn.head_dim, model.model.embed_tokens.weight
    unit = lambda rows: torch.nn.functional.normalize(rows, dim=1)
    E.normal_(0, scale)
    seen = torch.linalg.qr(torch.randn(W, D))[0].to(E)                             # orthonormal columns
    told = unit(torch.randn(len(codes), D))
    if features is not None:
        told[:, :features.shape[1]] += unit(features.to(told))                     # half of it: like patches must still differ
    E[codes] = scale * W ** 0.5 * (unit(told).to(E) @ seen.T)
    side, octave = round(len(places) ** 0.5), torch.tensor([1.0, 2, 4, 8])
    angle = torch.linspace(0, torch.pi / 2, side)[:, None] * octave                # (side, 4) near places are alike
    wave = unit(torch.cat([angle.cos(), angle.sin()], 1) / octave.repeat(2) ** 0.5)             # (side, 8)
    rows, columns = (wave @ torch.linalg.qr(torch.randn(W, 16))[0].T.view(2, 8, W)).to(E)       # (side, W) each, at right angles
    E[places] = scale * (W / 2) ** 0.5 * (rows[:, None] + columns).flatten(0, 1)
    return seen


@torch.no_grad()
def write_copy_heads(model, seen, period, sharp=8.0, scale=0.1):
    """For images, where the same code stands in many places: heads that look at the patch where the next token stood in the picture before, and
    at those beside, above and below it, as a convolution does. Only the first goes to the output: an untrained model copies. All of it
    stays trainable. Constant queries and keys (biases) are turned apart by RoPE.

    seen: of `embed_images`; period: tokens from a patch of x to the same one of y.
    """
    W, D, E = model.config.hidden_size, model.model.layers[0].self_attn.head_dim, model.model.embed_tokens.weight
    line = round((period - 3) ** 0.5)                                              # patches of a row: <image>, </image> and a line break are no patches
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    basis = lambda: torch.linalg.qr(torch.randn(W, D))[0].to(E)                    # (W, D) orthonormal columns
    for layer, head, distance, out in ((first, 0, period - 1, 3 * scale * seen), (first, 1, period, 2 * scale * basis()),
                                       (first, 2, period - 2, 2 * scale * basis()), (first, 3, period - 1 + line, 2 * scale * basis()),
                                       (second, 0, period - 1 - line, 2 * scale * basis())):
        turn, part = distance * model.model.rotary_emb.inv_freq.to(E), slice(head * D, head * D + D)      # (D/2,)
        layer.k_proj.bias[part] = sharp * torch.cat([torch.ones_like(turn), torch.zeros_like(turn)])
        layer.q_proj.bias[part] = sharp * torch.cat([turn.cos(), -turn.sin()])
        layer.v_proj.weight[part], layer.o_proj.weight[:, part] = seen.T, out
