"""Teach Q to refuse: labelled pairs with a wrong y and an empty action (`--spoiled`; images).

Claim: a Q that was trained on these names no action where no action makes y of x.
"""
REFUSAL = ""        # an action without a word


def rows(Q, labelled, share, rng, times=8):
    """[(prompt, target)] of labelled (x, z, y), `times` over. For a `share` of these there is also
    one with a wrong y and the refusal."""
    real = {tuple(Q.changes(x, y)) for x, _, y in labelled}
    out = []
    for row, (x, _, y) in zip(Q.rows(labelled), labelled):
        out += [row] * times
        for _ in range(times):
            if rng.random() >= share:
                continue
            other = rng.choice(labelled)[0]
            bad = Q.spoil(x, y, other, rng)
            if bad is not None and tuple(Q.changes(x, bad)) not in real:
                out += Q.rows([(x, REFUSAL, bad)])
    return out


def spoil(x, y, other, rng):
    """y with one wrong line; None if nothing changes from x to y, or no line can be exchanged.

    Half of the time a line that should have stayed comes from the state `other`. Where y changes
    several lines, one of them comes from `other`, or stays as it was in x, a quarter each."""
    before, after = x.split("\n"), y.split("\n")
    changed = []
    if len(before) == len(after):
        changed = [i for i, (old, new) in enumerate(zip(before, after)) if old != new]
    like = {}                                              # lines of `other` by their first word
    for line in other.split("\n"):
        like.setdefault(line.split(" ")[0], []).append(line)

    def exchanges(places):
        return [(i, line) for i in places for line in like.get(after[i].split(" ")[0], ())
                if line not in (after[i], *before[i:i + 1])]

    stray = exchanges([i for i, line in enumerate(after) if line in before])
    several = []
    if len(changed) > 1:
        several = [exchanges(changed), [(i, before[i]) for i in changed]]
    options = [choices for choices in (stray, stray, *several) if choices]
    if x == y or not options:
        return None
    i, line = rng.choice(rng.choice(options))
    return "\n".join(after[:i] + [line] + after[i + 1:])
