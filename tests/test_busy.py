"""Busy logs of the text worlds: somebody else acts as well, in training alone, and never on what is
ours; and the draws."""
import copy
import random
from collections import Counter

import pytest
from test_physics import read

import envs
from envs import physics, tools, web
from settings import parse

WORLDS = {"tools": tools, "physics": physics, "web": web}
OURS = {"tools": ("user", "results", "reply"),
        "web": ("view", "search", "colour", "sort", "page", "1", "2", "3", "note", "dialog")}


@pytest.fixture(params=WORLDS)
def world(request):
    return WORLDS[request.param]


def watch(monkeypatch, world, act=None):
    """[(text before, text after)] of each time that somebody else acts; act(self, rng) in place of
    what he does."""
    seen, own = [], act or world.World.others_act

    def others_act(self, rng):
        before = self.text()
        own(self, rng)
        seen.append((before, self.text()))

    monkeypatch.setattr(world.World, "others_act", others_act)
    return seen


def episodes(world, n, busy):
    return [world.episode(random.Random(seed), busy=busy) for seed in range(n)]


def test_clean_logs_are_those_without_the_others(monkeypatch, world):
    clean = [world.episode(random.Random(seed)) for seed in range(20)]
    seen = watch(monkeypatch, world)
    assert episodes(world, 20, 0.0) == clean and not seen
    assert episodes(world, 20, 0.5) != clean and seen


def test_a_clean_log_draws_no_number_for_the_others():
    """By hand: propose, step, and nothing else."""
    rng, rows = random.Random(5), []
    world = physics.World(rng)
    for _ in range(physics.STEPS):
        x, z = world.text(), world.propose(rng)
        world.step(z)
        rows.append((x, z, world.text()))
    assert physics.episode(random.Random(5), busy=0.0) == physics.episode(random.Random(5)) == rows


@pytest.mark.parametrize("busy", [0.2, 0.5, 1.0])
def test_others_act_in_the_share_that_is_asked(monkeypatch, world, busy):
    seen = watch(monkeypatch, world)
    rows = [row for steps in episodes(world, 60, busy) for row in steps]
    assert len(rows) == 60 * 14 and len(seen) / len(rows) == pytest.approx(busy, abs=0.05)
    assert sum(a != b for a, b in seen) > 0.8 * len(seen)  # what they do is mostly seen


def test_busy_episodes_are_chains_fixed_by_the_seed(world):
    assert episodes(world, 10, 0.5) == episodes(world, 10, 0.5)
    assert all(a[2] == b[0] for steps in episodes(world, 10, 0.5) for a, b in zip(steps, steps[1:]))


def test_up_to_their_first_act_nothing_is_different(monkeypatch, world):
    """Held against others who do nothing: x and z are the same, and so is what z makes of x; y is
    what they made of that."""
    acted, idle = [], []
    for seed in range(60):
        with monkeypatch.context() as patch:
            seen = watch(patch, world)
            acted.append((world.episode(random.Random(seed), busy=1.0)[0], seen[0]))
        with monkeypatch.context() as patch:
            watch(patch, world, act=lambda self, rng: None)
            idle.append(world.episode(random.Random(seed), busy=1.0)[0])
    for (row, (before, after)), alone in zip(acted, idle):
        assert row[:2] == alone[:2] and alone[2] == before and row[2] == after
    assert sum(row[2] != alone[2] for (row, _), alone in zip(acted, idle)) > 48


def test_y_is_what_z_and_then_the_others_make_of_x(monkeypatch, world):
    """By a copy of the world at x, which z alone moves."""
    copies, act = [], world.World.others_act

    def others_act(self, rng):
        act(self, rng)
        copies.append(copy.deepcopy(self))

    seen = watch(monkeypatch, world, act=others_act)
    for seed in range(15):
        steps = world.episode(random.Random(seed), busy=1.0)
        for (x, z, y), here, (before, after) in zip(steps[1:], copies, seen[1:]):
            assert here.text() == x and y == after
            here.step(z)
            assert here.text() == before
        assert len(copies) == len(seen) == len(steps)
        copies.clear(), seen.clear()


def test_housemate_explains_what_z_does_not_in_physics(monkeypatch):
    """By the rules alone, from the text."""
    seen = watch(monkeypatch, physics)
    rows = [row for steps in episodes(physics, 60, 0.4) for row in steps]
    acted, strange = {after for _, after in seen}, 0
    for x, z, y in rows:
        world = read(x)
        world.step(z)
        if world.text() != y:
            assert (world.text(), y) in seen and y in acted
            strange += 1
    assert strange == sum(before != after for before, after in seen) > 200


@pytest.mark.parametrize("name", OURS)
def test_others_do_not_touch_what_is_ours(monkeypatch, name):
    world = WORLDS[name]
    seen = watch(monkeypatch, world)
    episodes(world, 150, 1.0)
    changed = Counter()
    for before, after in seen:
        a, b = before.split("\n"), after.split("\n")
        assert len(a) == len(b)
        changed.update(old.split(":")[0].split(" ")[0] for old, new in zip(a, b) if old != new)
    assert not set(changed) & set(OURS[name]) and len(changed) > 4, changed


def test_the_housemate_does_not_wait(monkeypatch):
    """Time passes by our own waiting alone."""
    zs, act, step = [], physics.World.others_act, physics.World.step

    def others_act(self, rng):
        twin = copy.deepcopy(self)
        monkeypatch.setattr(physics.World, "step", lambda self, z: zs.append(z) if self is twin
                            else step(self, z))
        act(twin, rng)
        monkeypatch.setattr(physics.World, "step", step)
        act(self, rng)

    monkeypatch.setattr(physics.World, "others_act", others_act)
    episodes(physics, 60, 1.0)
    assert len(zs) == 60 * 14 and "wait" not in zs and len({z.split(" ")[0] for z in zs}) > 7


def test_others_do_only_what_is_theirs(monkeypatch):
    kinds = {"tools": [], "web": []}
    for name, kind_of in (("tools", lambda z: z.split("(")[0]), ("web", lambda z: web.read(z)[0])):
        world, step = WORLDS[name], WORLDS[name].World.step
        acting, act = [], world.World.others_act

        def others_act(self, rng, act=act, acting=acting):
            acting.append(self)
            act(self, rng)
            acting.clear()

        def stepped(self, z, step=step, acting=acting, kinds=kinds[name], kind_of=kind_of):
            if acting and self is acting[0]:
                kinds.append(kind_of(z))
            return step(self, z)

        monkeypatch.setattr(world.World, "others_act", others_act)
        monkeypatch.setattr(world.World, "step", stepped)
        episodes(world, 60, 1.0)
    assert set(kinds["tools"]) == set(tools.OTHERS) and set(kinds["web"]) == set(web.OTHERS)


# --- the splits -----------------------------------------------------------------------------------

def config(*argv):
    return parse(["--episodes", "12", *argv])


@pytest.mark.parametrize("env", WORLDS)
def test_validation_and_test_do_not_depend_on_busy(env):
    clean, busy = (config("--env", env, "--busy", share) for share in ("0", "0.9"))
    for split in ("validation", "test"):
        assert envs.episodes(clean, split) == envs.episodes(busy, split)
    assert envs.load_splits(clean)[1] == envs.load_splits(busy)[1]
    for split in ("labelled", "state-only"):
        assert envs.episodes(clean, split) != envs.episodes(busy, split)


@pytest.mark.parametrize("env", WORLDS)
def test_validation_size_does_not_change_the_test_draw(env):
    few, many = (envs.load_splits(parse(["--env", env, "--validation-size", n]))
                 for n in ("20", "160"))
    assert len(few[1]) == 20 and len(many[1]) == 160 and few[3] == many[3]


@pytest.mark.parametrize("env", WORLDS)
def test_eval_size_does_not_change_the_validation_draw(env):
    few, many = (envs.load_splits(config("--env", env, "--eval-size", n)) for n in ("20", "160"))
    assert len(few[3]) == 20 and len(many[3]) == 160 and few[1] == many[1]


@pytest.mark.parametrize("env", WORLDS)
def test_the_test_transitions_do_not_depend_on_busy(env):
    """Those that are scored: the same command, clean or busy, is judged by the same transitions."""
    clean, busy = (envs.load_splits(config("--env", env, "--busy", share))[3]
                   for share in ("0", "0.5"))
    assert clean == busy


def test_pixels_are_clean_unless_asked():
    assert parse(["--env", "pixels"]).busy == 0 < parse([]).busy


def test_pixels_and_busy_are_one_line_or_no_error():
    try:
        busy = parse(["--env", "pixels", "--busy", "0.5"]).busy
        envs.draw(envs.pixels.episode, 0, "labelled", 1, busy)
    except SystemExit as stop:
        assert stop.code == 2
