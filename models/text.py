"""Text and token ids: segments, the frame of a prompt, states that are too long.

Claim: every prompt is  head + what is asked + tail,  every reply is  text + end.  Head, tail and
end come from the chat template: what is asked is the user's turn, the reply is the assistant's.
Without a template, head is the beginning token that the tokenizer would put there, tail is empty,
and end is the tokenizer's.

Notes
1. Segments are encoded alone, and prompts are joined from ids, never from text. BPE merges across a
   joint would change the tokens on both sides. A tokenizer that puts a space before every text
   (Llama 2) puts one before each segment.
2. The end closes the assistant's turn in the template. It need not be the tokenizer's own.
3. A template may name the day or have a thinking mode. The day is fixed, so that a run is the same
   tomorrow. The tail is what the template puts before a reply in a finished conversation.
"""
import functools
import itertools
import re
from typing import NamedTuple

CUT = "[... cut ...]\n"


def spell(tok, text):
    """Token ids (a tuple) of one segment, without special tokens. "<eos>" in a state stays text."""
    return tuple(tok.encode(text, add_special_tokens=False, split_special_tokens=True))


class Spelt:
    """`spell` with a memory: the texts that were used last, at most so many characters of them.
    A character takes about ten bytes here."""

    def __init__(self, most=2e7):
        self.most, self.size = most, 0
        self.ids = {}                                      # (tok, text): ids, the last used last

    def __call__(self, tok, text):
        ids = self.ids.pop((tok, text), None)
        if ids is None:
            ids = spell(tok, text)
            self.size += len(text)
        self.ids[tok, text] = ids
        while self.size > self.most:
            oldest = next(iter(self.ids))
            del self.ids[oldest]
            self.size -= len(oldest[1])
        return ids

    def cache_clear(self):
        self.size = 0
        self.ids.clear()


encode = Spelt()


def decode(tok, ids):
    """The text of sampled ids without their end. Other special tokens stay visible."""
    return tok.decode(ids[:-1] if ids and ids[-1] == tok.eos_token_id else ids)


class Frame(NamedTuple):
    """What stands around the segments of a prompt and of a reply."""
    head: tuple     # ids before what is asked
    tail: tuple     # ids between it and the reply
    end: int        # id that ends the reply; None if the tokenizer has none
    line: str       # before the first segment of a prompt and before y: a line break, or nothing
    space: str      # before z: a space, or nothing


@functools.lru_cache(maxsize=None)
def frame(tok):
    """The Frame of a tokenizer."""
    if not tok.chat_template:
        head = tuple(t for t in tok.encode("") if t != tok.eos_token_id or t == tok.bos_token_id)
        return Frame(head, (), tok.eos_token_id, "\n", " ")
    day = "{% macro strftime_now(f) %}26 Jul 2024{% endmacro %}"       # note 3
    turns = [{"role": "user", "content": "<<asked>>"},
             {"role": "assistant", "content": "<<reply>>"}]
    text = tok.apply_chat_template(turns, tokenize=False, enable_thinking=False,
                                   date_string="26 Jul 2024",
                                   chat_template=day + tok.get_chat_template())
    head, asked, rest = text.partition("<<asked>>")
    tail, reply, after = rest.partition("<<reply>>")
    if not asked or not reply:
        raise ValueError("its chat template drops what the user or the assistant says")

    def ids(text):
        return tuple(tok.encode(text, add_special_tokens=False))

    end = tok.eos_token_id
    closing = ids(after)[:1]
    if closing and (closing[0] in tok.all_special_ids or closing[0] in tok.added_tokens_decoder):
        end = closing[0]
    return Frame(ids(head), ids(tail), end, "", "")


def shorten(tok, state, longest):
    """A state of at most `longest` tokens. A longer one keeps its first and its last lines with a
    mark between them, each side half of what is allowed. Where one line is too long, words are
    kept; where one word is too long, characters."""
    if len(encode(tok, state)) <= longest:
        return state
    half = max(1, (longest - len(encode(tok, CUT))) // 2)
    lines, words = state.splitlines(keepends=True), re.findall(r"\s*\S+|\s+$", state)
    for pieces in (lines, words, list(state)):
        if max(len(encode(tok, piece)) for piece in pieces) <= half:
            break

    def kept(pieces):
        sizes = itertools.accumulate(len(encode(tok, piece)) for piece in pieces)
        return pieces[:sum(size <= half for size in sizes)]

    return "".join(kept(pieces)) + CUT + "".join(kept(pieces[::-1])[::-1])
