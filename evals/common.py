"""What the scorers of the text benchmarks share: reading pairs, scoring them by split, the table
and the JSON file.

Claim: every pair that can be scored is scored once; every other row is counted and never scored as
0. Each number comes with the same number of the model that copies x, and with both for only the
changed pairs (reference != x).

Pairs come from one of
    --pairs FILE ..   JSONL, plain or .gz: {"prediction": str, "reference": str, "x": str or absent,
                      "split": str or absent},
                      or LLaMA-Factory's generated_predictions.jsonl: {"prompt", "predict", "label"}
    --predictions FILE .. --references FILE ..   a JSON string a line (or an object of the keys
                      above), zipped in order
    --run DIR         what train.py wrote: its model predicts its test transitions anew, greedily
SPLIT=FILE puts a whole file into a split; a file that is named after a split of the benchmark
(id_high.jsonl) needs no SPLIT=.

Notes:
  1. A row is missing if it is no JSON, lacks a text, or has no line across in the other file. A
     text may be empty: that is an answer. Missing rows are counted by split where their split is
     known. A blank line of --pairs is no row. Pairs that differ only in blanks at the ends, and
     references in which ROUGE-L finds no token, are scored, and their number is printed.
  2. x of LLaMA-Factory's rows is not taken from "prompt": that holds instructions and z as well.
  3. copy-x and changed-only need an x in every scored pair of a split; else they are null. Presets
     are never mixed: a report has one, and names it, as it names the encoder, the layer and the
     stemmer.
  4. The scorers need no torch; --run and --encoder do.
"""

import argparse
import json
import math
import os
import re
import sys
import typing
from collections import Counter
from pathlib import Path

from envs import records
from envs.records import fail
from evals import metrics

NAMES = {"prediction": ("prediction", "predict"), "reference": ("reference", "label")}


class Pair(typing.NamedTuple):
    """One prediction with its reference; x and split are None if they are not known."""
    prediction: str
    reference: str
    x: str | None = None
    split: str | None = None


class Missing(typing.NamedTuple):
    """A row that is not scored; why: one line, "FILE:LINE: what is wrong; what to do"."""
    why: str
    split: str | None = None


# ---- Read ----------------------------------------------------------------------------------------


def read_pairs(path, split=None, splits=()):
    """([Pair], [Missing]) of a JSONL file in the form of --pairs. split: of the whole file; None:
    each row's own "split".

    splits: the names that a split may have, if only some may. BadData if the file cannot be read.
    """
    pairs, missing = [], []
    for number, raw in records.lines(path):
        if not raw.strip():
            continue
        row = {}
        try:
            row = _json(raw)
            if not isinstance(row, dict):
                raise ValueError(
                    'not a JSON object; write {"prediction": .., "reference": ..} on each line'
                )
            own = _text(row, "split") if row.get("split") is not None and split is None else split
            if splits and own is not None and own not in splits:
                raise ValueError(
                    f"no split is called {json.dumps(own)[:60]}; give one of {', '.join(splits)}"
                )
            pairs.append(Pair(_text(row, "prediction"), _text(row, "reference"),
                              None if row.get("x") is None else _text(row, "x"), own))
        except ValueError as error:
            own = (
                split if split is not None else row.get("split") if isinstance(row, dict) else None
            )
            known = isinstance(own, str) and (not splits or own in splits)
            missing.append(Missing(f"{path}:{number}: {error}", own if known else None))
    return pairs, missing


def read_zipped(predictions, references, split=None):
    """([Pair], [Missing]) of two JSONL files, line by line; BadData if one cannot be read. split:
    of them both, or None."""
    sides = []
    for path, key in ((predictions, "prediction"), (references, "reference")):
        rows = [raw for _, raw in records.lines(path)]
        while rows and not rows[-1].strip():
            rows.pop()
        sides.append((path, key, rows))
    pairs, missing = [], []
    for i in range(max(len(rows) for _, _, rows in sides)):
        texts = []
        for (path, key, rows), (other, *_) in zip(sides, reversed(sides)):
            try:
                if i >= len(rows):
                    raise ValueError(
                        f"the file ends before this line, which {other} has; give both as many "
                        "lines"
                    )
                value = _json(rows[i])
                texts.append(_text(value if isinstance(value, dict) else {key: value}, key))
            except ValueError as error:
                missing.append(Missing(f"{path}:{i + 1}: {error}", split))
                break
        else:
            pairs.append(Pair(*texts, split=split))
    return pairs, missing


def _json(raw):
    try:
        return records.from_json(raw)
    except ValueError as error:
        raise ValueError(
            f"not valid JSON ({error}); write one JSON value on each line, in UTF-8"
        ) from None


def _text(row, key):
    """The string under `key` or its other name; ValueError if there is none."""
    name = next((name for name in NAMES.get(key, (key,)) if name in row), None)
    if name is None:
        raise ValueError(f"the key \"{key}\" is missing; give it a string")
    if not isinstance(row[name], str):
        raise ValueError(f"\"{name}\" is {records.shown(row[name])}; give a string")
    try:
        row[name].encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f'"{name}" holds half a surrogate pair; write the whole character'
        ) from None
    return row[name]


def predict_run(folder, splits=()):
    """[Pair] of a finished run of train.py: x, y and the greedy y_hat of each test transition, as
    its last stage scored them. The split of `splits` is the one in the episode's id
    (test-SPLIT-..), if the run was on a transitions file. BadData as in `opened.open_run`."""
    from support.opened import open_run  # here and not above: note 4
    run = open_run(folder)
    file = records.read(run.cfg.data) if run.cfg.data else []
    episodes = {(t.x, t.z, t.y): t.episode for t in file if t.episode.startswith("test-")}
    if len(run.test) < len(episodes):
        print(
            f"warning: the run scored {len(run.test)} of {len(episodes)} test transitions "
            "(--eval-size)",
            file=sys.stderr,
        )
    # test-SPLIT-.., where SPLIT is the name of a file
    groups = [split_of(episodes.get(row, "--").split("-")[1], splits) for row in run.uncut]
    xs, zs, ys = map(list, zip(*run.test))
    return [
        Pair(y_hat, y, x, group)
        for x, y, y_hat, group in zip(xs, ys, run.P.predict(xs, zs), groups)
    ]


# ---- Score ---------------------------------------------------------------------------------------


class Column(typing.NamedTuple):
    """score: (predictions, references) -> one number a pair; a group's number is their mean, to
    `digits` if given."""
    score: typing.Callable
    digits: int | None = None


def exact(predictions, references):
    """1 or 0 for each pair."""
    return [float(p == r) for p, r in zip(predictions, references)]


def rouge_l(stemmer):
    """The score of a Column: ROUGE-L F of each pair, in [0, 100]."""
    return lambda predictions, references: [
        100 * metrics.rouge_l(p, r, stemmer) for p, r in zip(predictions, references)
    ]


def score(pairs, missing, columns, splits=(), average=False):
    """{group: row}: a row for each split in the order of `splits`, then "all" (pooled) or, if
    `average`, "average".

    columns: {name: Column}. average: the plain mean of the rows of `splits`; without any split
    there is only "all". row = {"n", "n_missing", "n_changed", "model", "changed", "copy_x",
    "copy_x_changed"}; the last four are {name: number} or None: of all n pairs, of the n_changed
    with reference != x, and both again for the prediction x.
    """
    xs, references = [p.x or "" for p in pairs], [p.reference for p in pairs]
    model = {
        name: c.score([p.prediction for p in pairs], references) for name, c in columns.items()
    }
    copies = (
        {name: c.score(xs, references) for name, c in columns.items()}
        if any(p.x is not None for p in pairs)
        else None
    )

    def mean(values, chosen):
        if not chosen or values is None:
            return None
        means = {name: math.fsum(values[name][i] for i in chosen) / len(chosen) for name in columns}
        return {
            name: m if columns[name].digits is None else round(m, columns[name].digits)
            for name, m in means.items()
        }

    def row(chosen, n_missing):
        known = bool(chosen) and all(pairs[i].x is not None for i in chosen)
        changed = [i for i in chosen if references[i] != pairs[i].x] if known else []
        return {
            "n": len(chosen),
            "n_missing": n_missing,
            "n_changed": len(changed) if known else None,
            "model": mean(model, chosen),
            "changed": mean(model, changed),
            "copy_x": mean(copies, chosen) if known else None,
            "copy_x_changed": mean(copies, changed),
        }

    members, absent = {}, Counter(m.split for m in missing)
    for i, p in enumerate(pairs):
        members.setdefault(p.split, []).append(i)
    found = {*members, *absent}
    order = [s for s in splits if s in found] + sorted(
        s for s in found - set(splits) if s is not None
    )
    groups = {s: row(members.get(s, []), absent[s]) for s in order}
    if order and None in found:
        groups["no split"] = row(members.get(None, []), absent[None])
    whole = row(range(len(pairs)), len(missing))
    scored = [groups[s] for s in order if s in splits and groups[s]["n"]]
    if not (average and scored):
        return groups | {"all": whole}
    for side in ("model", "changed", "copy_x", "copy_x_changed"):
        rows = [r[side] for r in scored]
        whole[side] = (
            None
            if None in rows
            else {name: math.fsum(r[name] for r in rows) / len(rows) for name in columns}
        )
    return groups | {"average": whole}


# ---- The command line ----------------------------------------------------------------------------


def parser(doc):
    """The flags that every scorer has."""
    p = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.error = fail
    p.add_argument(
        "--pairs",
        nargs="+",
        metavar="[SPLIT=]FILE",
        help="JSONL of {prediction, reference, x?, split?}, or LLaMA-"
        "Factory's generated_predictions.jsonl {prompt, predict, label}",
    )
    p.add_argument(
        "--predictions",
        nargs="+",
        metavar="[SPLIT=]FILE",
        help="JSONL, a string a line, zipped with --references",
    )
    p.add_argument(
        "--references", nargs="+", metavar="FILE", help="as many files, in the same order"
    )
    p.add_argument(
        "--run",
        metavar="DIR",
        help="a run of train.py: predict its test transitions and score them",
    )
    p.add_argument(
        "--stemmer",
        action="store_true",
        help="ROUGE-L on Porter stems (needs nltk); the paper does not say",
    )
    p.add_argument(
        "--json",
        metavar="FILE",
        help="write the figures to this file (and replace only what a scorer wrote)",
    )
    return p


def add_encoder(p):
    """The flags of BERTScore, for `state_columns`."""
    p.add_argument(
        "--encoder",
        help="add BERTScore F by this encoder: a folder or a Hub id (the paper's: perhaps "
             "roberta-large)",
    )
    p.add_argument("--layer", type=int, help="its layer; only roberta-large has a default, 17")
    p.add_argument(
        "--rescale",
        action="store_true",
        help="rescale BERTScore by roberta-large's constants; off: raw cosines",
    )


def state_columns(args):
    """(columns, about) of the two next-state benchmarks: ROUGE-L, BERTScore F if --encoder is
    given, exact match."""
    columns, about = {"rouge_l": Column(rouge_l(args.stemmer))}, {}
    if args.encoder is None and (args.layer is not None or args.rescale):
        fail("--layer and --rescale say how BERTScore is computed; give an --encoder with them")
    if args.encoder:
        from transformers.utils import logging  # here and not above: note 4

        from evals import bertscore
        logging.disable_progress_bar()
        try:
            layer = bertscore.layer_of(args.encoder, args.layer)
            # fails now, not after the predictions
            bertscore.bertscore(["a"], ["a"], args.encoder, layer, args.rescale)
        except Exception as error:  # whatever a damaged folder makes the loaders raise
            fail(f"--encoder {args.encoder}: {str(error).partition(chr(10))[0]}")
        columns["bertscore"] = Column(
            lambda predictions, references: [
                100 * F
                for _, _, F in bertscore.bertscore(
                    predictions, references, args.encoder, layer, args.rescale
                )
            ]
        )
        about = {"encoder": args.encoder, "layer": layer, "rescaled": args.rescale}
    return columns | {"exact": Column(exact)}, {
        "encoder": None,
        "layer": None,
        "rescaled": False,
    } | about


def collect(args, splits):
    """([Pair], [Missing]) of whatever the flags name; BadData if a file or a run cannot be read."""
    ways = [bool(args.pairs), bool(args.predictions or args.references), bool(args.run)]
    if sum(ways) != 1 or bool(args.predictions) != bool(args.references):
        fail("give one of --pairs FILE, --predictions FILE --references FILE, or --run DIR")
    if args.run:
        return predict_run(args.run, splits), []
    if args.pairs:
        parts = [
            read_pairs(path, split, splits)
            for split, path in (_split(name, splits) for name in args.pairs)
        ]
    else:
        if len(args.predictions) != len(args.references):
            fail(
                f"--predictions names {len(args.predictions)} files and --references "
                f"{len(args.references)}; give as many"
            )
        parts = []
        for name, reference in zip(args.predictions, args.references):
            (split, path), (other, reference) = _split(name, splits), _split(reference, splits)
            if split and other and split != other:
                fail(
                    f"{path} is of split {split} and {reference} of {other}; give the files in the "
                    "same order"
                )
            parts.append(read_zipped(path, reference, split or other))
    return [p for pairs, _ in parts for p in pairs], [m for _, missing in parts for m in missing]


def _split(name, splits):
    """(split or None, path) of FILE or SPLIT=FILE; a file may have a = in its name."""
    split, equals, path = name.partition("=")
    if equals and not os.path.exists(name):
        if splits and split not in splits:
            fail(f"{name}: no split is called {split}; give one of {', '.join(splits)}")
        return split, path
    return split_of(Path(name).name.split(".")[0], splits), name


def split_of(name, splits):
    """The split that a file's name tells: itself, or what stands before a number (test_task_0);
    None without one."""
    name = re.sub(r"_[0-9]+$", "", name) if name not in splits else name
    return name if name in splits else None


def report(benchmark, args, columns, about, splits=(), average=False):
    """Read, score, print the table, write --json. Returns the exit code 0; anything wrong with the
    input exits with 2.

    columns: {name: Column}. about: {name: what the numbers depend on}, part of the JSON.
    """
    records.show_anything()
    try:
        check_json(args.json)
        if args.stemmer:
            # says now if nltk is not there
            metrics.rouge_l("a", "a", stemmer=True)
        pairs, missing = collect(args, splits)
        if not pairs:
            raise records.BadData(f"nothing can be scored: {missing[0].why}" if missing else
                                  "nothing can be scored: no row was found; give a file with pairs")
        if missing:
            print(
                f"warning: {len(missing)} of {len(pairs) + len(missing)} rows are missing or "
                "broken and not scored; the "
                f"first: {records.one_line(missing[0].why)}",
                file=sys.stderr,
            )
        odd = oddities(pairs)
        for number, what in zip(odd.values(), ODD):
            if number:
                print(f"warning: {number} of {len(pairs)} {what}", file=sys.stderr)
        groups = score(pairs, missing, columns, splits, average)
        absent = (
            [s for s in splits if not groups.get(s, {}).get("n")] if "average" in groups else []
        )
        if absent:
            print(
                f"warning: the average is over {len(splits) - len(absent)} of {len(splits)} "
                "splits, without "
                f"{', '.join(absent)}",
                file=sys.stderr,
            )
        result = {
            "benchmark": benchmark,
            "n": len(pairs),
            "n_missing": len(missing),
            "first_missing": missing[0].why if missing else None,
            "stemmer": args.stemmer,
            **odd,
            **about,
            "splits_absent": absent,
            "scores": groups,
        }
        if about.get("encoder"):
            from evals import bertscore
            texts = [t for p in pairs for t in (p.prediction, p.reference)]
            result["texts_cut"] = bertscore.cut(texts, about["encoder"], about["layer"])
            result["texts"] = len(texts)
        print_table(result, columns)
        if args.json:
            write_json(args.json, result)
    except (records.BadData, ImportError) as error:
        fail(error)
    return 0


ODD = (
    "predictions differ from their reference only in blanks at the ends: exact says wrong",
    "references have no token for ROUGE-L, which knows a-z and 0-9: they score 0",
)


def oddities(pairs):
    """{what a score hides: number of pairs}, in the order of ODD."""
    blanks = sum(p.prediction != p.reference and p.prediction.strip() == p.reference.strip()
                 for p in pairs)
    empty = sum(not metrics.has_tokens(p.reference) for p in pairs)
    return {"differ_in_blanks": blanks, "without_rouge_tokens": empty}


TITLES = {"bleu": "BLEU", "rouge_l": "ROUGE-L", "bertscore": "BERTScore", "exact": "exact %"}


def print_table(result, columns):
    """A row a split; beneath it the model that copies x, and both for only the changed pairs."""
    notes = [f"BLEU: {result['bleu']}"] if "bleu" in columns else []
    notes += (
        [f"ROUGE-L: rouge_score, {'Porter' if result['stemmer'] else 'no'} stemmer"]
        if "rouge_l" in columns
        else []
    )
    if "bertscore" in columns:
        notes.append(
            f"BERTScore F: {result['encoder']}, layer {result['layer']}, "
            f"{'rescaled' if result['rescaled'] else 'not rescaled'}; {result['texts_cut']} of "
            f"{result['texts']} texts "
            "are longer than it reads"
        )
    print(f"{result['benchmark']}: " + "\n  ".join(notes))
    print(f"{'':24}{'n':>7}{'missing':>9}" + "".join(f"{TITLES[name]:>11}" for name in columns))

    def line(title, n, n_missing, numbers):
        cells = [
            "-" if numbers is None else f"{numbers[name] * (100 if name == 'exact' else 1):.2f}"
            for name in columns
        ]
        print(f"{title:24}{n:>7}{n_missing:>9}" + "".join(f"{cell:>11}" for cell in cells))

    for name, row in result["scores"].items():
        line(name, row["n"], row["n_missing"], row["model"])
        if row["copy_x"] is not None:
            line("  copy x", row["n"], "", row["copy_x"])
            line("  changed only", row["n_changed"], "", row["changed"])
            line("  changed only, copy x", row["n_changed"], "", row["copy_x_changed"])
    if all(row["copy_x"] is None for row in result["scores"].values()):
        print("without an x in every pair there is no copy-x and no changed-only")


def check_json(path):
    """BadData if `path` may not be written: it holds what no scorer wrote, or its folder is not
    there. None is fine."""
    if path is None:
        return
    if not Path(path).absolute().parent.is_dir():
        raise records.BadData(f"--json {path}: there is no such folder; make it first")
    if os.path.exists(path):
        try:
            result = json.loads(Path(path).read_text())
            ours = isinstance(result, dict) and "benchmark" in result
        except (OSError, ValueError, RecursionError):
            ours = False
        if not ours:
            raise records.BadData(
                f"--json {path}: holds something that no scorer wrote; give another name"
            )


def write_json(path, result):
    """Whole or not at all; BadData if it cannot be written."""
    try:
        with records.whole(path) as file:
            file.write((json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise records.BadData(
            f"--json {path}: cannot write it ({error.strerror}); name a file that you may write"
        ) from None
