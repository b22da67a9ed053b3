"""The world of services: its rules in situations made by hand, then what holds over many episodes."""
import random
import re
from collections import Counter, defaultdict

import pytest

from envs import tools


def session(user="leo", cash=40, savings=40, euros=40, left=2, results=(), bookings=(), reminders=()):
    world = tools.World(random.Random(0))
    world.user, world.reply = user, "ok"
    world.money = {"cash": cash, "savings": savings, "euros": euros}
    world.left = {offer: left for offer in tools.PRICE}
    world.results, world.bookings, world.reminders = list(results), dict(bookings), dict(reminders)
    return world


def changed(world, *calls):
    """The lines which the calls add to the text."""
    before = world.text().splitlines()
    for call in calls:
        world.step(call)
    return [line for line in world.text().splitlines() if line not in before]


def test_the_transition_in_the_docstring():
    world = session(cash=20, savings=10, euros=50, results=["f1", "h1"], bookings={"h2": "mia"},
                    reminders={"tuesday": "call", "friday": "pay"})
    world.left = {"f1": 3, "h1": 2, "f2": 1, "h2": 0, "f3": 0, "h3": 1}
    shown = [re.split("  +", row.removeprefix("    x").strip()) for row in tools.__doc__.splitlines()]
    start = shown.index(["user: leo", "z", "book(h1)"])
    assert [row[0] for row in shown[start:start + 11]] == world.text().splitlines()
    assert [row[1] for row in shown[start + 3:start + 6]] == changed(world, "book(h1)")


def test_booking_takes_the_seat_and_the_price_in_the_offers_currency():
    assert changed(session(), "book(f2)") == ["cash: 20", "oslo: f2 1, h2 2", "bookings: f2 leo"]
    assert changed(session(), "book(h2)") == ["euros: 10", "oslo: f2 2, h2 1", "bookings: h2 leo"]


def test_booking_names_the_first_reason_that_forbids_it():
    assert changed(session("none", left=0), "book(f2)") == ["reply: error, sign in first to take f2"]
    assert changed(session(left=0, bookings={"f2": "mia"}), "book(f2)") == ["reply: error, mia has f2"]
    two = {"f1": "leo", "h3": "mia"}
    assert changed(session(left=0, bookings=two), "book(f2)") == ["reply: error, f2 is one too many"]
    assert changed(session(left=0, cash=0), "book(f2)") == ["reply: error, no seats left in f2"]
    assert changed(session(cash=10), "book(f2)") == ["reply: error, not enough cash, f2 needs 20"]


def test_only_the_holder_cancels_and_pays_a_fee():
    held = {"f1": "leo", "h3": "mia"}
    back = ["cash: 50", "rome: f1 3, h1 2", "bookings: h3 mia"]
    assert changed(session(cash=30, bookings=held), "cancel(f1)") == back
    assert changed(session(bookings=held), "cancel(h3)") == ["reply: error, cannot drop h3, mia has it"]
    assert "cash: 60" in changed(session(cash=50, bookings=held), "cancel(f1)")     # the rest is lost


def test_results_are_listed_filtered_and_sorted():
    world = session()
    assert changed(world, "search(rome)") == ["results: f1, h1", "reply: ok, offers of rome"]
    assert changed(world, "sort_results(price)") == ["results: h1, f1", "reply: ok, cheapest first"]
    world.left["f1"] = 3
    assert changed(world, "sort_results(seats)") == ["results: f1, h1", "reply: ok, emptiest first"]
    world.left["f1"] = 0
    assert changed(world, "filter_results(free)") == ["results: h1", "reply: ok, full ones hidden"]
    assert changed(world, "filter_results(flights)") == ["reply: error, no flights among them"]
    assert changed(world, "sort_results(price)") == []                              # a single one


def test_money_moves_within_its_limits_and_halves_into_euros():
    assert changed(session(), "transfer(cash, savings, 20)") == ["cash: 20", "savings: 60"]
    assert changed(session(), "exchange(cash, 20)") == ["cash: 20", "euros: 50"]
    assert changed(session(cash=20), "exchange(euros, 20)") == ["cash: 60", "euros: 20"]
    assert changed(session("none"), "deposit(cash, 20)") == ["cash: 60"]            # by anybody, up to 60
    for world, call, error in [
            (session(cash=0), "transfer(cash, savings, 10)", "cash too low, 10 stays in cash"),
            (session(), "exchange(euros, 20)", "cash too full, no 40 cash for you"),
            (session("none"), "exchange(cash, 20)", "sign in first, no 10 euros for you"),
            (session(cash=50), "deposit(cash, 20)", "cash cannot grow by 20")]:
        assert changed(world, call) == ["reply: error, " + error]


def test_the_session_has_one_user_and_signing_out_clears_the_results():
    assert changed(session(), "sign_in(mia)") == ["reply: error, leo is in, mia must wait"]
    assert changed(session(results=["f1"]), "sign_out()")[:2] == ["user: none", "results: none"]


def test_a_day_holds_one_reminder():
    noted = {"monday": "call", "friday": "pay"}
    for call, lines in [("move_reminder(monday, tuesday)", ["reminders: tuesday call, friday pay"]),
                        ("set_reminder(friday, pack)", ["reply: error, friday is for pay, not pack"]),
                        ("move_reminder(monday, friday)", ["reply: error, friday is taken, monday stays"]),
                        ("clear_reminder(tuesday)", []), ("move_reminder(tuesday, friday)", [])]:
        assert changed(session(reminders=noted), call) == lines


def test_a_read_answers_and_a_second_one_changes_nothing():
    world = session(cash=10)
    assert changed(world, "can_afford(f1)") == ["reply: no, f1 is 20 too dear"]
    assert changed(world, "can_afford(f1)") == []
    assert changed(world, "check_price(f1)") == ["reply: f1 for 30 cash"]
    assert changed(session(left=0), "can_afford(f1)") == ["reply: no, f1 is full"]


@pytest.mark.parametrize("z", ["", "sign_out", "fly(f2)", "book()", "book(f9)", "book(f1, f2)", "book(f1",
                               "text()", "transfer(cash, 20)", "deposit(cash,20)", "deposit(cash, 50)"])
def test_unknown_call(z):
    with pytest.raises(ValueError):
        session().step(z)


def test_promises_over_many_episodes():
    episodes = [tools.episode(random.Random(seed)) for seed in range(200)]
    assert episodes[7] == tools.episode(random.Random(7)) != episodes[8]
    assert all(len(e) == tools.STEPS and all(a[2] == b[0] for a, b in zip(e, e[1:])) for e in episodes)
    drawn, ys, calls = [t for e in episodes for t in e], {}, defaultdict(list)
    for x, z, y in drawn:
        assert ys.setdefault((x, z), y) == y and z not in y                         # Markov in the text
        if x != y:
            calls[tuple((a, b) for a, b in zip(x.splitlines(), y.splitlines()) if a != b)].append(z)
    states = [y for x, _, y in drawn if x != y]
    assert 0.08 <= 1 - len(states) / len(drawn) <= 0.15 and len(set(states)) >= 0.95 * len(states)
    assert sum(len(zs) for zs in calls.values() if len(set(zs)) == 1) >= 0.93 * len(states)
    kinds = Counter(z.split("(")[0] for _, z, _ in drawn)
    assert set(kinds) == set(tools.KINDS) and min(kinds.values()) >= 0.02 * len(drawn)
    words = [len(x.split()) for x, _, _ in drawn]
    assert 30 * len(words) <= sum(words) and max(words) <= 50 and {x.count("\n") for x, _, _ in drawn} == {10}
    assert len({word.strip(":,") for x, _, _ in drawn for word in x.split()}) <= 110
