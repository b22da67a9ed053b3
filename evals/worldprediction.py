"""WorldPrediction-Bench as a rollout: imagine the frames of a plan, each from one's own last. CLIP
and a judge, turn by turn.

    python -m evals.worldprediction --data PP.json --frames DIR --generated OUT --json scores.json
    python -m evals.worldprediction --data PP.json --frames DIR --generated OUT --judge gpt-4o \\
        --replies replies.jsonl

Claim: for each turn T, data set, and both (JSON only), the mean of cos(generated frame, reference
frame) with CLIP ViT-B/32, and of the judge's score from 0 to 10, over the samples that have it;
"all" pools the turns. Only the true plan among the candidates counts.

x = a frame, then the model's own image; z = the label of step k; y = the frame after it. --data is
{data set: {uid: {"states": {"segment_uid"}, "ground_truth", "candidates": [[segment_uid, ..], ..],
"action_segments": {segment_uid: {"action_label"}}, "original_segments": [{"segment_uid"}, ..]}}},
or the samples in a list or one flat object. OUT/UID/metadata.json holds "candidates": [{"index",
"generated_paths"}]; a path that is not there is looked for at OUT/UID/candidate_%02d/step_%02d.png
(steps from 1).

A frame is the path under its segment_uid in --frame-map (JSON; from --frames), else frames/ or
images/ in --frames, UID.png, .jpg or .jpeg, where "|" stays, or is _ or /. Cut frames out of videos
beforehand (the released code takes the middle of a segment).

Notes:
  1. --mode released compares the image after action k with the frame of segment k, from which the
     first action starts: copying the first frame scores 1 at T=1. --mode aligned, our default,
     compares it with UID@end, the frame at the end of segment k, where there is one, else with the
     frame of segment k + 1. A last step without UID@end then has no reference: it is no row, but
     counted.
  2. "ground_truth" counts from 1. The released reader subtracts 1 from whatever is above 0, so that
     in a file which counts from 0 every sample but those with 0 gets another candidate. Here a file
     that holds a 0 is taken to count from 0 (--base says so for a file without one), and an index
     out of range is a broken row, not the nearest candidate. --released does as it did.
  3. Later turns have fewer samples: see their n. Turns of one sample stand or fall together, so the
     SE of "all" is too small.
"""
import functools
import itertools
import os
import sys
import typing
from pathlib import Path

from envs import records
from envs.official import need
from envs.records import BadData
from evals import judge, visual
from evals.visual import Missing, Row, cosine, read_image


class Sample(typing.NamedTuple):
    """truth: which candidate is the true plan, from 0; labels: of its actions; segments: the uids
    of original_segments."""
    dataset: str
    uid: str
    truth: int
    labels: list
    segments: list


class Step(typing.NamedTuple):
    """Turn k, from 0. generated, reference, first: paths; first, the frame that the rollout begins
    with, may be None."""
    id: str
    groups: tuple
    sample: Sample
    k: int
    generated: str
    reference: str
    first: str | None


# ---- Read ----------------------------------------------------------------------------------------


def load(path):
    """What a JSON file holds; BadData if it is not there or broken."""
    try:
        return records.from_json(Path(path).read_bytes())
    except OSError as error:
        raise BadData(f"{path}: cannot read it ({error.strerror})") from None
    except ValueError as error:
        raise BadData(f"{path}: not valid JSON ({error})") from None


def read(path, base=None, released=False):
    """(base, [Sample or Missing]); base: 1 or 0, what "ground_truth" counts from (note 2)."""
    whole, found = load(path), []
    if not isinstance(whole, (dict, list)):
        raise BadData(f"{path}: neither a JSON object nor a list; give the benchmark's file")
    for name, value in (
        whole.items() if isinstance(whole, dict) else [("worldprediction", dict(enumerate(whole)))]
    ):
        if isinstance(value, dict) and "candidates" not in value:
            found += [(name, str(uid), row) for uid, row in value.items()]
        else:
            found.append(
                (value.get("dataset", name) if isinstance(value, dict) else name, name, value)
            )
    if base is None:
        zero = any(isinstance(row, dict) and row.get("ground_truth") == 0 for *_, row in found)
        base = 0 if zero and not released else 1
    return base, [
        _sample(dataset, uid, row, base, released, f"{path}, {dataset!r}, {uid!r}")
        for dataset, uid, row in found
    ]


def _sample(dataset, uid, row, base, released, place):
    """Sample of one entry, or Missing."""
    groups = ()
    try:
        groups = (visual.text({"dataset": dataset}, "dataset", place),)
        states = need(row, "states", dict, place)
        uid = visual.text(
            states if "segment_uid" in states else {"segment_uid": uid}, "segment_uid", place
        )
        candidates, truth = (
            need(row, "candidates", list, place), need(row, "ground_truth", int, place))
        index = max(0, min(truth - (truth > 0), len(candidates) - 1)) if released else truth - base
        if not 0 <= index < len(candidates):
            raise BadData(
                f"{place}: ground_truth {truth} names none of {len(candidates)} candidates, "
                f"counted from {base}"
            )
        segments = [
            visual.text(s, "segment_uid", place)
            for s in need(row, "original_segments", list, place)
        ]
        actions, plan = (
            need(row, "action_segments", dict, place),
            need({"candidate": candidates[index]}, "candidate", list, place))
        plan = [visual.text({"candidate": s}, "candidate", place) for s in plan]
        labels = [visual.text(need(actions, s, dict, place), "action_label", place) for s in plan]
        if not segments or not plan:
            raise BadData(f"{place}: original_segments or the true candidate is empty")
        return Sample(dataset, uid, index, labels, segments)
    except BadData as error:
        return Missing(str(error), groups)


def frame(root, frame_map, uid, anywhere=False):
    """The path of a frame, or None. anywhere: see `visual.inside`."""
    names = [
        os.path.join(folder, name + ending)
        for folder in ("frames", "images")
        for ending in (".png", ".jpg", ".jpeg")
        for name in (uid, uid.replace("|", "_"), uid.replace("|", os.sep))
    ]
    mapped = frame_map.get(uid)
    names = [mapped] * isinstance(mapped, str) + names
    paths = (os.path.join(root, name) for name in names
             if anywhere or not visual.leads_out(root, name))
    return next(filter(os.path.isfile, paths), None)


def generated_paths(root, sample, anywhere=False):
    """[path of the image after each action of the true plan] that a rollout's metadata.json tells,
    or that its place tells. anywhere: see `visual.inside`."""
    folder = visual.inside(root, sample.uid, anywhere)
    place = os.path.join(folder, "metadata.json")
    for position, entry in enumerate(need(load(place), "candidates", list, place)):
        if isinstance(entry, dict) and entry.get("index", position) == sample.truth:
            told = need(entry, "generated_paths", list, place)[:len(sample.labels)]
            here = [
                os.path.join(folder, f"candidate_{sample.truth:02d}", f"step_{k + 1:02d}.png")
                for k in range(len(sample.labels))
            ]
            return [
                t if isinstance(t, str) and is_there(t, root, anywhere) else h
                for t, h in itertools.zip_longest(told, here)
            ]
    raise BadData(f"{place}: no candidate has the index {sample.truth}")


def is_there(path, root, anywhere):
    """Whether a path that a rollout tells is a file, and one in the folder root."""
    path = os.path.abspath(path)
    return os.path.isfile(path) and (anywhere or not visual.leads_out(root, path))


def steps(sample, folder, root, frame_map, mode, anywhere=False):
    """Yields a Step, a Missing, or None where there is no reference by the rules of `mode`, for
    each action of the true plan."""
    try:
        paths = generated_paths(folder, sample, anywhere)
    except BadData as error:
        paths = error

    def picture(uid):
        return frame(root, frame_map, uid, anywhere)

    for k in range(len(sample.labels)):
        turn, id = f"T={k + 1}", f"{sample.dataset}/{sample.uid}/step_{k + 1:02d}"
        groups, shifted = (
            (turn, sample.dataset, f"{sample.dataset}, {turn}"), k + (mode == "aligned"))
        reference = (
            picture(f"{sample.segments[k]}@end")
            if mode == "aligned" and k < len(sample.segments)
            else None
        )
        if reference is None and shifted >= len(sample.segments):
            yield None
            continue
        reference = reference or picture(sample.segments[shifted])
        if isinstance(paths, BadData) or reference is None:
            yield Missing(
                str(paths)
                if isinstance(paths, BadData)
                else f"{id}: no frame of {sample.segments[shifted]} in {root}",
                groups,
            )
        else:
            yield Step(
                id,
                groups,
                sample,
                k,
                paths[k],
                reference,
                picture(sample.segments[0]),
            )


# ---- Score ---------------------------------------------------------------------------------------


def judged(ask, step, id, reference, image, released=False):
    """The column of the judge."""
    sample = step.sample
    asked = (
        f"A model imagines what one sees while a plan is carried out. Data set: {sample.dataset}. "
        f"Sample: {sample.uid}. The whole "
        f"plan: {'; '.join(sample.labels)}. This is step {step.k + 1} of {len(sample.labels)}, "
        "with the action: "
        f"{sample.labels[step.k]}. The first image is the true view, the second the model's. How "
        "right is the model's? Reply "
        'with one JSON object: {"score": number from 0 to 10, "explanation": "..."}'
    )
    return ask and ask(
        functools.partial(judge.worldprediction_score, released=released),
        id,
        asked,
        [reference, image],
        detail="high",
    )


def work(args, embedder, ask):
    """What visual.run needs."""
    def score(step):
        image, reference = read_image(step.generated), read_image(step.reference)
        first = [read_image(step.first)] if step.first else []
        g, r, *x = embedder.images([image, reference, *first])
        return Row(
            step.groups,
            {
                "clip": cosine(g, r),
                "judge": judged(ask, step, step.id, reference, image, args.released),
            },
            {
                "clip": cosine(x[0], r) if x else None,
                "judge": judged(
                    ask and ask.copies, step, f"{step.id}/copy", reference, *first, args.released
                )
                if x
                else None,
            },
        )

    def items():
        for sample in samples:
            for item in (
                [sample]
                if isinstance(sample, Missing)
                else steps(sample, args.generated, args.frames, frame_map, mode, args.anywhere)
            ):
                if item is None:
                    about["steps without reference"] += 1
                else:
                    yield item

    mode = args.mode or ("released" if args.released else "aligned")
    frame_map = load(args.frame_map) if args.frame_map else {}
    if not isinstance(frame_map, dict):
        raise BadData(f"{args.frame_map}: not a JSON object of segment_uid: path")
    base, samples = read(args.data, args.base, args.released)
    known = [s for s in samples if isinstance(s, Sample)]
    turns = [f"T={k + 1}" for k in range(max((len(s.labels) for s in known), default=0))]
    datasets = list(dict.fromkeys(s.dataset for s in known))
    groups = dict.fromkeys(turns + datasets, True) | dict.fromkeys(
        (f"{d}, {t}" for d in datasets for t in turns), False
    )
    about = {"mode": mode, "ground_truth from": base, "steps without reference": 0}
    columns = {"clip": ("similarity", 4)} | ({"judge": ("judge", 2)} if ask else {})
    return about, items(), score, columns, groups


def main(argv=None):
    parser = visual.parser(__doc__)
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="the benchmark's JSON, with SWIRL's fields"
    )
    parser.add_argument(
        "--frames",
        required=True,
        metavar="DIR",
        help="holds frames/ or images/, and the frame map's paths",
    )
    parser.add_argument("--frame-map", metavar="FILE", help="JSON of segment_uid: path")
    parser.add_argument(
        "--mode",
        choices=["aligned", "released"],
        help="which frame a step is compared with, see note 1 [aligned]",
    )
    parser.add_argument(
        "--base",
        type=int,
        choices=[0, 1],
        help="what ground_truth counts from [1, or 0 in a file that holds a 0]",
    )
    return visual.run("worldprediction", parser.parse_args(argv), work)


if __name__ == "__main__":
    sys.exit(main())
