"""A session with several services' APIs, in the spirit of StableToolBench: what does a call change?

A family of three shares one travel site, one bank and one calendar. A state is the whole session in
fourteen lines, an action is one call, and the next state is the session after it. A drawn
transition:

    x   user: leo                               z   book(rome-hotel)
        cash: 20
        savings: 10                             y   the same but for this line
        rome-flight: 3
        rome-hotel: 2                               rome-hotel: 1, booked
        oslo-flight: 1
        oslo-hotel: 0, booked
        lima-flight: 0
        lima-hotel: 1
        results: rome-flight, rome-hotel
        monday: free
        tuesday: 9am call tom
        friday: 3pm pay eva
        reply: ok

Rules
 1. Each offer has a line with the number left, and whether the family has booked one.
 2. sign_in(mia) works when nobody is in. sign_out() also clears the results.
 3. search(rome) lists all that the catalogue has there, full or not. filter_results(hotels) keeps
    the hotels; if nothing would stay, it is an error and the list stays. sort_results() puts the
    cheapest first.
 4. check_price(oslo-hotel) only answers. Prices stand in the catalogue (PRICE) alone, the same in
    all episodes.
 5. book(oslo-hotel) takes one of what is left. Errors, the first that holds: nobody is in, it is
    booked, none left.
 6. cancel(oslo-hotel) gives it back. Errors: nobody is in, it is not booked.
 7. transfer(cash, savings) moves 10 and needs a user; deposit(cash) adds 20 and needs none. An
    account below 0 or above 60 would be an error.
 8. set_reminder(monday, call, tom, 9am): one reminder a day, one more is an error.
    reschedule(monday, 3pm) changes its hour, move_reminder(monday, friday) its day,
    clear_reminder(monday) ends it.
 9. A call that finds nothing to do (signing out twice, clearing a free day, sorting a sorted list,
    filtering hotels for hotels) changes no line, the reply included. Nor does a read or an error
    whose reply is already there.
10. Bookings, cancellations, money, sorting, filtering and reminders are answered by a bare ok when
    they succeed: which call it was must be read from its effect. An error gives its reason and does
    not name the call.

Busy logs (`--busy`): in training episodes the rest of the family acts as well, each on an own
device. After our call one of them books, cancels, moves money or changes a reminder (OTHERS). z
does not name that call. Who is signed in here, the results and the reply are ours: the others do
not touch them.

To add an action: a row in CALLS (its name and the slots of its arguments) and in HABITS, a method
of World of that name which changes the fields and returns the new reply (None: keep the old one),
and a rule above.

Departures from the benchmark
 1. StableToolBench has thousands of APIs and a language model as their server; here are 14 with
    exact rules.
 2. Its state is hidden behind the APIs; here it is printed, so that the next state follows from the
    text.
 3. Its replies are JSON and carry the news; here a success is told by the other lines.
 4. Its callers follow a user's request; propose() follows what the state offers, thinks better of
    most errors, and sometimes slips.
 5. Payment is left out: what a call does is simple, and the work is to leave the other lines as
    they are.
"""
import copy

STEPS = 14
EPISODES = 240       # to train on, unless --episodes says else
STATE_ONLY = 1
PRESET = {}         # settings of this world, where they differ from settings.py's
REPEAT = 0.06       # share of calls that repeat the call before: an impatient caller
SLIP = 0.1          # share of calls made without a look at the state
BOLD = 0.05         # share of calls known to end in an error that are made all the same
LIMIT = 60          # no account holds more

PRICE = {
    "rome-flight": 30, "rome-hotel": 20, "oslo-flight": 20, "oslo-hotel": 30, "lima-flight": 20,
    "lima-hotel": 10}
CITY = {city: (f"{city}-flight", f"{city}-hotel") for city in ("rome", "oslo", "lima")}

# The slots of arguments, and the words that may stand there.
VALUES = {
    "user": ("mia", "leo", "ana"), "city": tuple(CITY), "keep": ("flights", "hotels"),
    "offer": tuple(PRICE), "booked": tuple(PRICE), "purse": ("cash", "savings"),
    "day": ("monday", "tuesday", "friday"), "busy": ("monday", "tuesday", "friday"),
    "task": ("call", "pay", "meet", "visit"), "person": ("tom", "eva", "max", "zoe"),
    "hour": ("8am", "9am", "10am", "2pm", "3pm", "4pm"),
}
CALLS = {
    "sign_in": ("user",), "sign_out": (), "search": ("city",), "filter_results": ("keep",),
    "sort_results": (), "check_price": ("offer",), "book": ("offer",), "cancel": ("booked",),
    "transfer": ("purse", "purse"), "deposit": ("purse",),
    "set_reminder": ("day", "task", "person", "hour"), "reschedule": ("busy", "hour"),
    "move_reminder": ("busy", "day"), "clear_reminder": ("busy",)}
KINDS = tuple(CALLS)
OTHERS = (
    "book", "cancel", "transfer", "deposit", "set_reminder", "reschedule", "move_reminder",
    "clear_reminder")

# How often the family makes each kind of call.
HABITS = {
    "sign_in": 2, "sign_out": 2, "search": 3, "filter_results": 2, "sort_results": 2,
    "check_price": 1, "book": 7, "cancel": 7, "transfer": 3, "deposit": 3, "set_reminder": 5,
    "reschedule": 6, "move_reminder": 2, "clear_reminder": 3}


class World:
    """One session. text() prints every field: the rules use nothing else but the constants
    above."""

    def __init__(self, rng):
        self.user = rng.choice(VALUES["user"] + ("none",))
        self.money = {account: rng.randrange(0, LIMIT + 1, 10) for account in VALUES["purse"]}
        # seats or rooms
        self.left = {offer: rng.randint(0, 5) for offer in PRICE}
        self.results = list(CITY[rng.choice(VALUES["city"])]) if rng.random() < 0.7 else []
        self.booked = set(rng.sample(list(PRICE), rng.randint(1, 4)))
        self.reminders = {
            day: tuple(rng.choice(VALUES[slot]) for slot in ("task", "person", "hour"))
            for day in rng.sample(VALUES["day"], rng.randint(1, 3))
        }
        self.reply = "ok"

    def text(self):
        lines = [f"user: {self.user}"]
        lines += [f"{account}: {amount}" for account, amount in self.money.items()]
        lines += [f"{offer}: {self.left[offer]}" + (", booked" if offer in self.booked else "")
                  for offer in PRICE]
        lines.append(f"results: {', '.join(self.results) or 'none'}")
        lines += [
            f"{day}: "
            + ("{2} {0} {1}".format(*self.reminders[day]) if day in self.reminders else "free")
            for day in VALUES["day"]
        ]
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
        return f"{offer} for {PRICE[offer]}"

    def book(self, offer):
        if self.user == "none":
            return "error, sign in first"
        if offer in self.booked:
            return "error, booked already"
        if self.left[offer] == 0:
            return "error, none left"
        self.left[offer] -= 1
        self.booked.add(offer)
        return "ok"

    def cancel(self, offer):
        if self.user == "none":
            return "error, sign in first"
        if offer not in self.booked:
            return "error, not booked"
        self.left[offer] += 1
        self.booked.remove(offer)
        return "ok"

    def transfer(self, source, target):
        if self.user == "none":
            return "error, sign in first"
        if self.money[source] < 10:
            return f"error, {source} too low"
        if self.money[target] + 10 > LIMIT:
            return f"error, {target} too full"
        self.money[source] -= 10
        self.money[target] += 10
        return "ok"

    def deposit(self, account):
        if self.money[account] + 20 > LIMIT:
            return f"error, {account} too full"
        self.money[account] += 20
        return "ok"

    def set_reminder(self, day, task, person, hour):
        there = self.reminders.get(day)
        if there:
            return None if there == (task, person, hour) else f"error, {day} is taken"
        self.reminders[day] = (task, person, hour)
        return "ok"

    def reschedule(self, day, hour):
        if day not in self.reminders or self.reminders[day][2] == hour:
            return None
        self.reminders[day] = (*self.reminders[day][:2], hour)
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
        """A call that mostly does something: of those that would end in an error, most are thought
        better of."""
        while True:
            call, after = self.idea(rng), copy.deepcopy(self)
            after.step(call)
            if (
                rng.random() < BOLD
                or not after.reply.startswith("error")
                or after.text() == self.text()
            ):
                return call

    def others_act(self, rng):
        """Somebody else of the family makes a call on another device."""
        ours = self.user, self.results, self.reply
        self.user = rng.choice(VALUES["user"])
        call = ""
        while call.partition("(")[0] not in OTHERS:
            call = self.propose(rng)
        self.step(call)
        self.user, self.results, self.reply = ours

    def idea(self, rng):
        """A call; its arguments mostly come from what is listed, held or noted in the state."""
        slip = rng.random() < SLIP
        likely = (
            {}
            if slip
            else {
                "offer": self.results,
                "booked": sorted(self.booked),
                "busy": list(self.reminders),
            }
        )
        kind, = rng.choices(KINDS, [HABITS[kind] for kind in KINDS])
        if self.user == "none" and not slip:
            kind = rng.choice((kind, "sign_in", "sign_in"))
        # nothing to sign in or drop
        elif not slip and (kind == "sign_in" or kind == "cancel" and not self.booked):
            kind = "book"
        elif not slip and kind in ("filter_results", "sort_results") and len(self.results) < 2:
            kind = "search"
        while True:
            args = [rng.choice(likely.get(slot) or VALUES[slot]) for slot in CALLS[kind]]
            if len(set(args)) == len(args):     # not from an account to itself
                return f"{kind}({', '.join(args)})"


def episode(rng, steps=STEPS, busy=0.0):
    """[(x, z, y)], y of one step is x of the next; busy: the chance that somebody else acts, too,
    between x and y."""
    world = World(rng)
    transitions = []
    for _ in range(steps):
        x = world.text()
        z = transitions[-1][1] if transitions and rng.random() < REPEAT else world.propose(rng)
        world.step(z)
        if busy and rng.random() < busy:
            world.others_act(rng)
        transitions.append((x, z, world.text()))
    return transitions
