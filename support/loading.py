"""Everything that a run needs before its first step: data, models and checks. It writes nothing.

Bad input ends in one line and exit code 2 (`rundir.fail`).
"""
import dataclasses
import itertools
import json
import typing
from collections import Counter
from pathlib import Path

import torch

import lm
from envs import codebook, images, load_splits, records, test_episodes
from evals import metrics
from models import adapters, memory, parallel, pretrained, probe, tiny
from models import images as image_models
from models.text import encode, frame, shorten
from support import rollouts, rundir
from support.evaluate import affordable
from swirl_fwm import FWM
from swirl_idm import IDM, line_diff


@dataclasses.dataclass
class Lab:
    """What every stage works with."""
    cfg: typing.Any         # settings.Config
    labelled: list          # [(x, z, y)]
    validation: list        # [(x, z, y)]
    state_only: list        # [(x, y)]
    test: list              # [(x, z, y)]
    windows: list           # [[(x, z, y)] * 6] to roll out
    book: typing.Any        # the image tokenizer; None for text
    run: typing.Any = None  # rundir.Run
    held_out: dict = dataclasses.field(default_factory=dict)    # side: (scores, predictions)
    tally: Counter = dataclasses.field(default_factory=Counter)     # examples, tokens of a stage

    def fresh_net(self, device):
        """The net that P began with, before the warm-up."""
        P, _, _ = open_lab(self.cfg, device)
        return P.net


def open_lab(cfg, device):
    """(P, Q, lab): data and models as the run begins, checked."""
    splits = load_splits(cfg)
    states = states_of([splits[0], splits[2]])             # those of training
    book = codebook(cfg)
    half = in_half(cfg, device)
    net_P, net_Q, tok = load_nets(cfg, states, book, half)
    splits = shorten_all(tok, splits, cfg.max_state)
    longest = check_data(net_P, tok, splits, cfg)
    nets = net_P.to(device), net_Q.to(device)
    check_model(nets[0], tok, splits, longest, cfg)
    P, Q = wrap(*nets, tok, cfg, half, longest, states[0])
    labelled, validation, state_only, test = splits
    test = affordable(tok, test)
    windows = windows_of(cfg, tok, book, len(test))
    return P, Q, Lab(cfg, labelled, validation, state_only, test, windows, book)


def states_of(splits):
    """Every x and y of splits of (x, z, y) or (x, y): each once, in their order."""
    states = {}
    for rows in splits:
        for row in rows:
            states[row[0]] = None
            states[row[-1]] = None
    return list(states)


def windows_of(cfg, tok, book, tests):
    """Six steps [(x, z, y)] each, to roll out; their number depends on that of test
    transitions. None of text for a real model: that is what evals/rollout.py is for."""
    if not book and cfg.model != "tiny":
        return []
    episodes = shorten_all(tok, test_episodes(cfg), cfg.max_state)
    most = tests * 2 // 3 if book else tests // 20
    return rollouts.windows(episodes, 6, every=1)[:max(4, most)]


def in_half(cfg, device):
    """Whether products are bfloat16: for a real model where the device has such products."""
    if cfg.dtype != "auto":
        return cfg.dtype == "bfloat16"
    if cfg.model == "tiny":
        return False
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(kind) for kind in ("avx512_bf16", "amx_bf16"))


def load_nets(cfg, states, book, half):
    """(P's net, Q's net, tok), one start for both, as in the paper. Images add their codes to any
    tokenizer; the tiny model for images has a start of its own."""
    added = images.vocabulary(states, book.size if book else 0)
    if added and (cfg.lora or cfg.max_state):
        rundir.fail(
            "leave out --lora, which cannot learn the new tokens of images, and --max-state, "
            "which would cut images"
        )
    name = tiny.FOLDER if cfg.model == "tiny" else cfg.model
    dtype = torch.bfloat16 if cfg.lora and half else torch.float32         # a base does not learn
    try:
        net, tok = pretrained.load(name, dtype)
        if cfg.model == "tiny" and added:
            return image_models.start(tok, added, states, book, cfg.seed)
        if cfg.lora:
            nets = adapters.pair(net, cfg.lora)
        else:
            nets = net, parallel.plain(net).eval()
    except Exception as error:      # whatever a damaged file makes the loaders raise
        refuse(cfg, error)
    if tok.eos_token_id is None:
        rundir.fail(
            f"--model {cfg.model}: its tokenizer has no end token; give a causal language model"
        )
    if tok.add_tokens(added):
        for net in nets:
            net.resize_token_embeddings(max(len(tok), net.config.vocab_size))
    return *nets, tok


def refuse(cfg, error):
    """Fails in one line: the model cannot be used."""
    reason = str(error).partition("\n")[0]
    rundir.fail(f"--model {cfg.model}: {reason}; give tiny, smollm2, a Hub id, a folder with "
                "safetensors or a .gguf file")


def check_model(net, tok, splits, longest, cfg):
    """Fails if the model samples and scores unlike, behind a prompt as long as the data's
    longest."""
    if cfg.model == "tiny":
        return
    x = max(len(encode(tok, "\n" + state)) for state in states_of(splits))
    size = min(len(tok), net.config.get_text_config().vocab_size)
    try:
        probe.check(net, size, min(x + sum(longest), pretrained.context(net)))
    except ValueError as error:
        refuse(cfg, error)


def wrap(net_P, net_Q, tok, cfg, half, longest, state):
    """(P, Q) as FWM and IDM. longest: tokens of the longest y and z. For images, P may emit only
    codes and Q only words. Elsewhere neither may emit ids beyond the tokenizer, which decode to
    nothing."""
    size = net_P.config.vocab_size
    for_P = for_Q = None
    kind_P, kind_Q = FWM, IDM
    if images.is_image(state):
        kind_P, kind_Q = image_models.ImageFWM, image_models.ImageIDM
        for_P = image_models.codes_only(tok, size, state)
        for_Q = image_models.words_only(tok, size)
    elif len(tok) < size:
        known = torch.arange(size) < len(tok)
        for_P = for_Q = known[None]                                        # (1, V)

    longest_y, longest_z = longest
    cached = 0
    if cfg.tokens and cfg.model != "tiny":
        cached = memory.cached(net_P.config, cfg.tokens, longest_y, cfg.lora, half)

    def options(allowed):
        if allowed is not None:
            allowed = allowed.to(net_P.device)
        return lm.Options(tok.eos_token_id, allowed=allowed, half=half, tokens=cfg.tokens,
                          cached=cached)

    P = kind_P(net_P, tok, options(for_P), longest_y)
    Q = kind_Q(net_Q, tok, options(for_Q), longest_z, cfg.view)
    return P, Q


def settle(P, Q, lab, device, folder):
    """P and Q with the weights in a folder of the run, if one is given, on their device and, under
    --shard, divided among the processes."""
    cfg = lab.cfg
    if folder:
        for model, side in ((P, "fwm"), (Q, "idm")):
            saved = saved_model(lab.run.dir, folder, side)
            if cfg.lora:
                model.net.load(saved)                      # on the base that `load_nets` has loaded
            else:
                model.net = None                           # memory holds no third model
                model.net = pretrained.load(saved)[0]
    nets = [P.net, Q.net]
    if lab.run.progress["stages"]:
        print(f"resuming after {lab.run.label}{lab.run.progress['stages'][-1]['name']}")
    nets = [net.to(device) for net in nets]
    if cfg.shard:
        nets = [parallel.shard(net) for net in nets]
    P.net, Q.net = nets
    if lab.run.done("joint"):
        Q.net = P.net                                      # --method share
    return P, Q


# What shapes the data and the warm-up: --start must have been given the same
SAME = ("env", "data", "seed", "model", "lora", "view", "spoiled", "busy", "episodes", "labelled",
        "eval_size", "validation_size", "max_state")


def check_start(cfg):
    """(the folder of --start's SFT models, the scores that they had there); (None, None) without
    --start. Fails if it is no finished run, or one of other data or another model."""
    if not cfg.start:
        return None, None
    folder = Path(cfg.start)
    if folder.resolve() == Path(cfg.out).resolve():
        rundir.fail("--start and --out are one folder; give another --out")
    try:
        config = json.loads((folder / "config.json").read_text())
        before = dict(config["settings"])
        scores = json.loads((folder / "results.json").read_text())["stages"][0]
        found = all((folder / name).exists() for name in ("sft/fwm", "sft/idm"))
    except (OSError, ValueError, LookupError, TypeError):
        found = False
    if not found:
        rundir.fail(f"--start {folder}: no finished run with sft/ is there; give one")
    for name in SAME:
        if before.get(name) != getattr(cfg, name):
            rundir.fail(f"--start {folder} has {name}={before.get(name)}, this run has "
                        f"{name}={getattr(cfg, name)}; give the same, or leave out --start")
    if config.get("data_sha256") != records.sha256(cfg.data):
        rundir.fail(f"{cfg.data} has changed since the run in {folder}; leave out --start")
    return (folder / "sft").resolve(), scores


def saved_model(run_dir, folder, side):
    """Where a run has one side's model: in `folder`, or in its own if the run was cut at its very
    end, when the models had moved."""
    last = run_dir / folder / side
    return last if last.exists() else run_dir / side


def shorten_all(tok, splits, longest):
    """The splits with `text.shorten` applied to every state; says how many it cut."""
    if not longest:
        return splits
    states = states_of(splits)
    short = {state: shorten(tok, state, longest) for state in states}

    def loses_its_change(row):
        return row[0] != row[-1] and short[row[0]] == short[row[-1]]

    def shortened(row):
        return short[row[0]], *row[1:-1], short[row[-1]]

    cut = sum(short[state] != state for state in states)
    if cut:
        rows = list(itertools.chain(*splits))
        lost = sum(map(loses_its_change, rows))
        print(
            f"{cut} of {len(states)} states have more than {longest} tokens: the middle of each is "
            f"left out (--max-state), and with it all that changes in {lost} of {len(rows)} "
            "transitions"
        )
    return tuple(list(map(shortened, rows)) for rows in splits)


def check_processes(cfg, device):
    """Fails if torchrun started more processes than there are GPUs or rows of a batch."""
    world = parallel.world()
    if device == "cuda" and parallel.too_many():
        rundir.fail(f"more processes than GPUs ({torch.cuda.device_count()}) on a machine; give "
                    "torchrun fewer, or --device cpu")
    if cfg.shard and cfg.lora:
        rundir.fail(
            "--shard and --lora exclude each other: an adapter is small; give one of the two"
        )
    if cfg.shard and world == 1:
        rundir.fail("--shard needs several processes: "
                    "torchrun --nproc-per-node N train.py --shard ...")
    for name in ("batch", "warmup_batch", "warmup_batch_idm"):
        if 0 < getattr(cfg, name) < world:
            rundir.fail(f"--{name.replace('_', '-')} {getattr(cfg, name)} cannot be divided among "
                        f"{world} processes; give at least {world}, or start fewer")


def check_data(net, tok, splits, cfg):
    """(longest y, longest z) to draw, in tokens: the longest in training and a margin. Fails if a
    split has nothing to learn from, or a prompt and its reply do not fit the model."""
    labelled, _, state_only, test = splits
    name = cfg.data or cfg.env
    check_changes(splits, name)
    states = states_of(splits)
    sizes = {state: len(encode(tok, "\n" + state)) for state in states}
    margin = 1 if check_images(tok, states, name) else 16  # images are of one size
    longest_y = margin + max(sizes[state] for state in states_of([labelled, state_only]))
    longest_z = longest_action(tok, labelled)
    check_context(net, tok, splits, sizes, longest_y, cfg)
    warn_of_lossy(tok, states, name)
    warn_of_unreadable(tok, test, longest_y, name)
    return longest_y, longest_z


def check_changes(splits, name):
    """Fails if a split has nothing to learn from."""
    processes = parallel.world()
    few = "no" if processes == 1 else f"fewer than {processes} (one a process)"
    kinds = "labelled", "validation", "state-only", "test"
    for kind, rows in zip(kinds, splits):
        changed = [row for row in rows if row[0] != row[-1]]
        if len(changed) < processes:
            rundir.fail(f"{name}: {few} {kind} transition with y != x; give more episodes")


def warn_of_lossy(tok, states, name):
    """Print one line if the tokenizer spells some states in another way."""
    line = frame(tok).line
    lost = 0
    for state in states:
        ids = encode(tok, line + state)
        lost += tok.decode(ids).removeprefix(line) != state
    if lost:
        print(
            f"warning: {name}: the tokenizer does not give {lost} of {len(states)} states back as "
            "they are; P cannot predict these exactly"
        )


def warn_of_unreadable(tok, test, longest_y, name):
    """Print a line if P cannot write some test states, since they are longer than those of
    training, and one if ROUGE-L finds nothing to compare in some."""
    line = frame(tok).line
    long = sum(len(encode(tok, line + y)) >= longest_y for _, _, y in test)
    empty = sum(not metrics.has_tokens(y) for _, _, y in test)
    if long:
        print(f"warning: {name}: {long} of {len(test)} test states y are longer than P may write "
              f"({longest_y} tokens, from training); it cannot predict these")
    if empty:
        print(f"warning: {name}: {empty} of {len(test)} test states y have no token for ROUGE-L, "
              "which knows a-z and 0-9; they score 0 there")


def longest_action(tok, rows):
    """Tokens of the longest z, and a margin."""
    sizes = [len(encode(tok, " " + z)) for _, z, _ in rows]
    return max(sizes) + 8


def check_images(tok, states, name):
    """True for images. Fails if only some states are images, or if they differ in size."""
    shown = [images.patches(s) or [] for s in states if images.is_image(s)]
    if not shown:
        return False
    whole = all(shown) and len(shown) == len(states)
    one_size = len(set(map(len, shown))) == 1
    known = set(itertools.chain(*shown)) <= set(tok.get_added_vocab())
    if not (whole and one_size and known):
        example = images.spell([["0", "1"], ["2", "3"]])
        rundir.fail(
            f"{name}: where a state is an image, all are: {example}, rows as long as columns, all "
            "of one size, every code seen in training"
        )
    return True


def check_context(net, tok, splits, sizes, longest_y, cfg):
    """Fails if x, z and y together are longer than the model takes."""
    labelled, validation, _, test = splits
    longest = max(sizes, key=sizes.get)
    size = sizes[longest]
    z = longest_action(tok, labelled + validation + test)
    needed = size + max(longest_y, size) + others(tok, longest, z, cfg.view)
    if needed > pretrained.context(net):
        rundir.fail(
            f"{cfg.data or cfg.env}: a state of {size} tokens ({longest[:40]!r}...) is "
            f"longer than the model takes ({pretrained.context(net)} tokens for x, z and y "
            "together); give --max-state, shorten the states or choose another --model"
        )


def others(tok, state, longest_z, view):
    """Tokens besides x and y of the longest prompt and its reply, if x is `state`."""
    marks = 0
    if view == "diff":                                     # what Q reads besides codes and lines
        marks = 6 * (1 + state.count("\n")) + state.count("<c")
    around = len(frame(tok).head) + len(frame(tok).tail) + 16
    return marks + 2 * longest_z + around


# --- whether the line diff says anything -------------------------------------------------------

def diff_is_short(x, y):
    """Whether the line diff shows fewer than half of the lines of x and y."""
    lines = x.count("\n") + y.count("\n") + 2
    return 2 * len(line_diff(x, y)) < lines


def warn_of_long_diffs(lab):
    """Print one line if the line diff of most pairs of a file is nearly x and y. It looks at the
    first 100 changed pairs."""
    cfg = lab.cfg
    if not cfg.data or cfg.view == "full" or images.is_image(lab.test[0][0]) or parallel.rank():
        return
    pairs = [(row[0], row[-1]) for row in lab.labelled + lab.state_only if row[0] != row[-1]]
    some = pairs[:100]
    long = len(some) - sum(diff_is_short(x, y) for x, y in some)
    if 2 * long > len(some):
        print(
            f"warning: {cfg.data}: in {long} of {len(some)} changed pairs the line diff shows half "
            "of x and y or more, so it says little; give --view full"
        )
