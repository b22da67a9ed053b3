"""A small web shop as text, in the spirit of Mind2Web: which page does a click, a word or a choice
lead to?

An example: x, the action z, and the lines of y that are new.

    view: list                                z = [button] add red-lamp -> CLICK
    search: none
    colour: red
    sort: a to z
    page: 1 of 1
    1 red-bag
    2 red-lamp
    3 red-mug
    cart: red-bag, blue-bag                   cart: red-bag, blue-bag, red-lamp
    name: cleo hill
    street: 12 oak road
    time: friday 12 to 14
    delivery: post
    code: autumn
    note: ready

Rules
 1. The rows are the items of the catalogue (PRICES) that match the printed search and colour, in
    the printed sort (equal prices: a to z), three a page. Prices are not printed: they are the same
    in all episodes. Next and previous turn pages as far as there are any.
 2. A new search, colour or sort leads to page 1. Choosing the current one changes nothing.
 3. Add puts an item that is on the page into the cart. The cart holds 4 things; one more is an
    error dialog.
 4. An amount, 1 or 2, can be typed for an item in the cart, with the same limit. Remove takes out a
    single thing at once. If there are two or more of it, remove asks first. Typing and removing
    work in both views.
 5. Search, filter, order, pages, add, checkout work in view list; name, street, time, delivery,
    coupon, apply, pay, back in view checkout. Checkout wants something in the cart, else an error
    dialog.
 6. Apply counts the typed coupon: spring takes 10 off from 50 of goods on, winter 20 from 90 on,
    autumn is over. Goods that fall below the limit, or a new code, switch it off again.
 7. Pay wants something in the cart, a name, a street, a time, a delivery, and the courier for a
    chair. The first one missing is an error dialog; otherwise a dialog asks whether to send.
    Sending empties cart, time, delivery and code.
 8. A dialog replaces the note and blocks everything else. Yes agrees to a question; close ends any
    dialog.
 9. An action that is not on offer (other view, item not on the page or not in the cart) changes
    nothing.

Departures from the benchmark
 1. Mind2Web has real pages, HTML of thousands of elements; this is one shop of 15 lines without
    markup.
 2. Mind2Web asks for the action that serves a goal. Here the action is given, or Q reads it from
    the change.
 3. Actions keep its form, `[role] name -> CLICK / TYPE: word / SELECT: word`, but a visitor with
    simple habits draws them (`propose`), not a person with a task.
 4. The page answers at once and in full: nothing loads, no hidden server state, nothing random.

Busy logs (`--busy`): in training episodes the same account is open on a second device. After our
action somebody changes the cart, the form or the code there (OTHERS). z does not name that change.
Only our actions change view, search, colour, sort, page and message.

To add an action: a line in ACTIONS (each string with its argument), a weight in HABITS, an `elif
kind == ...` in `step`. Whatever the rule needs must be printed by `text`, or be the same in every
episode.
"""
import copy

PRICES = {
    "red-lamp": 30, "blue-lamp": 40, "white-lamp": 20, "green-lamp": 50,
    "red-mug": 10, "blue-mug": 10, "white-mug": 20,
    "red-bag": 40, "blue-bag": 20, "green-bag": 30,
    "white-chair": 50, "green-chair": 40,
}
THINGS = ("lamp", "mug", "bag", "chair")
COLOURS = ("red", "blue", "white", "green")
# choice: as printed
SORTS = {"name": "a to z", "price up": "cheap first", "price down": "dear first"}
NAMES = tuple(
    f"{first} {last}"
    for first in ("ana", "ben", "cleo", "dan")
    for last in ("gray", "hill", "moss", "stone")
)
STREETS = tuple(f"{number} {street}" for number in (3, 12, 27, 40)
                for street in ("oak road", "mill lane", "park row", "bay street"))
TIMES = tuple(
    f"{day} {hours}"
    for day in ("monday", "friday", "sunday")
    for hours in ("8 to 10", "12 to 14", "18 to 20")
)
FORM = ("name", "street", "time", "delivery")         # what paying asks for, in this order
DELIVERY = ("pickup", "post", "courier")
# (goods from, off); None: over
COUPONS = {"spring": (50, 10), "winter": (90, 20), "autumn": None}
ROWS, FULL, STEPS = 3, 4, 14      # rows a page, things a cart holds, steps an episode

# kind: {action string: its argument}
ACTIONS = {
    "search": {f"[searchbox] search -> TYPE: {thing}": thing for thing in THINGS},
    "clear": {"[button] clear search -> CLICK": "none"},
    "colour": {f"[combobox] filter -> SELECT: {colour}": colour for colour in ("any", *COLOURS)},
    "sort": {f"[combobox] order by -> SELECT: {option}": shown for option, shown in SORTS.items()},
    "next": {"[link] next -> CLICK": +1},
    "previous": {"[link] previous -> CLICK": -1},
    "add": {f"[button] add {item} -> CLICK": item for item in PRICES},
    "amount": {f"[spinbutton] {item} -> TYPE: {n}": (item, n) for item in PRICES for n in (1, 2)},
    "remove": {f"[button] remove {item} -> CLICK": item for item in PRICES},
    "checkout": {"[button] checkout -> CLICK": None},
    "back": {"[link] back -> CLICK": None},
    "name": {f"[textbox] name -> TYPE: {name}": name for name in NAMES},
    "street": {f"[textbox] street -> TYPE: {street}": street for street in STREETS},
    "time": {f"[combobox] time -> SELECT: {time}": time for time in TIMES},
    "delivery": {f"[combobox] delivery -> SELECT: {way}": way for way in DELIVERY},
    "coupon": {f"[textbox] coupon -> TYPE: {code}": code for code in COUPONS},
    "apply": {"[button] apply -> CLICK": None},
    "pay": {"[button] pay -> CLICK": None},
    "yes": {"[button] yes -> CLICK": None},
    "close": {"[button] close -> CLICK": None},
}
KINDS = tuple(ACTIONS)
OTHERS = ("amount", "remove", "name", "street", "time", "delivery", "coupon")

# How much a visitor likes each kind.
HABITS = {
    "search": 2, "clear": 4, "colour": 2, "sort": 2, "next": 9, "previous": 14, "add": 5,
    "amount": 3, "remove": 3, "checkout": 9, "back": 9, "name": 10, "street": 10, "time": 10,
    "delivery": 8, "coupon": 8, "apply": 6, "pay": 4, "yes": 7, "close": 2}
EPISODES = 240    # to train on, unless --episodes says else
STATE_ONLY = 1
PRESET = {}         # settings of this world, where they differ from settings.py's
CARELESS = 0.16   # share of actions drawn without a look at the page: most of these change nothing
BOLD = 0.3        # share of errors that even a visitor who looks at the page makes


def read(z):
    """Kind and argument of an action string."""
    for kind, strings in ACTIONS.items():
        if z in strings:
            return kind, strings[z]
    raise ValueError(f"not an action of the web shop: {z!r}")


class World:
    def __init__(self, rng):
        self.search = rng.choice(("none", "none", "none", *THINGS))
        self.colour = rng.choice(("any", "any", "any", "any", *COLOURS))
        self.sort = rng.choice(list(SORTS.values()))
        self.page = rng.randint(1, self.pages())
        # item: amount, in the order in which they came
        self.cart = {}
        for item in rng.sample(list(PRICES), rng.choice((1, 2, 2, 3))):
            self.cart[item] = 1 if self.cart else rng.choice((1, 1, 2))
        self.name, self.street, self.time = (
            rng.choice(("none", rng.choice(some), rng.choice(some)))
            for some in (NAMES, STREETS, TIMES)
        )
        self.delivery = rng.choice(("none", *DELIVERY))
        self.code = rng.choice(("none", "none", *COUPONS))
        self.applied = False
        self.view = rng.choice(("list", "checkout")) if self.cart else "list"
        self.message = "note: ready"                          # or "dialog: ..."

    def text(self):
        rows = [item or "nothing" for item in self.rows()]
        off = f", {COUPONS[self.code][1]} off" if self.applied else ""
        return "\n".join(
            [
                f"view: {self.view}",
                f"search: {self.search}",
                f"colour: {self.colour}",
                f"sort: {self.sort}",
                f"page: {self.page} of {self.pages()}",
                *(f"{number} {row}" for number, row in enumerate(rows, 1)),
                "cart: "
                + (
                    ", ".join(item + (f" x{n}" if n > 1 else "") for item, n in self.cart.items())
                    or "empty"
                ),
                f"name: {self.name}",
                f"street: {self.street}",
                f"time: {self.time}",
                f"delivery: {self.delivery}",
                f"code: {self.code}{off}",
                self.message,
            ]
        )

    def found(self):
        """All items that match search and colour, sorted."""
        items = [
            item
            for item in PRICES
            if self.search in ("none", item.split("-")[1])
            and self.colour in ("any", item.split("-")[0])
        ]
        sign = {"a to z": 0, "cheap first": 1, "dear first": -1}[self.sort]
        return sorted(items, key=lambda item: (sign * PRICES[item], item))

    def pages(self):
        # rounded up; one empty page if nothing is found
        return max(1, -(-len(self.found()) // ROWS))

    def rows(self):
        """The items on this page, None for an empty row."""
        start = (self.page - 1) * ROWS
        return (self.found() + [None] * ROWS)[start:start + ROWS]

    def goods(self):
        return sum(n * PRICES[item] for item, n in self.cart.items())

    def step(self, z):
        kind, what = read(z)
        if self.message.startswith("dialog"):                 # rule 8: a dialog blocks the rest
            if kind == "yes":
                self.agree()
            elif kind == "close":
                self.message = "note: closed"
        elif kind == "amount":
            self.set_amount(*what)
        elif kind == "remove":
            self.remove(what)
        elif self.view == "list":
            if kind in ("search", "clear") and what != self.search:
                self.search, self.page = what, 1
            elif kind == "colour" and what != self.colour:
                self.colour, self.page = what, 1
            elif kind == "sort" and what != self.sort:
                self.sort, self.page = what, 1
            elif kind in ("next", "previous"):
                self.page = min(max(self.page + what, 1), self.pages())
            elif kind == "add":
                self.add(what)
            elif kind == "checkout" and self.cart:
                self.view = "checkout"
            elif kind == "checkout":
                self.message = "dialog: nothing to check out"
        elif kind == "back":
            self.view = "list"
        elif kind in FORM:
            setattr(self, kind, what)
        elif kind == "coupon" and what != self.code:
            self.code, self.applied = what, False
        elif kind == "apply" and self.code != "none" and not self.applied:
            self.apply()
        elif kind == "pay":
            self.pay()

    def add(self, item):
        if item in self.rows() and sum(self.cart.values()) == FULL:
            self.message = "dialog: cart is full"
        elif item in self.rows():
            self.put(item, self.cart.get(item, 0) + 1)

    def set_amount(self, item, n):
        old = self.cart.get(item, n)                    # not in the cart: as if nothing changed
        if sum(self.cart.values()) - old + n > FULL:
            self.message = "dialog: cart is full"
        elif n != old:
            self.put(item, n)

    def remove(self, item):
        if self.cart.get(item, 0) > 1:
            self.message = f"dialog: drop {item}?"
        elif item in self.cart:
            self.put(item, 0)

    def put(self, item, n):
        self.cart[item] = n
        if n == 0:
            del self.cart[item]
        if self.applied and self.goods() < COUPONS[self.code][0]:
            # rule 6: too little left for the coupon
            self.applied = False

    def apply(self):
        if COUPONS[self.code] is None:
            self.message = f"dialog: {self.code} is over"
        elif self.goods() < COUPONS[self.code][0]:
            self.message = f"dialog: {self.code} starts at {COUPONS[self.code][0]}"
        else:
            self.applied = True

    def pay(self):
        missing = [field for field in FORM if getattr(self, field) == "none"]
        if not self.cart:
            self.message = "dialog: nothing to pay for"
        elif missing:
            self.message = f"dialog: {missing[0]} is missing"
        elif self.delivery != "courier" and any("chair" in item for item in self.cart):
            self.message = "dialog: chair needs courier"
        else:
            self.message = f"dialog: send by {self.delivery}?"

    def agree(self):
        """Yes to one of the two questions; an error dialog wants close."""
        if self.message.startswith("dialog: drop "):
            item = self.message.removeprefix("dialog: drop ").removesuffix("?")
            self.put(item, 0)
            self.message = f"note: {item} is out"
        elif self.message.startswith("dialog: send "):
            self.message = f"note: sent to {self.name}"
            self.cart, self.time, self.delivery, self.code, self.applied = (
                {}, "none", "none", "none", False)

    def after(self, z):
        """The world that z would lead to."""
        twin = copy.copy(self)
        twin.cart = dict(self.cart)
        twin.step(z)
        return twin

    def propose(self, rng):
        if rng.random() < CARELESS:
            return rng.choice(list(ACTIONS[rng.choice(KINDS)]))
        # ends: search, back or close always does something
        while True:
            kind = rng.choices(list(HABITS), list(HABITS.values()))[0]
            for z in rng.sample(list(ACTIONS[kind]), len(ACTIONS[kind])):
                twin = self.after(z)
                error = twin.message.startswith("dialog") and not twin.message.endswith("?")
                if vars(twin) != vars(self) and (not error or rng.random() < BOLD):
                    return z

    def others_act(self, rng):
        """Somebody changes the cart, the form or the code on the other device."""
        ours = self.view, self.message
        before = self.text()
        while self.text() == before:
            self.view, self.message = "checkout", "note: ready"
            self.step(rng.choice(list(ACTIONS[rng.choice(OTHERS)])))
            self.view, self.message = ours


def episode(rng, steps=STEPS, busy=0.0):
    """[(x, z, y)], y of one step is x of the next; busy: the chance that somebody else acts, too,
    between x and y."""
    world = World(rng)
    transitions, seen = [], set()
    for _ in range(steps):
        x, z = world.text(), world.propose(rng)
        # rather something new than back and forth
        if world.after(z).text() in seen:
            z = world.propose(rng)
        seen.add(x)
        world.step(z)
        if busy and rng.random() < busy:
            world.others_act(rng)
        transitions.append((x, z, world.text()))
    return transitions
