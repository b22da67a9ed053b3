"""Pictures as strings: an image is cut into patches, each patch becomes a code, each code is one
token, and the codes stand between two marks.

    <image><c12><c12><c7>..</image>          row by row, as many rows as columns

Claim: P and Q remain language models, and the same functions serve text and pictures. `encode`
turns frames (N, H, W, 3) of uint8 into codes (N, side, side), and `decode` turns codes into frames.
Anything with these two calls can serve a world of frames.

A code is a whole number of at most five digits. What begins with <image> and is not of that form is
a text.

Departure from the paper: its codes come from a VQ model that was trained on very many pictures
(Liquid's, 1,024 a picture). `Codebook` is k-means on the patches of the run's own training frames.
It is exact on them if they hold at most `size` different patches, as in `pixels.py`.
"""
import re

import numpy as np

IMAGE, END = "<image>", "</image>"
CODE = re.compile(r"<c(0|[1-9][0-9]{0,4})>")


# ---- Codes and strings ---------------------------------------------------------------------------


def spell(codes):
    """The string of (side, side) codes."""
    return IMAGE + "".join(f"<c{code}>" for row in codes for code in row) + END


def patches(image):
    """The code tokens of an image's string, row by row: ["<c12>", ..]. None if the string is no
    image."""
    found = [code[0] for code in CODE.finditer(image)]
    side = round(len(found) ** 0.5)
    return (
        found
        if found and side * side == len(found) and image == IMAGE + "".join(found) + END
        else None
    )


def is_image(state):
    return state.startswith(IMAGE) and patches(state) is not None


def codes(image):
    """(side, side) codes of an image's string; None if it is none."""
    found = patches(image)
    return (
        None
        if found is None
        else np.array([int(code[2:-1]) for code in found]).reshape(round(len(found) ** 0.5), -1)
    )


def place(i, n):
    """The token that names patch i of n."""
    return "<{},{}>".format(*divmod(i, round(n ** 0.5)))


def neighbours(i, side):
    """The patches above, left of, right of and below patch i."""
    r, c = divmod(i, side)
    return [
        side * a + b
        for a, b in ((r - 1, c), (r, c - 1), (r, c + 1), (r + 1, c))
        if 0 <= a < side and 0 <= b < side
    ]


def diff(x, y):
    """What Q reads: two lines, each column by column. The first has place, code before and code
    after of each patch that changes. The second has place and code of the patches above, below,
    left and right of these, since a toy's support does not change. Where a camera moves, the first
    line would be long. If a shift of the whole of x by one patch (its border repeated) leaves less
    than half of it, x is taken as shifted, as in a video codec. The line then begins with two
    places, from where to where. It depends only on x and y."""
    before, after = patches(x), patches(y)
    if before is None or after is None or len(before) != len(after):
        # no picture is predicted: the whole of both
        return [x, y]
    n, side = len(after), round(len(after) ** 0.5)
    wide = np.pad(np.array(before).reshape(side, side), 1, "edge")
    shifts = {
        (r, c): wide[1 - r : 1 - r + side, 1 - c : 1 - c + side].ravel().tolist()
        for r, c in ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
    }
    left = {
        way: sum(old != new for old, new in zip(moved, after)) * (1 if any(way) else 0.5)
        for way, moved in shifts.items()
    }
    # min takes the first of equals
    r, c = min(left, key=left.get)
    before = shifts[r, c]
    # most sentences tell left from right
    columns = sorted(range(n), key=lambda i: (i % side, i))
    changed = [i for i in columns if before[i] != after[i]]
    beside = {j for i in changed for j in neighbours(i, side)} - set(changed)
    shift = place(side + 1, n) + place(side * (1 + r) + 1 + c, n) if r or c else ""
    return [shift + "".join(place(i, n) + before[i] + after[i] for i in changed),
            "".join(place(i, n) + after[i] for i in columns if i in beside)]


def spoil(x, y, other, rng):
    """The image y as a careless P would draw it. Either a patch has a wrong code, from x, y or
    `other`; or a patch that should change keeps the code of x; or a patch that changes is exchanged
    with a neighbour. None if nothing changes or that cannot be done."""
    before, after = patches(x), patches(y)
    n, side = len(after), round(len(after) ** 0.5)
    changed = [i for i in range(n) if before[i] != after[i]]
    if not changed:
        return None
    way = rng.choice(
        ("swap", "swap", "stray", "stray", "change", "stay")
        if len(changed) > 1
        else ("swap", "stray", "stray")
    )
    i = (
        rng.choice([i for i in range(n) if i not in changed] or changed)
        if way == "stray"
        else rng.choice(changed)
    )
    if way == "swap":
        near = [j for j in neighbours(i, side) if after[i] != after[j]]
        if near:
            j = rng.choice(near)
            after[i], after[j] = after[j], after[i]
    elif way == "stay":
        after[i] = before[i]
    else:
        after[i] = rng.choice(
            [
                code
                for code in sorted({*before, *after, *patches(other)})
                if code not in (before[i], after[i])
            ]
            or [after[i]]
        )
    bad = IMAGE + "".join(after) + END
    return bad if bad != y else None


def is_token(token):
    """Whether `vocabulary` made it."""
    return re.fullmatch(r"</?image>|<c\d+>|<\d+,\d+>", token) is not None


def vocabulary(states, size=0):
    """The tokens that images among the states need: marks, codes (those that are there, and `size`
    at least) and places; [] if there are no images."""
    images = [state for state in states if is_image(state)]
    if not images:
        return []
    n = max(image.count("<c") for image in images)
    top = max(int(code) for image in images for code in CODE.findall(image))
    return [
        IMAGE,
        END,
        *(f"<c{code}>" for code in range(max(size, top + 1))),
        *(place(i, n) for i in range(n)),
    ]


# ---- Frames and codes ----------------------------------------------------------------------------


def cut(frames, patch):
    """(N, H, W, 3) frames as (N, H/patch, W/patch, patch * patch * 3) patches."""
    N, H, W, C = frames.shape
    return (
        frames.reshape(N, H // patch, patch, W // patch, patch, C)
        .swapaxes(2, 3)
        .reshape(N, H // patch, W // patch, -1)
    )


def distinct(points):
    """(the different ones of (n, D) uint8 points, which of these each is, how often each comes)."""
    # np.unique(axis=0) sorts them all: seconds
    found = {}
    back = np.array([found.setdefault(point.tobytes(), len(found)) for point in points])
    return np.frombuffer(b"".join(found), np.uint8).reshape(len(found), -1), back, np.bincount(back)


def strings(book, frames):
    """The image strings of frames."""
    return [spell(codes) for codes in book.encode(np.stack(frames))]


def frames(book, states):
    """(N, H, W, 3) of image strings."""
    return book.decode(np.stack([codes(state) for state in states]))


class Codebook:
    """k-means on patches: codes are the rows of `centres` (K, patch * patch * 3), uint8."""

    def __init__(self, centres):
        self.centres, self.size = centres, len(centres)
        self.patch = round((centres.shape[1] / 3) ** 0.5)

    @classmethod
    def fit(cls, frames, patch=16, size=256, seed=0, rounds=20):
        """From (N, H, W, 3) frames: their different patches, the commonest first; where there are
        more than `size`, the centres of k-means (k-means++, each patch with its count)."""
        points, _, count = distinct(cut(frames, patch).reshape(-1, patch * patch * 3))
        order = np.argsort(-count, kind="stable")
        points, count = points[order], count[order]
        if len(points) <= size:
            return cls(points)
        rng, values = np.random.default_rng(seed), points.astype(np.float32)
        centres = values[:1]
        # to the nearest centre so far
        far = ((values - centres[0]) ** 2).sum(1)
        while len(centres) < size:
            new = values[rng.choice(len(values), p=far * count / (far * count).sum())]
            centres, far = np.vstack([centres, new]), np.minimum(far, ((values - new) ** 2).sum(1))
        for _ in range(rounds):
            nearest = cls(centres).nearest(values)
            # a centre without points does not move
            for k in np.unique(nearest):
                centres[k] = np.average(values[nearest == k], axis=0, weights=count[nearest == k])
        return cls(np.rint(centres).astype(np.uint8))

    def features(self, n=32):
        """(K, n) appearance of each centre: the n chief directions in which their 4x4 thumbnails
        differ."""
        size = self.patch // 4
        small = (
            self.centres.astype(np.float32)
            .reshape(self.size, 4, size, 4, size, 3)
            .mean((2, 4))
            .reshape(self.size, -1)
        )
        left, length, _ = np.linalg.svd(small - small.mean(0), full_matrices=False)
        return (left * length)[:, :n]

    def nearest(self, points):
        """(n,) the code of each of (n, D) patches. In float64, where whole numbers are exact: a tie
        falls alike in every batch."""
        centres = self.centres.astype(float)
        return np.concatenate(
            [
                ((centres**2).sum(1) - 2 * part.astype(float) @ centres.T).argmin(1)
                for part in np.array_split(points, max(1, len(points) // 4096))
            ]
        )

    def encode(self, frames):
        """(N, side, side) codes of (N, H, W, 3) frames."""
        parts = cut(frames, self.patch)
        points, back, _ = distinct(parts.reshape(-1, parts.shape[-1]))
        return self.nearest(points)[back.reshape(parts.shape[:3])]

    def decode(self, codes):
        """(N, H, W, 3) frames of (N, side, side) codes."""
        N, rows, columns = codes.shape
        parts = self.centres[codes].reshape(N, rows, columns, self.patch, self.patch, 3)
        return parts.swapaxes(2, 3).reshape(N, rows * self.patch, columns * self.patch, 3)

    def save(self, file):
        """To an open binary file or a path that ends in .npz."""
        np.savez_compressed(file, centres=self.centres)

    @classmethod
    def load(cls, path):
        return cls(np.load(path, allow_pickle=False)["centres"])
