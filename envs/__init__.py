"""One file a world (physics, web, tools, pixels), `records.py` for your own transitions file, and
the splits of all."""
import functools
import random
import warnings

import numpy as np

from envs import images, physics, pixels, records, tools, web

WORLDS = {"physics": physics, "web": web, "tools": tools, "pixels": pixels}
# test episodes of a world
TEST = 60

# python -m envs.records: this file has imported it before, which does no harm
warnings.filterwarnings("ignore", "'envs.records' found in sys.modules", RuntimeWarning)


@functools.lru_cache(maxsize=8)
def draw(episode, seed, split, n, busy=0.0, peek=False):
    """[episode]: n of them, lists of (x, z, y). Without `peek` z is None in those that are
    state-only."""
    # Nobody else acts in validation and test
    some = {"busy": busy} if busy and split in ("labelled", "state-only") else {}
    drawn = [episode(random.Random(f"{seed} {split} {i}"), **some) for i in range(n)]
    if split == "state-only" and not peek:
        drawn = [[(x, None, y) for x, _, y in steps] for steps in drawn]
    return drawn


def shares(cfg):
    """{split: number of episodes} of a world."""
    world, half = WORLDS[cfg.env], cfg.episodes // 2
    # no more than are used
    held = max(1, min(half // 2, -(-cfg.validation_size // world.STEPS)))
    return {
        "labelled": half - held,
        "validation": held,
        "state-only": half * world.STATE_ONLY,
        "test": TEST,
    }


@functools.lru_cache(maxsize=2)
def fit_codebook(env, seed, labelled, state_only):
    frames = [
        frame
        for split, n in (("labelled", labelled), ("state-only", state_only))
        for steps in draw(WORLDS[env].episode, seed, split, n)
        for frame in (steps[0][0], *(y for _, _, y in steps))
    ]
    return images.Codebook.fit(np.stack(frames), pixels.PATCH, seed=seed)


def codebook(cfg):
    """The image tokenizer of a world of frames, fitted on what it trains on; None for text."""
    if cfg.data or cfg.env != "pixels":
        return None
    return fit_codebook(
        cfg.env, cfg.seed, *(shares(cfg)[split] for split in ("labelled", "state-only"))
    )


def episodes(cfg, split, peek=False):
    """[episode] of a world, with its states as strings."""
    episode, n = WORLDS[cfg.env].episode, shares(cfg)[split]
    drawn = draw(episode, cfg.seed, split, n, cfg.busy, peek)
    book = codebook(cfg)
    if book is None:
        return drawn
    return [
        list(zip(images.strings(book, xs), zs, images.strings(book, ys)))
        for xs, zs, ys in (zip(*steps) for steps in drawn)
    ]


def with_actions(cfg):
    """[(x, z, y)]: the state-only half of a world with its actions, for the method `oracle`."""
    triples = [t for steps in episodes(cfg, "state-only", peek=True) for t in steps]
    return pick(cfg, triples, cfg.state_only, "state-only") if cfg.state_only else triples


def pick(cfg, rows, n, what):
    """n of the rows, or all if there are fewer. The same for as many rows in the same order."""
    return random.Random(f"{cfg.seed} {what}").sample(rows, min(n, len(rows)))


def load_splits(cfg):
    """labelled, validation, test: [(x, z, y)]; state_only: [(x, y)], no z anywhere in memory."""
    if cfg.data:
        part = records.split(records.read(cfg.data), cfg.seed)
        labelled, validation, test = (
            [(t.x, t.z, t.y) for t in part[k]] for k in ("labelled", "validation", "test")
        )
        state_only = [(t.x, t.y) for t in part["state_only"]]
    else:
        labelled, validation, test = (
            [t for steps in episodes(cfg, split) for t in steps]
            for split in ("labelled", "validation", "test")
        )
        state_only = [(x, y) for steps in episodes(cfg, "state-only") for x, _, y in steps]
    seen = {s for x, _, y in labelled for s in (x, y)} | {s for pair in state_only for s in pair}
    # MirrorAPI's x, a documentation, comes again and again
    known = all if cfg.data else any
    # no state that training held word for word
    fresh = [t for t in test if not known(s in seen for s in (t[0], t[2]))]
    if not fresh:
        print(
            f"warning: {cfg.data or cfg.env}: training holds the states of all {len(test)} test "
            "transitions; they are scored all the same"
        )
    if cfg.labelled:
        labelled = pick(cfg, labelled, cfg.labelled, "labelled")
    if cfg.state_only:
        state_only = pick(cfg, state_only, cfg.state_only, "state-only")
    return (
        labelled,
        pick(cfg, validation, cfg.validation_size, "validation"),
        state_only,
        pick(cfg, fresh or test, cfg.eval_size, "test"),
    )


def test_episodes(cfg):
    """[episode] to roll out: lists of (x, z, y), the test split in its order."""
    if not cfg.data:
        return episodes(cfg, "test")
    out = {}
    for t in records.split(records.read(cfg.data), cfg.seed)["test"]:
        out.setdefault(t.episode, []).append((t.x, t.z, t.y))
    return list(out.values())
