"""The world of services: its rules in situations made by hand, then what holds over many
episodes."""
import random
import re
from collections import Counter, defaultdict

import pytest

from envs import tools


def session(user="leo", cash=40, savings=40, left=2, results=(), booked=(), reminders=()):
    world = tools.World(random.Random(0))
    world.user, world.reply = user, "ok"
    world.money = {"cash": cash, "savings": savings}
    world.left = {offer: left for offer in tools.PRICE}
    world.results, world.booked, world.reminders = list(results), set(booked), dict(reminders)
    return world


def changed(world, *calls):
    """The lines which the calls add to the text."""
    before = world.text().splitlines()
    for call in calls:
        world.step(call)
    return [line for line in world.text().splitlines() if line not in before]


def test_the_transition_in_the_docstring():
    world = session(
        cash=20,
        savings=10,
        results=["rome-flight", "rome-hotel"],
        booked=["oslo-hotel"],
        reminders={"tuesday": ("call", "tom", "9am"), "friday": ("pay", "eva", "3pm")},
    )
    world.left = dict(zip(tools.PRICE, (3, 2, 1, 0, 0, 1)))
    shown = [
        re.split("  +", row.removeprefix("    x").strip()) for row in tools.__doc__.splitlines()
    ]
    start = shown.index(["user: leo", "z", "book(rome-hotel)"])
    assert [row[0] for row in shown[start:start + 15]] == world.text().splitlines() + [""]
    assert [row[1] for row in shown[start + 3 : start + 15] if row[1:]] == changed(
        world, "book(rome-hotel)"
    )


def test_booking_takes_one_or_says_why_not():
    assert changed(session(), "book(oslo-flight)") == ["oslo-flight: 1, booked"]
    mine = ["oslo-flight"]
    for world, error in [
        (session("none", left=0, booked=mine), "sign in first"),
        (session(left=0, booked=mine), "booked already"),
        (session(left=0), "none left"),
    ]:
        assert changed(world, "book(oslo-flight)") == ["reply: error, " + error]


def test_cancelling_gives_it_back():
    assert changed(session(booked=["rome-flight"]), "cancel(rome-flight)") == ["rome-flight: 3"]
    assert changed(session(), "cancel(lima-hotel)") == ["reply: error, not booked"]
    assert changed(session("none", booked=["lima-hotel"]), "cancel(lima-hotel)") == [
        "reply: error, sign in first"
    ]


def test_results_are_listed_filtered_and_sorted():
    world, both = session(left=0), "results: rome-flight, rome-hotel"
    assert changed(world, "search(rome)") == [both, "reply: ok, offers of rome"]    # full ones too
    assert changed(world, "sort_results()") == ["results: rome-hotel, rome-flight", "reply: ok"]
    assert changed(world, "sort_results()") == []
    assert changed(world, "filter_results(flights)") == ["results: rome-flight"]
    assert changed(world, "filter_results(flights)") == []
    assert changed(world, "filter_results(hotels)") == ["reply: error, nothing would stay"]


def test_money_moves_within_its_limits():
    assert changed(session(), "transfer(cash, savings)") == ["cash: 30", "savings: 50"]
    # by anybody, up to 60
    assert changed(session("none"), "deposit(cash)") == ["cash: 60"]
    for world, call, error in [
            (session("none", cash=0), "transfer(cash, savings)", "sign in first"),
            (session(cash=0), "transfer(cash, savings)", "cash too low"),
            (session(savings=60), "transfer(cash, savings)", "savings too full"),
            (session(cash=50), "deposit(cash)", "cash too full")]:
        assert changed(world, call) == ["reply: error, " + error]


def test_session_has_one_user_until_sign_out():
    assert changed(session("none"), "sign_in(mia)")[0] == "user: mia"
    assert changed(session(), "sign_in(mia)") == ["reply: error, leo is in"]
    assert changed(session(results=["rome-flight"]), "sign_out()")[:2] == [
        "user: none",
        "results: none",
    ]


NOTED = {"monday": ("call", "tom", "9am"), "friday": ("pay", "eva", "3pm")}


def test_a_day_holds_one_reminder():
    for call, *lines in [
        ("set_reminder(tuesday, visit, zoe, 8am)", "tuesday: 8am visit zoe"),
        ("reschedule(friday, 10am)", "friday: 10am pay eva"),
        ("move_reminder(monday, tuesday)", "monday: free", "tuesday: 9am call tom"),
        ("clear_reminder(monday)", "monday: free"),
        ("set_reminder(friday, pay, eva, 2pm)", "reply: error, friday is taken"),
        ("move_reminder(monday, friday)", "reply: error, friday is taken"),
    ]:
        assert changed(session(reminders=NOTED), call) == lines


def test_idle_calls_change_no_line():
    nothing_there = ["sign_out()", "sort_results()", "clear_reminder(tuesday)",
                     "reschedule(monday, 8am)"]
    nothing_new = ["sign_in(leo)", "set_reminder(monday, call, tom, 9am)",
                   "reschedule(monday, 9am)", "move_reminder(tuesday, monday)"]
    assert changed(session("none"), *nothing_there) == []
    assert changed(session(reminders=NOTED), *nothing_new) == []


def test_a_reply_that_comes_again_changes_no_line():
    for call, reply in [
        ("check_price(rome-hotel)", "rome-hotel for 20"),
        ("book(rome-hotel)", "error, sign in first"),
    ]:
        assert (
            changed(session("none"), call)
            == changed(session("none"), call, call)
            == [f"reply: {reply}"]
        )


def test_success_is_answered_by_a_bare_ok():
    for call in (
        "book(rome-hotel)",
        "deposit(cash)",
        "transfer(cash, savings)",
        "set_reminder(monday, pay, tom, 8am)",
    ):
        world = session()
        world.reply = "welcome"
        assert changed(world, call)[-1] == "reply: ok"
    listed = session(results=["rome-flight", "rome-hotel"])
    assert changed(listed, "search(rome)") == ["reply: ok, offers of rome"]
    assert changed(session(), "transfer(cash, cash)") == []


@pytest.mark.parametrize(
    "z",
    [
        "",
        "sign_out",
        "text()",
        "can_afford(rome-hotel)",
        "book()",
        "book(rome)",
        "book(rome-hotel",
        "transfer(cash,savings)",
        "deposit(euros)",
    ],
)
def test_unknown_call(z):
    with pytest.raises(ValueError):
        session().step(z)


@pytest.fixture(scope="module")
def episodes():
    return [tools.episode(random.Random(seed)) for seed in range(200)]


@pytest.fixture(scope="module")
def drawn(episodes):
    """Their transitions."""
    return [transition for steps in episodes for transition in steps]


def test_episodes_are_chains_fixed_by_the_seed(episodes):
    assert episodes[7] == tools.episode(random.Random(7)) != episodes[8]
    assert all(
        len(e) == tools.STEPS and all(a[2] == b[0] for a, b in zip(e, e[1:])) for e in episodes
    )


def test_next_state_follows_from_the_text_alone(drawn):
    ys = {}
    for x, z, y in drawn:
        assert ys.setdefault((x, z), y) == y and z not in y


def test_most_states_are_new_and_few_calls_idle(drawn):
    states = [y for x, _, y in drawn if x != y]
    assert 0.08 <= 1 - len(states) / len(drawn) <= 0.15 and len(set(states)) >= 0.95 * len(states)


def test_the_diff_tells_the_call(drawn):
    calls, errors = defaultdict(list), 0
    for x, z, y in drawn:
        # a reason does not name the call
        if x != y and "reply: error" in y:
            errors += 1
        elif x != y:
            calls[tuple((a, b) for a, b in zip(x.splitlines(), y.splitlines()) if a != b)].append(z)
    assert sum(len(zs) for zs in calls.values() if len(set(zs)) == 1) >= 0.99 * sum(
        map(len, calls.values())
    )
    assert 0.01 * len(drawn) <= errors <= 0.06 * len(drawn)


def test_every_kind_of_call_occurs(drawn):
    kinds = Counter(z.split("(")[0] for _, z, _ in drawn)
    assert (
        set(kinds) == set(tools.KINDS)
        and len(kinds) == 14
        and min(kinds.values()) >= 0.02 * len(drawn)
    )


def test_states_are_short_and_of_few_words(drawn):
    assert all(28 <= len(x.split()) <= 56 and x.count("\n") == 13 for x, _, _ in drawn)
    assert len({word.strip(":,") for x, _, _ in drawn for word in x.split()}) <= 90
