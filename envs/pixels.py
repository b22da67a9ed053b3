"""A toy room seen by a camera, in the spirit of ByteMorph and AURORA-Bench: what does a sentence
change in a picture?

A frame is an array (128, 128, 3) of uint8, an action is a sentence, and the next frame is the room
after it. `images.py` turns frames into codes, so that P and Q read and write pictures as they do
text. The room has four columns. Toys stand in piles. One column holds a figure that can bend its
arms and knees. Half of the rooms have a curtain that hides a column. A window is above.

    zoom in                  pan left                  tilt up        (camera zoom, camera motion)
    move the red ball left   rotate the yellow cone    remove the blue box
    add a yellow box         paint the red ball blue   put the red ball on the blue box
                                                       (object motion, and AURORA's)
    raise the left arm       kneel                     walk right                  (human motion)
    pick up the red ball     put it down left          push the blue box right     (interaction)

Rules
 1. Toys fall. A toy that is moved, put or added rests on top of its column's pile. When a toy
    leaves, the toys on it come down by one. A pile holds three. "left" and "right" are the
    viewer's. An added toy goes to the leftmost column that has room.
 2. "put A left of B" (or right of) means the column next to B's. "on" needs B at the top of its
    pile. "under" means below B; B and the toys on it are lifted.
 3. The figure walks to a free column next to it. It pushes a single toy next to it if there is room
    behind, and follows. It picks up the top toy of a pile next to it and holds it over its head.
    Then its arms are up, and it neither kneels nor lowers them.
 4. A toy behind the curtain is hidden. A sentence that names it can move it, and it comes out.
    Nothing is put next to it by name. The figure does not go there.
 5. "zoom in" shows the four columns at twice the size. "zoom out" shows the whole wall with the
    columns in its middle. When zoomed out, the camera can pan by a cell to each side of where it
    began and tilt down by one. The picture then moves the other way.
 6. No two toys look the same, up to a turn. "rotate" lays a cone down or stands it up. A sentence
    that cannot be done (moving a ball against the figure) changes nothing.
 7. Each change has one sentence: "move A left", not "put A on B" where B stands there. Otherwise
    nobody could read which sentence it was.

To add an action: a case in `step`, and its sentence with its kind in `sentences`.

Departures from the benchmarks
 1. ByteMorph and AURORA are photographs and renderings; these are flat drawings, whose patches (16
    pixels) repeat, so that a codebook of 256 holds them all.
 2. x shows everything that y depends on, except a toy behind the curtain, which the sentence names.
 3. Their actions are free text of 5 to 50 words; these follow one form each.
"""

import copy
import functools
import itertools
from typing import NamedTuple

import numpy as np

STEPS = 10
EPISODES = 82       # for training, unless --episodes says else; half of them keep their actions
# episodes without actions for each labelled one: pictures are plenty, actions are seldom known
STATE_ONLY = 5
# Settings of this world. P is so sure of its pictures that a third of the groups have no spread at
# temperature 1
PRESET = {
    "busy": 0.0, "scale": "mean", "group_size": 16, "lr_idm": 2e-4, "muon": True,
    "warmup_lr": 4e-3, "warmup_steps": 2400, "warmup_steps_idm": 500, "warmup_batch_idm": 32,
    "temperature": 1.3, "min_p": 0.05, "batch": 16, "lr_fwm": 1.2e-3, "phase1_steps": 120,
    "phase2_steps": 40, "bootstrap_steps": 1200, "tokens": 2048, "spoiled": 1.0, "floor": 10.0,
    "eval_size": 500}
SLIP = 0.04         # share of sentences given without a look at the room
# share of near views that end at once: from near a toy has other codes, each to be learnt anew
BACK = 0.8
# pixels of a cell seen from near, of a patch
CELL, PATCH = 32, 16
# the stage, in cells
COLUMNS, HIGH = 4, 3
# the row and column of its top left on the wall
HOME = 3, 2

COLOURS = {"red": (214, 58, 52), "blue": (52, 96, 200), "yellow": (240, 190, 40)}
SHAPES = ("ball", "box", "cone")
WALL, FLOOR, BOARD, SKIN, SHIRT, DARK, CLOTH, PANE = (
    (236, 230, 218), (176, 136, 96), (120, 84, 56), (232, 184, 148), (120, 70, 150), (50, 46, 60),
    (150, 40, 70), (170, 210, 235))

# How often a sentence of each kind is given.
HABITS = {
    "camera zoom": 0.4, "camera motion": 4, "object motion": 4, "human motion": 4,
    "interaction": 4, "add": 1, "remove": 1, "recolour": 2, "put": 2, "rotate": 2}
# ByteMorph's; the others are AURORA's
MOTION = ("camera zoom", "camera motion", "object motion", "human motion", "interaction")


class Toy(NamedTuple):
    colour: str
    shape: str
    # only for cones: 1 lies
    turn: int = 0

    @property
    def name(self):
        return f"the {self.colour} {self.shape}"


class Room:
    """Where everything is. Two rooms that look the same may differ only behind the curtain."""

    def __init__(self, rng):
        # the stage's place in the picture, when out
        self.near, self.camera = False, HOME
        self.figure, *free = rng.sample(range(COLUMNS), COLUMNS)
        self.curtain = free.pop() if rng.random() < 0.5 else None
        self.up, self.kneels, self.held = {"left": False, "right": False}, False, None
        # from the floor up
        self.piles = [[] for _ in range(COLUMNS)]
        names = rng.sample(list(itertools.product(COLOURS, SHAPES)), 2)
        for colour, shape in names:
            self.piles[rng.choice(free)].append(Toy(colour, shape))

    def find(self, colour, shape):
        """(column, height) of a toy in a pile; None if there is none."""
        return next(((c, h) for c, pile in enumerate(self.piles) for h, toy in enumerate(pile)
                     if (toy.colour, toy.shape) == (colour, shape)), None)

    def toys(self):
        return [toy for pile in self.piles for toy in pile]

    def takes(self, column):
        """Whether a toy can be put there."""
        return 0 <= column < COLUMNS and column != self.figure and len(self.piles[column]) < HIGH

    def free(self, column):
        """Whether the figure can go there."""
        return 0 <= column < COLUMNS and not self.piles[column] and column != self.curtain


SIDE = {"left": -1, "right": 1}


# ---- What a sentence does ------------------------------------------------------------------------


def step(room, sentence):
    """The room after the sentence; the same one if that cannot be done."""
    new = copy.copy(room)
    new.up, new.piles = dict(room.up), [list(pile) for pile in room.piles]
    return new if act(new, sentence.split()) else room


def act(room, words):
    """Change the room as the words say; False if that cannot be done (the room may then be half
    changed)."""
    words = [word for word in words if word not in ("the", "a", "of", "it")]
    match words:
        case ["zoom", way]:
            done, room.near, room.camera = room.near != (way == "in"), way == "in", HOME
            return done
        # what is seen moves the other way
        case ["pan" | "tilt", way]:
            row, column = room.camera
            row, column = (
                row + (way == "up") - (way == "down"), column + (way == "left") - (way == "right"))
            room.camera = row, column
            return not room.near and -1 <= row - HOME[0] <= 0 and abs(column - HOME[1]) <= 1
        case ["move", colour, shape, ("left" | "right") as side]:
            return carry(room, (colour, shape), lambda c, h: c + SIDE[side])
        case ["put", colour, shape, ("left" | "right" | "on" | "under") as where, colour2, shape2]:
            return put(room, (colour, shape), where, (colour2, shape2))
        case ["add", colour, shape]:
            column = next((c for c in range(COLUMNS) if room.takes(c)), None)
            if column is None or taken(room, colour, shape) or len(room.toys()) > 2:
                return False
            room.piles[column].append(Toy(colour, shape))
        case ["remove", colour, shape]:
            return lift(room, (colour, shape)) is not None
        case ["paint", colour, shape, new]:
            return (
                change(room, (colour, shape), lambda toy: toy._replace(colour=new))
                if not taken(room, new, shape)
                else False
            )
        case ["rotate", colour, "cone"]:
            return change(room, (colour, "cone"), lambda toy: toy._replace(turn=1 - toy.turn))
        case ["raise" | "lower" as verb, side, "arm"]:
            done, room.up[side] = (
                room.up[side] != (verb == "raise") and not room.held, verb == "raise")
            return done
        case ["kneel"] | ["stand", "up"]:
            done, room.kneels = (
                room.kneels != (words == ["kneel"]) and not room.held, words == ["kneel"])
            return done
        case ["walk", side]:
            room.figure += SIDE[side]
            return not room.kneels and room.free(room.figure)
        case ["push", colour, shape, side]:
            beside = room.figure + SIDE[side]
            if (
                room.kneels
                or room.find(colour, shape) != (beside, 0)
                or len(room.piles[beside]) > 1
                or beside == room.curtain
            ):
                return False
            room.figure = beside
            toy = room.piles[beside].pop()
            if not room.takes(beside + SIDE[side]):
                return False
            room.piles[beside + SIDE[side]].append(toy)
        case ["pick", "up", colour, shape]:
            at = room.find(colour, shape)
            if (
                not at
                or room.held
                or room.kneels
                or abs(at[0] - room.figure) != 1
                or at[0] == room.curtain
                or at[1] < len(room.piles[at[0]]) - 1
            ):
                return False
            room.held, room.up = room.piles[at[0]].pop(), {"left": True, "right": True}
        case ["put", "down", side]:
            column = room.figure + SIDE[side]
            if not room.held or not room.takes(column):
                return False
            room.piles[column].append(room.held)
            room.held, room.up = None, {"left": False, "right": False}
        case _:
            return False
    return True


def taken(room, colour, shape):
    return (colour, shape) in [
        (toy.colour, toy.shape) for toy in [*room.toys(), *([room.held] if room.held else [])]
    ]


def lift(room, name):
    """Take a toy out of its pile, what stood on it comes down; None if it stands in none."""
    at = room.find(*name)
    return room.piles[at[0]].pop(at[1]) if at else None


def change(room, name, into):
    at = room.find(*name)
    if at is None or at[0] == room.curtain:
        return False
    room.piles[at[0]][at[1]] = into(room.piles[at[0]][at[1]])
    return True


def carry(room, name, where):
    """Move a toy to the top of the pile in column where(its column, its height)."""
    at = room.find(*name)
    if at is None or not room.takes(where(*at)):
        return False
    room.piles[where(*at)].append(lift(room, name))
    return True


def put(room, name, where, other):
    at, there = room.find(*name), room.find(*other)
    if at is None or there is None or name == other:
        return False
    if where in SIDE:
        return carry(room, name, lambda c, h: there[0] + SIDE[where])
    toy = lift(room, name)
    # it may have come down
    column, height = room.find(*other)
    pile = room.piles[column]
    if len(pile) == HIGH or (where == "on" and height < len(pile) - 1):
        return False
    pile.insert(height + (where == "on"), toy)
    return True


def sentences(room):
    """{kind: sentences} that name what is there, whether they can be done or not."""
    names, sides = [toy.name for toy in room.toys()], ("left", "right")
    seen = [
        toy.name for column, pile in enumerate(room.piles) for toy in pile if column != room.curtain
    ]
    held = [room.held.name] if room.held else []
    return {
        "camera zoom": ["zoom in", "zoom out"],
        "camera motion": ["pan left", "pan right", "tilt up", "tilt down"],
        "object motion": [f"move {name} {side}" for name in names for side in sides],
        "human motion": [f"{verb} the {side} arm" for verb in ("raise", "lower") for side in sides]
        + ["kneel", "stand up", "walk left", "walk right"],
        "interaction": [f"push {name} {side}" for name in names for side in sides]
        + [f"pick up {name}" for name in names]
        + [f"put it down {side}" for side in sides if held],
        "add": [f"add a {colour} {shape}" for colour in COLOURS for shape in SHAPES],
        "remove": [f"remove {name}" for name in names],
        "recolour": [f"paint {name} {colour}" for name in names for colour in COLOURS],
        "put": [
            f"put {a} {where} {b}"
            for where in ("on", "under", "left of", "right of")
            for a in names
            for b in seen
            if a != b
        ],
        "rotate": [f"rotate {name}" for name in names if name.endswith("cone")],
    }


def propose(room, x, rng):
    """(sentence, room after it, its frame). HABITS choose the kind. The sentence changes the
    picture x in a way that no earlier one does (`move` is before `put`); now and then it is any."""
    said, slip = sentences(room), rng.random() < SLIP
    if room.near and rng.random() < BACK:
        said = {kind: ["zoom out"] if kind == "camera zoom" else [] for kind in said}
    kinds = [kind for kind in HABITS if said[kind]]
    while True:
        kind = rng.choices(kinds, [HABITS[kind] for kind in kinds])[0]
        ways = (said["object motion"] if kind == "put" else []) + said[kind]
        for z in rng.sample(said[kind], len(said[kind])):
            new = step(room, z)
            if (
                slip
                or new is not room
                and z == next(way for way in ways if vars(step(room, way)) == vars(new))
            ):
                y = draw(new)
                if slip or not np.array_equal(x, y):
                    return z, new, y


def episode(rng):
    """STEPS transitions (x, z, y): two frames and a sentence."""
    room, out = Room(rng), []
    x = draw(room)
    for _ in range(STEPS):
        z, room, y = propose(room, x, rng)
        out.append((x, z, y))
        x = y
    return out


def kind(z):
    """The kind of a sentence."""
    first, *rest = z.split()
    if first in ("raise", "lower", "kneel", "stand", "walk"):
        return "human motion"
    if first in ("push", "pick") or z.startswith("put it down"):
        return "interaction"
    return {
        "zoom": "camera zoom",
        "pan": "camera motion",
        "tilt": "camera motion",
        "move": "object motion",
        "paint": "recolour",
    }.get(first, first)


# ---- What it looks like --------------------------------------------------------------------------


def draw(room):
    """The frame, (128, 128, 3) uint8: the wall with the stage on it, drawn as seen from near, then
    cut or halved."""
    row, column = HOME if room.near else room.camera
    canvas = np.empty((8 * CELL, 8 * CELL, 3), np.float32)
    canvas[:] = WALL
    ground = (row + HIGH) * CELL
    canvas[ground:], canvas[ground:ground + 4] = FLOOR, BOARD

    # its top left in column c, h cells above the floor
    def paste(tile, c, h):
        top, left = ground - CELL * (h + 1), CELL * (column + c)
        canvas[top:top + len(tile), left:left + CELL] = tile
    for c, pile in enumerate(room.piles):
        for h, toy in enumerate(pile):
            paste(toy_tile(toy), c, h)
    paste(figure_tile(room.up["left"], room.up["right"], room.kneels), room.figure, 1)
    if room.held:
        paste(toy_tile(room.held), room.figure, 2)
    # else a walk in an empty room could be a pan
    paste(window_tile(), 1, HIGH)
    if room.curtain is not None:
        paste(curtain_tile(), room.curtain, HIGH - 1)
    if room.near:
        top, left = ground - HIGH * CELL - PATCH, column * CELL
        return np.rint(canvas[top:top + 4 * CELL, left:left + 4 * CELL]).astype(np.uint8)
    return np.rint(
        (canvas[::2, ::2] + canvas[::2, 1::2] + canvas[1::2, ::2] + canvas[1::2, 1::2]) / 4
    ).astype(np.uint8)


def blank(high):
    """A tile of wall, and fill(colour, distance), which paints it where distance(across, down) < 0,
    in pixels from its middle."""
    tile = np.full((high, CELL, 3), WALL, float)
    down, across = np.mgrid[:high, :CELL] + 0.5

    def fill(colour, distance):
        # a soft edge
        cover = np.clip(0.5 - distance(across - CELL / 2, down - high / 2), 0, 1)[..., None]
        tile[:] += cover * (np.array(colour) - tile)
    return tile, fill


@functools.cache
def toy_tile(toy):
    tile, fill = blank(CELL)
    colour = np.array(COLOURS[toy.colour])
    light, dark = 0.55 * colour + 0.45 * 255, 0.65 * colour
    square = lambda a, d: np.maximum(abs(a), abs(d))

    # its tip up or, lying, right
    def cone(a, d):
        a, d = (d, -a) if toy.turn else (a, d)
        return np.maximum(d, (2 * abs(a) - d) / 5 ** 0.5)
    size, shape = {"ball": (14, np.hypot), "box": (14, square), "cone": (12, cone)}[toy.shape]
    fill(dark, lambda a, d: shape(a, d) - size)
    fill(colour, lambda a, d: shape(a, d) - size + 2.5)
    if toy.shape == "ball":
        fill(light, lambda a, d: np.hypot(a + 4, d + 5) - 4)
    elif toy.shape == "box":
        fill(
            light,
            lambda a, d: np.minimum(abs(a - d), abs(a + d)) / 1.4 - 1.5 + 100 * (square(a, d) > 11),
        )
    return tile


@functools.cache
def figure_tile(left_up, right_up, kneels):
    """Two cells high: a head, a body, two arms with elbows and two legs with knees."""
    tile, fill = blank(2 * CELL)
    low = PATCH if kneels else 0

    def limb(colour, *joints, wide=2.5):
        for (a0, d0), (a1, d1) in itertools.pairwise(joints):
            # to the line between two joints
            def distance(a, d):
                t = np.clip(
                    ((a - a0) * (a1 - a0) + (d - d0) * (d1 - d0))
                    / ((a1 - a0) ** 2 + (d1 - d0) ** 2),
                    0,
                    1,
                )
                return np.hypot(a - a0 - t * (a1 - a0), d - d0 - t * (d1 - d0)) - wide
            fill(colour, distance)

    for side, raised in ((-1, left_up), (1, right_up)):
        limb(
            DARK, (3 * side, 8 + low), (10 * side, 24) if kneels else (5 * side, 18), (6 * side, 29)
        )
        limb(
            SKIN,
            (5 * side, low - 11),
            (11 * side, low - 8),
            (12 * side, low - 24 if raised else low + 3),
        )
    limb(SHIRT, (0, low - 9), (0, low + 6), wide=6)
    limb(SKIN, (0, low - 23), (0, low - 22), wide=6.5)
    for eye in (-2.5, 2.5):
        limb(DARK, (eye, low - 23), (eye, low - 22), wide=1)
    return tile


@functools.cache
def window_tile():
    tile, fill = blank(CELL)
    fill(BOARD, lambda a, d: np.maximum(abs(a), abs(d)) - 13)
    fill(PANE, lambda a, d: np.maximum(abs(abs(a) - 5.5), abs(abs(d) - 5.5)) - 4)
    return tile


@functools.cache
def curtain_tile():
    fold = 0.85 + 0.15 * np.cos(np.arange(CELL) * 2 * np.pi / 8)                   # (32,)
    return np.broadcast_to(fold[:, None] * np.array(CLOTH), (HIGH * CELL, CELL, 3))
