"""Household physics in the spirit of ScienceWorld: heat and phases, vessels and devices, all in
sight.

An example: x on the left; z = `wait`; in y the lines on the right replace those of x next to
them.
    stove: on
    freezer: on, shut
    chest: shut
    shelf: oil, butter
    pot: liquid water, 20 C, in the freezer             pot: solid water, -20 C, in the freezer
    cup: liquid water, 20 C, on the bench
    jar: liquid water, 60 C, on the stove               jar: boiling water, 100 C, on the stove

The rules:
 1. Time passes only on `wait`. The state before a wait decides its effect. An action whose
    condition fails changes nothing.
 2. A wait changes the temperature of a vessel's contents. On a stove that is on they warm by 40 C,
    to 120 C at most and never past a boiling point. In a freezer that is on and shut they cool by
    40 C, to -20 C. In the shut chest, lined with cork, they keep their temperature. Anywhere else
    they move 20 C towards the room's 20 C.
 3. Phase: solid at or below the melting point, boiling at or above the boiling point, else liquid.
 4. A substance that boils on a stove that is on is gone after the next wait. Brine leaves salt,
    syrup leaves sugar.
 5. A vessel holds at most two substances, each once. Mixing gives the mean of both temperatures
    (rounded down to a multiple of 20 C). The tap and the shelf give things at 20 C.
 6. `pour` moves everything that is not solid, or nothing. `fill` needs the vessel in the sink.
 7. `stir` makes one substance of two if RECIPES has them and they are warm enough.
 8. Nothing in a shut freezer or chest can be reached. Stove, freezer, chest and sink take one
    vessel each.

Departures from the benchmark:
 1. There is one room, and all of it is in sight: no walking, no inventory, no looking, no task, no
    score.
 2. No amounts, no hot empty vessels; melting points are moved to fit (sugar melts above 100 C
    here).
 3. A failed action says nothing (ScienceWorld answers with a message). No plants, circuits or
    friction.

Busy logs (`--busy`): in training episodes a housemate acts as well, after us: any action but
`wait`, chosen with the same habits. z does not name it.

To add an action: a `case` in step() (and a method, if it is long), a line in propose(), its name in
KINDS. To add a substance or a recipe: a line in SUBSTANCES or RECIPES (and STOCK, if the shelf may
offer it).
"""
import copy

STEPS = 14
EPISODES = 240       # to train on, unless --episodes says else
STATE_ONLY = 1
PRESET = {}         # settings of this world, where they differ from settings.py's
KINDS = ("put", "take", "turn on", "turn off", "open", "close",
         "fill", "pour", "empty", "stir", "add", "wait")
NEVER = 999                                         # a temperature that nothing here reaches
SUBSTANCES = {  # name: (melting point, boiling point)
    "water": (0, 100),
    "milk": (0, 100),
    "oil": (-20, NEVER),
    "butter": (20, NEVER),
    "chocolate": (40, NEVER),
    "wax": (60, NEVER),
    "sugar": (100, NEVER),
    "salt": (NEVER, NEVER),
    "mint": (NEVER, NEVER),
    "brine": (-NEVER, 120),
    "syrup": (-20, 120),
    "tea": (0, 100),
    "cocoa": (0, 100),
    "caramel": (80, NEVER),
}
# (one, other), in any order: (product, lowest heat)
RECIPES = {
    ("water", "salt"): ("brine", 20), ("water", "sugar"): ("syrup", 40),
    ("water", "mint"): ("tea", 80), ("milk", "chocolate"): ("cocoa", 60),
    ("butter", "sugar"): ("caramel", 100)}
RESIDUE = {"brine": "salt", "syrup": "sugar"}       # what stays when it boils away
STOCK = ["milk", "oil", "butter", "chocolate", "wax", "sugar", "salt", "mint"]
VESSELS = ["pot", "cup", "jar"]
# where a vessel can stand, in addition to the bench
PLACES = {"stove": "on", "freezer": "in", "chest": "in", "sink": "in"}


def phase(substance, heat):
    melts, boils = SUBSTANCES[substance]
    return "solid" if heat <= melts else "boiling" if heat >= boils else "liquid"


class World:
    def __init__(self, rng):
        self.on = {device: rng.random() < 0.5 for device in ("stove", "freezer")}
        self.open = {device: rng.random() < 0.5 for device in ("freezer", "chest")}
        self.shelf = rng.sample(STOCK, 2)
        self.where = dict(zip(VESSELS, rng.sample([*PLACES, "bench"], 3)))
        self.holds, self.heat = {}, {}
        for v in VESSELS:
            some = rng.sample(["water", *STOCK], 2)
            self.holds[v] = rng.choice(
                [[], ["water"], some[:1], some, list(rng.choice(list(RECIPES)))]
            )
            usual = {"stove": [20, 40, 60, 80], "freezer": [-20, 0, 20]}.get(self.where[v], [20])
            self.heat[v] = rng.choice(usual) if self.holds[v] else 20

    def text(self):
        on = {device: "on" if self.on[device] else "off" for device in self.on}
        door = {device: "open" if self.open[device] else "shut" for device in self.open}
        lines = [f"stove: {on['stove']}", f"freezer: {on['freezer']}, {door['freezer']}",
                 f"chest: {door['chest']}", f"shelf: {', '.join(self.shelf) or 'bare'}"]
        for v in VESSELS:
            stuff = [f"{phase(s, self.heat[v])} {s}" for s in self.holds[v]]
            inside = ", ".join(stuff + [f"{self.heat[v]} C"]) if stuff else "empty"
            lines.append(f"{v}: {inside}, {PLACES.get(self.where[v], 'on')} the {self.where[v]}")
        return "\n".join(lines)

    def reach(self, v):
        return self.open.get(self.where[v], True)

    def step(self, z):
        match z.split():
            case ["put", "the", v, prep, "the", place] if (
                v in VESSELS and PLACES.get(place) == prep
            ):
                if (
                    self.reach(v)
                    and self.open.get(place, True)
                    and place not in self.where.values()
                ):
                    self.where[v] = place
            case ["take", "the", v] if v in VESSELS:
                if self.reach(v):
                    self.where[v] = "bench"
            case ["turn", ("on" | "off") as way, "the", device] if device in self.on:
                self.on[device] = way == "on"
            case [("open" | "close") as way, "the", device] if device in self.open:
                self.open[device] = way == "open"
            case ["fill", "the", v] if v in VESSELS:
                if self.where[v] == "sink":
                    self.join(v, ["water"], 20)
            case ["pour", "the", v, "into", "the", w] if v in VESSELS and w in VESSELS and v != w:
                flowing = [s for s in self.holds[v] if phase(s, self.heat[v]) != "solid"]
                if flowing and self.reach(v) and self.join(w, flowing, self.heat[v]):
                    self.keep(v, [s for s in self.holds[v] if s not in flowing])
            case ["empty", "the", v] if v in VESSELS:
                if self.reach(v):
                    self.keep(v, [])
            case ["stir", "the", v] if v in VESSELS:
                for pair, (product, lowest) in RECIPES.items():
                    if set(pair) == set(self.holds[v]) and self.heat[v] >= lowest and self.reach(v):
                        self.holds[v] = [product]
            case ["add", "the", s, "to", "the", v] if s in STOCK and v in VESSELS:
                if s in self.shelf and self.join(v, [s], 20):
                    self.shelf.remove(s)
            case ["wait"]:
                self.wait()
            case _:
                raise ValueError(f"no such action: {z!r}")

    def join(self, v, stuff, heat):
        """Stuff of this temperature goes into v; False if v is out of reach or has no room for
        it."""
        both = self.holds[v] + stuff
        if not self.reach(v) or len(both) > 2 or len(set(both)) < len(both):
            return False
        self.heat[v] = (self.heat[v] + heat) // 40 * 20 if self.holds[v] else heat
        self.holds[v] = both
        return True

    def keep(self, v, stuff):
        """Only this stays in v. An empty vessel shows no temperature, so it must have a fixed
        one."""
        self.holds[v] = stuff
        self.heat[v] = self.heat[v] if stuff else 20

    def wait(self):
        for v in VESSELS:
            if self.holds[v]:
                self.heat_or_cool(v)

    def heat_or_cool(self, v):
        heat, place = self.heat[v], self.where[v]
        if place == "stove" and self.on["stove"]:
            boiling = [s for s in self.holds[v] if phase(s, heat) == "boiling"]
            if boiling:
                left = [RESIDUE.get(s) if s in boiling else s for s in self.holds[v]]
                # salt from brine joins salt
                self.keep(v, [s for s in dict.fromkeys(left) if s])
            else:
                self.heat[v] = min([heat + 40, 120] + [SUBSTANCES[s][1] for s in self.holds[v]])
        elif place == "freezer" and self.on["freezer"] and not self.open["freezer"]:
            self.heat[v] = max(heat - 40, -20)
        elif place != "chest" or self.open["chest"]:
            self.heat[v] += 20 if heat < 20 else -20 if heat > 20 else 0

    def propose(self, rng):
        """An action. Most change something, and useful ones are likelier; at times a careless
        try."""
        careless = rng.random() < 0.17
        while True:
            v, w = rng.sample(VESSELS, 2)
            place, device, door = (rng.choice(list(some)) for some in (PLACES, self.on, self.open))
            options = [
                f"put the {v} {PLACES[place]} the {place}", f"take the {v}",
                f"turn on the {device}", f"turn off the {device}", f"open the {door}",
                f"close the {door}", f"fill the {v}", f"pour the {v} into the {w}",
                f"empty the {v}", f"stir the {v}",
                f"add the {rng.choice(self.shelf or STOCK)} to the {v}", "wait"]
            if not careless:                        # useful actions are likelier
                if self.holds[v]:
                    options += [f"pour the {v} into the {w}", f"put the {v} on the stove"] * 2
                    options += [f"stir the {v}"] * 24
                else:
                    options += [f"put the {v} in the sink", f"fill the {v}"] * 2
                if self.where[v] == "stove" or self.heat[v] != 20:
                    options += ["turn on the stove", "wait"]
            z, trial = rng.choice(options), copy.deepcopy(self)
            trial.step(z)
            if careless or trial.text() != self.text():
                return z

    def others_act(self, rng):
        """The housemate does something; only we wait."""
        z = "wait"
        while z == "wait":
            z = self.propose(rng)
        self.step(z)


def episode(rng, steps=STEPS, busy=0.0):
    """[(x, z, y)], y of one step is x of the next; busy: the chance that somebody else acts, too,
    between x and y."""
    world, out = World(rng), []
    for _ in range(steps):
        x, z = world.text(), world.propose(rng)
        world.step(z)
        if busy and rng.random() < busy:
            world.others_act(rng)
        out.append((x, z, world.text()))
    return out
