"""What the importers of official data share: a large JSON file read row by row, and their command
line.

Claim: no file is in memory as a whole. A JSON list is decoded through a buffer of about two rows
(at least a megabyte), a JSONL file by lines. What is wrong with a file is said in one line, and
then nothing is written.

Notes:
  1. A row that its reader refuses is left out; the command counts such rows and names the first. So
     is a line of a JSONL file that is no JSON. In a list, nothing after broken JSON can be trusted:
     the file is refused.
  2. Files may be gzipped (.gz), within the bounds of `records.py`. A file whose first character is
     [ is a list, any other is JSONL.
"""

import collections
import gzip
import itertools
import json
import os
import re
import sys
import zlib

from envs import records
from envs.records import BadData

CHUNK = 1 << 20  # characters read at once, at least
SPLITS = ("train", "dev", "test")
_SPACE = re.compile(r"[ \t\n\r]*")


# ---- Rows of a file ------------------------------------------------------------------------------


def rows(path, broken):
    """Yields (n, place, row): the row's number from 1, "FILE:LINE, row n", and what JSON makes of
    it.

    broken: list; gets a message for each line of a JSONL file that is no JSON. Raises BadData for
    all else.
    """
    place = [path, 0]  # the line reached, for the errors of the file itself
    try:
        with (gzip.open if path.endswith(".gz") else open)(
            path, "rt", encoding="utf-8-sig"
        ) as file:
            file = Bounded(file, path)
            text = file.read(CHUNK)
            while text.isspace():
                place[1] += text.count("\n")
                text = file.read(CHUNK)
            first = _SPACE.match(text).end()
            yield from (
                _list(file, place, text, first)
                if text[first : first + 1] == "["
                else _lines(file, place, text, broken)
            )
    except FileNotFoundError:
        raise BadData(f"{path}: there is no such file; check the path") from None
    except UnicodeDecodeError:
        raise BadData(
            f"{path}: not UTF-8 text after line {place[1]}; download it again, or name it .gz if "
            "it "
            "is gzip"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadData(
            f"{path}: not a whole gzip file ({error}); download it again, or drop .gz from its name"
        ) from None
    except OSError as error:
        raise BadData(f"{path}: cannot read it ({error.strerror}); give a readable file") from None


class Bounded:
    """A text file of which no more can be read than `records.room` allows."""

    def __init__(self, file, path):
        self.file, self.path, self.left = file, path, records.room(path)

    def read(self, size):
        return self.counted(self.file.read(min(self.left + 1, size)))

    def line(self):
        """The next line with its end; "" at the end of the file."""
        return self.counted(self.file.readline(min(self.left, records.LONGEST) + 1))

    def counted(self, text):
        self.left -= len(text)
        if self.left < 0:
            raise records.too_large(self.path)
        return text


def _lines(file, place, text, broken):
    """text: the beginning of the file."""
    n, begin = 0, (text + file.line()).split("\n")
    if not begin[-1]:
        begin.pop()
    for line in itertools.chain(begin, iter(file.line, "")):
        place[1] += 1
        if not line.strip():
            continue
        n += 1
        where = f"{place[0]}:{place[1]}, row {n}"
        try:
            row = records.from_json(line)
        except ValueError as error:
            broken.append(f"{where}: not valid JSON ({error})")
            continue
        yield n, where, row


def _list(file, place, text, at):
    """text[at] is the list's [."""
    decode, n, last = json.JSONDecoder(object_pairs_hook=records.once).raw_decode, 1, ""
    line, counted, at = place[1] + 1, 0, at + 1  # line: that of text[counted]
    while True:
        at = _SPACE.match(text, at).end()
        if text[at:at + 1] == "]" and n == 1:
            break
        try:
            row, end = decode(text, at)
            end = _SPACE.match(text, end).end()
            error = (
                None
                if text[end : end + 1] in (",", "]")
                else json.JSONDecodeError("no comma or ] after it", text, end)
            )
        except (ValueError, RecursionError) as caught:
            error = caught
        # The buffer's end may have cut the row: then it lacks a quote, or the fault is at that end
        if isinstance(error, json.JSONDecodeError) and (error.msg.startswith("Unterminated")
                                                        or error.pos >= len(text.rstrip()) - 16):
            # at least as much as there is, so all readings together are linear
            more = file.read(max(CHUNK, len(text) - at))
            if more:
                line += text.count("\n", counted, at)
                text, at, counted = text[at:] + more, 0, 0
                continue
        line, counted = line + text.count("\n", counted, at), at
        place[1], where = line, f"{place[0]}:{line}, row {n}"
        if error is not None:
            raise BadData(f"{where}: not valid JSON ({records.why_no_json(error)}); the file is "
                          "damaged or was cut: download it again")
        yield n, where, row
        n, at, last = n + 1, end + 1, text[end]
        if last == "]":
            at -= 1
            break
    if text[at + 1:].strip() or file.read(CHUNK).strip():
        raise BadData(f"{place[0]}: there is text after the end of the list; give one list a file")


def need(row, key, kind, place):
    """row[key] if `row` is a dict that has it with type `kind`, else BadData."""
    if not isinstance(row, dict):
        raise BadData(f"{place}: not a JSON object")
    if not isinstance(row.get(key), kind):
        what = f"is not a {kind.__name__}" if key in row else "is missing"
        raise BadData(f"{place}: the key \"{key}\" {what}")
    return row[key]


# ---- Command line --------------------------------------------------------------------------------


def add_files(parser):
    """--train, --dev and --test, each with any number of files."""
    for split in SPLITS:
        parser.add_argument(f"--{split}", nargs="+", default=[], metavar="FILE",
                            help=f"official files for the {split} split")


def files(args):
    """[(split, file's name without folder and endings, path)]; BadData if there is none or two
    would share their ids."""
    found, seen = [], {}
    for split in SPLITS:
        for path in getattr(args, split):
            name = (
                os.path.basename(path)
                .removesuffix(".gz")
                .removesuffix(".jsonl")
                .removesuffix(".json")
            )
            if (split, name) in seen:
                raise BadData(
                    f"{path}: the name {name} was taken by {seen[split, name]}, and episodes are "
                    "named after "
                    "their file; rename one of them, or write two files"
                )
            seen[split, name] = path
            found.append((split, name, path))
    if not found:
        raise BadData("no files were given; give --train, --dev or --test")
    return found


def main(parser, make, argv=None):
    """Writes what make(args, broken, counts) yields to --out, and prints what that was.

    make: yields Transitions; appends to `broken` (list of str) a message for each row left out, and
    counts in `counts` (Counter) what the user should know, by sentence. Bad input: one line on
    standard error, exit code 2.
    """
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="transitions file to write, .jsonl or .jsonl.gz",
    )
    parser.add_argument("--force", action="store_true", help="replace --out if it is there")
    parser.error = records.fail
    args = parser.parse_args(argv)
    records.show_anything()
    broken, counts, episodes, sizes = [], collections.Counter(), {}, collections.Counter()

    def watched():
        for tr in make(args, broken, counts):
            episodes[tr.episode] = None
            sizes["rows"] += 1
            sizes["changed"] += tr.x != tr.y
            for key in "xzy":
                sizes[key] = max(sizes[key], len(getattr(tr, key)))
            yield tr
        if not episodes:
            raise BadData(
                f"no transition is left of what was "
                f"read{'; the first fault: ' + broken[0] if broken else ''}"
            )

    try:
        if not args.out.endswith((".jsonl", ".jsonl.gz")):
            raise BadData(f"--out {args.out}: give a name that ends in .jsonl or .jsonl.gz")
        if os.path.exists(args.out) and not args.force:
            raise BadData(
                f"--out {args.out} is there already; name another file, or replace it with --force"
            )
        records.write(args.out, watched())
    except BadData as error:
        records.fail(error)
    except KeyboardInterrupt:
        records.fail("stopped; nothing was written")
    if broken:
        first = records.one_line(broken[0])
        print(f"warning: {len(broken)} left out; the first: {first}", file=sys.stderr)
    by_split = collections.Counter(episode.split("-")[0] for episode in episodes)
    shares = ", ".join(f"{split} {by_split[split]}" for split in SPLITS)
    # ids without a split are split by the seed of each run
    shares = f" ({shares})" if set(by_split) & set(SPLITS) else ""
    print(
        f"{args.out}: {sizes['rows']} transitions of {len(episodes)} episodes{shares}; "
        f"y differs from x in {100 * sizes['changed'] / sizes['rows']:.1f}%; at most "
        f"{sizes['x']}, {sizes['z']}, {sizes['y']} characters of x, z, y"
    )
    for sentence, number in counts.items():
        print(f"{sentence}: {number}")
    print(f"sha256 {records.sha256(args.out)}")
    return 0
