"""Your own logs as a transitions file, and the command line of `envs/records.py`.

    python -m envs.records FILE --check
    python -m envs.records --from-csv FILE.csv --out FILE.jsonl.gz
    python -m envs.records --from-folder DIR --out FILE.jsonl.gz

Claim: texts are kept word for word, but for Windows line ends, which become plain ones, blanks at
the ends of an action, and line breaks at the end of a snapshot. What is wrong is said in one line,
and then nothing is written. One episode at most is in memory.

A CSV file names its columns on the first line: x, y, and if you like z, episode and t.
  1. An empty z is an action that nobody wrote down. Other columns are left out.
  2. Without t the steps of an episode are counted in the order of the rows.
  3. Without episode each row is an episode of its own. Only where y of a row is x of the next one
     do both belong to the same episode. An episode of a single row gets an id that fixes its split:
     of each ten such rows, in a random order, 7 are for training, 1 is for validation and 2 are for
     the test. Those without z are for training.

A folder holds a sub-folder for each episode, and that a text file for each state. The order is that
of the names, with numbers as numbers: 2.txt comes before 10.txt. A file actions.txt beside the
states may hold the actions, one a line, between each two states; an empty line is an action that
nobody wrote down. Hidden files are skipped.
"""
import argparse
import collections
import csv
import os
import random
import re
from pathlib import Path

from envs import records
from envs.records import BadData

ACTIONS = "actions.txt"


# ---- CSV -----------------------------------------------------------------------------------------


def from_csv(path):
    """Yields the Transitions of a CSV file."""
    steps = collections.Counter()
    for episode, place, row in named_rows(table(path)):
        record = {"episode": episode, "t": steps[episode], "x": row["x"], "y": row["y"]}
        steps[episode] += 1
        if row.get("z"):
            record["z"] = row["z"]
        if "t" in row:
            record["t"] = whole_number(row["t"])
        yield records.check(record, place)
    if not steps:
        raise BadData(f"{path}: no row stands below the names of the columns; add some")


def whole_number(cell):
    """An int, or the cell as it is, of which `records.check` tells what is wrong."""
    try:
        return int(cell)
    except ValueError:
        return cell


def named_rows(rows):
    """Yields (episode, place, row): the episode is that of the column, or as in note 3."""
    chain, splits = [], shares()
    for place, row in rows:
        if "episode" in row:
            yield row["episode"], place, row
            continue
        if chain and chain[-1][1]["y"] != row["x"]:
            yield from named_chain(chain, splits)
            chain = []
        chain.append((place, row))
    if chain:
        yield from named_chain(chain, splits)


def named_chain(chain, splits):
    """Yields (episode, place, row) of rows that belong together."""
    place, row = chain[0]
    episode = "row-" + place.rpartition(":")[2]
    if len(chain) == 1:
        split = next(splits) if row.get("z") else "train"
        episode = f"{split}-{episode}"
    for place, row in chain:
        yield episode, place, row


def shares():
    """Yields the splits of rows that are episodes of their own."""
    rng = random.Random(0)
    while True:
        ten = 7 * ["train"] + ["dev"] + 2 * ["test"]
        rng.shuffle(ten)
        yield from ten


def table(path):
    """Yields (place, {column: cell}) of each row. Cells but x and y lose blanks at their ends."""
    csv.field_size_limit(2**31 - 1)                        # a state may be long
    reader = csv.reader(decoded(path), strict=True)
    header = None
    while True:
        place = f"{path}:{reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise BadData(f"{place}: not valid CSV ({error}); put a cell with commas, quotes or "
                          "line breaks in double quotes, and double those inside") from None
        if row is None:
            break
        if not any(map(str.strip, row)):
            continue
        if header is None:
            header = columns(row, place)
            continue
        if len(row) != len(header):
            raise BadData(f"{place}: {len(row)} cells, and the first line names {len(header)}; "
                          "put cells with commas or line breaks in double quotes")
        cells = {name: cell.strip() for name, cell in zip(header, row)}
        for name in "xy":
            cells[name] = row[header.index(name)].replace("\r\n", "\n")
        yield place, cells
    if header is None:
        raise BadData(f"{path}: the file is empty; write the names x, z, y on its first line")


def columns(row, place):
    """The names of the columns, in small letters."""
    header = [name.strip().lower() for name in row]
    for name in "xy":
        if name not in header:
            raise BadData(f'{place}: there is no column "{name}"; name the columns x, z, y and, if '
                          "you like, episode and t on the first line, with commas between")
    for name in ("x", "z", "y", "episode", "t"):
        if header.count(name) > 1:
            raise BadData(f'{place}: the column "{name}" comes twice; rename one of them')
    return header


def decoded(path):
    """Yields the lines of a file as text, with their ends."""
    for number, raw in records.lines(path):
        yield as_text(raw, path, number)


def as_text(raw, path, number=1):
    """The text of bytes, of which the first are on line `number` of the file."""
    try:
        # -sig: some editors begin a file with a byte-order mark
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        number += raw.count(b"\n", 0, error.start)
        raise BadData(f"{path}:{number}: not UTF-8 text; save it as UTF-8") from None


# ---- Folders -------------------------------------------------------------------------------------


def from_folder(folder):
    """Yields the Transitions of a folder of episodes."""
    episodes = [path for path in listing(folder) if path.is_dir()]
    if not episodes:
        raise BadData(f"{folder}: there is no sub-folder; make one for each episode, and in it a "
                      "text file for each state")
    for path in episodes:
        yield from snapshots(path)


def snapshots(folder):
    """Yields the Transitions of one episode."""
    files = [path for path in listing(folder) if path.name != ACTIONS]
    for path in files:
        if not path.is_file():             # a folder; a pipe, which would wait for ever
            raise BadData(f"{path}: a folder inside an episode, or no plain file; the episode's "
                          "sub-folder holds files only")
    if len(files) < 2:
        raise BadData(f"{folder}: {len(files)} state(s), and at least two make a transition; add "
                      "the others or remove the folder")
    actions = actions_of(folder / ACTIONS, len(files) - 1)
    x = state_of(files[0])
    for t, z in enumerate(actions):
        y = state_of(files[t + 1])
        record = {"episode": folder.name, "t": t, "x": x, "y": y}
        if z:
            record["z"] = z
        yield records.check(record, str(files[t + 1]))
        x = y


def state_of(path):
    """The text of a snapshot."""
    text = content(path).rstrip("\n")
    if not text.strip():
        raise BadData(f"{path}: the file is empty; give it some text or remove it")
    return text


def actions_of(path, n):
    """n actions; "" where nobody wrote one down."""
    if not path.is_file():
        return [""] * n
    # The line break at the end of the last line begins no other
    actions = [line.strip() for line in content(path).removesuffix("\n").split("\n")]
    while len(actions) > n and not actions[-1]:
        actions.pop()
    if len(actions) != n:
        raise BadData(f"{path}:{len(actions)}: {len(actions)} action(s) for {n + 1} states; write "
                      f"{n}, one a line between each two states")
    return actions


def content(path):
    """The text of a file, with plain line ends."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadData(f"{path}: cannot read it ({error.strerror}); give a readable file") from None
    return as_text(raw, path).replace("\r\n", "\n")


def listing(folder):
    """What is in a folder and not hidden, in natural order."""
    try:
        paths = [path for path in Path(folder).iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise BadData(f"{folder}: cannot list it ({error.strerror}); give a folder") from None
    return sorted(paths, key=natural)


def natural(path):
    """A key that sorts numbers in names as numbers."""
    parts = re.split(r"(\d+)", path.name)
    parts[1::2] = map(int, parts[1::2])
    return parts, path.name


# ---- Command line --------------------------------------------------------------------------------


def convert(transitions, source, out, force):
    """Writes the transitions, and prints what they are."""
    if not out.endswith((".jsonl", ".jsonl.gz")):
        raise BadData(f"--out {out}: give a name that ends in .jsonl or .jsonl.gz")
    if os.path.exists(out) and not force:
        raise BadData(f"--out {out} is there already; name another file, or replace it with "
                      "--force")
    sizes, episodes = collections.Counter(), set()

    def counted():
        for tr in records.whole_episodes(transitions, source):
            sizes["rows"] += 1
            sizes["z"] += tr.z is not None
            episodes.add(tr.episode)
            yield tr

    records.write(out, counted())
    print(f"{out}: {sizes['rows']} transitions of {len(episodes)} episodes, {sizes['z']} with an "
          f"action; next: python -m envs.records {out} --check")


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m envs.records", description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = records.fail
    parser.add_argument("file", nargs="?", metavar="FILE", help="a transitions file, for --check")
    parser.add_argument("--check", action="store_true", help="say what FILE is fit for")
    parser.add_argument("--from-csv", metavar="FILE.csv",
                        help="columns x, z, y; without a column episode each row is an episode of "
                             "its own, unless its y is x of the next row, which chains them")
    parser.add_argument("--from-folder", metavar="DIR",
                        help="sub-folders are episodes, their files states, in natural order")
    parser.add_argument("--out", metavar="FILE", help="what to write: .jsonl or .jsonl.gz")
    parser.add_argument("--force", action="store_true", help="replace --out if it is there")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    records.show_anything()
    sources = [args.from_csv, args.from_folder]
    wanted = [args.check, *sources]
    if sum(map(bool, wanted)) != 1 or args.check != bool(args.file) or args.check == bool(args.out):
        records.fail("give FILE --check, --from-csv FILE.csv --out FILE, or --from-folder DIR "
                     "--out FILE")
    try:
        if args.check:
            from support import check_file  # only this needs torch
            print("\n".join(check_file.report(args.file)))
        elif args.from_csv:
            convert(from_csv(args.from_csv), args.from_csv, args.out, args.force)
        else:
            convert(from_folder(args.from_folder), args.from_folder, args.out, args.force)
    except BadData as error:
        records.fail(error)
    except KeyboardInterrupt:
        records.fail("stopped; nothing was written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
