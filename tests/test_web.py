"""The web shop: its rules one by one, then what every built-in world promises."""
import random
import re
from collections import Counter, defaultdict

import pytest

from envs import web


def shop(**facts):
    """A shop with an empty cart and form on page 1 of everything, but for the facts given."""
    world = web.World(random.Random(0))
    start = dict(
        view="list",
        search="none",
        colour="any",
        sort="a to z",
        page=1,
        cart={},
        name="none",
        street="none",
        time="none",
        delivery="none",
        code="none",
        applied=False,
        message="note: ready",
    )
    for fact, value in (start | facts).items():
        setattr(world, fact, value)
    return world


def after(world, *actions):
    """The lines of the text that the actions bring."""
    before = world.text().split("\n")
    for z in actions:
        world.step(z)
    return [line for line in world.text().split("\n") if line not in before]


def test_the_transition_in_the_docstring():
    cart = {"red-bag": 1, "blue-bag": 1}
    world = shop(
        colour="red",
        cart=cart,
        name="cleo hill",
        street="12 oak road",
        time="friday 12 to 14",
        delivery="post",
        code="autumn",
    )
    shown = [row.strip().split("   ") for row in web.__doc__.split("\n") if row.startswith("    ")][
        :15
    ]
    assert [row[0] for row in shown] == world.text().split("\n")
    assert after(world, "[button] add red-lamp -> CLICK") == [shown[8][-1].strip()]


def test_rows_follow_search_colour_sort_and_page():
    world = shop(page=3)
    assert after(world, "[searchbox] search -> TYPE: lamp") == [
        "search: lamp", "page: 1 of 2", "1 blue-lamp", "2 green-lamp", "3 red-lamp"]
    assert after(world, "[combobox] order by -> SELECT: price up") == [
        "sort: cheap first", "1 white-lamp", "2 red-lamp", "3 blue-lamp"]
    assert after(world, "[link] next -> CLICK") == [
        "page: 2 of 2",
        "1 green-lamp",
        "2 nothing",
        "3 nothing",
    ]
    # chosen already
    assert not after(world, "[link] next -> CLICK", "[searchbox] search -> TYPE: lamp")
    assert after(world, "[combobox] filter -> SELECT: red") == [
        "colour: red",
        "page: 1 of 1",
        "1 red-lamp",
    ]
    world.step("[button] clear search -> CLICK")
    assert world.rows() == ["red-mug", "red-lamp", "red-bag"]  # cheap first


def test_add_needs_the_item_shown_and_cart_room():
    world = shop(cart={"blue-bag": 3})
    assert not after(world, "[button] add red-mug -> CLICK")  # on page 3
    assert after(world, "[button] add blue-bag -> CLICK") == ["cart: blue-bag x4"]
    assert after(world, "[button] add blue-lamp -> CLICK") == ["dialog: cart is full"]
    assert world.cart == {"blue-bag": 4}


@pytest.mark.parametrize("view", ["list", "checkout"])
def test_amount_and_remove(view):
    world = shop(view=view, cart={"red-mug": 3, "red-bag": 1})
    assert not after(world, "[button] remove blue-mug -> CLICK", "[spinbutton] red-bag -> TYPE: 1")
    assert after(world, "[spinbutton] red-bag -> TYPE: 2") == ["dialog: cart is full"]
    world.step("[button] close -> CLICK")
    # two: asks first
    assert after(world, "[button] remove red-mug -> CLICK") == ["dialog: drop red-mug?"]
    assert after(world, "[button] yes -> CLICK") == ["cart: red-bag", "note: red-mug is out"]
    assert after(world, "[spinbutton] red-bag -> TYPE: 2") == ["cart: red-bag x2"]
    assert after(world, "[spinbutton] red-bag -> TYPE: 1") == ["cart: red-bag"]
    assert after(world, "[button] remove red-bag -> CLICK") == ["cart: empty"]  # one: at once


def test_a_dialog_blocks_the_rest():
    world = shop()
    assert after(world, "[button] checkout -> CLICK") == ["dialog: nothing to check out"]
    assert not after(world, "[link] next -> CLICK", "[button] yes -> CLICK")  # it is no question
    assert after(world, "[button] close -> CLICK") == ["note: closed"]
    assert after(world, "[link] next -> CLICK")


def test_coupon():
    world, apply = (
        shop(view="checkout", cart={"red-lamp": 1, "red-mug": 1}), "[button] apply -> CLICK")
    assert (
        after(world, "[textbox] coupon -> TYPE: spring", apply)[1] == "dialog: spring starts at 50"
    )
    lines = after(world, "[button] close -> CLICK", "[spinbutton] red-mug -> TYPE: 2", apply)
    assert lines[1] == "code: spring, 10 off"
    assert after(world, "[spinbutton] red-mug -> TYPE: 1")[1] == "code: spring"  # 40 again: off
    assert after(world, "[textbox] coupon -> TYPE: autumn", apply)[1] == "dialog: autumn is over"


def test_pay_asks_for_what_is_missing_and_then_sends():
    world = shop(view="checkout", cart={"white-chair": 1})
    for missing, remedy in [("name is missing", "[textbox] name -> TYPE: ben moss"),
                            ("street is missing", "[textbox] street -> TYPE: 3 mill lane"),
                            ("time is missing", "[combobox] time -> SELECT: friday 8 to 10"),
                            ("delivery is missing", "[combobox] delivery -> SELECT: post"),
                            ("chair needs courier", "[combobox] delivery -> SELECT: courier")]:
        assert after(world, "[button] pay -> CLICK") == ["dialog: " + missing]
        after(world, "[button] close -> CLICK", remedy)
    assert after(world, "[button] pay -> CLICK") == ["dialog: send by courier?"]
    assert after(world, "[button] yes -> CLICK") == [
        "cart: empty", "time: none", "delivery: none", "note: sent to ben moss"]
    assert after(world, "[button] pay -> CLICK") == ["dialog: nothing to pay for"]


def test_each_view_has_its_own_buttons():
    assert not after(shop(), "[textbox] name -> TYPE: ana gray", "[button] pay -> CLICK")
    world = shop(view="checkout", cart={"red-mug": 1})
    assert not after(world, "[button] add blue-bag -> CLICK", "[link] next -> CLICK")
    assert after(world, "[link] back -> CLICK") == ["view: list"]
    assert after(world, "[button] add blue-bag -> CLICK")


@pytest.mark.parametrize(
    "z", ["", "fly", "[button] add 1 -> CLICK", "[searchbox] search -> TYPE: boat"]
)
def test_unknown_action(z):
    with pytest.raises(ValueError):
        shop(message="dialog: name is missing").step(z)


@pytest.fixture(scope="module")
def episodes():
    return [web.episode(random.Random(seed)) for seed in range(200)]


@pytest.fixture(scope="module")
def drawn(episodes):
    """Their transitions."""
    return [transition for steps in episodes for transition in steps]


def test_episodes_are_chains_fixed_by_the_seed(episodes):
    assert episodes[7] == web.episode(random.Random(7)) != episodes[8]
    assert all(
        len(e) == web.STEPS and all(a[2] == b[0] for a, b in zip(e, e[1:])) for e in episodes
    )


def test_next_state_follows_from_the_text_alone(drawn):
    ys = {}
    for x, z, y in drawn:
        assert ys.setdefault((x, z), y) == y and z not in y


def test_most_states_are_new_and_few_actions_idle(drawn):
    states = [y for x, _, y in drawn if x != y]
    assert 0.08 <= 1 - len(states) / len(drawn) <= 0.15 and len(set(states)) >= 0.95 * len(states)


def test_the_diff_tells_the_action(drawn):
    actions = defaultdict(list)
    for x, z, y in drawn:
        # it does not name the action
        if x != y and not y.endswith("dialog: cart is full"):
            actions[tuple((a, b) for a, b in zip(x.split("\n"), y.split("\n")) if a != b)].append(z)
    assert sum(len(zs) for zs in actions.values() if len(set(zs)) == 1) >= 0.93 * sum(
        map(len, actions.values())
    )


def test_the_cart_fills_to_its_limit_and_no_further(drawn):
    carts = [line for x, _, _ in drawn for line in x.split("\n") if line.startswith("cart: ")]
    amounts = lambda cart: [int(n or 1) for n in re.findall(r"-[a-z]+(?: x(\d))?", cart)]
    assert max(sum(amounts(cart)) for cart in carts) == web.FULL


def test_every_kind_of_action_occurs(drawn):
    kinds = Counter(web.read(z)[0] for _, z, _ in drawn)
    assert set(kinds) == set(web.KINDS) and min(kinds.values()) >= 0.01 * len(drawn)


def test_states_are_short_and_of_few_words(drawn):
    states = [y for x, _, y in drawn if x != y]
    words = [len(y.split()) for y in states]
    assert (
        30 * len(words) <= sum(words)
        and max(words) <= 50
        and {y.count("\n") for y in states} == {14}
    )
    # red-lamp is two of the words
    text = " ".join(x + " " + z for x, z, _ in drawn).replace("-", " ")
    assert len({word.strip(",:?") for word in text.split()}) <= 120
