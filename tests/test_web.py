"""The web shop: its rules one by one, then what every built-in world promises."""
import random
from collections import Counter, defaultdict

import pytest

from envs import web


def shop(**facts):
    """A shop with an empty cart and form on page 1 of everything, but for the facts given."""
    world = web.World(random.Random(0))
    start = dict(view="list", search="none", colour="any", sort="a to z", page=1, cart={}, name="none",
                 delivery="none", code="none", applied=False, message="note: ready")
    for fact, value in (start | facts).items():
        setattr(world, fact, value)
    return world


def line(world, start):
    return next(text for text in world.text().split("\n") if text.startswith(start))


def unchanged(world, z):
    before = world.text()
    world.step(z)
    return world.text() == before


def test_the_transition_in_the_docstring():
    world = shop(colour="red", sort="dear first", cart={"blue mug": 1}, name="ana", delivery="post")
    for text in world.text().split("\n"):
        assert "\n    " + text in web.__doc__
    before = set(world.text().split("\n"))
    world.step("[button] add 2 -> CLICK")
    new = set(world.text().split("\n")) - before
    assert new == {"cart: 1 blue mug, 1 red lamp", "total: 50", "note: row 2, red lamp, now 1"}
    assert all(text in web.__doc__ for text in new)


def test_rows_follow_search_colour_sort_and_page():
    world = shop(page=3)
    world.step("[searchbox] search -> TYPE: lamp")
    assert world.page == 1 and world.rows() == ["blue lamp", "green lamp", "red lamp"]
    world.step("[combobox] order by -> SELECT: price up")
    assert world.rows() == ["white lamp", "red lamp", "blue lamp"]
    world.step("[link] next -> CLICK")
    assert line(world, "page") == "page: 2 of 2" and world.rows() == ["green lamp", None, None]
    assert unchanged(world, "[link] next -> CLICK") and unchanged(world, "[button] add 2 -> CLICK")
    assert unchanged(world, "[searchbox] search -> TYPE: lamp")               # chosen already: stays there
    world.step("[combobox] filter -> SELECT: red")
    assert line(world, "page") == "page: 1 of 1" and line(world, "1 ") == "1 red lamp, 30"
    world.step("[button] clear search -> CLICK")
    assert world.rows() == ["red mug", "red lamp", "red bag"]                 # cheap first
    assert shop(search="chair", colour="red").rows() == [None, None, None]


def test_add_depends_on_row_and_room():
    world = shop(cart={"blue bag": 3})
    world.step("[button] add 1 -> CLICK")
    assert line(world, "cart") == "cart: 4 blue bag" and line(world, "total") == "total: 80"
    world.step("[button] add 2 -> CLICK")
    assert world.message == "dialog: row 2 does not fit" and world.cart == {"blue bag": 4}


def test_amount_and_remove():
    world = shop(cart={"red mug": 2, "red bag": 1})
    assert unchanged(world, "[button] remove blue mug -> CLICK")
    assert unchanged(world, "[spinbutton] red mug -> TYPE: 2")
    world.step("[button] remove red mug -> CLICK")                            # two of them: asks first
    assert world.message == "dialog: drop red mug?" and world.cart["red mug"] == 2
    world.step("[button] yes -> CLICK")
    assert world.cart == {"red bag": 1} and world.message == "note: red mug is out"
    world.step("[button] remove red bag -> CLICK")                            # a single one: at once
    assert line(world, "cart") == "cart: empty" and line(world, "total") == "total: 0"
    world = shop(cart={"red mug": 2, "red bag": 1})
    world.step("[spinbutton] red bag -> TYPE: 3")
    assert world.message == "dialog: 3 red bag do not fit" and world.cart["red bag"] == 1


def test_a_dialog_blocks_the_rest():
    world = shop()
    world.step("[button] checkout -> CLICK")
    assert world.message == "dialog: nothing to check out" and world.view == "list"
    assert unchanged(world, "[link] next -> CLICK") and unchanged(world, "[button] yes -> CLICK")
    world.step("[button] close -> CLICK")
    assert not unchanged(world, "[link] next -> CLICK")


def test_coupon():
    world = shop(view="checkout", cart={"red lamp": 1, "red mug": 1}, delivery="post")
    assert unchanged(world, "[button] apply -> CLICK")                        # no code typed
    world.step("[textbox] coupon -> TYPE: spring")
    world.step("[button] apply -> CLICK")
    assert world.message == "dialog: spring starts at 50"
    world.step("[button] close -> CLICK")
    world.step("[spinbutton] red mug -> TYPE: 2")
    world.step("[button] apply -> CLICK")
    assert line(world, "form").endswith("code spring, 10 off") and line(world, "total") == "total: 50"
    world.step("[spinbutton] red mug -> TYPE: 1")                             # 40 of goods: too little for it
    assert line(world, "form").endswith("code spring") and line(world, "total") == "total: 50"
    world.step("[textbox] coupon -> TYPE: autumn")
    world.step("[button] apply -> CLICK")
    assert world.message == "dialog: autumn is over"


def test_pay_asks_for_what_is_missing_and_then_sends():
    world = shop(view="checkout", cart={"white chair": 1})
    for missing, remedy in [("name is missing", "[textbox] name -> TYPE: ben"),
                            ("delivery is missing", "[combobox] delivery -> SELECT: post"),
                            ("chair needs courier", "[combobox] delivery -> SELECT: courier")]:
        world.step("[button] pay -> CLICK")
        assert world.message == "dialog: " + missing
        world.step("[button] close -> CLICK")
        world.step(remedy)
    world.step("[button] pay -> CLICK")
    assert world.message == "dialog: send for 70?"
    world.step("[button] yes -> CLICK")
    assert world.message == "note: sent to ben" and line(world, "cart") == "cart: empty"
    assert line(world, "form") == "form: name none, delivery none, code none"
    assert line(world, "total") == "total: 0"


def test_each_view_has_its_own_buttons():
    assert unchanged(shop(), "[textbox] name -> TYPE: ana") and unchanged(shop(), "[button] pay -> CLICK")
    world = shop(view="checkout", cart={"red mug": 1})
    assert unchanged(world, "[button] add 1 -> CLICK")
    world.step("[link] back -> CLICK")
    assert not unchanged(world, "[button] add 1 -> CLICK")


@pytest.mark.parametrize("z", ["", "fly", "[button] add 4 -> CLICK", "[searchbox] search -> TYPE: boat"])
def test_unknown_action(z):
    for world in (shop(), shop(message="dialog: name is missing")):
        with pytest.raises(ValueError):
            world.step(z)


# What every built-in world promises

def test_promises_over_many_episodes():
    episodes = [web.episode(random.Random(seed)) for seed in range(200)]
    transitions = [t for one in episodes for t in one]
    assert all(len(one) == web.STEPS for one in episodes)
    assert all(a[2] == b[0] for one in episodes for a, b in zip(one, one[1:]))

    futures, actions = defaultdict(set), defaultdict(set)
    for x, z, y in transitions:
        assert z not in y
        futures[x, z].add(y)
        if x != y:
            old, new = x.split("\n"), y.split("\n")
            removed, added = [t for t in old if t not in new], [t for t in new if t not in old]
            actions[tuple(removed), tuple(added)].add(z)
    assert all(len(ys) == 1 for ys in futures.values())                       # Markov in the text

    changed = [t for t in transitions if t[0] != t[2]]
    assert 0.08 <= 1 - len(changed) / len(transitions) <= 0.15
    assert sum(len(zs) == 1 for zs in actions.values()) >= 0.93 * len(actions)

    kinds = Counter(web.read(z)[0] for _, z, _ in transitions)
    assert 12 <= len(web.KINDS) <= 18 and set(kinds) == set(web.KINDS)
    assert min(kinds.values()) >= 0.02 * len(transitions)

    states = [y for x, _, y in transitions if x != y]
    assert len(set(states)) >= 0.95 * len(states)
    assert all(len(y.split("\n")) == 12 for y in states)
    assert all(35 <= len(y.split()) <= 60 for y in states)
    words = {word.strip(",:?") for x, z, y in transitions for word in (x + " " + z + " " + y).split()}
    assert len(words) <= 150


def test_a_state_in_full_is_enough_for_the_next():
    """Two worlds that print the same go on printing the same, whatever path led there."""
    world = shop(page=2)
    world.step("[combobox] filter -> SELECT: red")
    world.step("[combobox] filter -> SELECT: any")
    fresh = shop()
    assert world.text() == fresh.text()
    for strings in web.ACTIONS.values():
        assert all(world.after(z).text() == fresh.after(z).text() for z in strings)


def test_same_seed_same_episode():
    assert web.episode(random.Random(7)) == web.episode(random.Random(7))
    assert web.episode(random.Random(7)) != web.episode(random.Random(8))
