"""What a transitions file is fit for, before any training: `python -m envs.records FILE --check`.

Claim: what `train.py` would refuse (with its defaults) is refused here in the same words, or the
last line names the flag that helps. Numbers are of the whole file and of its split at seed 0.

Notes:
  1. Texts are read one transition at a time. Kept are a hash of each state, each distinct action
     and the longest state. The time is linear in the file's length. Where states are too long, the
     file is read again, to see what --max-state would hide.
  2. For a pair of many lines, or of many equal ones, the diff is estimated from the lines that only
     x or only y has. A line that moved then counts as unchanged.
  3. Tokens are those of the tiny model. Another model has its own, and its own context.
"""
import collections
import dataclasses
import json
import textwrap

import transformers

from envs import images, records
from models import pretrained, tiny
from models.text import encode, frame, shorten, spell  # spell: holds no text of the file
from support import loading, rundir

# What SFT reached, from docs/RESULTS.md: (labels, where, % of changes word for word)
MEASURED = [
    (1568, "tools, physics and web", "94.2, 79.2 and 75.0"),
    (1065, "the JSON of a cloud account", "55.5"),
    (985, "ScienceWorld", "14.5"),
]

MANY, EQUAL = 250_000, 50_000   # work of an exact diff beyond which note 2 holds
STEP = 50                       # --max-state is a multiple of it


def report(path):
    """The lines to print. BadData, or one line and exit code 2, if the file is bad."""
    records.show_anything()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    net, tok = pretrained.load(tiny.FOLDER)
    found = count(path, tok)
    splits = records.split(found.rows, seed=0)
    names = "labelled", "validation", "state_only", "test"
    pairs = [[(tr.x, tr.y) for tr in splits[name]] for name in names]
    loading.check_changes(pairs, path)

    diff, view = about_diff(found)
    context, longest = about_context(net, tok, path, found, view)
    flags = [f"--max-state {longest}"] * bool(longest) + ["--view full"] * (view == "full")
    return [
        *about_file(path, found),
        *about_splits(splits),
        *about_states(found),
        context,
        diff,
        *about_actions(found),
        *what_to_expect(len(splits["labelled"])),
        " ".join(["train: python train.py --data", path, *flags]),
    ]


# --- reading --------------------------------------------------------------------------------------

def table():
    return dataclasses.field(default_factory=collections.Counter)


@dataclasses.dataclass
class Found:
    """What one pass over the file finds. States are counted once each."""
    rows: list = dataclasses.field(default_factory=list)   # Transitions with hashes as x and y
    hashes: set = dataclasses.field(default_factory=set)   # of the states
    lines: collections.Counter = table()                   # lines of a state -> states
    tokens: collections.Counter = table()                  # tokens of a state -> states
    actions: collections.Counter = table()                 # z -> transitions
    kinds: collections.Counter = table()                   # form of a state -> states
    longest: str = ""                                      # the state of most tokens
    size: int = 0                                          # its tokens
    steepest: float = 0.0                                  # most lines a token, of long states
    lost: int = 0                                          # states that the tokenizer changes
    changed: int = 0                                       # transitions with y != x
    short: int = 0                                         # those of which the diff is short


def count(path, tok):
    """Found."""
    found = Found()
    for tr in records.each(path):
        x, y = hash(tr.x), hash(tr.y)
        for key, state in ((x, tr.x), (y, tr.y)):
            if key not in found.hashes:
                found.hashes.add(key)
                add_state(found, tok, state)
        z = None
        if tr.z is not None:
            z = "known"
            found.actions[tr.z] += 1
        if x != y:
            found.changed += 1
            found.short += diff_is_short(tr.x, tr.y)
        found.rows.append(dataclasses.replace(tr, x=x, z=z, y=y))
    return found


def add_state(found, tok, state):
    """Count a state that is new."""
    kind, line = form(state), frame(tok).line
    if kind == "images":                                   # a token a code, and two marks
        size = len(spell(tok, line)) + len(images.patches(state)) + 2
    else:
        ids = spell(tok, line + state)
        size = len(ids)
        found.lost += tok.decode(ids).removeprefix(line) != state
    lines = 1 + state.count("\n")
    if size > found.size:
        found.longest, found.size = state, size
    if size > 10 * STEP:
        found.steepest = max(found.steepest, lines / size)
    found.kinds[kind] += 1
    found.lines[lines] += 1
    found.tokens[size] += 1


def form(state):
    """What a state looks like."""
    if images.is_image(state):
        return "images"
    if "\n" in state.strip():
        return "of several lines"
    try:
        record = isinstance(json.loads(state), (dict, list))
    except (ValueError, RecursionError):
        record = False
    return "one line of JSON" if record else "a single line"


def diff_is_short(x, y):
    """`loading.diff_is_short`; by note 2 for many lines."""
    before, after = (collections.Counter(state.split("\n")) for state in (x, y))
    same = (before & after).total()
    lines = before.total() + after.total()
    equal = sum(n * after[line] for line, n in before.items())     # pairs of equal lines
    if before.total() * after.total() < MANY and (equal - same) * lines < EQUAL:
        return loading.diff_is_short(x, y)
    return 2 * (lines - 2 * same) < lines


# --- the lines ------------------------------------------------------------------------------------

def about_file(path, found):
    episodes = {}
    for tr in found.rows:
        episodes[tr.episode] = episodes.get(tr.episode, True) and tr.z is not None
    n, known = len(found.rows), found.actions.total()
    return [
        f"{path}: {len(episodes):,} episodes, {n:,} transitions, {len(found.hashes):,} states",
        f"with an action: {share(known, n)} of the transitions; every action is known in "
        f"{sum(episodes.values()):,} episodes",
        f"unchanged: y = x in {share(n - found.changed, n)} of the transitions; the phases leave "
        "these out",
    ]


def about_splits(splits):
    """The episodes and transitions of each split; how much of the test is new."""
    lines = ["split, seed 0, in episodes (transitions):"]
    for name, rows in splits.items():
        episodes = len({tr.episode for tr in rows})
        lines.append(f"  {name.replace('_', '-'):<11}{episodes:>7,} ({len(rows):,})")
    seen = {state for name in ("labelled", "state_only") for tr in splits[name]
            for state in (tr.x, tr.y)}
    new = sum(not {tr.x, tr.y} <= seen for tr in splits["test"])
    scored = "of which at most 300 are scored" if new else "so known ones are scored"
    lines[-1] += f": {new:,} hold a state that training lacks, {scored}"
    return lines


def about_states(found):
    """How long the states are, and whether the tokenizer keeps them."""
    n = len(found.hashes)
    kept = f"gives all {n:,} states back as they are"
    if found.lost:
        kept = (f"does not give {found.lost:,} of {n:,} states back as they are; P cannot predict "
                "these exactly")
    return [
        f"lines of a state: {spread(found.lines)}",
        f"tokens of a state: {spread(found.tokens)}",
        f"tokenizer: it {kept}",
    ]


def about_context(net, tok, path, found, view):
    """(what to print, --max-state to give or 0)."""
    limit = pretrained.context(net)
    z = 8
    if found.actions:
        z += max(len(spell(tok, " " + action)) for action in found.actions)
    needed = room(tok, found.longest, found.size, z, view)
    text = f"context: the longest x, z and y take {needed:,} of {limit:,} tokens"
    if needed <= limit:
        return f"{text}: they fit", 0
    if found.kinds["images"]:
        rundir.fail(f"{text}; make the images smaller")
    longest = most(tok, found, limit, z, view)
    long = sum(n for tokens, n in found.tokens.items() if tokens > longest)
    states = share(long, found.tokens.total())
    pairs = share(hidden(path, tok, longest), found.changed)
    return (f"{text};\n  give --max-state {longest}, which cuts {states} of the states and hides "
            f"all that changes in {pairs} of the pairs", longest)


def room(tok, state, size, longest_z, view):
    """Tokens that `loading.check_context` wants for a longest state of `size` tokens, and at most
    the margin of 16 more."""
    return 2 * size + 16 + loading.others(tok, state, longest_z, view)


def most(tok, found, limit, longest_z, view):
    """The --max-state with which everything fits: a multiple of STEP."""
    free = limit - room(tok, "\n\n", 0, longest_z, view)   # a cut adds a line
    each = 2 + (6 * found.steepest if view == "diff" else 0)
    longest = int(free / each) // STEP * STEP
    while longest > 0:
        state = shorten(tok, found.longest, longest)
        size = len(encode(tok, "\n" + state))
        if room(tok, state, size, longest_z, view) <= limit:
            return longest
        longest -= STEP
    rundir.fail(f"the longest action takes {longest_z:,} tokens, and x, z and y do not fit the "
                f"tiny model's {limit:,}; shorten the actions, or choose another --model")


def hidden(path, tok, longest):
    """Changed pairs that are equal when they are cut."""
    n = 0
    for tr in records.each(path):
        encode.cache_clear()                               # else it holds the whole file
        if tr.x != tr.y:
            n += shorten(tok, tr.x, longest) == shorten(tok, tr.y, longest)
    return n


def about_diff(found):
    """(what to print, --view to give)."""
    if found.kinds["images"]:
        return "line diff: the states are images, and Q reads the patches that change", "diff"
    text = (f"line diff: in {share(found.short, found.changed)} of the changed pairs it shows less "
            "than half of x and y")
    if 2 * found.short >= found.changed:
        return text, "diff"
    kind, n = found.kinds.most_common(1)[0]
    why = f"most states are {kind}"
    if kind == "of several lines":
        why = "most lines change"
    todo = "give --view full"
    if kind == "one line of JSON":
        todo += ", or write a key a line (indent=0)"
    return f"{text}:\n  {why}; {todo}", "full"


def about_actions(found):
    """How many there are, and the ten most frequent."""
    if not found.actions:
        return []
    n, known = len(found.actions), found.actions.total()
    once = sum(times == 1 for times in found.actions.values())
    lines = [f"distinct actions: {n:,}; {share(once, n)} of them come once, which is "
             f"{share(once, known)} of the transitions with an action"]
    top = [f"{cut(z)} ({times:,})" for z, times in found.actions.most_common(10)]
    text = "most frequent: " + ", ".join(top)
    return lines + textwrap.wrap(text, 98, initial_indent="  ", subsequent_indent="    ")


def what_to_expect(labels):
    """What was measured, without a word on what lies between."""
    lines = [f"expect: the file gives {labels:,} labels. Only this was measured, SFT of the tiny "
             "model, word for word:"]
    for n, where, score in MEASURED:
        lines.append(f"  {score}% of the changes from {n:,} labels in {where}")
    return lines


def share(part, whole):
    return f"{100 * part / whole:.1f}%" if whole else "none"


def spread(counts):
    """Median, 90% and longest of a Counter of lengths."""
    n, below, marks = counts.total(), 0, []
    for length in sorted(counts):
        below += counts[length]
        while len(marks) < 2 and below >= n * (0.5, 0.9)[len(marks)]:
            marks.append(length)
    return f"median {marks[0]:,}, 90% at most {marks[1]:,}, longest {max(counts):,}"


def cut(text, longest=20):
    """A text on one line, cut."""
    text = " ".join(text.split())
    return text if len(text) <= longest else text[:longest - 2] + ".."
