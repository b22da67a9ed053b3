"""What the three visual scorers share: images, embedders, the command line, the table and the JSON
file (judge.py: judges).

Claim: every image that can be scored is scored once, every other one is counted with one line that
says why and never scores 0. Each number comes with the same number of the model that copies x, and
with the names of everything it depends on.

An embedder has `.name`, `images(list of (H, W, 3) uint8) -> (N, D) float32 unit rows` and
`texts(list of str) -> the same, or None`.

Notes:
  1. --embedder is OpenAI's CLIP ViT-B/32 by default: the benchmarks define their scores with it.
     Where it cannot be had the command stops and names --embedder pixels, which needs no weights,
     has no text side, and gives other numbers than the paper's.
  2. CLIP runs in float32, one image at a time: equal images have equal rows, so that "strictly
     nearer" and "no direction" are exact. The released ByteMorph scripts run in bfloat16 on a GPU.
     Texts are cut to what the model reads (77 tokens).
  3. The two preprocessings are no variants of one another: centre crop (AURORA, WorldPrediction)
     loses the margins, stretching (ByteMorph) the aspect ratio, and torch's bicubic without
     antialias is not Pillow's.
  4. An image keeps its pixels as they are stored: the rotation that its EXIF asks for is not made,
     as in the released scripts. 16-bit greys become 8-bit ones.
  5. Paths that a file names stay inside its folder, or inside --root, --frames and --generated: an
     image may go to a judge. --anywhere lets them out. Links on the disk are followed.
  6. An image that unpacks to more than MOST pixels, and to more than TIMES its bytes, is refused.
"""
import argparse
import io
import os
import sys
import typing
import warnings
from collections import Counter
from logging import getLogger

import numpy as np

from envs import records
from envs.official import need
from envs.records import BadData, fail
from evals import common, judge

VIT_B_32 = "openai/clip-vit-base-patch32"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MOST, TIMES = 2**24, 10         # pixels; pixels a byte
# CLIP's, of red, green, blue
MEAN, STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)


class Row(typing.NamedTuple):
    """One scored image. model, copy: {column: number, or None where there is none (no target, no
    direction, no reply)}."""
    groups: tuple
    model: dict
    copy: dict


class Missing(typing.NamedTuple):
    """An image that is not scored; why: one line."""
    why: str
    groups: tuple = ()


# ---- Read ----------------------------------------------------------------------------------------


def text(row, key, place):
    """The string under `key` of a row, else BadData, which begins with `place`."""
    value = need(row, key, str, place)
    # no tokenizer, file name or terminal takes it
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise BadData(f"{place}: the key \"{key}\" holds half a surrogate pair")
    return value


def read_image(source):
    """(H, W, 3) uint8 of an image file, given by its path or as its bytes; BadData if it is not
    there or broken."""
    try:
        from PIL import Image
    except ImportError:
        raise ImportError(
            "images are read with Pillow, which is not installed: pip install Pillow"
        ) from None
    name = "an image of the table" if isinstance(source, bytes) else source
    try:
        size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source,
                              formats=FORMATS)
            with file:
                if file.width * file.height > max(MOST, TIMES * size):
                    raise BadData(f"{name}: {file.width} x {file.height} pixels from {size} bytes")
                image = in_8_bit(file)
    except FileNotFoundError:
        raise BadData(f"{name}: there is no such image") from None
    except BadData:
        raise
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise BadData(f"{name}: no readable image ({type(error).__name__})") from None
    # its short side at 224 would fill the memory
    if max(image.shape[:2]) > 64 * min(image.shape[:2]):
        raise BadData(f"{name}: a strip of {image.shape[1]} x {image.shape[0]} pixels, no picture")
    return image


def in_8_bit(file):
    """(H, W, 3) uint8 of an opened image."""
    if not file.mode.startswith("I"):
        return np.asarray(file.convert("RGB"))
    # 16 bits a pixel: Pillow would make all greys above 255 white
    grey = np.asarray(file) // 257
    return np.stack([grey.clip(0, 255).astype(np.uint8)] * 3, axis=-1)


def inside(root, name, anywhere=False):
    """The path of `name` from the folder root; BadData if it leads out of it, unless `anywhere`."""
    path = os.path.join(root, name)
    if not anywhere and leads_out(root, name):
        raise BadData(f"{path}: leads out of its folder; give --anywhere if you trust the file")
    return path


def leads_out(root, name):
    """Whether the path `name`, from the folder root, is outside of it."""
    top, path = os.path.abspath(root), os.path.abspath(os.path.join(root, name))
    return os.path.commonpath([top, path]) != top


def resize(image, width, height, kernel):
    """By Pillow, whose kernels widen when it shrinks; kernel: "BICUBIC", "LANCZOS", "BOX"."""
    from PIL import Image

    return np.asarray(
        Image.fromarray(image).resize((width, height), getattr(Image.Resampling, kernel))
    )


# ---- Embedders -----------------------------------------------------------------------------------


def centre_crop(image, size):
    """(3, size, size) in [0, 1]: the short side to `size` by Pillow's bicubic, then the middle."""
    import torch
    height, width = image.shape[:2]
    short = min(height, width)
    image = resize(image, int(size * width / short), int(size * height / short), "BICUBIC")
    top, left = round((image.shape[0] - size) / 2), round((image.shape[1] - size) / 2)
    return torch.tensor(image[top:top + size, left:left + size]).permute(2, 0, 1) / 255


def stretch(image, size):
    """(3, size, size), about in [0, 1]: both sides to `size` by torch's bicubic, without
    antialias."""
    import torch
    pixels = torch.tensor(image).permute(2, 0, 1)[None] / 255
    return torch.nn.functional.interpolate(
        pixels, size=(size, size), mode="bicubic", align_corners=False
    )[0]


class CLIP:
    """Any CLIP of transformers, by Hub id or folder; fit: "crop" or "stretch". BadData if it cannot
    be had."""

    def __init__(self, name, fit="crop"):
        import torch
        from transformers import AutoTokenizer, CLIPModel
        from transformers.utils import logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        # without a network it tells of every attempt
        getLogger("huggingface_hub").setLevel("ERROR")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model, loaded = CLIPModel.from_pretrained(
                name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            if loaded["missing_keys"]:
                raise ValueError(
                    f"{len(loaded['missing_keys'])} of its weights are not in the file"
                )
        # whatever a damaged folder or the network makes the loaders raise
        except Exception as error:
            raise BadData(
                f"--embedder {name}: no CLIP can be loaded "
                f"({str(error).partition(chr(10))[0].rstrip('.')}); give a folder "
                "that holds one, or --embedder pixels, which needs no weights and gives other "
                "numbers"
            ) from None
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.fit = {"crop": centre_crop, "stretch": stretch}[fit]
        self.size, self.longest = (
            model.config.vision_config.image_size,
            model.config.text_config.max_position_embeddings)
        self.name = f"CLIP {name}, {'centre crop' if fit == 'crop' else 'stretched'}"
        self.cut = set()                                   # texts that are longer

    def images(self, images):
        import torch
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        pixels = ((self.fit(image, self.size) - mean) / std for image in images)
        return self._rows(
            self.model.vision_model,
            self.model.visual_projection,
            [{"pixel_values": p[None]} for p in pixels],
        )

    def texts(self, texts):
        ids = [
            self.tokenizer(t, truncation=True, max_length=self.longest, return_tensors="pt")
            for t in texts
        ]
        self.cut |= {t for t in texts if len(self.tokenizer(t)["input_ids"]) > self.longest}
        return self._rows(
            self.model.text_model,
            self.model.text_projection,
            [{"input_ids": i["input_ids"]} for i in ids],
        )

    def _rows(self, tower, projection, inputs):
        import torch
        with torch.no_grad():
            rows = [
                projection(
                    tower(**{k: v.to(self.model.device) for k, v in i.items()}).pooler_output
                )
                for i in inputs
            ]
        return torch.nn.functional.normalize(torch.cat(rows).float(), dim=-1).cpu().numpy()


class Pixels:
    """The picture itself, 32 x 32. Its cosines are high between any two pictures; compare them
    with those of the copy of x."""
    name = "pixels, 32 x 32"
    cut = ()

    def images(self, images):
        rows = np.stack(
            [resize(image, 32, 32, "BOX").astype(np.float32).ravel() for image in images]
        )
        # black has no direction: the darkest grey's
        rows[~rows.any(1)] = 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def texts(self, texts):
        return None


def cosine(a, b):
    """Of two vectors. None if one is absent or has no direction; the released scripts then have
    NaN."""
    if a is None or b is None:
        return None
    a, b = a.astype(np.float64), b.astype(np.float64)
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if 0 < size < np.inf else None


# ---- The command line, the table -----------------------------------------------------------------


def parser(doc):
    """The flags that the three scorers have."""
    p = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.error = fail
    p.add_argument("--generated", required=True, metavar="DIR", help="what the model made")
    p.add_argument(
        "--embedder",
        default=VIT_B_32,
        help=f"CLIP by Hub id or folder, or pixels, which needs no weights [{VIT_B_32}]",
    )
    p.add_argument(
        "--judge",
        metavar="MODEL",
        help="ask this model, by OPENAI_API_KEY and OPENAI_BASE_URL; needs --replies",
    )
    p.add_argument(
        "--replies",
        metavar="FILE",
        help="JSONL of {id, reply}: the judge's are written here; alone: score these",
    )
    p.add_argument(
        "--no-judge-copy",
        action="store_true",
        help="do not judge the copy of x, which doubles the questions",
    )
    p.add_argument(
        "--anywhere",
        action="store_true",
        help="let the paths that a file names lead out of its folder",
    )
    p.add_argument(
        "--released",
        action="store_true",
        help="with the quirks of the released scripts; see the notes",
    )
    p.add_argument(
        "--json",
        metavar="FILE",
        help="write the figures to this file (and replace only what a scorer wrote)",
    )
    return p


def run(benchmark, args, work, fit="crop", max_tokens=256, rounded=()):
    """Scores, prints, writes --json. Returns the exit code.

    work(args, embedder, ask) -> (about, items, score, columns, groups); ask: a judge.Recorded, or
    None. about: {name: what the numbers depend on}. items: Missing, or anything with an `id` and
    `groups` of which score(item) makes a Row or raises BadData. columns: {name: (title, decimals)}
    of the table. groups: {name: whether it is printed}, or None: in order of appearance. rounded:
    columns whose means of groups are rounded to the table's decimals in the JSON, too.
    """
    records.show_anything()
    try:
        common.check_json(args.json)
        ask = judge.from_args(args, max_tokens)
        embedder = args.embedder and (
            Pixels() if args.embedder == "pixels" else CLIP(args.embedder, fit)
        )
        about, items, score, columns, groups = work(args, embedder, ask)
        rows, missing = each(items, score)
        if not rows:
            raise BadData(
                f"nothing can be scored: {missing[0].why if missing else 'no row was found'}"
            )
        if groups is None:
            groups = dict.fromkeys((g for item in rows + missing for g in item.groups), True)
        misses = {"rows are missing or broken and not scored": [m.why for m in missing],
                  "replies of the judge are missing or hold no score": ask.misses if ask else []}
        for what, lines in misses.items():
            if lines:
                print(
                    f"warning: {len(lines)} {what}; the first: {records.one_line(lines[0])}",
                    file=sys.stderr,
                )
        if embedder and embedder.cut:
            print(f"warning: {len(embedder.cut)} texts are longer than the {embedder.longest} "
                  "tokens that CLIP reads, and are cut", file=sys.stderr)
        about = {
            "embedder": embedder.name if embedder else None,
            "judge": ask.name if ask else None,
            "texts_cut": len(embedder.cut) if embedder else 0,
            "released": args.released,
            **about,
        }
        names = list(rows[0].model)
        of_group, n_missing = {}, Counter(g for item in missing for g in item.groups)
        for row in rows:
            for g in row.groups:
                of_group.setdefault(g, []).append(row)
        scores = {g: summary(names, of_group.get(g, []), n_missing[g]) for g in groups}
        for means, c in (
            (row[side], c)
            for row in scores.values()
            for side in ("model", "copy_x")
            for c in rounded
        ):
            means[c] = None if means[c] is None else round(means[c], columns[c][1])
        scores["all"] = summary(names, rows, len(missing))
        print(
            f"{benchmark}: "
            + "; ".join(f"{k}: {'no' if v is None or v is False else v}" for k, v in about.items())
        )
        print_table({g: row for g, row in scores.items() if groups.get(g, True)}, columns)
        if args.json:
            lists = dict(zip(("missing", "judge_missing"), misses.values()))
            common.write_json(
                args.json,
                {
                    "benchmark": benchmark,
                    "n": len(rows),
                    "n_missing": len(missing),
                    **about,
                    "scores": scores,
                    **lists,
                },
            )
    except (BadData, ImportError) as error:
        fail(error)
    except KeyboardInterrupt:
        print(
            "stopped; the same command goes on with the replies that it has"
            if args.judge
            else "stopped",
            file=sys.stderr,
        )
        return 130
    return 0


def each(items, score):
    """([Row], [Missing]) of the items."""
    rows, missing = [], []
    for item in items:
        try:
            missing.append(item) if isinstance(item, Missing) else rows.append(score(item))
        except BadData as error:
            missing.append(Missing(f"{item.id}: {error}", item.groups))
    return rows, missing


def summary(names, rows, n_missing):
    """{"n", "n_missing", "model", "se", "counts", "copy_x", "copy_se", "copy_counts"} of a group.

    model, copy_x: {name: plain mean over the rows that have this number, or None}; se, copy_se: its
    standard error, of a share sqrt(p (1 - p) / n); counts, copy_counts: how many rows have it.
    """
    result = {"n": len(rows), "n_missing": n_missing}
    for side, se, counts, dicts in (("model", "se", "counts", [r.model for r in rows]),
                                    ("copy_x", "copy_se", "copy_counts", [r.copy for r in rows])):
        told = {name: np.array([d[name] for d in dicts if d[name] is not None]) for name in names}
        result[side] = {
            name: float(numbers.mean()) if len(numbers) else None for name, numbers in told.items()
        }
        result[se] = {
            name: float(numbers.std() / len(numbers) ** 0.5) if len(numbers) else None
            for name, numbers in told.items()
        }
        result[counts] = {name: len(numbers) for name, numbers in told.items()}
    return result


def print_table(scores, columns):
    """Three lines a group (the model, its standard error, the copy of x), and which numbers some
    rows do not have."""
    print(
        f"{'':28}{'n':>6}{'missing':>9}" + "".join(f"{title:>12}" for title, _ in columns.values())
    )
    for name, row in scores.items():
        counts = f"{row['n']:>6}{row['n_missing']:>9}"
        lines = (name, "model", counts), ("  SE", "se", ""), ("  copy x", "copy_x", "")
        for title, side, ns in lines:
            cells = [
                "-" if row[side][c] is None else f"{row[side][c]:.{digits}f}"
                for c, (_, digits) in columns.items()
            ]
            print(f"{title:28}{ns:15}" + "".join(f"{cell:>12}" for cell in cells))
    for c, (title, _) in columns.items():
        if scores["all"]["counts"][c] < scores["all"]["n"]:
            print(
                f"{title}: {scores['all']['counts'][c]} of {scores['all']['n']} rows have this "
                "number"
            )
