"""StableToolBench as a world: MirrorAPI's own files, in which a model stands in for 7,437 web APIs.

    python -m envs.mirrorapi --train train_sft.json --test test_sft/*.json --out mirrorapi.jsonl.gz
    python train.py --data mirrorapi.jsonl.gz --model MODEL

Claim: every row {"system", "instruction", "output"} of the files becomes one transition, word for
word but for blanks at the ends of x and z, or is counted as left out. An instruction is "API doc:",
the documentation, a blank line, "Request:" and the request:

    x = system, a blank line, "API doc:" and the documentation    z = the request    y = output

Source: the data sets stabletoolbench/MirrorAPI-Bench (test_sft/ and test_cot/: id_high, id_medium,
id_low, ood, ood_failure) and MirrorAPI-Training (train_sft, train_cot, train_augment, train_cache);
a JSON list each, or JSONL.

Notes:
  1. A row is an episode of one step, t = 0, called SPLIT-FILE-ROW: test-ood-12 is row 12 of
     ood.json. The two modes have files of the same names: convert them apart.
  2. The paper does not say what x, z, y are here; this is the one split that has a state, an action
     and an effect. The state behind an API is hidden, so equal (x, z) may have several y, and x
     never changes into y.
  3. y is the whole output, as the benchmark scores it. In SFT mode that is {"error", "response"},
     in CoT mode "mechanism_of_the_api" comes first. `reply` reads both. --no-errors leaves out the
     replies that tell an error, as Word2World does; a reply that `reply` cannot read stays and is
     counted.
"""

import argparse
import json
import re

from envs import official, records
from envs.official import need
from envs.records import BadData

# the first one: the documentation, one dict, has no raw line break inside
_REQUEST = re.compile(r"\n[ \t]*Request:")
_FIELDS = re.compile(r'"error"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"response"\s*:\s*"(.*)', re.DOTALL)


def transition(row, episode, place):
    """Transition of one row (dict); BadData, which begins with `place`, says what is wrong with
    it."""
    instruction = need(row, "instruction", str, place)
    found = _REQUEST.search(instruction)
    if not found:
        raise BadData(f"{place}: the instruction has no line \"Request:\"")
    x = need(row, "system", str, place).strip() + "\n\n" + instruction[:found.start()].strip()
    return records.check(
        {
            "episode": episode,
            "t": 0,
            "x": x.strip(),
            "z": instruction[found.end() :].strip(),
            "y": need(row, "output", str, place),
        },
        place,
    )


def reply(text):
    """(error, response) that an output tells, in SFT or CoT mode, or None if it tells neither.

    A field that is no string is given as JSON. A reply that was cut, or is no JSON for another
    reason, is searched for the two fields; the end of the response may be missing. Its escapes
    (such as a backslash and n) are left as they are. Source: StableToolBench,
    server/main_mirrorapi.py, which keeps the closing quote and bracket where they are there.
    """
    try:
        fields = records.from_json(text)
    except ValueError:
        found = _FIELDS.search(text)
        return found and (found[1], without_end(found[2]))
    if not isinstance(fields, dict) or not {"error", "response"} <= set(fields):
        return None
    try:
        return tuple(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                     for value in (fields["error"], fields["response"]))
    except RecursionError:
        return None


def without_end(text):
    """The text without the quote and the bracket that close a reply."""
    end = text.rstrip().removesuffix("}").rstrip()
    return end[:-1] if end.endswith('"') else text


def make(args, broken, counts):
    """Yields the transitions of all files; see official.main."""
    for split, name, path in official.files(args):
        for n, place, row in official.rows(path, broken):
            try:
                tr = transition(row, f"{split}-{name}-{n}", place)
            except BadData as error:
                broken.append(str(error))
                continue
            told = reply(tr.y)
            if told is None:
                counts["outputs without a readable error and response, kept"] += 1
            elif told[0] and args.no_errors:
                counts["outputs that tell an error, left out"] += 1
                continue
            yield tr


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m envs.mirrorapi", description="MirrorAPI files to a transitions file."
    )
    official.add_files(parser)
    parser.add_argument(
        "--no-errors",
        action="store_true",
        help="leave out the replies whose field error is not empty",
    )
    return official.main(parser, make, argv)


if __name__ == "__main__":
    raise SystemExit(main())
