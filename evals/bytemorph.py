"""ByteMorph-Bench: edit an image with motion (camera, objects, people). Four CLIP scores and a
judge from 0 to 100, by type.

    python -m evals.bytemorph --data BM-Bench --generated GEN --json scores.json
    python -m evals.bytemorph --data BM-Bench --generated GEN --judge gpt-4o --replies replies.jsonl
    python -m evals.bytemorph --layout bm --data SIDE_BY_SIDE --generated GEN

Claim: with CLIP ViT-B/32 on stretched images (s, g, t: source, generated, target; c_s, c_t:
captions of source and target),
    clip_sim_txt = cos(g, c_t)    clip_dir_txt = cos(g - s, c_t - c_s)
    clip_sim_img = cos(s, g)      clip_dir_img = cos(t - s, g - s)
means per type, and pooled over images; the judge's mean per type is rounded to 2 decimals, as BM
does.

x = source image, z = the rewritten instruction (edit_prompt where that is empty), y = target image.
Layout sw: --data is BM-Bench's parquet (needs pyarrow), a JSON list or a JSONL of the same fields
(src_img, tgt_img: paths from the file's folder), or a folder that holds one; the image is
GEN/fullset/TYPE/IMAGE_ID.png, with "-" for "/" in the type. Layout bm: --data holds TYPE/NAME.png,
source and target side by side, and TYPE/NAME.json {"input", "output", "edit"}: the captions and the
instruction; GEN holds TYPE/NAME.png, source and generated image side by side.

Notes:
  1. A direction of nothing (g = s, or c_t = c_s) has no cosine: no number, counted; so copy x has
     no directions. In the released scripts one such image makes the mean NaN.
  2. Layout bm brings the generated half to the target's size by Lanczos, only for clip_dir_img. Its
     other scores take s from the generated file.
  3. The released SWIRL scorers look an image up under its id in lower case, other characters than
     a-z 0-9 . _ - replaced by -, and only what stands after its last _. Its generator writes the
     plain id, so such images are not found: --released does the same. The two names are never
     mixed: a_1 and b_1 would both be 1.png.
  4. A missing caption leaves the two text scores without a number; the released script compares
     with the empty caption.
"""

import functools
import os
import re
import sys
import typing
from pathlib import Path

from envs import official, records
from envs.records import BadData
from evals import judge, visual
from evals.visual import Missing, Row, cosine, read_image

COLUMNS = {
    "clip_sim_txt": ("sim txt", 4), "clip_sim_img": ("sim img", 4), "clip_dir_txt": ("dir txt", 4),
    "clip_dir_img": ("dir img", 4)}
SYSTEM = (
    "You evaluate image edits. You are shown an image before and after an edit, and the EDIT TEXT "
    "that was asked for. Rate "
    "the result from 0 to 100. Everything that the text requires must be there, nothing that it "
    "does not require may have "
    "changed, and the change itself should be as small as the text allows. Be strict. Reply with "
    "JSON only, without another "
    'word: {"Score": number}'
)


class Item(typing.NamedTuple):
    """One edit. Images are whatever visual.read_image takes; target, captions: None if they are not
    given."""
    id: str
    groups: tuple        # (type,)
    source: typing.Any
    target: typing.Any
    instruction: str
    captions: tuple      # of source and target


# ---- Read ----------------------------------------------------------------------------------------


def read(path, anywhere=False):
    """Yields an Item, or a Missing, for each row of BM-Bench in layout sw: a file, or the folder
    that holds it. anywhere: see `visual.inside`."""
    files = [path]
    if os.path.isdir(path):
        found = (
            sorted(map(str, Path(path).glob(p)))
            for p in ("data/test-*.parquet", "*.parquet", "*.jsonl", "*.json")
        )
        files = next(filter(None, found), None)
        if files is None:
            raise BadData(
                f"{path}: holds no data/test-*.parquet, *.parquet, *.jsonl or *.json; give "
                "BM-Bench's folder or file"
            )
    for file in files:
        broken = []
        for _, place, row in (
            _parquet(file) if file.endswith(".parquet") else official.rows(file, broken)
        ):
            groups = ()
            try:
                groups = (visual.text(row, "edit_type", place).replace("/", "-"),)
                known = lambda key: visual.text(row, key, place).strip() if row.get(key) else ""
                image = lambda key: _image(row, key, os.path.dirname(file), place, anywhere)
                z = known("edit_prompt_rewrite_instruction") or known("edit_prompt")
                if not z:
                    raise BadData(f"{place}: no edit_prompt_rewrite_instruction and no edit_prompt")
                number = isinstance(row.get("image_id"), int) and {"image_id": str(row["image_id"])}
                yield Item(visual.text(number or row, "image_id", place), groups, image("src_img"),
                           image("tgt_img") if row.get("tgt_img") is not None else None, z,
                           (known("src_img_caption") or None, known("tgt_img_caption") or None))
            except BadData as error:
                yield Missing(str(error), groups)
        yield from map(Missing, broken)


def _parquet(path):
    """As official.rows; a few rows are in memory at a time."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            "a parquet file is read with pyarrow, which is not installed: pip install pyarrow"
        ) from None
    n = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
        if max((group.total_byte_size for group in groups), default=0) > records.unpacked(path):
            raise records.too_large(path)
        for batch in file.iter_batches(batch_size=8):
            for row in batch.to_pylist():
                n += 1
                yield n, f"{path}, row {n}", row
    except FileNotFoundError:
        raise BadData(f"{path}: there is no such file; check the path") from None
    except BadData:
        raise
    except Exception as error:  # whatever a damaged file makes pyarrow raise
        raise BadData(
            f"{path}: no whole parquet file ({str(error).partition(chr(10))[0]}); download it again"
        ) from None


def _image(row, key, folder, place, anywhere):
    """A path, or the bytes of an image file, of what stands in a row: a path, bytes, or {"bytes",
    "path"} as the Hub writes it."""
    value = row.get(key)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    return visual.inside(folder, visual.text({key: value}, key, place), anywhere)


def read_side_by_side(data):
    """Yields an Item, or a Missing, for each PNG of layout bm; source and target are both the file,
    whose halves they are."""
    for file in sorted(Path(data).glob("*/*.png")):
        groups, sidecar = (file.parent.name,), file.with_suffix(".json")
        try:
            try:
                row = records.from_json(sidecar.read_bytes())
            except (OSError, ValueError):
                raise BadData(f"{sidecar}: is not there, or no JSON") from None
            known = lambda key: (
                visual.text(row, key, sidecar)
                if not isinstance(row, dict) or row.get(key)
                else None
            )
            captions = known("input"), known("output")
            yield Item(
                file.stem,
                groups,
                file,
                file,
                known("edit") or visual.text(row, "edit", sidecar),
                captions,
            )
        except BadData as error:
            yield Missing(str(error), groups)


def image_path(generated, item, layout="sw", released=False):
    """Where a model puts its image of an Item; released: where the released scorers look for it
    (note 3)."""
    if layout == "bm":
        return Path(generated, item.groups[0], f"{item.id}.png")
    name = (
        re.sub(r"[^a-zA-Z0-9._-]+", "-", item.id.strip()).lower().split("_")[-1]
        if released
        else item.id
    )
    return Path(generated, "fullset", item.groups[0], f"{name}.png")


# ---- Score ---------------------------------------------------------------------------------------


def clip_scores(g, s, c_s, c_t, t=None, g_at_t=None, s_at_t=None):
    """The four columns of one image from feature rows. g_at_t, s_at_t: what clip_dir_img takes for
    g and s, if not themselves."""
    direction = lambda a, b: None if a is None or b is None else a - b
    g_at_t, s_at_t = g if g_at_t is None else g_at_t, s if s_at_t is None else s_at_t
    return {
        "clip_sim_txt": cosine(g, c_t),
        "clip_sim_img": cosine(s, g),
        "clip_dir_txt": cosine(g - s, direction(c_t, c_s)),
        "clip_dir_img": cosine(direction(t, s_at_t), g_at_t - s_at_t),
    }


def judged(ask, id, instruction, source, edited, released=False):
    """The column of the judge."""
    return {
        "judge": ask
        and ask(
            functools.partial(judge.bytemorph_score, released=released),
            id,
            f"EDIT TEXT: {instruction}",
            [source, edited],
            system=SYSTEM,
            jpeg=True,
        )
    }


def work(args, embedder, ask):
    """What visual.run needs."""
    def score(item):
        edited = image_path("", item, args.layout, args.released)
        edited = read_image(visual.inside(args.generated, edited, args.anywhere))
        source = read_image(item.source)
        target, at_t = read_image(item.target) if item.target else None, []
        if args.layout == "bm":
            (source, edited), (true_source, target) = halves(edited), halves(source)
            at_t = [
                visual.resize(edited, target.shape[1], target.shape[0], "LANCZOS")
                if edited.shape != target.shape
                else edited,
                true_source,
            ]
        g, s, *rest = embedder.images(
            [edited, source, *at_t] + ([] if target is None else [target])
        )
        at_t, t = rest[:len(at_t)], rest[-1] if target is not None else None
        c_s, c_t = (
            None if rows is None else rows[0]
            for rows in (c and embedder.texts([c]) for c in item.captions)
        )
        id = f"{item.groups[0]}/{item.id}"
        return Row(
            item.groups,
            clip_scores(g, s, c_s, c_t, t, *at_t)
            | judged(ask, id, item.instruction, source, edited, args.released),
            clip_scores(s, s, c_s, c_t, t)
            | judged(
                ask and ask.copies, f"{id}/copy", item.instruction, source, source, args.released
            ),
        )

    side_by_side = args.layout == "bm"
    items = read_side_by_side(args.data) if side_by_side else read(args.data, args.anywhere)
    return (
        {"layout": args.layout},
        items,
        score,
        COLUMNS | ({"judge": ("judge", 2)} if ask else {}),
        None,
    )


def halves(image):
    """(left, right) of two images side by side; of an odd width, the right one is wider."""
    middle = image.shape[1] // 2
    if not middle:
        raise BadData("an image of one pixel's width has no halves")
    return image[:, :middle], image[:, middle:]


def main(argv=None):
    parser = visual.parser(__doc__)
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="BM-Bench's folder or file; layout bm: the folder of types",
    )
    parser.add_argument(
        "--layout",
        choices=["sw", "bm"],
        default="sw",
        help="one file an image (sw), or side by side (bm) [sw]",
    )
    return visual.run("bytemorph", parser.parse_args(argv), work, fit="stretch", rounded=("judge",))


if __name__ == "__main__":
    sys.exit(main())
