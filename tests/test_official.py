"""Claims of `envs/official.py`: rows as json.load gives them, whatever the buffer; one line for
what is wrong; nothing half-written."""

import gzip
import hashlib
import json
import os
import random
import re
import tracemalloc
from pathlib import Path

import pytest

from envs import cloud, mind2web, mirrorapi, official, records, scienceworld
from envs.records import BadData

TEST, TRAIN = (
    str(Path(__file__).parent / "data" / name)
    for name in ("mirrorapi.json", "mirrorapi_train.jsonl")
)


def anything(rng, depth=3):
    """A random JSON value."""
    kind = rng.randrange(8 if depth else 6)
    if kind < 2:
        return rng.choice(
            [0, -17, 3.5, 1e300, -2.5e-7, 123456789012345678901234567890, True, False, None]
        )
    if kind < 6:
        return "".join(
            rng.choice(
                ["a", "\\", '"', "\n", "é", "😀", "\u2028", "[", "]", "{", ",", " ", "\\u12"]
            )
            for _ in range(rng.randrange(30))
        )
    items = [anything(rng, depth - 1) for _ in range(rng.randrange(4))]
    return items if kind == 6 else {str(anything(rng, 0)): item for item in items}


@pytest.mark.parametrize("seed", range(60))
def test_a_list_is_what_json_load_gives(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    value = [anything(rng) for _ in range(rng.randrange(12))]
    indent, separators = rng.choice(
        [(None, None), (1, None), (None, ("," + " " * 50 + "\n", ":  "))]
    )
    text = json.dumps(value, indent=indent, separators=separators, ensure_ascii=rng.random() < 0.5)
    path = tmp_path / "d.json"
    path.write_text(rng.choice(["", "\ufeff", "\n \n"]) + text + rng.choice(["", "\n", "  \n\n"]))
    monkeypatch.setattr(official, "CHUNK", rng.choice([1, 2, 3, 7, 40, 10**6]))
    got = list(official.rows(str(path), []))
    assert [row for _, _, row in got] == value and [n for n, _, _ in got] == list(
        range(1, len(value) + 1)
    )
    # with indent 1, a row begins on each line that begins with one blank and no closing bracket
    if indent:
        begin = [
            i
            for i, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1)
            if re.match(r" [^ \]}]", line)
        ]
        assert [place for _, place, _ in got] == [
            f"{path}:{line}, row {n}" for n, line in enumerate(begin, 1)
        ]


@pytest.mark.parametrize("chunk", [5, 10**6])
def test_a_list_that_was_cut_anywhere_is_refused(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(official, "CHUNK", chunk)
    value = [{"a": "x\n\"y\" é"}, [1, 23], -4.5e3, {"b": {"c": None}}]
    text, path = json.dumps(value), tmp_path / "d.json"
    for end in range(1, len(text)):
        path.write_text(text[:end])
        got = []
        with pytest.raises(BadData, match=rf"^{path}:1, row \d: .*; ") as caught:
            for _, _, row in official.rows(str(path), []):
                got.append(row)
        assert got == value[:len(got)] and f"row {len(got) + 1}:" in str(caught.value)
    for wrong in (
        "[1 2]",
        "[1,]",
        "[,]",
        "[1] 2",
        "[1][2]",
        "[nul]",
        "[" + "[" * 10**5,
        "[" + "1" * 5000 + "]",
    ):
        path.write_text(wrong)
        with pytest.raises(BadData, match=f"^{path}.*; ") as caught:
            list(official.rows(str(path), []))
        assert len(str(caught.value).splitlines()) == 1


def test_early_fault_stops_reading_a_large_list(tmp_path, monkeypatch):
    monkeypatch.setattr(official, "CHUNK", 100)
    path = tmp_path / "d.json"
    path.write_text('[{"a": 1},\n{"a" 2},\n' + '{"a": 3},\n' * 10**5 + '{"a": 3}]')
    tracemalloc.start()
    with pytest.raises(BadData, match=":2, row 2: "):
        list(official.rows(str(path), []))
    assert tracemalloc.get_traced_memory()[1] < 200_000  # the file has a million characters
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_a_large_file_is_never_in_memory(tmp_path, name):
    row = json.dumps({"text": "ab" * 500})
    (tmp_path / name).write_text(
        "[" + ",\n".join([row] * 12_000) + "]" if name == "d.json" else (row + "\n") * 12_000
    )
    tracemalloc.start()
    assert sum(1 for _ in official.rows(str(tmp_path / name), [])) == 12_000
    assert (
        tracemalloc.get_traced_memory()[1] < 8 * official.CHUNK < os.path.getsize(tmp_path / name)
    )
    tracemalloc.stop()


@pytest.mark.parametrize("chunk", [1, 9, 10**6])
def test_lines(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(official, "CHUNK", chunk)
    path, broken = tmp_path / "d.jsonl.gz", []
    with gzip.open(path, "wb") as file:
        file.write('\ufeff{"a": "é"}\r\n\n  \n{"a": \n"\u2028"\n[1]'.encode())
    assert list(official.rows(str(path), broken)) == [
        (1, f"{path}:1, row 1", {"a": "é"}),
        (3, f"{path}:5, row 3", "\u2028"),
        (4, f"{path}:6, row 4", [1]),
    ]
    assert len(broken) == 1 and broken[0].startswith(f"{path}:4, row 2: not valid JSON")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'[{"a": 1},\n"\xe9"]')
    (tmp_path / "plain.json.gz").write_text("[]")
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b"[1, 2, 3]" * 99)[:-20])
    (tmp_path / "packed.json").write_bytes(gzip.compress(b"[1]"))
    for path, what in (
        (tmp_path / "none.json", "no such file"),
        (tmp_path, "cannot read"),
        (tmp_path / "latin.json", "UTF-8"),
        (tmp_path / "plain.json.gz", "gzip"),
        (tmp_path / "cut.json.gz", "gzip"),
        (tmp_path / "packed.json", "UTF-8"),
    ):
        with pytest.raises(BadData, match=f"^{path}.*{what}.*; "):
            list(official.rows(str(path), []))


# ---- Command line --------------------------------------------------------------------------------

def test_the_file_that_is_written(tmp_path, capsys):
    out, again = str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.jsonl.gz")
    for path in (out, again):
        assert mirrorapi.main(["--train", TRAIN, "--test", TEST, "--out", path]) == 0
    told = capsys.readouterr()
    data = open(out, "rb").read()
    assert (
        data == open(again, "rb").read()
        and told.out.count("sha256 " + hashlib.sha256(data).hexdigest()) == 2
    )
    transitions = records.read(out)
    assert (
        f"{len(transitions)} transitions of {len(transitions)} episodes (train 4, dev 0, test 5)"
        in told.out
    )
    assert told.err.startswith(f"warning: 5 left out; the first: {TRAIN}:3, row 3: not valid JSON")
    parts = records.split(transitions, 0)
    assert (
        len(parts["labelled"]) == 1
        and len(parts["validation"]) == 1
        and len(parts["state_only"]) == 2
    )


@pytest.mark.parametrize(
    "argv, what",
    [
        ([], "--out"),
        (["--out", "d.jsonl"], "no files were given"),
        (["--out", "d.txt", "--test", TEST], "--out d.txt"),
        (["--out", "old.jsonl", "--test", TEST], "--out old.jsonl is there already.*--force"),
        (
            ["--out", "old.jsonl", "--force", "--test", TEST, "none.json"],
            "none.json: there is no such file",
        ),
        (["--out", "old.jsonl", "--force", "--test", "cut.json"], "cut.json:1, row 2"),
        (["--out", "old.jsonl", "--force", "--test", "empty.json"], "no transition is left"),
        (["--out", "nowhere/d.jsonl", "--test", TEST], "nowhere/d.jsonl: cannot write it"),
        (
            ["--out", "d.jsonl", "--test", TEST, "more/mirrorapi.json"],
            "more/mirrorapi.json: the name mirrorapi was taken by",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, argv, what):
    rows = open(TEST).read()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.jsonl").write_text("old")
    (tmp_path / "cut.json").write_text(json.dumps(json.loads(rows))[:900])
    (tmp_path / "empty.json").write_text("[]")
    before = sorted(os.listdir())
    with pytest.raises(SystemExit) as caught:
        mirrorapi.main(argv)
    told = capsys.readouterr()
    assert (
        caught.value.code == 2 and told.out == "" and re.search(f"^error: .*{what}.*\n$", told.err)
    )
    assert sorted(os.listdir()) == before and (tmp_path / "old.jsonl").read_text() == "old"


def test_force_replaces(tmp_path, capsys):
    out = tmp_path / "d.jsonl"
    out.write_text("old")
    mirrorapi.main(["--out", str(out), "--force", "--test", TEST])
    assert len(records.read(out)) == 5 and os.listdir(tmp_path) == ["d.jsonl"]


@pytest.mark.parametrize("module", [scienceworld, mirrorapi, mind2web, cloud])
def test_help(module, capsys):
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    assert caught.value.code == 0 and "--out" in capsys.readouterr().out
