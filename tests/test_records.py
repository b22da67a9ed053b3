"""Claims of `envs/records.py`: bad files are told in one line with the place; splits share no
episode."""

import gzip
import json
import os
import random

import pytest

from envs import records
from envs.records import BadData, Transition


def row(episode="e", t=0, **keys):
    record = {"episode": episode, "t": t, "x": "on", "z": "turn off", "y": "off", **keys}
    # ... leaves the key out
    return {key: value for key, value in record.items() if value is not ...}


def save(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def world(episodes, steps=3, no_z=()):
    """Transitions of the named episodes; those in no_z lack one z."""
    return [Transition(e, t, f"x {e} {t}", None if e in no_z and t == 1 else f"z {t}", f"y {e} {t}")
            for e in episodes for t in range(steps)]


def names(transitions):
    return {tr.episode for tr in transitions}


# ---- Read and write ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
def test_round_trip(tmp_path, name):
    transitions = world(["a", "b"], no_z=["b"])
    transitions += [Transition("c", t, "水 \u2028 x", "é", "😀\ny") for t in (0, 1)]
    path = tmp_path / name
    path.write_text("the old file")
    records.write(path, transitions)
    assert records.read(path) == transitions
    assert os.listdir(tmp_path) == [name]  # nothing unfinished is left behind
    data = path.read_bytes()
    assert (data[:2] == b"\x1f\x8b") == name.endswith(".gz")
    assert not name.endswith(".gz") or data[4:8] == bytes(4)  # no time stamp
    assert b"null" not in (gzip.decompress(data) if name.endswith(".gz") else data)  # no z: no key
    records.write(path, transitions)
    assert path.read_bytes() == data


def test_read_sorts_skips_blank_lines_and_extra_keys(tmp_path):
    rows = [
        row("b", 9), row("a", 2), "", row("b", 7, reward=[1], source="mine"), row("a", 1, z=...),
        "  "]
    got = records.read(save(tmp_path / "d.jsonl", rows))
    assert [(tr.episode, tr.t, tr.z) for tr in got] == [("a", 1, None), ("a", 2, "turn off"),
                                                        ("b", 7, "turn off"), ("b", 9, "turn off")]
    assert got[0].source.endswith("d.jsonl:5")


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    lines = "\r\n".join(json.dumps(row(t=t)) for t in range(2))
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert len(records.read(tmp_path / "d.jsonl")) == 2


def test_write_keeps_the_old_file_if_it_fails(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("the old file")
    with pytest.raises(AttributeError):
        records.write(path, [Transition("a", 0, "x", "z", "y"), "not a transition"])
    assert path.read_text() == "the old file" and os.listdir(tmp_path) == ["d.jsonl"]
    with pytest.raises(BadData, match="cannot write"):
        records.write(tmp_path / "nowhere" / "d.jsonl", [])


# ---- Bad files -----------------------------------------------------------------------------------

def error(path, **options):
    with pytest.raises(BadData) as caught:
        records.read(path, **options)
    message = str(caught.value)
    assert (
        len(message.splitlines()) == 1 and "; " in message and isinstance(caught.value, ValueError)
    )
    return message


BAD_LINES = {  # the line, and what its message must name
    "broken": ('{"episode": "e", "t": 1', "JSON"),
    "two objects": ('{"episode": "e"} {"t": 1}', "JSON"),
    "deep": ("[" * 100_000, "JSON"),
    "array": ([1, 2], "object"),
    "string": ('"x"', "object"),
    "no episode": (row(episode=..., t=1), '"episode"'),
    "no t": (row(t=...), '"t"'),
    "no x": (row(t=1, x=...), '"x"'),
    "no y": (row(t=1, y=...), '"y"'),
    "episode number": (row(episode=7, t=1), '"episode"'),
    "episode empty": (row(episode="", t=1), '"episode"'),
    "t string": (row(t="1"), '"t"'),
    "t float": (row(t=1.0), '"t"'),
    "t bool": (row(t=True), '"t"'),
    "x list": (row(t=1, x=["on"]), '"x"'),
    "y null": (row(t=1, y=None), '"y"'),
    "y long object": (row(t=1, y={"a": "b" * 999}), '"y"'),
    "x empty": (row(t=1, x=""), '"x"'),
    "y blank": (row(t=1, y=" \n\t"), '"y"'),
    "z null": (row(t=1, z=None), '"z"'),
    "z number": (row(t=1, z=3), '"z"'),
    "z blank": (row(t=1, z="  "), '"z"'),
    "half a character": (row(t=1, x="a \ud800"), '"x"'),
    "again": (row(t=0, x="other"), "twice"),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_told_with_file_and_line(tmp_path, name, suffix):
    line, word = BAD_LINES[name]
    path = save(tmp_path / "d.jsonl", [row(), "", line, row(t=2)])
    if suffix:
        with open(path, "rb") as file, gzip.open(path + suffix, "wb") as out:
            out.write(file.read())
    message = error(path + suffix)
    assert (
        message.startswith(path + suffix + ":3: ")
        and word in message
        and len(message) < len(path) + 250
    )


def test_short_episode(tmp_path):
    path = save(tmp_path / "d.jsonl", [row("a", 0), row("lonely", 0), row("a", 1)])
    assert error(path).startswith(path + ":2: ") and "lonely" in error(path)
    assert len(records.read(path, min_steps=1)) == 3


def test_one_line_episode_is_taken_if_its_split_is_set(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"episode": "dev-a", "t": 7, "x": "a", "z": "go", "y": "b"}))
    assert [t.episode for t in records.read(path)] == ["dev-a"]


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "no such file" in error(str(tmp_path / "none.jsonl"))
    assert "cannot read" in error(str(tmp_path))


def test_an_empty_file_is_refused(tmp_path):
    for rows in ([], ["", "  "]):
        path = save(tmp_path / "empty.jsonl", rows)
        assert error(path).startswith(path + ": ") and "no transitions" in error(path)
    empty = tmp_path / "empty.jsonl.gz"
    empty.write_bytes(b"")
    assert "no transitions" in error(str(empty))


PACKED = gzip.compress("".join(json.dumps(row(t=t)) + "\n" for t in range(9)).encode())


def test_broken_gzip_is_refused(tmp_path):
    assert "gzip" in error(save(tmp_path / "plain.jsonl.gz", [row(), row(t=1)]))
    for name, data in (("cut", PACKED[:-9]), ("torn", PACKED[:20] + b"\xff\xff\xff" + PACKED[23:])):
        (tmp_path / f"{name}.gz").write_bytes(data)
        assert error(str(tmp_path / f"{name}.gz")).startswith(str(tmp_path / name))
        assert "gzip" in error(str(tmp_path / f"{name}.gz"))


def test_bytes_that_are_no_utf_8_are_told_by_line(tmp_path):
    (tmp_path / "packed.jsonl").write_bytes(PACKED)
    message = error(str(tmp_path / "packed.jsonl"))
    assert ":1: " in message and ".gz" in message
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(row()).encode() + b'\n{"x": "\xe9"}\n')
    assert ":2: " in error(str(tmp_path / "latin.jsonl"))


# ---- Split ---------------------------------------------------------------------------------------

def check(transitions, seed):
    """The split, after what holds for every split: a partition by episode, z everywhere but in
    state_only."""
    parts = records.split(transitions, seed)
    assert list(parts) == ["labelled", "state_only", "validation", "test"]
    everything = sorted((tr.episode, tr.t, tr.x, tr.y) for part in parts.values() for tr in part)
    assert everything == sorted((tr.episode, tr.t, tr.x, tr.y) for tr in transitions)
    assert sum(len(names(part)) for part in parts.values()) == len(names(transitions))
    for name, part in parts.items():
        assert part == sorted(part, key=lambda tr: (tr.episode, tr.t))
        assert all((tr.z is None) == (name == "state_only") for tr in part)
    assert parts["labelled"] and parts["validation"] and parts["test"]
    return parts


def test_no_prefix_70_10_20_and_halves():
    parts = check(world([f"e{i}" for i in range(100)]), seed=0)
    assert [len(names(part)) for part in parts.values()] == [35, 35, 10, 20]


@pytest.mark.parametrize("n", range(3, 30))
def test_small_files(n):
    parts = check(world([f"e{i}" for i in range(n)]), seed=n)
    # 3 episodes are too few for a state-only one; from 4 on every part has some
    assert bool(parts["state_only"]) == (n > 3)


def test_prefixes_fix_the_split():
    episodes = [f"{p}-{i}" for p, n in (("train", 20), ("dev", 3), ("test", 5)) for i in range(n)]
    parts = check(world(episodes), seed=1)
    assert names(parts["validation"]) == {"dev-0", "dev-1", "dev-2"}
    assert names(parts["test"]) == {f"test-{i}" for i in range(5)}
    assert len(names(parts["labelled"])) == len(names(parts["state_only"])) == 10
    assert names(parts["labelled"]) != names(check(world(episodes), seed=2)["labelled"])


def test_no_dev_takes_a_tenth_of_the_labelled():
    episodes = [f"train-{i}" for i in range(60)] + ["test-0"]
    assert [len(names(part)) for part in check(world(episodes), seed=1).values()] == [27, 30, 3, 1]


def test_mixed_files_keep_their_prefixes():
    fixed = [f"{p}-{i}" for p in ("train", "dev", "test") for i in range(10)]
    # no prefixes
    free = [f"{p}{i}" for p in ("training", "contest-", "devil", "tester") for i in range(25)]
    parts = check(world(fixed + free), seed=2)
    train = names(parts["labelled"]) | names(parts["state_only"])
    for p, members in (
        ("train", train),
        ("dev", names(parts["validation"])),
        ("test", names(parts["test"])),
    ):
        assert {f"{p}-{i}" for i in range(10)} <= members
    assert (len(train), len(names(parts["validation"])), len(names(parts["test"]))) == (80, 20, 30)
    assert names(check(world(["e", "train-0", "train-1", "test-0"]), 0)["test"]) == {"test-0"}


def test_same_seed_same_split_whatever_the_line_order():
    episodes = [f"e{i}" for i in range(40)] + ["train-a", "dev-a"]
    transitions = world(episodes, no_z=["e3", "e7", "train-a"])
    shuffled = random.Random(0).sample(transitions, len(transitions))
    assert check(transitions, 5) == check(shuffled, 5)
    assert check(transitions, 5) != check(transitions, 6)


def test_split_does_not_depend_on_file_line_order(tmp_path):
    lines = [json.dumps(row(f"e{e}", t)) for e in range(12) for t in range(2)]
    first = records.split(records.read(save(tmp_path / "a.jsonl", lines)), 3)
    random.Random(1).shuffle(lines)
    assert records.split(records.read(save(tmp_path / "b.jsonl", lines)), 3) == first


def test_episodes_without_z_are_state_only():
    episodes = [f"train-{i}" for i in range(20)] + ["dev-0", "test-0"]
    few, many = [f"train-{i}" for i in range(6)], [f"train-{i}" for i in range(15)]
    parts = check(world(episodes, no_z=few), seed=0)
    assert len(names(parts["labelled"])) == 10 and set(few) < names(parts["state_only"])
    parts = check(world(episodes, no_z=many), seed=0)
    assert names(parts["labelled"]) == {f"train-{i}" for i in range(15, 20)}
    # without prefixes: never validation or test; 70/10/20 of the ones with z
    episodes = [f"e{i}" for i in range(60)]
    parts = check(world(episodes, no_z=episodes[:40]), seed=0)
    assert [len(names(part)) for part in parts.values()] == [14, 40, 2, 4]


@pytest.mark.parametrize("prefix", ["dev", "test"])
def test_held_out_episode_without_z_is_refused(tmp_path, prefix):
    rows = [
        row(f"{p}-{i}", t) for p in ("train", "dev", "test") for i in range(3) for t in range(2)
    ]
    rows.append(row(f"{prefix}-0", 2, z=...))
    path = save(tmp_path / "d.jsonl", rows)
    with pytest.raises(BadData, match=f"^{path}:{len(rows)}: .*{prefix}-0.* no z.*; ") as caught:
        records.split(records.read(path), 0)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(BadData, match="no z"):  # of transitions that no file holds, too
        records.split(world(["train-0", "dev-0", "test-0"], no_z=[f"{prefix}-0"]), 0)


@pytest.mark.parametrize("missing, transitions", [
    ("labelled", []),
    ("labelled", world(["dev-0", "test-0"])),
    ("labelled", world(["train-0", "train-1", "dev-0", "test-0"], no_z=["train-0", "train-1"])),
    ("labelled", world(["train-0", "test-0"])),  # its only labelled episode went to validation
    ("test", world(["train-0", "train-1", "dev-0"])),
    ("labelled", world(["a", "b", "c", "d"], no_z="abcd")),
])
def test_a_split_that_cannot_be_had_is_refused(tmp_path, missing, transitions):
    with pytest.raises(BadData, match=f"no episode is left for the {missing} split.*; "):
        records.split(transitions, 0)
    if transitions:
        records.write(tmp_path / "d.jsonl", transitions)
        with pytest.raises(BadData, match=f"^{tmp_path / 'd.jsonl'}: "):
            records.split(records.read(tmp_path / "d.jsonl"), 0)
