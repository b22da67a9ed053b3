"""The physics world keeps its rules, and its transitions are fit to learn from."""
import random
import re
from collections import Counter, defaultdict

import pytest

from envs.physics import KINDS, STEPS, VESSELS, World, episode
from envs.physics import __doc__ as doc

EPISODES = [episode(random.Random(seed)) for seed in range(200)]
DRAWN = [transition for e in EPISODES for transition in e]


def read(text):
    """The world that a state text describes, from nothing but the text."""
    world, line = World(random.Random(0)), dict(row.split(": ") for row in text.split("\n"))
    world.on = {device: line[device].split(", ")[0] == "on" for device in ("stove", "freezer")}
    world.open = {device: line[device].endswith("open") for device in ("freezer", "chest")}
    world.shelf = [] if line["shelf"] == "bare" else line["shelf"].split(", ")
    for v in VESSELS:
        *inside, place = line[v].split(", ")
        world.where[v] = place.split()[-1]
        world.holds[v] = [s.split()[-1] for s in inside[:-1]]
        world.heat[v] = int(inside[-1].split()[0]) if world.holds[v] else 20
    return world


def given(*lines):
    """A plain state, with these lines in place of its own."""
    plain = {"stove": "off", "freezer": "off, shut", "chest": "shut", "shelf": "salt, milk",
             **{v: "empty, on the bench" for v in VESSELS}} | dict(row.split(": ") for row in lines)
    return read("\n".join(f"{name}: {facts}" for name, facts in plain.items()))


def after(world, *actions):
    """The lines of the state that the actions lead to."""
    for z in actions:
        world.step(z)
    return world.text().split("\n")

def test_the_transition_in_the_docstring():
    rows = [re.split("  +", row.strip()) for row in doc.split("\n") if row.startswith("    ")][:7]
    assert after(read("\n".join(row[0] for row in rows)), "wait") == [row[-1] for row in rows]


@pytest.mark.parametrize(
    "before, then",
    [
        ("solid butter, 20 C, on the stove", "liquid butter, 60 C, on the stove"),
        (
            "liquid water, liquid oil, 80 C, on the stove",
            "boiling water, liquid oil, 100 C, on the stove",
        ),
        ("boiling water, liquid oil, 100 C, on the stove", "liquid oil, 100 C, on the stove"),
        ("boiling milk, 100 C, on the stove", "empty, on the stove"),
        ("boiling brine, 120 C, on the stove", "solid salt, 120 C, on the stove"),
        ("boiling water, 100 C, in the sink", "liquid water, 80 C, in the sink"),
        ("solid wax, -20 C, on the bench", "solid wax, 0 C, on the bench"),
        # shut: it keeps the heat
        ("liquid wax, 80 C, in the chest", "liquid wax, 80 C, in the chest"),
    ],
)
def test_a_wait_with_the_stove_on(before, then):
    assert f"pot: {then}" in after(given("stove: on", f"pot: {before}"), "wait")


def test_the_freezer_must_be_on_and_shut():
    cold, warm = "solid water, 0", "liquid water, 20"
    for freezer, then in [("on, shut", cold), ("on, open", warm), ("off, shut", warm)]:
        world = given(f"freezer: {freezer}", "jar: liquid water, 40 C, in the freezer")
        assert f"jar: {then} C, in the freezer" in after(world, "wait")


def test_a_shut_door_keeps_a_vessel_in():
    world = given("cup: liquid water, 80 C, in the chest")
    assert after(world) == after(
        world, "take the cup", "empty the cup", "pour the cup into the pot"
    )
    assert "cup: liquid water, 60 C, on the bench" in after(
        world, "open the chest", "wait", "take the cup"
    )


def test_a_place_takes_one_vessel():
    world = given("pot: empty, on the stove")
    assert after(world) == after(world, "put the cup on the stove", "put the jar in the freezer")
    assert "cup: empty, on the stove" in after(world, "take the pot", "put the cup on the stove")


def test_pouring_moves_liquids_only_and_mixes_heat():
    world = given(
        "pot: boiling water, solid mint, 100 C, on the bench", "cup: liquid oil, 20 C, in the sink"
    )
    pot, cup = after(world, "pour the pot into the cup")[4:6]
    assert pot == "pot: solid mint, 100 C, on the bench"
    assert cup == "cup: liquid oil, liquid water, 60 C, in the sink"
    # mint is solid
    assert after(world) == after(world, "pour the pot into the jar")


def test_filling_and_adding_need_room_and_come_at_20():
    world = given("pot: liquid water, 60 C, in the sink")
    # has water; not in the sink
    assert after(world) == after(world, "fill the pot", "fill the cup")
    lines = after(world, "add the salt to the pot", "add the milk to the pot")
    assert lines[3:5] == ["shelf: milk", "pot: liquid water, solid salt, 40 C, in the sink"]
    assert "pot: liquid water, 20 C, in the sink" in after(world, "empty the pot", "fill the pot")


def test_stirring_needs_a_recipe_and_warmth():
    for before, then in [
        ("liquid chocolate, liquid milk, 60 C", "liquid cocoa, 60 C"),
        ("liquid milk, solid chocolate, 40 C", "liquid milk, solid chocolate, 40 C"),
        ("liquid water, liquid oil, 80 C", "liquid water, liquid oil, 80 C"),
    ]:
        assert f"pot: {then}, on the bench" in after(
            given(f"pot: {before}, on the bench"), "stir the pot"
        )


@pytest.mark.parametrize(
    "z",
    [
        "dance",
        "",
        "put the pot in the stove",
        "take the stove",
        "wait longer",
        "pour the pot into the pot",
        "open the stove",
        "add the water to the pot",
    ],
)
def test_unknown_action(z):
    with pytest.raises(ValueError):
        given().step(z)


def test_next_state_follows_from_the_text_alone():
    for x, z, y in DRAWN:
        assert read(x).text() == x and "\n".join(after(read(x), z)) == y


def test_episodes_are_chains_fixed_by_the_seed():
    assert all(len(e) == STEPS and all(a[2] == b[0] for a, b in zip(e, e[1:])) for e in EPISODES)
    assert episode(random.Random(7)) == EPISODES[7] != EPISODES[8]


def test_every_kind_occurs_and_some_actions_are_idle():
    shares = Counter(next(k for k in KINDS if f"{z} ".startswith(k + " ")) for _, z, _ in DRAWN)
    assert len(KINDS) == len(shares) == 12 and min(shares.values()) >= 0.02 * len(DRAWN)
    assert 0.08 <= sum(x == y for x, _, y in DRAWN) / len(DRAWN) <= 0.15


def test_states_are_short_and_of_few_words():
    words = [len(x.split()) for x, _, _ in DRAWN]
    assert (
        sum(words) >= 30 * len(words)
        and max(words) <= 45
        and {x.count("\n") for x, _, _ in DRAWN} == {6}
    )
    assert len(set(re.findall(r"-?\w+", " ".join(x + " " + z for x, z, _ in DRAWN)))) <= 60


def test_states_seldom_repeat():
    states = [s for e in EPISODES[:100] for s in [e[0][0]] + [y for x, _, y in e if x != y]]
    assert len(set(states)) >= 0.95 * len(states)


def test_the_diff_tells_the_action():
    causes = defaultdict(list)
    for x, z, y in DRAWN:
        assert z not in y
        if x != y:
            causes[tuple((a, b) for a, b in zip(x.split("\n"), y.split("\n")) if a != b)].append(z)
    clear = [len(set(zs)) == 1 for zs in causes.values() for _ in zs]
    assert sum(clear) >= 0.93 * len(clear)
