"""The built-in model: a tokenizer fitted on the run's own text and a Llama of a million random weights. Nothing is downloaded.

Claim: with an induction head written in, which pretrained models have, 200 labelled transitions are enough to learn from.
Departure from the paper: it stands in place of a pretrained 3B to 7B model.
"""
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


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


def make_model(tokenizer, width=128, layers=4, heads=4, context=2048, seed=0, induction=True):
    """A small Llama (about 1M parameters) with random weights and an induction head: nothing is downloaded."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=context, attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)).eval()
    if induction and layers > 1:
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
    stays trainable. As in `write_induction_head`, constant queries and keys (biases) are turned apart by RoPE.

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
