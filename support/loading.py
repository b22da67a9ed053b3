"""Everything that a run needs before its first step: data, models and checks. Nothing is written here.

Bad input ends in one line and exit code 2 (`rundir.fail`).
"""
import dataclasses
import typing

import torch

from models import adapters
import lm
from models import parallel
from models import pretrained
from support import rundir
import swirl_fwm
import swirl_idm
from models import tiny
from envs import codebook, images, load_splits, test_episodes
from evals import rollout
from support.evaluate import affordable


@dataclasses.dataclass
class Lab:
    """What every stage works with."""
    cfg: typing.Any         # settings.Config
    tok: typing.Any
    labelled: list          # [(x, z, y)]
    validation: list        # [(x, z, y)]
    state_only: list        # [(x, y)]
    test: list              # [(x, z, y)]
    windows: list           # [[(x, z, y)] * 6] to roll out
    book: typing.Any        # the image tokenizer, None for text
    max_y: int              # longest y and z to sample, in tokens
    max_z: int
    run: typing.Any = None  # rundir.Run
    held_out: dict = dataclasses.field(default_factory=dict)    # side: (its scores, its predictions), until it moves


def open_lab(cfg, device):
    """(P, Q, lab): data and models as the run begins, checked."""
    set_precision(cfg, device)
    splits = load_splits(cfg)
    states = [s for rows in (splits[0], splits[2]) for row in rows for s in (row[0], row[-1])]
    P, Q, tok = load_models(cfg, states)
    labelled, validation, state_only, test = shorten(tok, splits, cfg.max_state)
    max_y, max_z = check_data(P, tok, labelled, validation, state_only, test, cfg)
    test = affordable(tok, test)
    book, windows = codebook(cfg), []
    if book or cfg.model == "tiny":                                                # a real model on texts: evals/rollout.py
        windows = rollout.windows(shorten(tok, test_episodes(cfg), cfg.max_state), 6, every=1)
        windows = windows[:max(4, len(test) * 2 // 3 if book else len(test) // 20)]
    return P, Q, Lab(cfg, tok, labelled, validation, state_only, test, windows, book, max_y, max_z)


def load_models(cfg, states):
    """(P, Q, tok), one start for both, as in the paper. Images add their codes to any tokenizer; a tiny model of images starts
    from random weights with copy heads (`tiny.for_images`)."""
    book = codebook(cfg)
    added = images.vocabulary(states, book.size if book else 0)
    if added and (cfg.lora or cfg.max_state):
        rundir.fail("leave out --lora, which cannot learn the tokens of images, new to every model, and --max-state, which would cut images")
    name = tiny.FOLDER if cfg.model == "tiny" else cfg.model
    try:
        P, tok = pretrained.load(name, torch.bfloat16 if cfg.lora and lm.HALF else torch.float32)   # a base does not learn
        if cfg.model == "tiny" and added:
            return tiny.for_images(tok, added, states, book, cfg.seed)
        P, Q = adapters.pair(P, cfg.lora) if cfg.lora else (P, lm.freeze(P).requires_grad_())
        lm.score(P, [[0, 0]], [[0]])                              # says now if its layers cannot do what `lm` does with them
    except Exception as e:                                        # whatever a damaged file or template makes the loaders raise
        rundir.fail(f"--model {cfg.model}: {str(e).partition(chr(10))[0]}; give tiny, smollm2, a Hub id, a folder with safetensors "
                    "or a .gguf file")
    if tok.eos_token_id is None:
        rundir.fail(f"--model {cfg.model}: its tokenizer has no end token; give a causal language model")
    if tok.add_tokens(added):
        for model in (P, Q):
            model.resize_token_embeddings(max(len(tok), model.config.vocab_size))
    return P, Q, tok


def restrict(P, Q, tok, x):
    """What P and Q may emit. No id beyond the tokenizer, which would vanish in decoding. For images P may emit only codes, as many
    as x has, and Q only words."""
    if images.is_image(x):
        P.allowed, Q.allowed = swirl_fwm.codes_only(P, tok, x).to(P.device), swirl_idm.words_only(Q, tok).to(Q.device)
    elif len(tok) < P.config.vocab_size:
        P.allowed = Q.allowed = (torch.arange(P.config.vocab_size, device=P.device) < len(tok))[None]    # (1, V)


def shorten(tok, splits, longest):
    """The splits with `pretrained.shorten` applied to every state; says how many it cut."""
    if not longest:
        return splits
    states = {s for rows in splits for row in rows for s in (row[0], row[-1])}
    short = {s: pretrained.shorten(tok, s, longest) for s in states}
    cut = sum(short[s] != s for s in states)
    if cut:
        lost = sum(row[0] != row[-1] and short[row[0]] == short[row[-1]] for rows in splits for row in rows)
        print(f"{cut} of {len(states)} states have more than {longest} tokens: the middle of each is left out (--max-state), and with it "
              f"all that changes in {lost} of {sum(map(len, splits))} transitions")
    return tuple([(short[row[0]], *row[1:-1], short[row[-1]]) for row in rows] for rows in splits)


def set_precision(cfg, device):
    lm.TOKENS, lm.HALF = cfg.tokens, cfg.dtype == "bfloat16" or (
        cfg.dtype == "auto" and cfg.model != "tiny" and device == "cuda" and torch.cuda.is_bf16_supported())


def check_processes(cfg, device):
    """Fails if torchrun started more processes than there are GPUs or rows of a batch."""
    world = parallel.world()
    if device == "cuda" and parallel.too_many():
        rundir.fail(f"more processes than GPUs ({torch.cuda.device_count()}) on a machine; give torchrun fewer, or --device cpu")
    if cfg.shard and cfg.lora:
        rundir.fail("--shard and --lora exclude each other: an adapter is small; give one of the two")
    if cfg.shard and world == 1:
        rundir.fail("--shard needs several processes: torchrun --nproc-per-node N train.py --shard ...")
    for name in ("batch", "warmup_batch", "warmup_batch_idm"):
        if getattr(cfg, name) < world:
            rundir.fail(f"--{name.replace('_', '-')} {getattr(cfg, name)} cannot be divided among {world} processes; "
                        f"give at least {world}, or start fewer")


def check_data(P, tok, labelled, validation, state_only, test, cfg):
    """(longest y, longest z) to sample, in tokens: the longest in training and a margin (images are of one size). Fails if a split is empty or a
    prompt and its completion do not fit the model."""
    name, few = cfg.data or cfg.env, "no" if parallel.world() == 1 else f"fewer than {parallel.world()} (one a process)"
    for what, rows in (("labelled", labelled), ("validation", validation), ("state-only", state_only), ("test", test)):
        if sum(row[0] != row[-1] for row in rows) < parallel.world():
            rundir.fail(f"{name}: {few} {what} transition with y != x; give more episodes")
    longest_z = lambda rows: max(len(lm.encode(tok, " " + z)) for _, z, _ in rows) + 8
    frame = len(pretrained.frame(tok).head) + len(pretrained.frame(tok).tail) + 16
    n = {s: len(lm.encode(tok, "\n" + s)) for rows in (labelled, validation, state_only, test) for row in rows
         for s in (row[0], row[-1])}
    shown = [images.patches(s) or [] for s in n if images.is_image(s)]
    if shown and (not all(shown) or len({len(patches) for patches in shown}) > 1 or len(shown) < len(n) or not set().union(*shown) <= set(tok.get_added_vocab())):
        rundir.fail(f"{name}: where a state is an image, all are: {images.spell([['0', '1'], ['2', '3']])}, rows as long as columns, all of one "
                    "size, every code seen in training")
    y = max(n[s] for rows in (labelled, state_only) for row in rows for s in (row[0], row[-1])) + (1 if shown else 16)      # an image's end
    longest = max(n, key=n.get)
    marks = 6 * (1 + longest.count("\n")) + longest.count("<c") if cfg.view == "diff" else 0     # what Q reads beside codes and lines
    if n[longest] + max(y, n[longest]) + marks + 2 * longest_z(labelled + validation + test) + frame > pretrained.context(P):
        rundir.fail(f"{name}: a state of {n[longest]} tokens ({longest[:40]!r}...) is longer than the model takes "
             f"({pretrained.context(P)} tokens for x, z and y together); give --max-state, shorten the states or choose another --model")
    lost = sum(swirl_fwm.read(tok, swirl_fwm.target(tok, s)) != s for s in n)
    if lost:
        print(f"warning: {name}: the tokenizer does not give {lost} of {len(n)} states back as they are; P cannot predict these exactly")
    return y, longest_z(labelled)
