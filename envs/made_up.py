"""Made-up worlds, to pretrain the tiny model on: what it knows before it sees a world of this
project.

    python -m envs.made_up              prints five transitions
    python -m envs.made_up 20 7         prints twenty, of seed 7

A world is a list of cells. A cell has a name, a kind and a value:

| kind   | value           | actions on it                                           |
| ------ | --------------- | ------------------------------------------------------- |
| number | 0 to 999        | set, raise, lower                                       |
| word   | a name, or none | set, clear, copy from another cell, swap with another   |
| flag   | one of a pair   | set to either                                           |
| list   | 0 to 4 names    | put in, take out, move to another list, empty           |
| text   | 3 to 12 words   | none: it is there to be copied                          |

Other actions look at a cell (nothing changes), move all counters on, delete a thing or add one. An
action may fail: the number would be negative, the name is not in the list, the flag is already so.
Then nothing changes, or only the answer line of a world that has one.

Each transition has a world of its own: words, verbs, the form of an action, the form of a state.
The forms of a state: lines `name: value`, rows, sections, sentences, JSON, HTML, a table.
So nothing can be learnt by heart. What can be learnt is to copy a state and to change what z names.

The words are the most common ones of English, from data/tiny/words.txt. Nothing here comes from the
other worlds: no rule, no template, no list of words (tests/test_made_up.py).
"""
import functools
import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

WORDS = Path(__file__).parent.parent / "data" / "tiny" / "words.txt"
KINDS = ("number", "number", "word", "word", "list", "list", "flag", "flag", "text")

# What people call an action; the first is the plain one.
VERBS = {
    "set": ("set", "change", "make", "update", "write", "assign", "choose", "select", "type"),
    "raise": ("raise", "increase", "add to", "grow", "bump"),
    "lower": ("lower", "decrease", "reduce", "cut", "drop"),
    "flag": ("set", "make", "switch", "mark", "turn"),
    "copy": ("copy", "clone", "mirror"),
    "swap": ("swap", "exchange", "trade"),
    "clear": ("clear", "reset", "erase", "wipe"),
    "put": ("put", "add", "insert", "append", "place", "push"),
    "take": ("take", "remove", "pull", "drop", "pop"),
    "move": ("move", "send", "carry", "transfer to", "shift"),
    "empty": ("empty", "clear", "flush"),
    "look": ("look at", "show", "read", "inspect", "get"),
    "tick": ("tick", "advance", "next", "step", "continue"),
    "delete": ("delete", "destroy", "drop", "close"),
    "create": ("create", "new", "make", "open"),
}
LINKS = {"set": "to", "raise": "by", "lower": "by", "flag": "to", "copy": "from", "swap": "with",
         "put": "into", "take": "from", "move": "to"}
PAIRS = (
    ("on", "off"), ("open", "closed"), ("yes", "no"), ("true", "false"), ("locked", "not locked"),
    ("active", "inactive"), ("visible", "hidden"), ("up", "down"), ("done", "not done"))
UNITS = ("", "", "", " kg", "%", " left", " units", " points")


@functools.lru_cache(maxsize=1)
def words():
    return WORDS.read_text().split()


def word(rng):
    """A word, the common ones more often; at times with a capital, or a string of random signs."""
    if rng.random() < 0.05:
        return "".join(
            rng.choice("abcdefghijklmnopqrstuvwxyzABCDEF0123456789")
            for _ in range(rng.randint(2, 8))
        )
    chosen = words()[int(rng.expovariate(1 / 900)) % len(words())]
    return chosen.capitalize() if rng.random() < 0.1 else chosen


@dataclass
class Cell:
    thing: str
    field: str
    kind: str
    value: object
    unit: str = ""
    pair: tuple = ()

    def shown(self, none):
        """The value as a state prints it."""
        if self.kind == "list":
            return ", ".join(self.value) or none
        return f"{self.value}{self.unit}"


@dataclass
class World:
    """One made-up world. text() prints every cell; act() changes some and says how."""
    rng: random.Random
    most: int = 64          # cells at most
    cells: list = field(default_factory=list)

    def __post_init__(self):
        rng = self.rng
        self.form = rng.choice(list(FORMS))
        self.speech = rng.choice(list(SPEECH))
        self.verb = {act: rng.choice(verbs) for act, verbs in VERBS.items()}
        self.join = rng.choice(("-", "_", " ", " "))
        self.none = rng.choice(("none", "nothing", "-", "null", "nobody"))
        self.separator = rng.choice((": ", ": ", " = ", " is ", " - ", ", "))
        self.tag = rng.choice(("div", "li", "p", "section", "tr", "option"))
        self.indent = rng.choice((None, 1, 2))
        self.bullet = rng.choice(("", "", "- ", "* ", "\t"))
        self.the = rng.choice(("", "the ", "The "))
        self.pool = [self.name() for _ in range(rng.randint(4, 9))]
        self.step = rng.choice((1, 1, 1, 5, 10))         # what a tick adds to each number
        self.feedback = "done" if rng.random() < 0.3 else None
        self.fields = [(word(rng), rng.choice(KINDS)) for _ in range(rng.randint(1, 5))]
        for _ in range(self.size()):
            self.add_thing(self.name())

    def size(self):
        """Things in the world: mostly few, sometimes so many that the state has 600 tokens."""
        most = min(self.most, self.rng.choice((6, 6, 10, 10, 16, 16, 24, 64)))
        return max(2, self.rng.randint(1, most) // len(self.fields))

    def name(self):
        return self.join.join(word(self.rng) for _ in range(self.rng.choice((1, 1, 2))))

    def add_thing(self, name):
        """A thing with a cell for each field. In half of the forms each thing has fields of its
        own."""
        own = self.form in ("lines", "sentences") and self.rng.random() < 0.7
        fields = [(word(self.rng), self.rng.choice(KINDS))] if own else self.fields
        if name not in [cell.thing for cell in self.cells]:
            self.cells += [self.cell(name, label, kind) for label, kind in fields]

    def cell(self, thing, label, kind):
        rng = self.rng
        cell = Cell(thing, label, kind, None)
        if kind == "number":
            cell.unit = rng.choice(UNITS)
        if kind == "flag":
            cell.pair = rng.choice(PAIRS) if rng.random() < 0.7 else (word(rng), word(rng))
        cell.value = self.fresh(cell)
        return cell

    def fresh(self, cell):
        """A random value for a cell."""
        rng = self.rng
        if cell.kind == "number":
            return rng.choice((rng.randint(0, 9), rng.randint(0, 99), 10 * rng.randint(0, 20)))
        if cell.kind == "word":
            return rng.choice([*self.pool, self.none])
        if cell.kind == "flag":
            return rng.choice(cell.pair)
        if cell.kind == "list":
            return rng.sample(self.pool, rng.randint(0, 3))
        return " ".join(word(rng) for _ in range(rng.randint(3, 12)))

    def text(self):
        """The state."""
        return FORMS[self.form](self)

    def label(self, cell):
        """How an action names a cell."""
        alone = sum(other.thing == cell.thing for other in self.cells) == 1
        return (
            cell.thing
            if alone
            else f"{cell.thing}{'.' if self.speech == 'call' else ' '}{cell.field}"
        )

    def say(self, act, *args):
        return SPEECH[self.speech](self.verb[act], LINKS.get(act, ""), [str(arg) for arg in args])

    def act(self):
        """Change the world by one action; return what was done, or None if nothing could be
        tried."""
        rng = self.rng
        if rng.random() < 0.12:
            return self.act_on_all()
        cell = rng.choice([cell for cell in self.cells if cell.kind != "text"] or [None])
        if cell is None:
            return None
        if rng.random() < 0.05:
            return self.answer(self.say("look", self.label(cell)), cell.shown(self.none))
        return getattr(self, "act_on_" + cell.kind)(cell, self.label(cell))

    def answer(self, z, feedback="done"):
        if self.feedback:
            self.feedback = feedback
        return z

    def act_on_all(self):
        """Move the counters on, delete a thing, or add one."""
        things = list(dict.fromkeys(cell.thing for cell in self.cells))
        kind = self.rng.choice(("tick", "delete", "create"))
        if kind == "tick":
            for cell in self.cells:
                if cell.kind == "number":
                    cell.value += self.step
            return self.answer(self.say("tick"))
        if kind == "delete" and len(things) > 2:
            gone = self.rng.choice(things)
            self.cells = [cell for cell in self.cells if cell.thing != gone]
            return self.answer(self.say("delete", gone))
        new = self.name()
        source = self.rng.choice(things)
        if new in things:
            return None
        self.cells += [Cell(new, c.field, c.kind, c.value, c.unit, c.pair)
                       for c in self.cells if c.thing == source]
        return self.answer(SPEECH[self.speech](self.verb["create"], "like", [new, source]))

    def act_on_number(self, cell, label):
        rng = self.rng
        kind = rng.choice(("set", "raise", "lower"))
        if kind == "set":
            cell.value = self.fresh(cell)
            return self.answer(self.say("set", label, cell.value))
        amount = rng.choice((1, 1, 2, 5, 10, rng.randint(1, 99)))
        z = self.say(kind, label) if amount == 1 else self.say(kind, label, amount)
        after = cell.value + (amount if kind == "raise" else -amount)
        if after < 0:
            return self.answer(z, f"failed: {label} would be negative")
        cell.value = after
        return self.answer(z)

    def act_on_flag(self, cell, label):
        value = self.rng.choice(cell.pair)
        was, cell.value = cell.value, value
        return self.answer(
            self.say("flag", label, value), "done" if was != value else f"already {value}"
        )

    def act_on_word(self, cell, label):
        rng = self.rng
        others = [c for c in self.cells if c.kind == "word" and c is not cell]
        kind = rng.choice(("set", "set", "clear") + (("copy", "swap") if others else ()))
        if kind == "set":
            cell.value = rng.choice([*self.pool, self.name()])
            return self.answer(self.say("set", label, cell.value))
        if kind == "clear":
            cell.value = self.none
            return self.answer(self.say("clear", label))
        other = rng.choice(others)
        before = cell.value
        cell.value = other.value
        if kind == "swap":
            other.value = before
        return self.answer(self.say(kind, label, self.label(other)))

    def act_on_list(self, cell, label):
        rng = self.rng
        kind = rng.choice(("put", "put", "take", "take", "move", "empty"))
        if kind == "empty":
            cell.value = []
            return self.answer(self.say("empty", label))
        if kind == "put":
            name = rng.choice(self.pool)
            if name in cell.value or len(cell.value) > 3:
                return self.answer(
                    self.say("put", name, label), f"failed: {label} has {name} or is full"
                )
            cell.value = [*cell.value, name]
            return self.answer(self.say("put", name, label))
        name = rng.choice(cell.value if cell.value and rng.random() < 0.9 else self.pool)
        others = [c for c in self.cells if c.kind == "list" and c is not cell and len(c.value) < 4]
        target = rng.choice(others) if kind == "move" and others else None
        z = self.say("move", name, self.label(target)) if target else self.say("take", name, label)
        if name not in cell.value:
            return self.answer(z, f"failed: {name} is not there") if not target else None
        cell.value = [other for other in cell.value if other != name]
        if target and name not in target.value:
            target.value = [*target.value, name]
        return self.answer(z)


# --- the forms of an action: (verb, linking word, arguments) -> z ---------------------------------

def called(verb, link, args):
    return f"{verb.replace(' ', '_')}({', '.join(args)})"


def spoken(verb, link, args):
    return f"{verb} " + (f" {link or 'in'} ".join(args))


def spoken_with_the(verb, link, args):
    return f"{verb} the " + (f" {link or 'in'} ".join(args))


def pointed(verb, link, args):
    return f"{verb}: " + " -> ".join(args)


def as_json(verb, link, args):
    return json.dumps({"do": verb, **dict(zip(("name", "value"), args))})


SPEECH = {
    "call": called, "spoken": spoken, "the": spoken_with_the, "pointed": pointed, "json": as_json}


# --- the forms of a state: world -> text ----------------------------------------------------------

def by_thing(world):
    """{thing: its cells}, in order."""
    things = {}
    for cell in world.cells:
        things.setdefault(cell.thing, []).append(cell)
    return things


def with_feedback(world, lines):
    return "\n".join(lines + ([f"answer: {world.feedback}"] if world.feedback else []))


def lines(world):
    """A line a cell."""
    return with_feedback(
        world,
        [
            f"{world.bullet}{world.label(cell)}{world.separator}{cell.shown(world.none)}"
            for cell in world.cells
        ],
    )


def rows(world):
    """A line a thing: its name, then its values."""
    return with_feedback(
        world,
        [
            f"{world.bullet}{thing}{world.separator}"
            + ", ".join(c.shown(world.none) for c in cells)
            for thing, cells in by_thing(world).items()
        ],
    )


def sections(world):
    """A heading for a thing, then a line a cell."""
    out = []
    for thing, cells in by_thing(world).items():
        out.append(f"[{thing}]" if world.bullet else f"{thing}:")
        out += [f"  {cell.field}{world.separator}{cell.shown(world.none)}" for cell in cells]
    return with_feedback(world, out)


def sentences(world):
    """A sentence or two for a thing, as in a description of a room."""
    out = []
    for thing, cells in by_thing(world).items():
        said = []
        for cell in cells:
            shown = cell.shown(world.none)
            if cell.kind == "list":
                said.append(f"has {shown} in its {cell.field}")
            elif cell.kind == "flag":
                said.append(f"is {shown}")
            else:
                said.append(f"has the {cell.field} {shown}")
        out.append(f"{world.bullet}{world.the}{thing} {', '.join(said)}.")
    return with_feedback(world, out) if world.indent else with_feedback(world, [" ".join(out)])


def json_text(world):
    state = {
        thing: {
            cell.field: cell.value if cell.kind in ("number", "list") else cell.shown(world.none)
            for cell in cells
        }
        for thing, cells in by_thing(world).items()
    }
    if world.feedback:
        state["answer"] = world.feedback
    return json.dumps(state, indent=world.indent)


def html(world):
    out = []
    for thing, cells in by_thing(world).items():
        marks = "".join(
            f' {cell.field}="{cell.shown(world.none)}"' for cell in cells if cell.kind == "flag"
        )
        inner = [
            f"<b>{cell.field}</b> {cell.shown(world.none)}" for cell in cells if cell.kind != "flag"
        ]
        if world.bullet:
            out += [
                f'<{world.tag} id="{thing}"{marks}>',
                *("  " + part for part in inner),
                f"</{world.tag}>",
            ]
        else:
            out.append(f'<{world.tag} id="{thing}"{marks}>{" ".join(inner)}</{world.tag}>')
    return with_feedback(world, out)


def table(world):
    """A row a thing; the first line names the columns."""
    mark = " | " if world.bullet else ","
    things = by_thing(world)
    head = ["name", *(cell.field for cell in next(iter(things.values())))]
    rows = [
        [thing, *(cell.shown(world.none).replace(", ", " ") for cell in cells)]
        for thing, cells in things.items()
    ]
    return with_feedback(world, [mark.join(row) for row in [head, *rows]])


FORMS = {
    "lines": lines, "rows": rows, "sections": sections, "sentences": sentences, "json": json_text,
    "html": html, "table": table}


def transition(rng, most=64):
    """One (x, z, y) of a new world of at most `most` cells, or two things."""
    while True:
        world = World(rng, most)
        for _ in range(rng.randint(0, 2)):
            world.act()
        x, z, y = world.text(), world.act(), world.text()
        if z:
            return x, z, y


def main(argv):
    n, seed = [int(arg) for arg in [*argv, "5", "0"][:2]] if len(argv) != 1 else (int(argv[0]), 0)
    rng = random.Random(seed)
    for _ in range(n):
        x, z, y = transition(rng)
        print(f"--- x\n{x}\n--- z\n{z}\n--- y\n{y}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
