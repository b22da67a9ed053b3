"""AURORA-Bench: edit an image as an instruction says. CLIP similarities and success, two DiscEdits,
a judge from 0 to 10.

    python -m evals.aurora --data AURORA/test.json --generated GEN --json scores.json
    python -m evals.aurora --data AURORA/test.json --generated GEN --judge gpt-4o \\
        --replies replies.jsonl
    python -m evals.aurora --disc-edit whatsup=itm_test.json something=valid.json \\
        --root AURORA --generated SAMPLES

Claim: with CLIP ViT-B/32, per task and pooled over images: the cosines of the generated image with
source and target, the share strictly nearer to the target (clip_success), and the judge's success,
over-editing (10: none) and the smaller of the two.

x = source image, z = instruction, y = target image. test.json is a list of {"input", "instruction",
"task", "output"?}, with paths from its folder (--root); the image of row i, from 0 in the full
file, is GEN/fullset/TASK/aurora_%05d.png. DiscEdit's files are lists of {"input" or "image",
"prompt"?, "pos"?, "neg"?}, and sample i of row n, from 0, is SAMPLES/TASK/%05d/pos_i.png and
neg_i.png.

Notes:
  1. clip_success is most likely what the paper calls DiscEdit, so it also goes by disc_edit_swirl.
     AURORA's own is another thing: pos asks for what the image shows already, neg for a change,
     both are sampled under one seed, and disc_edit_aurora is the share of pairs in which pos_i
     stays strictly nearer to the source than neg_i. Chance is .5, standing still 0.
  2. AURORA measures that distance between latents (L2), which other models do not have. Here:
     --distance pixels (L2 over pixels, the source brought to the sample's size by Lanczos) or
     embedder (1 - cosine). No LPIPS. The figures are not AURORA's.
  3. An empty neg is `prompt`; an empty pos is `prompt` in whatsup and svo, and elsewhere the row is
     left out, as in AURORA. A row whose pos and neg come out the same, or empty, is broken.
  4. Text similarity and the judge are given the instruction. The released scripts read it from a
     key that is never set: with --released there is no text similarity, and the judge gets an empty
     instruction.
  5. Tasks without targets (emu, clevr, epic) have neither clip_sim_target nor clip_success; the
     released script has success 0.
  6. Rows without a source or with a target that is not there are counted; the released scripts drop
     the former silently.
"""
import functools
import os
import sys
import typing
from pathlib import Path

import numpy as np

from envs import official
from envs.records import BadData
from evals import judge, visual
from evals.visual import Missing, Row, cosine, read_image

# the paper's: those that have targets
TASKS = ("magicbrush", "ag", "something", "whatsup", "kubric")
COLUMNS = {
    "clip_sim_source": ("sim source", 4), "clip_sim_target": ("sim target", 4),
    "clip_success": ("success", 4), "clip_sim_text": ("sim text", 4)}
JUDGED = {
    "avg_edit_success": ("judge", 2), "avg_overediting": ("overediting", 2), "avg_min": ("min", 2)}


class Item(typing.NamedTuple):
    """A row of test.json; target: a path or None."""
    id: str
    groups: tuple        # (task,)
    source: str
    target: str | None
    instruction: str


class Pair(typing.NamedTuple):
    """A row of a DiscEdit file: pos is true of the image already, neg is not."""
    id: str              # its number in the file, from 0, in five digits
    groups: tuple        # (task,)
    source: str
    pos: str
    neg: str


# ---- Read ----------------------------------------------------------------------------------------


def read(path, root=None, tasks=TASKS, anywhere=False):
    """Yields an Item, or a Missing, for each row of test.json that belongs to `tasks` (None: all).
    anywhere: see `visual.inside`."""
    broken, root = [], root or os.path.dirname(path)
    for n, place, row in official.rows(path, broken):
        groups = ()
        try:
            groups = (visual.text(row, "task", place).lower().replace("/", "-"),)
            if tasks and groups[0] not in tasks:
                continue
            source, target = visual.text(row, "input", place), None
            if row.get("output") is not None:
                target = visual.inside(root, visual.text(row, "output", place), anywhere)
            yield Item(
                f"aurora_{n - 1:05d}",
                groups,
                visual.inside(root, source, anywhere),
                target,
                visual.text(row, "instruction", place),
            )
        except BadData as error:
            yield Missing(str(error), groups)
    yield from map(Missing, broken)


def image_path(generated, item):
    """Where a model puts its image of an Item."""
    return Path(generated, "fullset", item.groups[0], f"{item.id}.png")


def read_disc_edit(path, task, root=None, anywhere=False):
    """Yields a Pair, or a Missing, for each row of a DiscEdit file that is not left out (note 3).
    anywhere: see `visual.inside`."""
    broken, root = [], root or os.path.dirname(path)
    for n, place, row in official.rows(path, broken):
        try:
            given = {
                key: visual.text(row, key, place)
                for key in ("pos", "neg", "prompt", "input", "image")
                if not isinstance(row, dict) or row.get(key)
            }
            if task not in ("whatsup", "svo") and "pos" not in given:
                continue
            pos, neg = (
                given.get(key) or visual.text(row, "prompt", place) for key in ("pos", "neg")
            )
            if pos == neg or not (pos and neg):
                raise BadData(f"{place}: pos and neg are the same prompt, or one is empty")
            source = given.get("input") or visual.text(row, "image", place)
            source = visual.inside(root, source, anywhere)
            yield Pair(f"{n - 1:05d}", (task,), source, pos, neg)
        except BadData as error:
            yield Missing(str(error), (task,))
    yield from (Missing(why, (task,)) for why in broken)


# ---- Score ---------------------------------------------------------------------------------------


def clip_scores(g, s, t, z):
    """The four columns of one image from feature rows: generated, source, target or None,
    instruction or None."""
    source, target = cosine(g, s), cosine(g, t)
    success = None if target is None or source is None else float(target > source)  # strictly
    return {
        "clip_sim_source": source,
        "clip_sim_target": target,
        "clip_success": success,
        "disc_edit_swirl": success,
        "clip_sim_text": cosine(g, z),
    }


def judged(ask, id, instruction, source, edited, released=False):
    """The three columns of one image, from the judge's two numbers."""
    asked = (
        "You judge image edits with the eye of a professional digital artist. The first image is "
        "the original, the second the "
        "edited one; how well does the edit do what the instruction says? Reply with one Python "
        "dict and nothing else: "
        '{"score": [success, overedit], "reasoning": "..."}\n'
        "success, 0 to 10: how far the instruction was carried out.\n"
        "overedit, 0 to 10: how much was changed that should have stayed; 10 means that hardly "
        "anything was.\n"
        f"The instruction: {'' if released else instruction}"
    )
    found = ask and ask(
        functools.partial(judge.aurora_scores, released=released), id, asked, [source, edited]
    )
    return dict(zip(JUDGED, (*found, min(found)) if found else (None,) * 3))


def work(args, embedder, ask):
    """What visual.run needs for test.json."""
    def score(item):
        edited = visual.inside(args.generated, image_path("", item), args.anywhere)
        edited, source = read_image(edited), read_image(item.source)
        g, s, *t = embedder.images(
            [edited, source] + ([read_image(item.target)] if item.target else [])
        )
        z = None if args.released else embedder.texts([item.instruction])
        t, z = t[0] if t else None, None if z is None else z[0]
        return Row(
            item.groups,
            clip_scores(g, s, t, z)
            | judged(ask, item.id, item.instruction, source, edited, args.released),
            clip_scores(s, s, t, z)
            | judged(
                ask and ask.copies,
                f"{item.id}/copy",
                item.instruction,
                source,
                source,
                args.released,
            ),
        )

    about = {"tasks": " ".join(args.tasks)}
    tasks = None if "all" in args.tasks else args.tasks
    items = read(args.data, args.root, tasks, args.anywhere)
    return about, items, score, COLUMNS | (JUDGED if ask else {}), None


def work_disc_edit(args, embedder, ask):
    """What visual.run needs for DiscEdit's files: an item for each pair of samples."""
    def items():
        for name in args.disc_edit:
            task, equals, path = name.partition("=")
            if not equals or os.path.exists(name):
                task, path = Path(name).absolute().parent.name, name
            for pair in read_disc_edit(path, task, args.root, args.anywhere):
                samples = (
                    (pair._replace(id=f"{pair.id}/{i}") for i in range(args.samples))
                    if isinstance(pair, Pair)
                    else [pair]
                )
                yield from samples

    def score(pair):
        number, i = pair.id.split("/")
        folder, source = Path(args.generated, pair.groups[0], number), read_image(pair.source)
        pos, neg = (read_image(folder / f"{side}_{i}.png") for side in ("pos", "neg"))
        if pos.shape != neg.shape:
            raise BadData(f"{folder}: pos_{i}.png and neg_{i}.png differ in size")
        nearer = distance(args.distance, embedder, pos, source) < distance(
            args.distance, embedder, neg, source
        )
        return Row(pair.groups, {"disc_edit_aurora": float(nearer)}, {"disc_edit_aurora": 0.0})

    about = {
        "distance": "pixel L2" if args.distance == "pixels" else "1 - cosine",
        "samples": args.samples, "chance": .5}
    return about, items(), score, {"disc_edit_aurora": ("DiscEdit", 4)}, None


def distance(kind, embedder, image, source):
    """The distance of a sample from its source, by note 2."""
    if kind == "embedder":
        return 1 - cosine(*embedder.images([image, source]))
    source = visual.resize(source, image.shape[1], image.shape[0], "LANCZOS")
    return float(np.linalg.norm(image / 255 - source / 255))


def main(argv=None):
    parser = visual.parser(__doc__)
    parser.add_argument("--data", metavar="FILE", help="AURORA's test.json")
    parser.add_argument(
        "--disc-edit",
        nargs="+",
        metavar="[TASK=]FILE",
        help="AURORA's DiscEdit files; the folder names the task",
    )
    parser.add_argument(
        "--root",
        metavar="DIR",
        help="the folder that paths in the files begin from [the file's own]",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=list(TASKS),
        help="of test.json, or all [the five that have targets]",
    )
    parser.add_argument(
        "--distance", choices=["pixels", "embedder"], default="pixels", help="of DiscEdit [pixels]"
    )
    parser.add_argument("--samples", type=int, default=4, help="of each prompt of DiscEdit [4]")
    args = parser.parse_args(argv)
    if bool(args.data) == bool(args.disc_edit):
        parser.error("give one of --data test.json and --disc-edit FILE")
    if args.disc_edit:
        if args.judge or args.replies:
            parser.error("DiscEdit has no judge; leave --judge and --replies out")
        args.embedder = args.embedder if args.distance == "embedder" else None
        return visual.run("aurora disc_edit_aurora", args, work_disc_edit)
    return visual.run("aurora", args, work, max_tokens=512)


if __name__ == "__main__":
    sys.exit(main())
