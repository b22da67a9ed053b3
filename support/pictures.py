"""What a world of frames looks like, and what P makes of it: grids as PNG, a simulated episode as
GIF. Needs Pillow (optional).

Claim: a picture shows what a score cannot. Arrays (H, W, 3) of uint8 in, one file out, written
whole or not at all.
"""
import itertools
import textwrap

import numpy as np

from envs import records

GAP = 6         # pixels between cells
LINE = 12       # pixels of a line of text


def sheet(rows, path, heads=()):
    """A PNG of rows of cells, each a frame or a text; heads: a text over each column."""
    from PIL import Image, ImageDraw
    cells = itertools.chain(*rows)
    frame = next(cell for cell in cells if not isinstance(cell, str))
    H, W, _ = frame.shape
    top = (LINE + GAP) if heads else GAP
    width = GAP + max(map(len, rows)) * (W + GAP)
    height = top + len(rows) * (H + GAP)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for c, head in enumerate(heads):
        left = GAP + c * (W + GAP)
        draw.text((left, GAP / 2), head, "black")
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            left = GAP + c * (W + GAP)
            upper = top + r * (H + GAP)
            if isinstance(cell, str):
                text = "\n".join(textwrap.wrap(cell, W // 7))
                draw.multiline_text((left, upper + H // 3), text, "black", spacing=2)
            else:
                picture.paste(Image.fromarray(cell), (left, upper))
    save(path, picture, "PNG")


def difference(y, y_hat):
    """y in pale grey, and red where y_hat differs."""
    wrong = (y.astype(int) != y_hat).any(-1)               # (H, W)
    grey = (200 + y.mean(-1) / 5).astype(np.uint8)         # (H, W)
    shown = np.stack([grey] * 3, axis=-1)                  # (H, W, 3)
    shown[wrong] = (220, 40, 40)
    return shown


def predictions(rows, path):
    """The grid of a stage; rows: [(x, z, y, y_hat)] with frames."""
    heads = "x", "z", "y, true", "y_hat, of P", "difference"
    cells = []
    for x, z, y, y_hat in rows:
        cells.append([x, z, y, y_hat, difference(y, y_hat)])
    sheet(cells, path, heads)


def rollouts(rows, path):
    """Several steps ahead; rows: [([z], [first frame, true y, ..], [y_hat])], each a line of
    actions and two of pictures."""
    cells = []
    for zs, truth, y_hats in rows:
        cells.append(["", *zs])
        cells.append(truth)
        cells.append([truth[0], *y_hats])
    steps = len(rows[0][0])
    heads = [f"T = {t}" for t in range(1, steps + 1)]
    sheet(cells, path, ["above true, below P", *heads])


def animation(frames, path):
    """A GIF of what P simulates: a frame every .7 seconds."""
    from PIL import Image

    height, width, _ = frames[0].shape
    size = 2 * width, 2 * height
    film = [Image.fromarray(frame) for frame in frames]
    first, *rest = [picture.resize(size, Image.NEAREST) for picture in film]
    save(path, first, "GIF", save_all=True, append_images=rest, duration=700, loop=0)


def save(path, picture, kind, **how):
    with records.whole(path) as file:
        picture.save(file, kind, **how)
