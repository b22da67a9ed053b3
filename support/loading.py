"""Everything that a run needs before its first step: data, models and checks. It writes nothing.

Bad input ends in one line and exit code 2 (`rundir.fail`).
"""
import dataclasses
import typing

import torch

import lm
from envs import codebook, images, load_splits, test_episodes
from evals import rollout
from models import adapters, parallel, pretrained, tiny
from models import images as image_models
from models.text import encode, frame, shorten
from support import rundir
from support.evaluate import affordable
from swirl_fwm import FWM
from swirl_idm import IDM


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


def open_lab(cfg, device):
    """(P, Q, lab): data and models as the run begins, checked."""
    splits = load_splits(cfg)
    states = [s for rows in (splits[0], splits[2]) for row in rows for s in (row[0], row[-1])]
    book = codebook(cfg)
    half = in_half(cfg, device)
    net_P, net_Q, tok = load_nets(cfg, states, book, half)
    splits = shorten_all(tok, splits, cfg.max_state)
    longest = check_data(net_P, tok, splits, cfg)
    P, Q = wrap(net_P.to(device), net_Q.to(device), tok, cfg, half, longest, states[0])
    labelled, validation, state_only, test = splits
    test = affordable(tok, test)
    windows = []
    if book or cfg.model == "tiny":            # for real models on text see evals/rollout.py
        episodes = shorten_all(tok, test_episodes(cfg), cfg.max_state)
        windows = rollout.windows(episodes, 6, every=1)
        windows = windows[:max(4, len(test) * 2 // 3 if book else len(test) // 20)]
    return P, Q, Lab(cfg, labelled, validation, state_only, test, windows, book)


def in_half(cfg, device):
    """Whether products are bfloat16."""
    if cfg.dtype == "auto":
        real = cfg.model != "tiny" and device == "cuda"
        return real and torch.cuda.is_bf16_supported()
    return cfg.dtype == "bfloat16"


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
        # Says now if its layers cannot do what `lm` does with them
        lm.score(nets[0], [[0, 0]] * 2, [[0], [1]], lm.Options(eos=0))
    except Exception as e:  # whatever a damaged file makes the loaders raise
        rundir.fail(
            f"--model {cfg.model}: {str(e).partition(chr(10))[0]}; give tiny, smollm2, a Hub id, "
            "a folder with safetensors or a .gguf file"
        )
    if tok.eos_token_id is None:
        rundir.fail(
            f"--model {cfg.model}: its tokenizer has no end token; give a causal language model"
        )
    if tok.add_tokens(added):
        for net in nets:
            net.resize_token_embeddings(max(len(tok), net.config.vocab_size))
    return *nets, tok


def wrap(net_P, net_Q, tok, cfg, half, longest, state):
    """(P, Q) as FWM and IDM. longest: tokens of the longest y and z. For images, P may emit only
    codes and Q only words. Elsewhere neither may emit ids beyond the tokenizer, which decode to
    nothing."""
    longest_y, longest_z = longest
    size = net_P.config.vocab_size
    for_P = for_Q = None
    kinds = FWM, IDM
    if images.is_image(state):
        kinds = image_models.ImageFWM, image_models.ImageIDM
        for_P = image_models.codes_only(tok, size, state)
        for_Q = image_models.words_only(tok, size)
    elif len(tok) < size:
        for_P = for_Q = (torch.arange(size) < len(tok))[None]              # (1, V)
    eos, device = tok.eos_token_id, net_P.device
    for_P, for_Q = (None if allowed is None else allowed.to(device) for allowed in (for_P, for_Q))
    P = kinds[0](
        net_P, tok, lm.Options(eos, allowed=for_P, half=half, tokens=cfg.tokens), longest_y
    )
    Q = kinds[1](
        net_Q,
        tok,
        lm.Options(eos, allowed=for_Q, half=half, tokens=cfg.tokens),
        longest_z,
        cfg.view,
    )
    return P, Q


def settle(P, Q, lab, device, folder):
    """P and Q with the weights in a folder of the run, if one is given, on their device and, under
    --shard, divided among the processes."""
    cfg, nets = lab.cfg, [P.net, Q.net]
    if folder:
        last = lab.run.dir / folder
        folders = [last / side if (last / side).exists() else lab.run.dir / side
                   for side in ("fwm", "idm")]
        if cfg.lora:
            for net, saved in zip(nets, folders):
                net.load(saved)                            # on the base that `load_nets` has loaded
        else:
            nets = [pretrained.load(saved)[0] for saved in folders]
    if lab.run.progress["stages"]:
        print(f"resuming after {lab.run.label}{lab.run.progress['stages'][-1]['name']}")
    nets = [net.to(device) for net in nets]
    if cfg.shard:
        nets = [parallel.shard(net) for net in nets]
    P.net, Q.net = nets
    return P, Q


def shorten_all(tok, splits, longest):
    """The splits with `text.shorten` applied to every state; says how many it cut."""
    if not longest:
        return splits
    states = {s for rows in splits for row in rows for s in (row[0], row[-1])}
    short = {s: shorten(tok, s, longest) for s in states}
    cut = sum(short[s] != s for s in states)
    if cut:
        lost = sum(row[0] != row[-1] and short[row[0]] == short[row[-1]]
                   for rows in splits for row in rows)
        print(
            f"{cut} of {len(states)} states have more than {longest} tokens: the middle of each is "
            f"left out (--max-state), and with it all that changes in {lost} of "
            f"{sum(map(len, splits))} transitions"
        )
    return tuple([(short[row[0]], *row[1:-1], short[row[-1]]) for row in rows] for rows in splits)


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
        if getattr(cfg, name) < world:
            rundir.fail(f"--{name.replace('_', '-')} {getattr(cfg, name)} cannot be divided among "
                        f"{world} processes; give at least {world}, or start fewer")


def check_data(net, tok, splits, cfg):
    """(longest y, longest z) to draw, in tokens: the longest in training and a margin. Fails if a
    split has nothing to learn from, or a prompt and its reply do not fit the model."""
    labelled, validation, state_only, test = splits
    name = cfg.data or cfg.env
    few = "no"
    if parallel.world() > 1:
        few = f"fewer than {parallel.world()} (one a process)"
    for what, rows in zip(("labelled", "validation", "state-only", "test"), splits):
        if sum(row[0] != row[-1] for row in rows) < parallel.world():
            rundir.fail(f"{name}: {few} {what} transition with y != x; give more episodes")
    states = {s: None for rows in splits for row in rows for s in (row[0], row[-1])}
    sizes = {s: len(encode(tok, "\n" + s)) for s in states}
    some_image = check_images(tok, states, name)
    trained = [s for rows in (labelled, state_only) for row in rows for s in (row[0], row[-1])]
    longest_y = max(sizes[s] for s in trained) + (1 if some_image else 16)  # images are of one size
    longest_z = longest_action(tok, labelled)
    check_context(net, tok, splits, sizes, longest_y, cfg)
    lost = sum(tok.decode(encode(tok, frame(tok).line + s)).removeprefix(frame(tok).line) != s
               for s in states)
    if lost:
        print(
            f"warning: {name}: the tokenizer does not give {lost} of {len(states)} states back as "
            "they are; P cannot predict these exactly"
        )
    return longest_y, longest_z


def longest_action(tok, rows):
    return max(len(encode(tok, " " + z)) for _, z, _ in rows) + 8


def check_images(tok, states, name):
    """True for images. Fails if only some states are images, or if they differ in size."""
    shown = [images.patches(s) or [] for s in states if images.is_image(s)]
    if not shown:
        return False
    one_size = all(shown) and len(shown) == len(states) and len(set(map(len, shown))) == 1
    if not one_size or not set().union(*shown) <= set(tok.get_added_vocab()):
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
    # What Q reads beside codes and lines
    marks = 6 * (1 + longest.count("\n")) + longest.count("<c") if cfg.view == "diff" else 0
    around = len(frame(tok).head) + len(frame(tok).tail) + 16
    z = longest_action(tok, labelled + validation + test)
    needed = sizes[longest] + max(longest_y, sizes[longest]) + marks + 2 * z + around
    if needed > pretrained.context(net):
        rundir.fail(
            f"{cfg.data or cfg.env}: a state of {sizes[longest]} tokens ({longest[:40]!r}...) is "
            f"longer than the model takes ({pretrained.context(net)} tokens for x, z and y "
            "together); give --max-state, shorten the states or choose another --model"
        )
