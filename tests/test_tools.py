"""The world of services: its rules in situations made by hand, then what holds over many episodes."""

import random
from collections import Counter, defaultdict

import pytest

from envs import tools


def session(user="leo", cash=50, savings=50, euros=50, left=2, results=(), bookings=(), reminders=()):
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


def test_booking_takes_the_seat_and_the_price_in_the_offers_currency():
    assert changed(session(), "book(f2)") == ["cash: 0", "rome: f1 2, f2 1, h1 2, h2 2", "bookings: f2 leo"]
    assert changed(session(), "book(h4)") == ["euros: 20", "lima: f5 2, f6 2, h4 1", "bookings: h4 leo"]


def test_booking_names_the_first_reason_that_forbids_it():
    assert changed(session("none", left=0), "book(f2)") == ["reply: error, sign in first to take f2"]
    assert changed(session(left=0, bookings={"f2": "mia"}), "book(f2)") == ["reply: error, mia has f2"]
    three = {"f1": "leo", "f3": "leo", "f4": "mia"}
    assert changed(session(left=0, bookings=three), "book(f2)") == ["reply: error, f2 is one too many"]
    assert changed(session(left=0, cash=0), "book(f2)") == ["reply: error, no seats left in f2"]
    assert changed(session(cash=40), "book(f2)") == ["reply: error, not enough cash, f2 needs 50"]


def test_only_the_holder_cancels_and_pays_a_fee():
    held = {"f2": "leo", "h3": "mia"}
    assert changed(session(bookings=held), "cancel(f2)") == [
        "cash: 90", "rome: f1 2, f2 3, h1 2, h2 2", "bookings: h3 mia"]
    assert changed(session(bookings=held), "cancel(h3)") == ["reply: error, cannot drop h3, mia has it"]
    assert "cash: 100" in changed(session(cash=80, bookings=held), "cancel(f2)")    # the rest is lost


def test_results_are_listed_filtered_and_sorted():
    world = session()
    assert changed(world, "search(rome)") == ["results: f1, f2, h1, h2", "reply: ok, offers of rome"]
    assert changed(world, "sort_results(price)") == ["results: h1, f1, h2, f2", "reply: ok, cheapest first"]
    world.left["h1"] = 0
    assert changed(world, "filter_results(free)") == ["results: f1, h2, f2", "reply: ok, full ones hidden"]
    assert changed(world, "filter_results(hotels)") == ["results: h2", "reply: ok, flights hidden"]
    assert changed(world, "filter_results(flights)") == ["reply: error, no flights among them"]
    assert changed(world, "sort_results(price)") == []


def test_money_moves_within_its_limits_and_halves_into_euros():
    assert changed(session(), "transfer(cash, savings, 20)") == ["cash: 30", "savings: 70"]
    assert changed(session(), "exchange(cash, 20)") == ["cash: 30", "euros: 60"]
    assert changed(session(cash=20), "exchange(euros, 40)") == ["cash: 100", "euros: 10"]
    assert changed(session(cash=10), "transfer(cash, savings, 20)") == [
        "reply: error, cash too low, 20 stays in cash"]
    assert changed(session(), "exchange(euros, 40)") == ["reply: error, cash too full, no 80 cash for you"]
    assert changed(session("none"), "deposit(cash, 20)") == ["cash: 70"]


def test_the_session_has_one_user_and_signing_out_clears_the_results():
    assert changed(session(), "sign_in(mia)") == ["reply: error, leo is in, mia must wait"]
    assert changed(session(results=["f1"]), "sign_out()", "sign_in(mia)") == [
        "user: mia", "results: none", "reply: welcome"]


def test_a_day_holds_one_reminder():
    noted = {"monday": "call", "friday": "pay"}
    assert changed(session(reminders=noted), "move_reminder(monday, tuesday)") == [
        "reminders: tuesday call, friday pay"]
    assert changed(session(reminders=noted), "set_reminder(friday, visa)") == [
        "reply: error, friday is for pay, not visa"]
    assert changed(session(reminders=noted), "clear_reminder(tuesday)") == []
    assert changed(session(reminders=noted), "move_reminder(tuesday, friday)") == []


def test_a_read_answers_and_a_second_one_changes_nothing():
    world = session(cash=30)
    assert changed(world, "can_afford(f2)") == ["reply: no, f2 is 20 too dear"]
    assert changed(world, "can_afford(f2)") == []
    assert changed(world, "check_price(f2)") == ["reply: f2 for 50 cash"]


@pytest.mark.parametrize("z", ["", "sign_out", "fly(f2)", "book()", "book(f9)", "book(f1, f2)", "book(f1",
                               "step(f2)", "text()", "transfer(cash, 20)", "deposit(cash,20)"])
def test_unknown_call(z):
    world = session()
    with pytest.raises(ValueError):
        world.step(z)
    assert world.text() == session().text()


@pytest.fixture(scope="module")
def drawn():
    return [step for seed in range(200) for step in tools.episode(random.Random(seed))]


def test_episodes_are_chains_and_the_seed_decides():
    steps = tools.episode(random.Random(7))
    assert len(steps) == tools.STEPS and steps == tools.episode(random.Random(7))
    assert all(before[2] == after[0] for before, after in zip(steps, steps[1:]))


def test_next_state_is_a_function_of_the_two_texts(drawn):
    seen = {}
    assert all(seen.setdefault((x, z), y) == y for x, z, y in drawn)
    # Nothing remains of how a state came about.
    world, detour = session(bookings={"f2": "leo"}), session(bookings={"f2": "leo"})
    changed(detour, "transfer(cash, savings, 20)", "transfer(savings, cash, 20)")
    assert detour.text() == world.text() and changed(detour, "cancel(f2)") == changed(world, "cancel(f2)")


def test_shares(drawn):
    same = sum(x == y for x, _, y in drawn) / len(drawn)
    kinds = Counter(z.split("(")[0] for _, z, _ in drawn)
    before = [x for x, _, y in drawn if x != y]
    assert 0.08 <= same <= 0.15
    assert set(kinds) == set(tools.KINDS) and 12 <= len(kinds) <= 18
    assert min(kinds.values()) >= 0.02 * len(drawn)
    assert len(set(before)) >= 0.95 * len(before)


def test_states_are_compact(drawn):
    words = [len(x.split()) for x, _, _ in drawn]
    vocabulary = {word.strip(":,") for x, _, _ in drawn for word in x.split()}
    assert 35 <= min(words) and max(words) <= 60 and len(vocabulary) <= 150
    assert {len(x.splitlines()) for x, _, _ in drawn} == {11}
    assert max(sum(a != b for a, b in zip(x.splitlines(), y.splitlines())) for x, _, y in drawn) <= 4


def test_the_changed_lines_tell_the_call_which_is_never_written_out(drawn):
    calls = defaultdict(list)
    for x, z, y in drawn:
        assert z not in y
        if x != y:
            before, after = x.splitlines(), y.splitlines()
            calls[tuple((a, b) for a, b in zip(before, after) if a != b)].append(z)
    clear = sum(len(same) for same in calls.values() if len(set(same)) == 1)
    assert clear >= 0.93 * sum(map(len, calls.values()))
