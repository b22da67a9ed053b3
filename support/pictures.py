"""What a world of frames looks like, and what P makes of it: grids as PNG, a simulated episode as
GIF. Needs Pillow (optional).

Claim: a picture shows what a score cannot. Arrays (H, W, 3) of uint8 in, one file out, written
whole or not at all.
"""
import textwrap

import numpy as np

from envs import records

# pixels between cells, of a line of text
GAP, LINE = 6, 12


def sheet(rows, path, heads=()):
    """A PNG of rows of cells, each a frame or a text; heads: a text over each column."""
    from PIL import Image, ImageDraw
    H, W = next(cell.shape[:2] for row in rows for cell in row if not isinstance(cell, str))
    top = (LINE + GAP) if heads else GAP
    size = (max(map(len, rows)) * (W + GAP) + GAP, top + len(rows) * (H + GAP))
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for c, head in enumerate(heads):
        draw.text((GAP + c * (W + GAP), GAP / 2), head, "black")
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            at = GAP + c * (W + GAP), top + r * (H + GAP)
            if isinstance(cell, str):
                draw.multiline_text(
                    (at[0], at[1] + H // 3),
                    "\n".join(textwrap.wrap(cell, W // 7)),
                    "black",
                    spacing=2,
                )
            else:
                picture.paste(Image.fromarray(cell), at)
    save(path, picture, "PNG")


def difference(y, y_hat):
    """y in pale grey, and red where y_hat differs."""
    wrong = (y.astype(int) != y_hat).any(-1)                                       # (H, W)
    pale = (200 + y.mean(-1) / 5).astype(np.uint8)[..., None].repeat(3, -1)
    pale[wrong] = (220, 40, 40)
    return pale


def predictions(rows, path):
    """The grid of a stage; rows: [(x, z, y, y_hat)] with frames."""
    sheet(
        [[x, z, y, y_hat, difference(y, y_hat)] for x, z, y, y_hat in rows],
        path,
        ("x", "z", "y, true", "y_hat, of P", "difference"),
    )


def rollouts(rows, path):
    """Several steps ahead; rows: [([z], [first frame, true y, ..], [y_hat])], each a line of
    actions and two of pictures."""
    cells = []
    for zs, truth, y_hats in rows:
        cells += [["", *zs], list(truth), [truth[0], *y_hats]]
    sheet(
        cells, path, ["above true, below P", *(f"T = {t}" for t in range(1, len(rows[0][0]) + 1))]
    )


def animation(frames, path):
    """A GIF of what P simulates: a frame every .7 seconds."""
    from PIL import Image

    first, *rest = [
        Image.fromarray(frame).resize((2 * frame.shape[1], 2 * frame.shape[0]), Image.NEAREST)
        for frame in frames
    ]
    save(path, first, "GIF", save_all=True, append_images=rest, duration=700, loop=0)


def save(path, picture, kind, **how):
    with records.whole(path) as file:
        picture.save(file, kind, **how)
