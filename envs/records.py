"""Your own logs as a world: read, check, write and split a transitions file.

Claim: whatever is wrong with the file is said in one line, "FILE:LINE: what is wrong; what to do"
(no LINE where the file as a whole is at fault), and no episode is on two sides of the split,
whatever the line order.

One JSON object a line, plain or .gz, UTF-8:
    {"episode": str, "t": int, "x": str, "z": str or absent, "y": str}    x --z--> y at step t

    python -m envs.records FILE --check       what the file is fit for; --help: from CSV, folders

Notes:
  1. An absent z: nobody wrote the action down. Such an episode can only be state-only training
     data.
  2. Split, always by episode: ids that begin with train-, dev- or test- say where they belong (dev
     is validation). Of the others, those with every z are shuffled by seed and cut 70 / 10 / 20
     into train, dev, test, and those that lack one go to train: scarce labels keep their share of
     training data.
  3. Training episodes are halved, by episode and seed, into labelled and state-only. Episodes that
     lack a z fill the state-only half first; if they are more than half, labelled gets all the
     rest.
  4. Without any dev episode, a tenth of the labelled ones (at least one) becomes validation.
  5. State-only transitions hold z = None in memory, so that no code can peek.
  6. Blank lines and extra keys are skipped. An episode of one line is refused, unless its id fixes
     its split (cut windows of a longer record may hold one line) or `min_steps=1`. That y of one
     step is x of the next is not required.
  7. A small file cannot fill the memory: a line has LONGEST bytes at most, a text MOST characters,
     since a tokenizer takes 300 times as much, and a .gz unpacks to TIMES its size and SPARE bytes
     at most. A key that comes twice in an object is refused, since one of its values would be lost.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import random
import sys
import zlib

# Settings for a file of your own, whose states may be long: a reward for each token, fewer steps
PRESET = {
    "reward_form": "mean", "floor": 10.0, "bootstrap_steps": 300, "phase1_steps": 20,
    "phase2_steps": 20}


LONGEST, MOST = 2**28, 2**20    # bytes of a line, characters of a text
TIMES, SPARE = 100, 2**24       # what a .gz may unpack to


class BadData(ValueError):
    """The user's data is at fault; str() is one line that says where, what, and what to do."""


def fail(message):
    """The user's input is at fault: one line, exit code 2."""
    print("error: " + one_line(message), file=sys.stderr)
    raise SystemExit(2)


def one_line(message):
    """The message on one line, with ? for what a terminal would obey rather than show."""
    text = " ".join(str(message).split())
    return "".join(c if c.isprintable() else "?" for c in text)


def show_anything():
    """Print "?" for a character that the terminal cannot show, in place of a crash."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@dataclasses.dataclass(frozen=True)
class Transition:
    """One step (x, z, y) of an episode. `source`: "FILE:LINE" if it was read; == does not look at
    it."""
    episode: str
    t: int
    x: str
    z: str | None
    y: str
    source: str = dataclasses.field(default="", compare=False, repr=False)


# ---- Read ----------------------------------------------------------------------------------------


def read(path, min_steps=2):
    """List of every Transition in the file at `path` (.jsonl or .jsonl.gz), sorted by episode, then
    by t.

    min_steps: an episode of fewer lines is refused if its id fixes no split (int >= 1; 1 takes
    every episode). Raises BadData for anything that the docstring above does not allow, with file
    and line.
    """
    return sorted(each(path, min_steps), key=_order)


def each(path, min_steps=2):
    """Yields what `read` lists, in the order of the file, so that it may be larger than memory."""
    path = os.fspath(path)
    parsed = (_parse(raw, f"{path}:{number}") for number, raw in lines(path) if raw.strip())
    return whole_episodes(parsed, path, min_steps)


def whole_episodes(transitions, path, min_steps=2):
    """Yields the transitions, which hold their source. BadData for a step that comes twice and, at
    the end, for an episode that is too short or if there is none."""
    # seen: (episode, t) -> line; steps: episode -> [number of lines, where the first is]
    seen, steps = {}, {}
    for tr in transitions:
        key, line = (tr.episode, tr.t), tr.source.rpartition(":")[2]
        if key in seen:
            raise BadData(
                f"{tr.source}: episode {shown(tr.episode)} has t = {tr.t} twice, first on "
                f"line {seen[key]}; remove or renumber one of them"
            )
        seen[key] = line
        steps.setdefault(tr.episode, [0, tr.source])[0] += 1
        yield tr
    if not steps:
        raise BadData(
            f"{path}: the file holds no transitions; write one JSON object a line with the keys "
            "episode, t, x, z, y"
        )
    for episode, (n, source) in steps.items():
        if n < min_steps and not episode.startswith(("train-", "dev-", "test-")):
            raise BadData(
                f"{source}: episode {shown(episode)} has {n} line(s), and at least {min_steps} "
                "are needed; add the other steps or remove the episode"
            )


def lines(path):
    """Yields (line number from 1, bytes of the line); bytes, so that bad UTF-8 can be told with its
    line."""
    number = 0
    try:
        left = room(path)
        with (gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")) as file:
            while raw := file.readline(min(left, LONGEST) + 1):
                number, left = number + 1, left - len(raw)
                if left < 0:
                    raise too_large(path)
                if len(raw) > LONGEST:
                    raise BadData(f"{path}:{number}: a line of more than {LONGEST} bytes; give one "
                                  "JSON object a line")
                yield number, raw
    except FileNotFoundError:
        raise BadData(f"{path}: there is no such file; check the path") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        place = f"{path}:{number + 1}" if number else path
        raise BadData(
            f"{place}: not a whole gzip file ({error}); compress it again, or drop .gz from its "
            "name if it is plain text"
        ) from None
    except OSError as error:
        raise BadData(f"{path}: cannot read it ({error.strerror}); give a readable file") from None


def room(path):
    """Bytes that may be read of a file."""
    return unpacked(path) if path.endswith(".gz") else sys.maxsize - 1


def unpacked(path):
    """Bytes to which a packed file may unpack."""
    return TIMES * os.path.getsize(path) + SPARE


def too_large(path):
    """The BadData of a packed file that may be made to fill the memory."""
    return BadData(f"{path}: it unpacks to more than {TIMES} times its size; unpack it yourself if "
                   "you trust it")


def from_json(text):
    """What JSON says, given as text or as bytes of UTF-8. ValueError says in a few words why it
    says nothing."""
    try:
        # -sig: some editors begin a file with a byte-order mark
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=once)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(why_no_json(error)) from None


class Twice(ValueError):
    """A key comes twice in an object."""
    msg = "a key comes twice in an object"


def once(pairs):
    """The dict of the pairs of an object."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Twice
    return found


def why_no_json(error):
    """What a decoder of JSON means by a ValueError or RecursionError."""
    return getattr(error, "msg", "a number too long or brackets too deep")


def _parse(raw, source):
    """Transition from the bytes of one line, or BadData."""
    try:
        record = from_json(raw)
    except ValueError as error:
        todo = "write one JSON object on each line"
        if "UTF-8" in str(error):
            todo = "save it as UTF-8, or name it .gz if it is gzip"
        raise BadData(f"{source}: not valid JSON ({error}); {todo}") from None
    return check(record, source)


def check(record, source):
    """Transition from what one line says (a dict, or whatever JSON gave), or BadData, which begins
    with `source`."""
    if not isinstance(record, dict):
        raise BadData(
            f'{source}: {shown(record)} is not a JSON object; write {{"episode": .., "t": .., '
            '"x": .., "z": .., "y": ..} on each line'
        )
    for key in ("episode", "t", "x", "y"):
        if key not in record:
            raise BadData(
                f'{source}: the key "{key}" is missing; every line needs episode, t, x and y'
            )
    # type() is int: True is an int to isinstance, and 3.0 is no step number.
    if type(record["t"]) is not int:
        raise BadData(
            f'{source}: "t" is {shown(record["t"])}; give the step as a whole number, as in 3'
        )
    for key in ("episode", "x", "z", "y"):
        if key not in record:  # only z may be absent
            continue
        if not isinstance(record[key], str):
            todo = ", or leave the key out if the action is unknown" if key == "z" else ""
            raise BadData(f"{source}: \"{key}\" is {shown(record[key])}; give a string{todo}")
        if not record[key].strip():
            todo = (
                "leave the key out if the action is unknown" if key == "z" else "give it some text"
            )
            raise BadData(f"{source}: \"{key}\" is empty; {todo}")
        if len(record[key]) > MOST:
            raise BadData(f'{source}: "{key}" has {len(record[key])} characters, and a text may '
                          f"have {MOST}; shorten it")
        try:
            record[key].encode("utf-8")
        # JSON can spell half a character, such as "\ud800"; no tokenizer takes it
        except UnicodeEncodeError:
            raise BadData(f"{source}: \"{key}\" holds half a surrogate pair (\\ud800 to \\udfff); "
                          "write the whole character or remove it") from None
    return Transition(
        record["episode"], record["t"], record["x"], record.get("z"), record["y"], source
    )


# ---- Write ---------------------------------------------------------------------------------------


def write(path, transitions):
    """Writes the transitions to `path`, in the order given, gzipped if it ends in .gz; z = None
    leaves z out.

    transitions: any iterable of Transition; it is written as it comes, so that it may be larger
    than memory. Atomic: the old file stays whole until the new one, written beside it, takes its
    place.
    """
    path = os.fspath(path)
    try:
        # No name, no time stamp: the same transitions make the same bytes
        with (
            whole(path) as file,
            gzip.GzipFile("", "wb", 9, file, mtime=0) if path.endswith(".gz") else file as out,
        ):
            for tr in transitions:
                record = {"episode": tr.episode, "t": tr.t, "x": tr.x, "z": tr.z, "y": tr.y}
                if tr.z is None:
                    del record["z"]
                out.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8"))
    except OSError as error:
        raise BadData(
            f"{path}: cannot write it ({error.strerror}); name a file in a folder that exists and "
            "that you may write to"
        ) from None


@contextlib.contextmanager
def whole(path):
    """A binary file beside `path` that takes its place when the block ends without an error, and is
    removed otherwise."""
    unfinished = f"{path}.{os.getpid()}.unfinished"
    try:
        with open(unfinished, "wb") as file:
            yield file
        sync(unfinished)
        os.replace(unfinished, path)
        sync(os.path.dirname(os.path.abspath(path)))
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def sync(path):
    """Let a file or folder reach the disk, so that a power cut leaves it."""
    if os.name == "nt":         # cannot open folders
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sha256(path):
    """Of the file's bytes, in hex; None for no path. BadData if it cannot be read."""
    if not path:
        return None
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise BadData(f"{path}: {error.strerror}") from None
    return digest.hexdigest()


# ---- Split ---------------------------------------------------------------------------------------


def split(transitions, seed):
    """Splits by episode: {"labelled", "state_only", "validation", "test"}, each a list of
    Transition.

    The same `seed` (int) and transitions, in any order, give the same split. Lists are sorted by
    episode, then by t. state_only holds z = None and may be empty; the others hold every z and at
    least one episode. Raises BadData where that cannot be had, or where a dev- or test- episode
    lacks a z.
    """
    transitions = sorted(transitions, key=_order)
    has_z, train, dev, test, free = {}, [], [], [], []
    for tr in transitions:
        has_z[tr.episode] = has_z.get(tr.episode, True) and tr.z is not None
        if tr.z is None and tr.episode.startswith(("dev-", "test-")):
            raise BadData(
                f"{tr.source or 'transitions'}: held-out episode {shown(tr.episode)} has no z at "
                f"t = {tr.t}; add the action, or rename the episode to train-.. for state-only use"
            )
    for episode in has_z:  # sorted, as the transitions are
        if episode.startswith("dev-"):
            dev.append(episode)
        elif episode.startswith("test-"):
            test.append(episode)
        elif episode.startswith("train-") or not has_z[episode]:
            train.append(episode)
        else:
            free.append(episode)

    rng = random.Random(seed)
    rng.shuffle(free)
    n_dev, n_test = (len(free) + 5) // 10, (2 * len(free) + 5) // 10  # 10% and 20%, rounded
    if not test:
        n_test = max(1, n_test)
    test += free[:n_test]
    dev += free[n_test:n_test + n_dev]
    train += free[n_test + n_dev:]

    train.sort()
    rng.shuffle(train)
    half = (len(train) + 1) // 2
    if not dev:
        half = max(2, half)  # labelled has to give one away
    labelled = [episode for episode in train if has_z[episode]][:half]
    if not dev:
        n_dev = max(1, (len(labelled) + 5) // 10)
        labelled, dev = labelled[n_dev:], labelled[:n_dev]

    for name, episodes in (("labelled", labelled), ("validation", dev), ("test", test)):
        if not episodes:
            file = transitions[0].source.rpartition(":")[0] if transitions else ""
            raise BadData(
                f"{file or 'transitions'}: no episode is left for the {name} split: "
                f"{sum(has_z.values())} of {len(has_z)} episodes have every z; add such episodes"
            )
    labelled, dev, test = set(labelled), set(dev), set(test)
    rest = set(has_z) - labelled - dev - test
    return {
        "labelled": [tr for tr in transitions if tr.episode in labelled],
        "state_only": [dataclasses.replace(tr, z=None) for tr in transitions if tr.episode in rest],
        "validation": [tr for tr in transitions if tr.episode in dev],
        "test": [tr for tr in transitions if tr.episode in test],
    }


def _order(transition):
    return transition.episode, transition.t


def shown(value):
    """A value as JSON on one line, cut to what a message can bear."""
    try:
        text = json.dumps(value)
    except RecursionError:
        text = "deep brackets"
    return text if len(text) <= 80 else text[:77] + "..."


if __name__ == "__main__":
    import runpy
    runpy.run_module("envs.convert", run_name="__main__")  # which imports this file
