"""A session with several services' APIs, in the spirit of StableToolBench: what does a call change?

A family of three shares one travel site, one bank and one calendar. A state is the whole session in eighteen
lines, an action is one call, and the next state is the session after it. A drawn transition:

    x   user: leo                               z   book(rome-hotel)
        cash: 20
        savings: 10                             y   the same but for these two lines
        euros: 50                                   euros: 30
        rome-flight: 3                              rome-hotel: 1, booked
        rome-hotel: 2
        oslo-flight: 1
        oslo-hotel: 0, booked
        lima-flight: 0
        lima-hotel: 1
        bonn-flight: 2
        bonn-hotel: 3
        results: rome-flight, rome-hotel
        monday: free
        tuesday: call
        friday: pay
        sunday: free
        reply: ok

Only the catalogue (PRICE) knows that a hotel in Rome costs 20. With fewer euros only the reply would change, to an
error.

Rules
 1. Each offer has a line with its seats left, and "booked" if somebody of the family has it. Flights are paid in
    cash, hotels in euros.
 2. sign_in(mia) works when nobody is in. sign_out() also clears the results.
 3. search(rome) lists all that the catalogue has there, full or not. filter_results(hotels) keeps the hotels; if
    nothing would stay, it is an error and the list stays. sort_results() puts the cheapest first.
 4. check_price(oslo-hotel) only answers.
 5. book(oslo-hotel) takes a seat and the price. Errors, the first that holds: nobody is in, it is booked, no seats
    left, not enough money.
 6. cancel(oslo-hotel) gives back the seat, and the price less a fee of 10 (what an account cannot hold above 60 is
    lost). Errors: nobody is in, it is not booked.
 7. transfer(cash, savings) moves 10; exchange(cash) turns 20 cash into 10 euros, exchange(euros) 10 euros into 20
    cash. Both need a user; deposit(cash) adds 20 and needs none. An account below 0 or above 60 would be an error.
 8. set_reminder(monday, call), move_reminder(monday, friday), clear_reminder(monday): one reminder a day,
    one more is an error.
 9. A call that finds nothing to do (signing out twice, clearing a free day, sorting a sorted list, filtering hotels
    for hotels) changes no line, the reply included. Nor does a read or an error whose reply is already there.
10. Bookings, cancellations, money, sorting, filtering and reminders are answered by a bare ok when they succeed:
    which call it was must be read from its effect. An error gives its reason and does not name the call.

To add an action: a row in CALLS (its name and the slots of its arguments) and in HABITS, a method of World of that name
which changes the fields and returns the new reply (None: keep the old one), and a rule above.

Departures from the benchmark
 1. StableToolBench has thousands of APIs and a language model as their server; here are 14 with exact rules.
 2. Its state is hidden behind the APIs; here it is printed, so that the next state follows from the text.
 3. Its replies are JSON and carry the news; here a success is told by the other lines.
 4. Its callers follow a user's request; propose() follows what the state offers, thinks better of
    most errors, and sometimes slips.
 5. Prices are sorted by their number, whatever the currency.
"""
import copy

STEPS = 14
EPISODES = 100      # to train on, unless --episodes says else
REPEAT = 0.06       # share of calls that repeat the call before: an impatient caller
SLIP = 0.1          # share of calls made without a look at the state
BOLD = 0.05         # share of calls known to end in an error that are made all the same
LIMIT = 60          # no account holds more

PRICE = {"rome-flight": 30, "rome-hotel": 20, "oslo-flight": 20, "oslo-hotel": 30, "lima-flight": 20, "lima-hotel": 10,
         "bonn-flight": 10, "bonn-hotel": 20}
CITY = {city: (f"{city}-flight", f"{city}-hotel") for city in ("rome", "oslo", "lima", "bonn")}

# The slots of arguments, and the words that may stand there.
VALUES = {
    "user": ("mia", "leo", "ana"), "city": tuple(CITY), "keep": ("flights", "hotels"),
    "offer": tuple(PRICE), "booked": tuple(PRICE), "purse": ("cash", "savings"), "coin": ("cash", "euros"),
    "day": ("monday", "tuesday", "friday", "sunday"), "busy": ("monday", "tuesday", "friday", "sunday"),
    "task": ("call", "pay", "pack", "cook"),
}
CALLS = {
    "sign_in": ("user",), "sign_out": (),
    "search": ("city",), "filter_results": ("keep",), "sort_results": (),
    "check_price": ("offer",), "book": ("offer",), "cancel": ("booked",),
    "transfer": ("purse", "purse"), "exchange": ("coin",), "deposit": ("purse",),
    "set_reminder": ("day", "task"), "move_reminder": ("busy", "day"), "clear_reminder": ("busy",),
}
KINDS = tuple(CALLS)

# How often the family makes each kind of call.
HABITS = {"sign_in": 1, "sign_out": 1, "search": 1, "filter_results": 2, "sort_results": 2, "check_price": 1, "book": 7,
          "cancel": 7, "transfer": 3, "exchange": 3, "deposit": 2, "set_reminder": 4, "move_reminder": 7,
          "clear_reminder": 2}


def currency(offer):
    return "cash" if offer.endswith("flight") else "euros"


class World:
    """One session. text() prints every field: the rules use nothing else but the constants above."""

    def __init__(self, rng):
        users, days, tasks = VALUES["user"], VALUES["day"], VALUES["task"]
        self.user = rng.choice(users + ("none",))
        self.money = {account: rng.randrange(30, LIMIT + 1, 10) for account in ("cash", "savings", "euros")}
        self.left = {offer: rng.choice((0, 1, 2, 2, 3, 3)) for offer in PRICE}                     # seats or rooms
        self.results = list(CITY[rng.choice(VALUES["city"])]) if rng.random() < 0.7 else []
        self.booked = set(rng.sample(list(PRICE), rng.randint(0, 3)))
        self.reminders = {day: rng.choice(tasks) for day in rng.sample(days, rng.randint(0, 3))}
        self.reply = "ok"

    def text(self):
        lines = [f"user: {self.user}"]
        lines += [f"{account}: {amount}" for account, amount in self.money.items()]
        lines += [f"{offer}: {self.left[offer]}" + (", booked" if offer in self.booked else "") for offer in PRICE]
        lines.append(f"results: {', '.join(self.results) or 'none'}")
        lines += [f"{day}: {self.reminders.get(day, 'free')}" for day in VALUES["day"]]
        return "\n".join([*lines, f"reply: {self.reply}"])

    def step(self, z):
        kind, _, rest = z.partition("(")
        args = [arg for arg in rest.rstrip(")").split(", ") if arg]
        slots = CALLS.get(kind, ())
        if kind not in CALLS or len(args) != len(slots) or z != f"{kind}({', '.join(args)})":
            raise ValueError(f"no such call: {z!r}")
        if any(arg not in VALUES[slot] for arg, slot in zip(args, slots)):
            raise ValueError(f"no such argument: {z!r}")
        self.reply = getattr(self, kind)(*args) or self.reply

    def sign_in(self, user):
        if self.user == user:
            return None
        if self.user != "none":
            return f"error, {self.user} is in"
        self.user = user
        return "welcome"

    def sign_out(self):
        if self.user == "none":
            return None
        self.user, self.results = "none", []
        return "goodbye"

    def search(self, city):
        self.results = list(CITY[city])
        return f"ok, offers of {city}"

    def filter_results(self, keep):
        kept = [offer for offer in self.results if offer.endswith(keep[:-1])]
        if not kept:
            return "error, nothing would stay"
        if kept == self.results:
            return None
        self.results = kept
        return "ok"

    def sort_results(self):
        cheapest_first = sorted(self.results, key=PRICE.get)
        if cheapest_first == self.results:
            return None
        self.results = cheapest_first
        return "ok"

    def check_price(self, offer):
        return f"{offer} for {PRICE[offer]} {currency(offer)}"

    def book(self, offer):
        purse, price = currency(offer), PRICE[offer]
        if self.user == "none":
            return "error, sign in first"
        if offer in self.booked:
            return "error, booked already"
        if self.left[offer] == 0:
            return "error, no seats left"
        if self.money[purse] < price:
            return f"error, not enough {purse}"
        self.money[purse] -= price
        self.left[offer] -= 1
        self.booked.add(offer)
        return "ok"

    def cancel(self, offer):
        purse = currency(offer)
        if self.user == "none":
            return "error, sign in first"
        if offer not in self.booked:
            return "error, not booked"
        self.booked.remove(offer)
        self.left[offer] += 1
        self.money[purse] = min(LIMIT, self.money[purse] + PRICE[offer] - 10)
        return "ok"

    def move(self, source, target, amount, gain):
        """Take the amount from one account and add the gain to another; or say why not."""
        if self.user == "none":
            return "error, sign in first"
        if self.money[source] < amount:
            return f"error, {source} too low"
        if self.money[target] + gain > LIMIT:
            return f"error, {target} too full"
        self.money[source] -= amount
        self.money[target] += gain
        return "ok"

    def transfer(self, source, target):
        return None if source == target else self.move(source, target, 10, 10)

    def exchange(self, source):
        target, amount, gain = ("euros", 20, 10) if source == "cash" else ("cash", 10, 20)
        return self.move(source, target, amount, gain)

    def deposit(self, account):
        if self.money[account] + 20 > LIMIT:
            return f"error, {account} too full"
        self.money[account] += 20
        return "ok"

    def set_reminder(self, day, task):
        there = self.reminders.get(day)
        if there:
            return None if there == task else f"error, {day} is taken"
        self.reminders[day] = task
        return "ok"

    def move_reminder(self, old, new):
        if old not in self.reminders or old == new:
            return None
        if new in self.reminders:
            return f"error, {new} is taken"
        self.reminders[new] = self.reminders.pop(old)
        return "ok"

    def clear_reminder(self, day):
        return "ok" if self.reminders.pop(day, None) else None

    def propose(self, rng):
        """A call that mostly does something: of those that would end in an error, most are thought better of."""
        while True:
            call, after = self.idea(rng), copy.deepcopy(self)
            after.step(call)
            if rng.random() < BOLD or not after.reply.startswith("error") or after.text() == self.text():
                return call

    def idea(self, rng):
        """A call; its arguments mostly come from what is listed, held or noted in the state."""
        slip = rng.random() < SLIP
        likely = {} if slip else {"offer": self.results, "booked": sorted(self.booked), "busy": list(self.reminders)}
        kind, = rng.choices(KINDS, [HABITS[kind] for kind in KINDS])
        if self.user == "none" and not slip:
            kind = rng.choice((kind, "sign_in", "sign_in"))
        elif not slip and (kind == "sign_in" or kind == "cancel" and not self.booked):      # nothing to sign in or drop
            kind = "book"
        elif not slip and kind in ("filter_results", "sort_results") and len(self.results) < 2:
            kind = "search"
        while True:
            args = [rng.choice(likely.get(slot) or VALUES[slot]) for slot in CALLS[kind]]
            if len(set(args)) == len(args):     # not from an account to itself
                return f"{kind}({', '.join(args)})"


def episode(rng, steps=STEPS):
    world = World(rng)
    transitions = []
    for _ in range(steps):
        x = world.text()
        z = transitions[-1][1] if transitions and rng.random() < REPEAT else world.propose(rng)
        world.step(z)
        transitions.append((x, z, world.text()))
    return transitions
