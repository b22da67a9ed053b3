"""Claims of `envs/scienceworld.py`, on a tiny stand-in with the simulator's methods; the real one
in a slow test."""

import collections
import random
import sys
import types

import pytest

from envs import records, scienceworld


class Fake:
    """A corridor: "go N" moves to room N, "wait" does nothing, "hum" is valid, yet not understood;
    "pick" asks which."""
    SPLITS = {"train": range(6), "dev": range(6, 9), "test": range(9, 12)}

    def __init__(self, length=30, valid=("wait",)):
        self.server, self.length, self.valid, self.log, self.closed = (
            self, length, list(valid), [], False)

    def load(self, task, variation=0, simplifications="", generateGoldPath=False):
        self.task, self.variation, self.room, self.asks, self.gold = (
            task, variation, 0, False, generateGoldPath)
        self.log.append((task, variation, simplifications, generateGoldPath))

    def get_task_names(self):
        return ["melt", "power-component"]

    def get_variations_train(self):
        return self.SPLITS["train"]

    def get_variations_dev(self):
        return self.SPLITS["dev"]

    def get_variations_test(self):
        return self.SPLITS["test"]

    def get_gold_action_sequence(self):
        return [f"go {i + 1}" for i in range(self.length)] if self.gold else ["ERROR: no gold path"]

    def get_valid_action_object_combinations(self):
        random.shuffle(self.valid)  # the real one's order differs from load to load
        return self.valid

    def step(self, z):
        self.log.append(z)
        if self.asks:
            self.asks = False
            assert z == "", "a question is open, and the command would be its answer"
            return "No action."
        if z == "hum":
            self.room += 1000  # even if it did something, x is read afresh
            return "No known action matches that input."
        if z == "pick":
            self.asks = True
            return "Ambiguous request: Please enter the number"
        if z.startswith("go"):
            self.room = int(z.split()[1]) + self.room // 1000 * 1000
        return f"You do: {z} \n\n"

    def freeActionLook(self):
        return f"Room {self.room} of {self.task}. \n\ta door \n\n"

    def freeActionInventory(self):
        return "In your inventory:\n\tan orange\n"

    def close(self):
        self.closed = True


def told(room, task="melt"):
    return f"Room {room} of {task}.\n\ta door\nIn your inventory:\n\tan orange"


# an observation before the first command
LOOK = "Room 0 of melt.\n\ta door"


def record(env=None, **options):
    counts = collections.Counter()
    got = scienceworld.episode(
        env or Fake(), "melt", 7, "dev", random.Random(0), counts=counts, **options
    )
    return got, counts


def test_the_gold_path_word_for_word():
    got, counts = record(slips=0, steps=100)
    assert [(tr.episode, tr.t, tr.x, tr.z, tr.y) for tr in got] == \
        [("dev-melt-007", t, told(t), f"go {t + 1}", told(t + 1)) for t in range(30)] and not counts


def test_observations():
    got, _ = record(slips=0, steps=100, observations=True)
    assert [(tr.x, tr.y) for tr in got] == [
        (LOOK if t == 0 else f"You do: go {t}", f"You do: go {t + 1}") for t in range(30)
    ]


@pytest.mark.parametrize("observations", [False, True])
def test_a_window_is_the_same_as_in_the_whole_path(observations):
    """Whatever lies before the window, slips and misunderstandings too, the window's x is true."""
    begins = set()
    for seed in range(60):
        env = Fake(valid=("hum", "pick", "wait", "go 500"))
        window = scienceworld.episode(
            env,
            "melt",
            7,
            "dev",
            random.Random(seed),
            slips=0.5,
            steps=6,
            unchanged=1,
            observations=observations,
        )
        begins.add(window[0].t)
        assert len(window) <= 6 and window[-1].t - window[0].t < 6
        # replay of all that the simulator was told
        twin, seen, t = Fake(), {}, -1
        twin.load("melt")
        before = LOOK
        for z in [z for z in env.log[1:] if z != ""]:
            t += 1
            x = before if observations else scienceworld.state(twin)
            answer = twin.step(z)
            if answer.startswith("Amb"):
                twin.step("")
            elif not answer.startswith("No known"):
                before = scienceworld.tidy(answer)
                seen[t] = (x, z, before if observations else scienceworld.state(twin))
        for tr in window:
            assert seen[tr.t] == (tr.x, tr.z, tr.y)
    assert len(begins) > 20  # windows lie anywhere


def test_slips_are_as_many_as_asked_for_and_understood():
    n = collections.Counter()
    for seed in range(40):
        env = Fake(valid=("wait", "hum"))
        got = scienceworld.episode(
            env,
            "melt",
            1,
            "train",
            random.Random(seed),
            slips=0.2,
            steps=10**6,
            unchanged=1,
            counts=n,
        )
        assert all(tr.z != "hum" for tr in got) and [tr.z for tr in got if tr.z != "wait"] == [
            f"go {i + 1}" for i in range(30)
        ]
        n["wait"] += sum(tr.z == "wait" for tr in got)
    hums = n["commands that the simulator did not understand, left out"]
    assert 90 < hums < 150 and 90 < n["wait"] < 150  # 40 * 30 * 0.2 / 2 = 120 each
    assert not [tr for tr in record(slips=0)[0] if tr.z == "wait"]


def test_seed_fixes_the_slips_in_any_listing_order():
    some = [
        [
            tr.z
            for tr in record(Fake(valid=[f"go {n}" for n in range(100, 130)]), slips=0.5, steps=99)[
                0
            ]
        ]
        for _ in range(5)
    ]
    assert all(zs == some[0] for zs in some) and any(
        z.startswith("go 1") and len(z) == 6 for z in some[0]
    )


def test_unchanged():
    def waits(unchanged):
        n = collections.Counter()
        got = [
            tr
            for seed in range(40)
            for tr in scienceworld.episode(
                Fake(),
                "melt",
                1,
                "train",
                random.Random(seed),
                slips=1,
                steps=99,
                unchanged=unchanged,
                counts=n,
            )
        ]
        same = sum(tr.x == tr.y for tr in got)
        assert same + n["transitions in which nothing changes, left out"] == 1200 == len(got) - same
        return same
    assert waits(0) == 0 and waits(1) == 1200 and 190 < waits(0.2) < 290


def twenty(seed, broken, counts):
    """20 episodes of two tasks."""
    tasks, options = ["melt", "power-component"], dict(slips=0, simplifications="openDoors")
    return list(scienceworld.record(
        Fake(3), tasks, episodes=20, seed=seed, broken=broken, counts=counts, **options
    ))


def test_splits_take_their_shares_and_own_variations():
    counts, broken = collections.Counter(), []
    got = twenty(0, broken, counts)
    episodes = sorted({tr.episode for tr in got})
    assert len(episodes) == 20 and not broken and not counts
    for episode in episodes:
        split, task, variation = (
            episode.split("-")[0], "-".join(episode.split("-")[1:-1]), int(episode[-3:]))
        assert variation in Fake.SPLITS[split] and task in Fake().get_task_names()
    assert collections.Counter(e.split("-")[0] for e in episodes) == {
        "train": 10,
        "dev": 4,
        "test": 6,
    }
    for one in ("melt", "power-component"):
        assert {e.split("-")[0] for e in episodes if one in e} == {"train", "dev", "test"}


def test_the_seed_decides_the_variations():
    counts, broken = collections.Counter(), []
    got = twenty(0, broken, counts)
    again = twenty(0, broken, counts)
    other = twenty(1, broken, counts)
    assert got == again
    assert {tr.episode for tr in other} != {tr.episode for tr in got}


def test_episodes_end_with_the_variations():
    counts, broken = collections.Counter(), []
    everything = list(scienceworld.record(
        Fake(3), ["melt"], 99, seed=0, broken=broken, counts=counts, slips=0
    ))
    assert len({tr.episode for tr in everything}) == 12 and list(counts.values()) == [87]
    assert len(records.split(everything, 0)["labelled"]) == 9


def test_an_episode_without_a_gold_path_is_told():
    env, broken = Fake(3), []
    env.get_gold_action_sequence = lambda: ["ERROR"] if env.variation == 9 else ["go 1"]
    got = list(scienceworld.record(
        env, ["melt"], 12, seed=0, broken=broken, counts=collections.Counter()
    ))
    assert (
        broken == ["test-melt-009: the simulator has no gold path"]
        and len({tr.episode for tr in got}) == 11
    )


# ---- Command line --------------------------------------------------------------------------------

@pytest.fixture
def fake(monkeypatch):
    env = Fake()
    py4j = types.ModuleType("py4j.protocol")
    py4j.Py4JError = type("Py4JError", (Exception,), {})
    monkeypatch.setitem(sys.modules, "py4j", types.ModuleType("py4j"))
    monkeypatch.setitem(sys.modules, "py4j.protocol", py4j)
    package = types.ModuleType("scienceworld")
    package.ScienceWorldEnv = lambda *_, **__: env
    monkeypatch.setitem(sys.modules, "scienceworld", package)
    monkeypatch.setattr(scienceworld.shutil, "which", lambda name: "/usr/bin/" + name)
    env.error = py4j.Py4JError
    return env


def test_the_command(fake, tmp_path, capsys):
    out = tmp_path / "d.jsonl.gz"
    assert (
        scienceworld.main(
            [
                "--episodes",
                "8",
                "--steps",
                "5",
                "--slips",
                "0",
                "--simplifications",
                "openDoors",
                "openContainers",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert (
        len(records.read(out)) == 40
        and fake.closed
        and "40 transitions of 8 episodes" in capsys.readouterr().out
    )
    assert all(
        entry[2] == "openDoors,openContainers" for entry in fake.log if isinstance(entry, tuple)
    )


@pytest.mark.parametrize(
    "argv, what",
    [
        (["--slips", "2"], "--slips cannot be 2.0"),
        (["--steps", "0"], "--steps cannot be 0"),
        (["--episodes", "-1"], "--episodes cannot be -1"),
        (["--unchanged", "-.1"], "--unchanged cannot be"),
        (["--tasks", "fly"], "--tasks fly: there is no such task; the tasks are melt, "),
        (["--simplifications", "easy"], "take away what power-component needs"),
        (["--simplifications", "cheap"], "--simplifications"),
    ],
)
def test_bad_flags(fake, tmp_path, capsys, argv, what):
    with pytest.raises(SystemExit) as caught:
        scienceworld.main(["--out", str(tmp_path / "d.jsonl"), *argv])
    err = capsys.readouterr().err
    assert (
        caught.value.code == 2
        and err.startswith("error: ")
        and what in err
        and err.count("\n") == 1
        and not list(tmp_path.iterdir())
    )


def test_a_simulator_that_dies_leaves_nothing(fake, tmp_path, capsys):
    def die():
        raise fake.error("connection lost\nat line 3")
    fake.get_gold_action_sequence = die
    with pytest.raises(SystemExit):
        scienceworld.main(["--out", str(tmp_path / "d.jsonl")])
    assert capsys.readouterr().err.strip().split("\n")[-1] == \
        "error: the simulator stopped (Py4JError: connection lost at line 3); start again"
    assert fake.closed and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "lack, what",
    [
        ("package", "pip install scienceworld"),
        ("java", "there is no java"),
        ("start", "java -version"),
    ],
)
def test_what_is_not_installed(fake, monkeypatch, tmp_path, capsys, lack, what):
    if lack == "package":
        monkeypatch.setitem(sys.modules, "scienceworld", None)
    elif lack == "java":
        monkeypatch.setattr(scienceworld.shutil, "which", lambda name: None)
    else:
        sys.modules["scienceworld"].ScienceWorldEnv = lambda *_, **__: int("no port")
    with pytest.raises(SystemExit) as caught:
        scienceworld.main(["--out", str(tmp_path / "d.jsonl")])
    err = capsys.readouterr().err
    assert (
        caught.value.code == 2
        and err.startswith("error: ")
        and what in err
        and err.count("\n") == 1
    )


@pytest.mark.slow
def test_the_real_simulator(tmp_path):
    pytest.importorskip("scienceworld")
    if scienceworld.shutil.which("java") is None:
        pytest.skip("no java")
    out = tmp_path / "d.jsonl.gz"
    assert (
        scienceworld.main(
            [
                "--tasks",
                "find-plant",
                "power-component",
                "--episodes",
                "4",
                "--unchanged",
                "1",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    got = records.read(out)
    assert len({tr.episode for tr in got}) == 4 and all(
        "In your inventory, you see:" in tr.x for tr in got
    )
    # what the game itself says of these commands: an opened door is open, and one is where one went
    opened = [tr for tr in got if tr.z.startswith("open door to ") and tr.x != tr.y]
    assert opened and all(
        f"door to the {tr.z.removeprefix('open door to ')} (that is open)" in tr.y for tr in opened
    )
    went = [tr for tr in got if tr.z.startswith("go to ") and tr.x != tr.y]
    assert went and all(
        f"called the {tr.z.removeprefix('go to ')}" in tr.y.split("\n")[0] for tr in went
    )
