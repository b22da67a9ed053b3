"""The physics world keeps its rules, and its transitions are fit to learn from."""
import random
import re
from collections import Counter, defaultdict

import pytest

from envs import physics
from envs.physics import KINDS, VESSELS, World, episode

EPISODES = [episode(random.Random(seed)) for seed in range(200)]
DRAWN = [t for e in EPISODES for t in e]


def read(text):
    """The world that a state text describes; it uses nothing but the text."""
    world, line = World(random.Random(0)), dict(row.split(": ") for row in text.split("\n"))
    world.time = line["time"]
    world.on = {device: line[device].split(", ")[0] == "on" for device in ("stove", "freezer", "lamp")}
    world.open = {device: line[device].endswith("open") for device in ("freezer", "chest")}
    world.charge = int(line["battery"].split()[0])
    world.wire = None if line["battery"].endswith("loose") else line["battery"].split()[-1]
    world.shelf = [] if line["shelf"] == "bare" else line["shelf"].split(", ")
    world.soil, plant, spot = line["soil"].split(", ")
    world.plant = None if plant == "bare" else tuple(plant.split())
    world.spot = spot.split()[-1]
    for v in VESSELS:
        *inside, place = line[v].split(", ")
        world.where[v] = place.split()[-1]
        world.holds[v] = [s.split()[-1] for s in inside[:-1]]
        world.heat[v] = int(inside[-1].split()[0]) if world.holds[v] else 20
    return world


PLAIN = """time: night
stove: off
freezer: off, shut
chest: shut
lamp: off
battery: 40 percent, loose
shelf: salt, milk, bean
soil: dry, bare, at the window
pot: empty, on the bench
cup: empty, on the bench
jar: empty, on the bench"""


def given(*lines):
    """The plain state with these lines in place of its own."""
    text = PLAIN
    for new in lines:
        text = re.sub(rf"^{new.split(':')[0]}: .*$", new, text, flags=re.M)
    return read(text)


def after(world, *actions):
    for z in actions:
        world.step(z)
    return world.text().split("\n")


# ---- the rules

def test_stove_melts_and_boils_away():
    world = given("stove: on", "pot: solid butter, 20 C, on the stove",
                  "cup: liquid water, 60 C, on the bench")
    lines = after(world, "wait")
    assert "pot: liquid butter, 60 C, on the stove" in lines
    assert "cup: liquid water, 40 C, on the bench" in lines                 # what stands about cools
    world = given("stove: on", "pot: liquid water, liquid oil, 80 C, on the stove")
    assert "pot: boiling water, liquid oil, 100 C, on the stove" in after(world, "wait")    # not past 100
    assert "pot: liquid oil, 100 C, on the stove" in after(world, "wait")
    assert "pot: liquid oil, 120 C, on the stove" in after(world, "wait")
    world = given("stove: off", "pot: boiling water, 100 C, on the stove")
    assert "pot: liquid water, 80 C, on the stove" in after(world, "wait")


def test_boiling_brine_leaves_its_salt():
    world = given("stove: on", "pot: boiling brine, 120 C, on the stove")
    assert "pot: solid salt, 120 C, on the stove" in after(world, "wait")


@pytest.mark.parametrize("freezer, then", [
    ("on, shut", "solid water, -20 C"), ("on, open", "liquid water, 20 C"),
    ("off, shut", "liquid water, 20 C")])
def test_freezer_must_be_on_and_shut(freezer, then):
    world = given(f"freezer: {freezer}", "jar: liquid water, 20 C, in the freezer")
    assert f"jar: {then}, in the freezer" in after(world, "wait")


def test_shut_chest_keeps_heat_and_is_out_of_reach():
    hot = "cup: liquid water, 80 C, in the chest"
    world = given("chest: shut", hot)
    assert hot in after(world, "wait", "take the cup", "empty the cup", "pour the cup into the pot")
    assert "cup: liquid water, 60 C, in the chest" in after(world, "open the chest", "wait")
    assert "cup: liquid water, 60 C, on the bench" in after(world, "take the cup")


def test_pouring_moves_liquids_only_and_mixes_heat():
    world = given("pot: boiling water, solid mint, 100 C, on the bench",
                  "cup: liquid milk, 20 C, on the bench")
    lines = after(world, "pour the pot into the cup")
    assert "pot: solid mint, 100 C, on the bench" in lines
    assert "cup: liquid milk, liquid water, 60 C, on the bench" in lines
    frozen = given("pot: solid water, 0 C, on the bench")
    assert frozen.text().split("\n") == after(frozen, "pour the pot into the cup")


def test_stirring_needs_a_recipe_and_warmth():
    cold = given("pot: liquid milk, solid chocolate, 40 C, on the bench")
    assert "pot: liquid milk, solid chocolate, 40 C, on the bench" in after(cold, "stir the pot")
    warm = given("pot: liquid milk, liquid chocolate, 60 C, on the bench")
    assert "pot: liquid cocoa, 60 C, on the bench" in after(warm, "stir the pot")
    odd = given("pot: liquid water, liquid oil, 80 C, on the bench")
    assert "pot: liquid water, liquid oil, 80 C, on the bench" in after(odd, "stir the pot")


def test_battery_lamp_and_panel():
    world = given("lamp: on, dark", "battery: 20 percent, loose", "time: night")
    lines = after(world, "connect the battery to the panel", "connect the battery to the lamp")
    assert "lamp: on, dark" in lines                                        # the one wire was in use
    lines = after(world, "disconnect the battery", "connect the battery to the lamp")
    assert "lamp: on, glowing" in lines
    lines = after(world, "wait")                                            # it was the last of the charge
    assert "battery: 0 percent, wired to the lamp" in lines and "lamp: on, dark" in lines
    lines = after(world, "disconnect the battery", "connect the battery to the panel", "wait")
    assert "battery: 20 percent, wired to the panel" in lines               # charged by the morning light


@pytest.mark.parametrize("time, soil, then", [
    ("noon", "wet, bean seed, at the window", "damp, bean sprout, at the window"),
    ("night", "wet, bean seed, at the window", "damp, bean seed, at the window"),
    ("noon", "damp, ivy sprout, at the window", "dry, ivy sprout, at the window"),
    ("noon", "damp, ivy sprout, in the corner", "dry, ivy flower, in the corner"),
    ("noon", "dry, rose sprout, at the window", "dry, rose wilted, at the window"),
    ("noon", "dry, rose seed, at the window", "dry, rose seed, at the window")])
def test_growth_needs_water_and_the_right_light(time, soil, then):
    assert f"soil: {then}" in after(given(f"time: {time}", f"soil: {soil}"), "wait")


def test_sow_water_and_pull_up():
    world = given("cup: liquid water, 20 C, on the bench", "jar: liquid water, 80 C, on the bench")
    lines = after(world, "sow the bean", "water the soil from the cup")
    assert "soil: wet, bean seed, at the window" in lines and "cup: empty, on the bench" in lines
    assert "shelf: salt, milk" in lines
    hot = given("soil: dry, bean sprout, at the window", "jar: liquid water, 80 C, on the bench")
    assert "soil: wet, bean wilted, at the window" in after(hot, "water the soil from the jar")
    ripe = given("soil: dry, ivy flower, at the window")
    lines = after(ripe, "pull up the plant")
    assert "soil: dry, bare, at the window" in lines and "shelf: salt, milk, bean, ivy" in lines


def test_unknown_actions():
    for z in ("dance", "", "put the pot in the stove", "take the stove", "pour the pot into the pot",
              "open the lamp", "add the bean to the pot", "wait longer"):
        with pytest.raises(ValueError):
            given().step(z)


# ---- the transitions as data

def test_next_state_follows_from_the_text_alone():
    seen = {}
    for x, z, y in DRAWN:
        assert seen.setdefault((x, z), y) == y
        world = read(x)
        assert world.text() == x
        world.step(z)
        assert world.text() == y


def test_episodes_chain_and_repeat_by_seed():
    for e in EPISODES[:20]:
        assert len(e) == physics.STEPS and all(a[2] == b[0] for a, b in zip(e, e[1:]))
    assert episode(random.Random(7)) == EPISODES[7] != EPISODES[8]


def kind(z):
    return max((k for k in KINDS if z == k or z.startswith(k + " ")), key=len)


def test_kinds_and_failures_are_in_proportion():
    shares = Counter(kind(z) for _, z, _ in DRAWN)
    assert len(KINDS) == len(shares) == 18
    assert min(shares.values()) > 0.015 * len(DRAWN)
    assert 0.07 < sum(x == y for x, _, y in DRAWN) / len(DRAWN) < 0.15


def test_states_are_short_and_varied():
    words = [len(x.split()) for x, _, _ in DRAWN]
    assert all(x.count("\n") == 10 for x, _, _ in DRAWN)
    assert min(words) >= 35 and max(words) <= 60
    vocabulary = set(re.findall(r"-?\w+", " ".join(x + " " + z for x, z, _ in DRAWN)))
    assert len(vocabulary) <= 150
    states = Counter(s for e in EPISODES for s in [e[0][0]] + [y for x, _, y in e if x != y])
    assert len(states) > 0.95 * sum(states.values())


def test_the_diff_tells_the_action():
    causes, diffs = defaultdict(set), []
    for x, z, y in DRAWN:
        assert z not in y
        if x != y:
            diff = tuple((a, b) for a, b in zip(x.split("\n"), y.split("\n")) if a != b)
            causes[diff].add(z)
            diffs.append(diff)
    assert sum(len(causes[d]) == 1 for d in diffs) >= 0.93 * len(diffs)
