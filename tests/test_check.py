"""Claims of `python -m envs.records`: what --check says of files of odd kinds, and what CSV files
and folders become."""
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import train
from envs import convert, images, records
from envs.records import Transition
from models import pretrained, tiny
from models.text import encode
from support import check_file, loading

ROOT = Path(__file__).parents[1]


def write(path, world):
    """A file of the episodes of a world: [[(x, z, y)]]."""
    records.write(path, [Transition(f"e{i}", t, *step) for i, steps in enumerate(world)
                         for t, step in enumerate(steps)])
    return str(path)


def episodes(state, n=10, steps=4):
    """n episodes; state(i, t) is a text."""
    return [[(state(i, t), f"go {t}", state(i, t + 1)) for t in range(steps)] for i in range(n)]


def rooms(i, t):
    """Seven lines, of which one changes."""
    return "\n".join([f"room: {t}", *(f"thing {k}: {i}" for k in range(6))])


def prose(i, t):
    """Each turn of a text adventure tells everything anew."""
    return (f"You are in room {t} of house {i}. It is dark. There are {t + 2} doors here.\n"
            f"After {t} turns a lamp in house {i} burns low.")


def one_line_json(i, t):
    return json.dumps({"user": {"id": i}, "cart": list(range(t)), "page": "shop"})


def html(i, t):
    """A page of lines, one of which changes."""
    items = "".join(f"<li>item {k}</li>\n" for k in range(9))
    return f"<html><body>\n<h1>Shop {i}</h1>\n<ul>\n{items}</ul>\n<p>{t} in cart</p>\n</body>"


def check(path):
    """What --check prints."""
    return "\n".join(check_file.report(str(path)))


def line(text, start):
    return next(line for line in text.splitlines() if line.strip().startswith(start))


def refused(capsys, argv):
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as ended:
        convert.main(list(map(str, argv)))
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err


# --- --check: the report --------------------------------------------------------------------------

@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(path, what --check says) of a file with nothing odd."""
    path = write(tmp_path_factory.mktemp("data") / "rooms.jsonl", episodes(rooms))
    return path, check(path)


def test_the_command_runs_without_a_word_on_stderr(plain):
    path, text = plain
    done = subprocess.run([sys.executable, "-m", "envs.records", path, "--check"], cwd=ROOT,
                          capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", text + "\n")


def test_sizes_are_counted(plain):
    assert "10 episodes, 40 transitions, 50 states" in plain[1]


def test_splits_are_those_of_training(plain):
    path, text = plain
    for name, rows in records.split(records.read(path), 0).items():
        found = line(text, name.replace("_", "-")).split()
        assert found[1:2] == [str(len({tr.episode for tr in rows}))]
        assert found[2].strip(":") == f"({len(rows)})"


def test_tokens_are_those_of_the_tiny_model(plain):
    _, tok = pretrained.load(tiny.FOLDER)
    longest = max(len(encode(tok, "\n" + rooms(i, t))) for i in range(10) for t in range(5))
    assert line(plain[1], "tokens of a state").endswith(f"longest {longest}")


def test_lines_are_counted(plain):
    assert "median 7, 90% at most 7, longest 7" in line(plain[1], "lines of a state")


def test_the_last_line_is_the_command_to_train(plain):
    path, text = plain
    assert text.endswith(f"python train.py --data {path}")
    train.parse(text.splitlines()[-1].split("train.py ")[1].split())


def test_a_report_has_at_most_25_lines(tmp_path):
    """With every line that it may have."""
    rng = random.Random(0)

    def state(i, t):
        return json.dumps({"a": i, "b": [t] * 1500})

    world = episodes(state, n=12)
    world = [[(x, f"{rng.random()} " * 9, y) for x, _, y in steps] for steps in world]
    text = check(write(tmp_path / "f.jsonl", world))
    assert "--max-state" in text and "indent=0" in text and len(text.splitlines()) <= 25


def test_unchanged_pairs_are_counted(tmp_path):
    world = episodes(rooms)
    for steps in world:
        x, z, _ = steps[0]
        steps[0] = x, z, x
    assert "y = x in 25.0%" in check(write(tmp_path / "f.jsonl", world))


def test_actions_are_counted(tmp_path):
    world = episodes(rooms, n=12)
    world[0][0] = world[0][0][0], "jump\nhigh", world[0][0][2]
    text = check(write(tmp_path / "f.jsonl", world))
    assert "distinct actions: 5; 20.0% of them come once, which is 2.1%" in text
    text = " ".join(text.split())
    assert "go 1 (12), go 2 (12), go 3 (12), go 0 (11), jump high (1)" in text


def test_no_more_than_ten_actions_are_named(tmp_path):
    text = check(write(tmp_path / "f.jsonl", episodes(rooms, steps=12)))
    text = " ".join(text.split())
    assert "distinct actions: 12" in text and sum(f"go {t} (" in text for t in range(12)) == 10


def test_missing_actions_are_counted(tmp_path):
    world = episodes(rooms)
    world[3] = [(x, None, y) for x, _, y in world[3]]
    text = check(write(tmp_path / "f.jsonl", world))
    assert "90.0% of the transitions; every action is known in 9 episodes" in text


def test_test_states_that_training_knows_are_told(tmp_path):
    def state(i, t):
        return f"same\nroom\nfor all\n{t}"

    text = check(write(tmp_path / "f.jsonl", episodes(state)))
    assert "0 hold a state that training lacks" in text


def test_states_that_the_tokenizer_changes_are_told(plain, monkeypatch):
    net, tok = pretrained.load(tiny.FOLDER)
    before = tok.decode
    monkeypatch.setattr(tok, "decode", lambda ids: before(ids).replace("room: 3", "room:3"))
    monkeypatch.setattr(pretrained, "load", lambda folder: (net, tok))
    assert "does not give 10 of 50 states back" in check(plain[0])
    assert "gives all 50 states back" in plain[1]


def test_the_measured_scores_are_those_of_the_results():
    text = (ROOT / "docs" / "RESULTS.md").read_text() + (ROOT / "README.md").read_text()
    rows = [row.replace("|", " ").split() for row in text.splitlines() if row.startswith("| SFT |")]
    for labels, _, scores in check_file.MEASURED:
        wanted = scores.replace(",", "").replace("and", "").split()
        assert any(set(wanted) <= set(row) for row in rows) and f"{labels:,} labelled" in text


def test_the_number_of_labels_is_told_beside_the_measured_runs(plain):
    labels = len(records.split(records.read(plain[0]), 0)["labelled"])
    text = line(plain[1], "expect")
    assert f"gives {labels} labels" in text and "1,568 labels" in plain[1]


# --- --check: the view and the context ------------------------------------------------------------

@pytest.mark.parametrize("state, why", [(prose, "most lines change"),
                                        (one_line_json, "most states are one line of JSON")])
def test_states_without_a_short_diff_get_the_full_view(tmp_path, state, why):
    text = check(write(tmp_path / "f.jsonl", episodes(state)))
    assert why in text and text.endswith("--view full")


@pytest.mark.parametrize("state", [rooms, html])
def test_states_with_a_short_diff_keep_it(tmp_path, state):
    text = check(write(tmp_path / "f.jsonl", episodes(state)))
    assert "in 100.0% of the changed pairs" in line(text, "line diff") and "--view" not in text


def test_many_lines_are_compared_in_linear_time():
    """The estimate agrees with the diff where no line moves."""
    x = [f"line {i}" for i in range(600)]
    for n in (1, 299, 301, 600):
        y = [f"{text} now" for text in x[:n]] + x[n:]
        pair = "\n".join(x), "\n".join(y)
        assert check_file.diff_is_short(*pair) == loading.diff_is_short(*pair) == (n < 300)


def long_lines(i, t):
    return "\n".join(f"line {k} of {i}: the value is {k * t}" for k in range(300))


def short_lines(i, t):
    """Many lines of few tokens: then the marks of the line diff cost most."""
    return "\n".join(str(k % 7) for k in range(1500)) + f"\n{i}\n{t}"


def long_prose(i, t):
    return f"Turn {t}, house {i}. " + "It is dark here and there. " * 400


def one_word(i, t):
    return f"{i} {t} " + "x" * 9000


@pytest.mark.parametrize("state", [long_lines, short_lines, long_prose, one_word])
def test_training_takes_the_max_state_of_the_check(tmp_path, capsys, state):
    text = check(write(tmp_path / "f.jsonl", episodes(state)))
    cfg = train.parse(text.splitlines()[-1].split("train.py ")[1].split())
    assert cfg.max_state and cfg.max_state % check_file.STEP == 0
    net, tok = pretrained.load(tiny.FOLDER)
    rows = [(x, z, y) for steps in episodes(state) for x, z, y in steps]
    splits = loading.shorten_all(tok, (rows, rows, [(x, y) for x, _, y in rows], rows),
                                 cfg.max_state)
    sizes = {state: len(encode(tok, "\n" + state)) for state in loading.states_of(splits)}
    longest_y = 16 + max(sizes.values())
    loading.check_context(net, tok, splits, sizes, longest_y, cfg)
    cfg.max_state = 0
    with pytest.raises(SystemExit):
        splits = rows, rows, [], rows
        sizes = {state: len(encode(tok, "\n" + state)) for state in loading.states_of(splits)}
        loading.check_context(net, tok, splits, sizes, longest_y, cfg)


@pytest.mark.parametrize("at_end, share", [(True, "0.0%"), (False, "100.0%")])
def test_what_a_cut_hides_is_told(tmp_path, at_end, share):
    def state(i, t):
        lines = [f"line {k} of {i}" for k in range(600)]
        lines[-1 if at_end else 300] = f"turn {t}"
        return "\n".join(lines)

    text = check(write(tmp_path / "f.jsonl", episodes(state)))
    assert f"hides all that changes in {share} of the pairs" in text


def test_actions_that_no_state_fits_beside_are_refused(tmp_path, capsys):
    world = [[(x, "word " * 3000 + z, y) for x, z, y in steps] for steps in episodes(rooms)]
    assert "shorten the actions" in refused(
        capsys, [write(tmp_path / "f.jsonl", world), "--check"])


def test_images_are_known(tmp_path):
    def state(i, t):
        return images.spell([[i, t], [3, 4]])

    text = check(write(tmp_path / "f.jsonl", episodes(state)))
    assert "patches that change" in line(text, "line diff") and "--view" not in text


# --- --check: bad files ---------------------------------------------------------------------------

BAD = {
    "empty": ("", "holds no transitions"),
    "empty state": ('{"episode": "e", "t": 0, "x": " ", "z": "a", "y": "b"}', ":1:"),
    "prose": ("You are in a dark room.\n", "not valid JSON"),
    "csv": ("x,z,y\na,b,c\n", "not valid JSON"),
    "empty z": ('{"episode": "e", "t": 0, "x": "a", "z": "", "y": "b"}', "leave the key out"),
}


@pytest.mark.parametrize("text, says", BAD.values(), ids=list(BAD))
def test_a_bad_file_is_refused_in_one_line(tmp_path, capsys, text, says):
    (tmp_path / "f.jsonl").write_text(text)
    assert says in refused(capsys, [tmp_path / "f.jsonl", "--check"])


def test_a_file_of_one_episode_is_refused(tmp_path, capsys):
    path = write(tmp_path / "f.jsonl", episodes(rooms, n=1))
    assert "no episode is left" in refused(capsys, [path, "--check"])


def test_a_file_without_any_action_is_refused(tmp_path, capsys):
    world = [[(x, None, y) for x, _, y in steps] for steps in episodes(rooms)]
    path = write(tmp_path / "f.jsonl", world)
    assert "0 of 10 episodes have every z" in refused(capsys, [path, "--check"])


def test_a_split_without_change_is_refused(tmp_path, capsys):
    world = [[(x, z, x) for x, z, _ in steps] for steps in episodes(rooms)]
    path = write(tmp_path / "f.jsonl", world)
    assert "with y != x" in refused(capsys, [path, "--check"])


def test_windows_lines_and_a_byte_order_mark_are_read(tmp_path, plain):
    text = Path(plain[0]).read_text().replace("\n", "\r\n")
    (tmp_path / "f.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert check(tmp_path / "f.jsonl").splitlines()[1:-1] == plain[1].splitlines()[1:-1]


def test_gzip_is_read(tmp_path, plain):
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(Path(plain[0]).read_bytes()))
    assert check(tmp_path / "f.jsonl.gz").splitlines()[1:-1] == plain[1].splitlines()[1:-1]


# --- CSV ------------------------------------------------------------------------------------------

def from_csv(folder, text, name="out.jsonl"):
    """The transitions that a CSV file becomes."""
    (folder / "f.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert convert.main(["--from-csv", str(folder / "f.csv"), "--out", str(folder / name)]) == 0
    return records.read(folder / name)


def texts(transitions):
    return [(tr.x, tr.z, tr.y) for tr in transitions]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_columns_become_keys(tmp_path, name):
    rows = "episode,t,x,z,y,note\na,3,on,off,dark,!\na,1,dark,on,on,?\n"
    got = from_csv(tmp_path, rows, name)
    assert got == [Transition("a", 1, "dark", "on", "on"), Transition("a", 3, "on", "off", "dark")]


def test_quotes_and_line_breaks_in_cells_are_kept(tmp_path):
    rows = 'episode,x,z,y\na,"one\n ""two"", three",say,"水\n\nend"\na,b,c,d\n'
    got = from_csv(tmp_path, rows)
    assert texts(got)[0] == ('one\n "two", three', "say", "水\n\nend")


def test_windows_csv_with_a_byte_order_mark_is_read(tmp_path):
    rows = b'\xef\xbb\xbfX,Z,Y\r\na,1,"b\r\nc"\r\n"b\r\nc",2,d\r\n'
    assert texts(from_csv(tmp_path, rows)) == [("a", "1", "b\nc"), ("b\nc", "2", "d")]


def test_an_empty_z_is_an_unknown_action(tmp_path):
    got = from_csv(tmp_path, "episode,x,z,y\na,b, ,c\na,c,go,d\n")
    assert texts(got) == [("b", None, "c"), ("c", "go", "d")]


def test_without_z_all_actions_are_unknown(tmp_path):
    assert texts(from_csv(tmp_path, "x,y\na,b\nb,c\n")) == [("a", None, "b"), ("b", None, "c")]


def test_rows_are_chained_where_y_is_the_next_x(tmp_path):
    got = from_csv(tmp_path, "x,z,y\na,1,b\nb,2,c\nq,3,r\nr,4,s\n")
    assert [(tr.episode, tr.t) for tr in got] == [("row-2", 0), ("row-2", 1), ("row-4", 0),
                                                  ("row-4", 1)]


def test_single_rows_fill_every_split(tmp_path):
    rows = "".join(f"x{i},go {i},y{i}\n" for i in range(20))
    got = from_csv(tmp_path, "x,z,y\n" + rows)
    sizes = {name: len(part) for name, part in records.split(got, 0).items()}
    assert sizes == {"labelled": 7, "state_only": 7, "validation": 2, "test": 4}


def test_single_rows_without_z_are_for_training(tmp_path):
    rows = "".join(f"x{i},,y{i}\n" for i in range(20))
    got = from_csv(tmp_path, "x,z,y\n" + rows)
    assert all(tr.episode.startswith("train-row-") for tr in got)


def test_long_cells_are_read(tmp_path):
    long = "word " * 60_000
    assert from_csv(tmp_path, f"episode,x,y\na,{long},b\na,b,c\n")[0].x == long


CSV = {
    "empty": ("", "the file is empty"),
    "names only": ("x,z,y\n", "no row"),
    "no x": ("state,z,y\na,b,c\n", ':1: there is no column "x"'),
    "semicolons": ("x;z;y\na;b;c\n", "commas between"),
    "x twice": ("x,x,y\na,b,c\n", "twice"),
    "too many cells": ("x,z,y\na,b,c\na,b,c,d\n", ":3: 4 cells"),
    "open quote": ('x,z,y\na,b,"c\nd\n', ":2: not valid CSV"),
    "empty y": ("x,z,y\na,b,c\nc,d, \n", ':3: "y" is empty'),
    "line of a cell": ('x,z,y\na,b,"c\nd"\n,e,f\n', ':4: "x" is empty'),
    "t": ("episode,t,x,y\na,1.0,b,c\n", ':2: "t" is "1.0"'),
    "t twice": ("episode,t,x,y\na,1,b,c\na,1,c,d\n", ":3: episode"),
    "one row": ("episode,x,y\na,b,c\n", ":2: episode"),
    "not UTF-8": (b"x,z,y\na,b,c\na,b,\xff\n", ":3: not UTF-8"),
}


@pytest.mark.parametrize("text, says", CSV.values(), ids=list(CSV))
def test_a_bad_csv_is_refused_and_nothing_written(tmp_path, capsys, text, says):
    (tmp_path / "f.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    out = tmp_path / "out.jsonl.gz"
    err = refused(capsys, ["--from-csv", tmp_path / "f.csv", "--out", out])
    assert says in err and "f.csv" in err and "; " in err and os.listdir(tmp_path) == ["f.csv"]


# --- folders --------------------------------------------------------------------------------------

def tree(folder, files):
    for name, text in files.items():
        path = folder / "logs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / "logs"


def from_folder(folder, files):
    """The transitions that a folder becomes."""
    source, out = tree(folder, files), folder / "out.jsonl"
    assert convert.main(["--from-folder", str(source), "--out", str(out)]) == 0
    return records.read(out)


THREE = {"a/s1.txt": "one\n", "a/s10.txt": "ten\r\nlines\r\n", "a/s2.txt": "two"}


def test_snapshots_are_in_natural_order(tmp_path):
    assert from_folder(tmp_path, THREE) == [Transition("a", 0, "one", None, "two"),
                                            Transition("a", 1, "two", None, "ten\nlines")]


def test_actions_stand_between_states(tmp_path):
    got = from_folder(tmp_path, THREE | {"a/actions.txt": "go\r\nstay \r\n\r\n"})
    assert [tr.z for tr in got] == ["go", "stay"]


def test_an_empty_line_is_an_unknown_action(tmp_path):
    got = from_folder(tmp_path, THREE | {"a/actions.txt": "\nstay"})
    assert [tr.z for tr in got] == [None, "stay"]


def test_hidden_files_and_files_beside_episodes_are_skipped(tmp_path):
    got = from_folder(tmp_path, THREE | {"a/.DS_Store": b"\xff", "notes.txt": "mine"})
    assert len(got) == 2


def test_a_snapshot_loses_its_byte_order_mark(tmp_path):
    assert from_folder(tmp_path, THREE | {"a/s1.txt": b"\xef\xbb\xbfone\n"})[0].x == "one"


TREES = {
    "no episodes": ({"s1.txt": "one"}, "no sub-folder"),
    "one state": ({"a/s1.txt": "one"}, "1 state"),
    "two states": ({"a/s1.txt": "one", "a/s2.txt": "two"}, "at least 2"),
    "empty state": (THREE | {"a/s2.txt": " \n"}, "s2.txt: the file is empty"),
    "too few actions": (THREE | {"a/actions.txt": "go\n"}, "1 action(s) for 3 states; write 2"),
    "too many actions": (THREE | {"a/actions.txt": "a\nb\nc\n"}, "actions.txt:3"),
    "not UTF-8": (THREE | {"a/s2.txt": b"one\ntwo \xff"}, "s2.txt:2: not UTF-8"),
    "a folder inside": (THREE | {"a/b/s1.txt": "one"}, "a folder inside"),
}


@pytest.mark.parametrize("files, says", TREES.values(), ids=list(TREES))
def test_a_bad_folder_is_refused_and_nothing_written(tmp_path, capsys, files, says):
    source, out = tree(tmp_path, files), tmp_path / "out.jsonl"
    err = refused(capsys, ["--from-folder", source, "--out", out])
    assert says in err and "logs" in err and "; " in err and os.listdir(tmp_path) == ["logs"]


# --- the command line -----------------------------------------------------------------------------

@pytest.mark.parametrize("argv", [[], ["f"], ["--check"], ["--from-csv", "f.csv"],
                                  ["f", "--check", "--out", "o.jsonl"],
                                  ["--from-csv", "f", "--from-folder", "d", "--out", "o.jsonl"]])
def test_half_a_command_is_refused(capsys, argv):
    assert "give FILE --check" in refused(capsys, argv)


@pytest.mark.parametrize("source", ["--from-csv", "--from-folder"])
def test_what_is_not_there_is_refused(tmp_path, capsys, source):
    out = tmp_path / "out.jsonl"
    assert "nowhere" in refused(capsys, [source, tmp_path / "nowhere", "--out", out])


def test_an_old_file_is_replaced_only_with_force(tmp_path, capsys):
    (tmp_path / "f.csv").write_text("x,z,y\na,1,b\nb,2,c\n")
    (tmp_path / "out.jsonl").write_text("mine")
    argv = ["--from-csv", str(tmp_path / "f.csv"), "--out", str(tmp_path / "out.jsonl")]
    assert "--force" in refused(capsys, argv) and (tmp_path / "out.jsonl").read_text() == "mine"
    assert convert.main([*argv, "--force"]) == 0 and len(records.read(tmp_path / "out.jsonl")) == 2


def test_another_ending_is_refused(tmp_path, capsys):
    assert "ends in .jsonl" in refused(capsys, ["--from-csv", "f.csv", "--out", "out.csv"])


def test_help_tells_how_rows_are_chained(capsys):
    with pytest.raises(SystemExit):
        convert.main(["--help"])
    assert "chains them" in " ".join(capsys.readouterr().out.split())


# --- train.py -------------------------------------------------------------------------------------

def lab_of(world, argv):
    """What `warn_of_long_diffs` looks at."""
    rows = [step for steps in world for step in steps]
    pairs = [(x, y) for x, _, y in rows]
    return loading.Lab(train.parse(argv), rows, rows, pairs, rows, [], None)


@pytest.mark.parametrize("state, argv, warned", [
    (prose, ["--data", "f.jsonl"], True),
    (one_line_json, ["--data", "f.jsonl"], True),
    (rooms, ["--data", "f.jsonl"], False),
    (prose, ["--data", "f.jsonl", "--view", "full"], False),
    (prose, ["--env", "tools"], False)])
def test_training_warns_where_the_diff_says_nothing(capsys, state, argv, warned):
    loading.warn_of_long_diffs(lab_of(episodes(state), argv))
    out = capsys.readouterr().out
    assert ("give --view full" in out) == warned and out.count("\n") == warned
