"""BERTScore: how well the tokens of two texts match one another, as vectors of an encoder.

Claim: with any Hugging Face encoder and any of its layers, P, R and F are those of the package
bert-score 0.3.13 (no idf) to 1e-5, so roberta-large at layer 17 is its lang="en". The argument
order is (prediction, reference), as everywhere here.

    S[i, j] = cosine of token i of the prediction and token j of the reference, hidden state `layer`
    P       = mean over i of max over j of S[i, j]
    R       = mean over j of max over i of S[i, j]
    F       = 2 P R / (P + R)

Notes:
  1. The start and end tokens (CLS, SEP) have weight 0 in both means. Other tokens may still match
     them.
  2. Texts are stripped and cut to what the encoder takes (roberta-large: 512 tokens, 510 of them
     text). The score sees only the beginning of a long page. `cut` counts such texts, and the
     scorers print the count.
  3. An empty side scores 0; so does a text of nothing but start and end tokens.
  4. Another encoder or layer gives another score: print both with the number. The paper does not
     name its own. Its figures (92 to 96) fit roberta-large without rescaling, so rescaling is off
     by default.
  5. RoBERTa and GPT-2 tokenizers read a text with a space before it, as bert-score asks of them;
     transformers 5 drops that request, so bert-score on top of it reads the first word otherwise
     (unless the tokenizer's own file adds the space).
  6. bert-score pads a batch of pairs with zeros. So a token whose best cosine is negative may count
     as 0 there, depending on its batch. Here nothing is padded in the matching, and the cosine
     counts. Trained encoders have no such tokens.
"""

import functools

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, GPT2Tokenizer, RobertaTokenizer
from transformers.utils import logging

# bert-score's choice for English
LAYERS = {"roberta-large": 17, "FacebookAI/roberta-large": 17}
# of P, R, F for it, from bert-score
BASELINE = (0.83150584, 0.8314941, 0.83122575)


def layer_of(encoder, layer=None):
    """The layer (int) that is scored: `layer` itself, or for roberta-large 17. ValueError if
    neither says."""
    if layer is None and encoder not in LAYERS:
        raise ValueError(f"which layer of {encoder}? Only roberta-large has a default (17)")
    return LAYERS[encoder] if layer is None else layer


@functools.lru_cache(maxsize=1)
def load(encoder, layer=None):
    """(model, tokenizer, limit in tokens) of an encoder: a local folder or a Hub id, without the
    layers above `layer`.

    OSError or ValueError if it is not there, is no encoder, or has no such layer (0 is the
    embeddings).
    """
    layer, config = (
        layer_of(encoder, layer), AutoConfig.from_pretrained(encoder, trust_remote_code=False))
    if config.is_encoder_decoder:
        raise ValueError(f"{encoder} has a decoder; give a model that is an encoder alone")
    if not 0 <= layer <= config.num_hidden_layers:
        raise ValueError(
            f"{encoder} has no layer {layer}; give one of 0 to {config.num_hidden_layers}"
        )
    tokenizer = AutoTokenizer.from_pretrained(encoder, trust_remote_code=False)
    before = logging.get_verbosity()
    # the layers left out would be reported
    logging.set_verbosity_error()
    try:
        model = AutoModel.from_pretrained(
            encoder,
            num_hidden_layers=layer,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
        ).eval()
    finally:
        logging.set_verbosity(before)
    positions = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    limit = getattr(config, "max_position_embeddings", None) or 10**9
    # RoBERTa counts positions from there
    if getattr(positions, "padding_idx", None) is not None:
        limit -= positions.padding_idx + 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), tokenizer, min(limit, tokenizer.model_max_length)


def encode(tokenizer, text, limit):
    """Token ids (list) of one text with its start and end tokens, cut to `limit`."""
    text = text.strip()
    if text and isinstance(tokenizer, (RobertaTokenizer, GPT2Tokenizer)):
        text = " " + text
    return tokenizer.encode(text, add_special_tokens=True, truncation=True, max_length=limit)


def cut(texts, encoder, layer=None):
    """How many of the texts are longer than the encoder reads."""
    _, tokenizer, limit = load(encoder, layer)
    return sum(len(encode(tokenizer, text, limit + 1)) > limit for text in texts)


@torch.no_grad()
def bertscore(predictions, references, encoder, layer=None, rescale=False, batch=16):
    """[(P, R, F)] of each pair, floats, at most 1; loads the encoder (the last one is kept).

    layer: int, may be left out for roberta-large. batch: pairs at a time. ValueError and OSError:
    as in `load`. rescale: (score - b) / (1 - b) with the constants b of roberta-large's layer 17;
    ValueError for any other. Source: bert-score 0.3.13, `score(predictions, references,
    model_type=encoder, num_layers=layer)`.
    """
    if rescale and (encoder not in LAYERS or layer_of(encoder, layer) != LAYERS[encoder]):
        raise ValueError(
            f"there are constants to rescale roberta-large's layer 17 with, not {encoder}'s layer "
            f"{layer}"
        )
    model, tokenizer, limit = load(encoder, layer)
    unweighted = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    pairs = list(dict.fromkeys(zip(predictions, references, strict=True)))
    ids = {
        text: encode(tokenizer, text, limit)
        for text in dict.fromkeys(t for pair in pairs for t in pair)
    }
    # so that little is padded
    pairs.sort(key=lambda pair: max(len(ids[text]) for text in pair))
    scores = {}
    for i in range(0, len(pairs), batch):
        texts = list(dict.fromkeys(t for pair in pairs[i:i + batch] for t in pair))
        # (T, D) each
        vectors = dict(
            zip(texts, embed(model, [ids[t] for t in texts], tokenizer.pad_token_id or 0))
        )
        weights = {
            t: torch.tensor([float(n not in unweighted) for n in ids[t]], device=model.device)
            for t in texts
        }
        for p, r in pairs[i:i + batch]:
            # (T_p, T_r)
            S = vectors[p] @ vectors[r].T if ids[p] and ids[r] else torch.zeros(0, 0)
            if not (weights[p].any() and weights[r].any()):
                scores[p, r] = 0.0, 0.0, 0.0
                continue
            P = (S.amax(1) * weights[p]).sum() / weights[p].sum()
            R = (S.amax(0) * weights[r]).sum() / weights[r].sum()
            F = 2 * P * R / (P + R) if P + R else P + R
            scores[p, r] = P.item(), R.item(), F.item()
    if rescale:
        scores = {
            pair: tuple((s - b) / (1 - b) for s, b in zip(prf, BASELINE))
            for pair, prf in scores.items()
        }
    return [scores[pair] for pair in zip(predictions, references)]


def embed(model, rows, pad):
    """The (T, D) unit vectors of each row of T token ids, from one padded batch."""
    T = max(1, max(map(len, rows)))
    # (B, T)
    ids = torch.tensor([row + [pad] * (T - len(row)) for row in rows], device=model.device)
    mask = torch.tensor(
        [[1] * len(row) + [0] * (T - len(row)) for row in rows], device=model.device
    )
    hidden = torch.nn.functional.normalize(
        model(input_ids=ids, attention_mask=mask).last_hidden_state, dim=-1
    )
    return [h[:len(row)] for h, row in zip(hidden, rows)]
