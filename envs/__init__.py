"""One file a world (physics, web, tools), `records.py` for your own transitions file, and the splits of both."""
import random

from envs import physics, records, tools, web

WORLDS = {"physics": physics, "web": web, "tools": tools}


def load_splits(cfg):
    """labelled, validation, test: [(x, z, y)]; state_only: [(x, y)], no z anywhere in memory."""
    if cfg.data:
        part = records.split(records.read(cfg.data), cfg.seed)
        labelled, validation, test = ([(t.x, t.z, t.y) for t in part[k]] for k in ("labelled", "validation", "test"))
        state_only = [(t.x, t.y) for t in part["state_only"]]
    else:
        def draw(split, n):
            return [t for i in range(n) for t in WORLDS[cfg.env].episode(random.Random(f"{cfg.seed} {split} {i}"))]
        half = cfg.episodes // 2
        held = max(1, min(half // 2, -(-cfg.validation_size // WORLDS[cfg.env].STEPS)))   # no more than are used
        labelled, validation = draw("labelled", half - held), draw("validation", held)
        state_only = [(x, y) for x, _, y in draw("state-only", half)]
        test = draw("test", 60)
    seen = {s for x, _, y in labelled for s in (x, y)} | {s for pair in state_only for s in pair}
    known = all if cfg.data else any                                              # MirrorAPI's x, a documentation, comes again and again
    test = [t for t in test if not known(s in seen for s in (t[0], t[2]))] or test      # no state that training held word for word
    rng = random.Random(cfg.seed)
    pick = lambda rows, n: rng.sample(rows, min(n, len(rows)))
    return labelled, pick(validation, cfg.validation_size), state_only, pick(test, cfg.eval_size)
