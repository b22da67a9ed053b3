"""A session with several services' APIs, in the spirit of StableToolBench: what does a call change?

A family of three shares one travel site, one bank and one calendar. A state is the whole session in fourteen
lines, an action is one call, and the next state is the session after it. A drawn transition:

    x   user: leo                               z   book(rome-hotel)
        cash: 20
        savings: 10                             y   the same but for these three lines
        euros: 50                                   euros: 30
        rome-flight: 3                              rome-hotel: 1
        rome-hotel: 2                               bookings: oslo-hotel mia, rome-hotel leo
        oslo-flight: 1
        oslo-hotel: 0
        lima-flight: 0
        lima-hotel: 1
        results: rome-flight, rome-hotel
        bookings: oslo-hotel mia
        reminders: tuesday call, friday pay
        reply: ok

Only the catalogue (PRICE) knows that a hotel in Rome costs 20. With fewer euros only the reply would change, to an
error.

Rules
 1. Each offer has a line with its seats left. Flights are paid in cash, hotels in euros.
 2. sign_in(mia) works when nobody is in. sign_out() also clears the results.
 3. search(rome) lists all that the catalogue has there, full or not. filter_results(hotels) keeps the hotels,
    filter_results(free) what has seats left; if nothing would stay, it is an error and the list stays.
    sort_results(price) puts the cheapest first, sort_results(seats) the emptiest (most left); ties stay.
    A list that was so already is answered like a new one.
 4. check_price(oslo-hotel) only answers.
 5. book(oslo-hotel) takes a seat and the price. Errors, the first that holds: nobody is in, somebody has booked
    it, three bookings already, no seats left, not enough money.
 6. cancel(oslo-hotel) is for the user who holds it, else an error. It gives back the seat, and the price less a
    fee of 10 (what an account cannot hold above 60 is lost).
 7. transfer(cash, savings, 20) moves money; exchange(cash, 20) makes 10 euros, exchange(euros, 20) 40 cash.
    Both need a user; deposit(cash, 20) needs none. An account below 0 or above 60 would be an error.
 8. set_reminder(monday, call), move_reminder(monday, friday), clear_reminder(monday): one reminder a day,
    one more is an error.
 9. A call that finds nothing to do (signing out twice, clearing a free day, sorting one result) changes no
    line, the reply included. Nor does a read or an error whose reply is already there.
10. Booking, moving money, sorting and filtering are answered by a bare ok when they succeed: which call it was
    must be read from its effect.

To add an action: a row in CALLS (its name and the slots of its arguments), a method of World of that name
which changes the fields and returns the new reply (None: keep the old one), and a rule above.

Departures from the benchmark
 1. StableToolBench has thousands of APIs and a language model as their server; here are 14 with exact rules.
 2. Its state is hidden behind the APIs; here it is printed, so that the next state follows from the text.
 3. Its replies are JSON and carry the news; here a success is told by the other lines.
 4. Its callers follow a user's request; propose() follows what the state offers, and sometimes slips.
 5. Prices are sorted by their number, whatever the currency.
"""

STEPS = 14
REPEAT = 0.06       # share of calls that repeat the call before: an impatient caller
SLIP = 0.1          # share of calls made without a look at the state
LIMIT = 60          # no account holds more
MOST = 3            # bookings at a time

PRICE = {"rome-flight": 30, "rome-hotel": 20, "oslo-flight": 20, "oslo-hotel": 30, "lima-flight": 10, "lima-hotel": 10}
CITY = {city: (f"{city}-flight", f"{city}-hotel") for city in ("rome", "oslo", "lima")}

# The slots of arguments, and the words that may stand there.
VALUES = {
    "user": ("mia", "leo", "ana"), "city": tuple(CITY), "keep": ("flights", "hotels", "free"), "order": ("price", "seats"),
    "offer": tuple(PRICE), "booked": tuple(PRICE), "purse": ("cash", "savings"), "amount": ("10", "20"),
    "coin": ("cash", "euros"), "sum": ("20",),                          # a sum that halves to a round number
    "day": ("monday", "tuesday", "friday"), "busy": ("monday", "tuesday", "friday"),
    "task": ("call", "pay", "pack"),
}
CALLS = {
    "sign_in": ("user",), "sign_out": (),
    "search": ("city",), "filter_results": ("keep",), "sort_results": ("order",),
    "check_price": ("offer",), "book": ("offer",), "cancel": ("booked",),
    "transfer": ("purse", "purse", "amount"), "exchange": ("coin", "sum"), "deposit": ("purse", "amount"),
    "set_reminder": ("day", "task"), "move_reminder": ("busy", "day"), "clear_reminder": ("busy",),
}
KINDS = tuple(CALLS)


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
        self.bookings = {offer: rng.choice(users) for offer in rng.sample(list(PRICE), rng.randint(0, 2))}
        self.reminders = {day: rng.choice(tasks) for day in rng.sample(days, rng.randint(0, 2))}
        self.reply = "ok"

    def text(self):
        def line(name, facts):
            return f"{name}: {', '.join(facts) or 'none'}"
        lines = [f"user: {self.user}"]
        lines += [f"{account}: {amount}" for account, amount in self.money.items()]
        lines += [f"{offer}: {self.left[offer]}" for offer in PRICE]
        notes = [f"{day} {self.reminders[day]}" for day in VALUES["day"] if day in self.reminders]
        lines += [line("results", self.results),
                  line("bookings", [f"{offer} {user}" for offer, user in self.bookings.items()]),
                  line("reminders", notes), f"reply: {self.reply}"]
        return "\n".join(lines)

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
            return f"error, {self.user} is in, {user} must wait"
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
        kept = [o for o in self.results if (self.left[o] > 0 if keep == "free" else o.endswith(keep[:-1]))]
        if not kept:
            return f"error, no {keep} among them"
        self.results = kept
        return "ok"

    def sort_results(self, order):
        if len(self.results) < 2:
            return None
        self.results.sort(key=lambda offer: PRICE[offer] if order == "price" else -self.left[offer])
        return "ok"

    def check_price(self, offer):
        return f"{offer} for {PRICE[offer]} {currency(offer)}"

    def book(self, offer):
        purse, price = currency(offer), PRICE[offer]
        if self.user == "none":
            return f"error, sign in first to take {offer}"
        if offer in self.bookings:
            return f"error, {self.bookings[offer]} has {offer}"
        if len(self.bookings) == MOST:
            return f"error, {offer} is one too many"
        if self.left[offer] == 0:
            return f"error, no seats left in {offer}"
        if self.money[purse] < price:
            return f"error, not enough {purse}, {offer} needs {price}"
        self.money[purse] -= price
        self.left[offer] -= 1
        self.bookings[offer] = self.user
        return "ok"

    def cancel(self, offer):
        purse, holder = currency(offer), self.bookings.get(offer, "nobody")
        if self.user == "none":
            return f"error, sign in first to drop {offer}"
        if holder != self.user:
            return f"error, cannot drop {offer}, {holder} has it"
        del self.bookings[offer]
        self.left[offer] += 1
        self.money[purse] = min(LIMIT, self.money[purse] + PRICE[offer] - 10)
        return "ok"

    def move(self, source, target, amount, gain):
        """Take the amount from one account and add the gain to another; or say why not."""
        if self.user == "none":
            return "sign in first"
        if self.money[source] < amount:
            return f"{source} too low"
        if self.money[target] + gain > LIMIT:
            return f"{target} too full"
        self.money[source] -= amount
        self.money[target] += gain
        return None

    def transfer(self, source, target, amount):
        if source == target:
            return None
        why = self.move(source, target, int(amount), int(amount))
        return f"error, {why}, {amount} stays in {source}" if why else "ok"

    def exchange(self, source, amount):
        target, gain = ("euros", int(amount) // 2) if source == "cash" else ("cash", int(amount) * 2)
        why = self.move(source, target, int(amount), gain)
        return f"error, {why}, no {gain} {target} for you" if why else "ok"

    def deposit(self, account, amount):
        if self.money[account] + int(amount) > LIMIT:
            return f"error, {account} cannot grow by {amount}"
        self.money[account] += int(amount)
        return "ok"

    def set_reminder(self, day, task):
        there = self.reminders.get(day)
        if there:
            return None if there == task else f"error, {day} is for {there}, not {task}"
        self.reminders[day] = task
        return "ok"

    def move_reminder(self, old, new):
        if old not in self.reminders or old == new:
            return None
        if new in self.reminders:
            return f"error, {new} is taken, {old} stays"
        self.reminders[new] = self.reminders.pop(old)
        return "ok"

    def clear_reminder(self, day):
        return "ok" if self.reminders.pop(day, None) else None

    def propose(self, rng):
        """A call; its arguments mostly come from what is listed, held or noted in the state."""
        slip = rng.random() < SLIP
        mine = [offer for offer, user in self.bookings.items() if user == self.user]
        likely = {} if slip else {"offer": self.results, "booked": mine, "busy": list(self.reminders)}
        kind = rng.choice(KINDS)
        if self.user == "none" and not slip:
            kind = rng.choice((kind, "sign_in", "sign_in"))
        elif not slip and (kind == "sign_in" or kind == "cancel" and not mine):
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
