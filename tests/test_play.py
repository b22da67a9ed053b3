"""What play.py writes is what the models say, and a cut leaves nothing doubled or lost."""
import copy
import dataclasses
import gzip
import io
import json
import random
import types

import pytest
from conftest import ending, write_lamps
from test_pixels import SMALL as PIXELS
from test_train import SMALL

import envs
import play
import train
from support.opened import open_run


@pytest.fixture(scope="module")
def worlds(small_folder, tmp_path_factory):
    """{name: (folder, opened run)} of small runs."""
    folder, made = tmp_path_factory.mktemp("play"), {}
    lamps = write_lamps(folder / "lamps.jsonl")
    small = [*SMALL, "--model", str(small_folder), "--method", "sft"]
    for name, argv in {"tools": small, "lamps": [*small, "--data", str(lamps)],
                       "pixels": [*PIXELS, "--method", "sft"]}.items():
        assert train.main([*argv, "--out", str(folder / name)]) == 0
        made[name] = folder / name, open_run(folder / name)
    return made


@pytest.fixture
def play_on(worlds, monkeypatch, capsys):
    """play_on(name, *argv, said=""): what is printed, with these lines as standard input."""
    def call(name, *argv, said="", code=0):
        folder, run = worlds[name]
        monkeypatch.setattr(play, "open_run", lambda _: run)
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
        if code == 2:
            with pytest.raises(SystemExit) as error:
                play.main([str(folder), *map(str, argv)])
            out, err = capsys.readouterr()
            assert error.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
            return err
        assert play.main([str(folder), *map(str, argv)]) == code
        return capsys.readouterr().out
    return call


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def pairs(run, n=11):
    """State-only rows with a key of their own."""
    test = (run.test * n)[:n]
    return [{"id": [i, "ä"], "x": x, "y": y} for i, (x, _, y) in enumerate(test)]


@pytest.fixture
def batch_4(monkeypatch):
    monkeypatch.setattr(play, "BATCH", 4)


# --- the walk -------------------------------------------------------------------------------------

def test_an_action_shows_what_p_predicts_and_q_reads(worlds, play_on):
    run = worlds["tools"][1]
    x, z, _ = run.test[2]
    said = play_on("tools", "--start", 2, said=z + "\n")
    y_hat, = run.P.predict([x], [z])
    z_hat, = run.Q.predict([x], [y_hat])
    assert play.whole_state(x) in said and play.difference(x, y_hat) in said
    assert f"Q reads {z_hat}" in said and "\033" not in said
    assert f"log P(y_hat | x, z) = {run.P.logp([x], [z], [y_hat]).item():.2f}" in said
    assert f"log Q(z | x, y_hat) = {run.Q.logp([x], [z], [y_hat]).item():.2f}" in said


def test_undo_restores_the_state(worlds, play_on):
    x = play.whole_state(worlds["tools"][1].test[0][0])
    said = play_on("tools", said="sign_out()\ndeposit(cash)\nundo\nundo\nundo\n")
    *_, last, nothing, _ = said.split("> undo\n")[1:] + [""]
    assert last.startswith(x) and "nothing to undo" in nothing


def test_colour_is_for_terminals(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert play.difference("a\nb", "a\nc") == "\033[31m- b\033[0m\n\033[32m+ c\033[0m"


def test_true_is_the_world(worlds):
    folder, run = worlds["tools"]
    for start, row in enumerate(run.test):
        steps = next(steps for steps in run.episodes if row in steps)
        rest = steps[steps.index(row):]
        for n in range(len(rest) + 1):
            after = rest[n - 1][2] if n else row[0]
            assert play.truth(run, start, [z for _, z, _ in rest[:n]]) == after


def test_true_in_the_walk(worlds, play_on, monkeypatch):
    run = worlds["tools"][1]
    x, z, y = next(row for row in run.test if row[0] != row[2])
    start = run.test.index((x, z, y))
    with monkeypatch.context() as patch:
        patch.setattr(run.P, "predict", lambda xs, zs: [y])
        said = play_on("tools", "--start", start, said=f"{z}\ntrue\n")
        assert "the real world is in the same state" in said
        patch.setattr(run.P, "predict", lambda xs, zs: xs)
        said = play_on("tools", "--start", start, said=f"{z}\ntrue\n")
        assert play.difference(x, y) in said.split("> true")[1]
    assert "cannot tell: no such call" in play_on("tools", said="fly\ntrue\n")


@pytest.mark.parametrize("name", ["lamps", "pixels"])
def test_only_worlds_of_text_can_tell(name, play_on):
    assert "cannot tell: only built-in worlds of text" in play_on(name, said="true\n")


def test_imagine_takes_seen_actions(worlds, play_on):
    seen = {z for _, z, _ in worlds["tools"][1].test}
    said = play_on("tools", "--seed", 5, said="imagine 3\nquit\n")
    assert said == play_on("tools", "--seed", 5, said="imagine 3\n")
    imagined = [line[2:] for line in said.split("> imagine 3\n")[1].splitlines() if line[0] == ">"]
    assert len(imagined) == 4 and set(imagined[:3]) <= seen and imagined[3] == "quit"


def test_a_walk_among_images_prints_a_map(worlds, play_on):
    said = play_on("pixels", said=f"{worlds['pixels'][1].test[0][1]}\nhelp\n")
    assert "an image of 64 patches" in said and "imagine T" in said
    x = "<image><c0><c1><c2><c3></image>"
    assert play.difference(x, x.replace("c2", "c9")) == "  ..\n  #."


# --- files ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["tools", "pixels"])
def test_predict_is_p_predict(name, worlds, play_on, tmp_path):
    run = worlds[name][1]
    rows = [{"t": 1.5, "x": x, "z": z} for x, z, _ in run.test]
    play_on(name, "--predict", write(tmp_path / "in", rows), "--out", tmp_path / "out")
    got = read(tmp_path / "out")
    assert [{key: row[key] for key in ("t", "x", "z")} for row in got] == rows
    xs, zs, _ = map(list, zip(*run.test))
    assert [row["y"] for row in got] == run.P.predict(xs, zs)
    assert all(row["logp"] < 0 for row in got)


@pytest.mark.parametrize("name", ["tools", "pixels"])
def test_label_is_q_predict(name, worlds, play_on, tmp_path):
    run = worlds[name][1]
    rows = pairs(run, 6)
    play_on(name, "--label", write(tmp_path / "in", rows), "--out", tmp_path / "out")
    got, xs, ys = read(tmp_path / "out"), *([row[key] for row in rows] for key in "xy")
    zs = run.Q.predict(xs, ys)
    assert [row["z"] for row in got] == zs
    assert [row["refused"] for row in got] == run.Q.refuses(xs, ys)
    again = run.Q.logp(xs, zs, ys, run.Q.no_refusal()).tolist()
    for row, z, y, logq in zip(got, zs, ys, again):
        # Where the tokens that were drawn are those that spell z
        if z and run.Q.read(run.Q.target(z)) == z and len(run.Q.target(z)) <= run.Q.longest:
            assert row["logq"] >= logq - 0.001


def test_simulate_reads_its_own_output(worlds, play_on, tmp_path):
    run = worlds["tools"][1]
    (x, z, _), (other, *_) = run.test[:2]
    rows = [{"x": x, "z": [z, z]}, {"x": other, "n": 7}]
    write(tmp_path / "in", rows)
    play_on("tools", "--simulate", tmp_path / "in", "--steps", 3, "--out", tmp_path / "out")
    first, second = read(tmp_path / "out")
    y, = run.P.predict([x], [z])
    assert first == rows[0] | {"y": [y, *run.P.predict([y], [z])]}
    assert second["n"] == 7 and len(second["z"]) == len(second["y"]) == 3
    assert [second["y"]] == play.simulate(run, [other], [second["z"]])


def test_simulate_goes_on_from_what_it_predicts():
    P = types.SimpleNamespace(predict=lambda xs, zs: [x + z for x, z in zip(xs, zs)])
    run = types.SimpleNamespace(P=P, cfg=types.SimpleNamespace(max_state=0))
    assert play.simulate(run, ["a", "b", "c"], [["1", "2"], [], ["3", "4", "5"]]) == [
        ["a1", "a12"], [], ["c3", "c34", "c345"]]


def test_a_refused_pair_has_an_action_all_the_same(worlds):
    run = worlds["tools"][1]
    Q = copy.copy(run.Q)
    Q.net = ending(copy.deepcopy(Q.net), Q.tok.eos_token_id, 1e4)
    rows = play.fill(run._replace(Q=Q), "label", pairs(run, 3))
    assert all(row["refused"] and row["z"] and row["logq"] < 0 for row in rows)


def test_long_states_are_read_as_in_training(worlds):
    run = worlds["tools"][1]
    cut = run._replace(cfg=dataclasses.replace(run.cfg, max_state=16))
    x, z, _ = run.test[0]
    short, = play.cut(cut, [x])
    row, = play.fill(cut, "predict", [{"x": x, "z": z}])
    assert len(short) < len(x) == len(row["x"])
    assert play.greedy(run.P, run.P.options, [short], [z]) == [(row["y"], row["logp"])]


@pytest.fixture
def labelled(worlds, play_on, tmp_path, batch_4):
    """(file, its whole output) of 11 rows, the last batch of them incomplete."""
    path = write(tmp_path / "in.jsonl", pairs(worlds["tools"][1]))
    play_on("tools", "--label", path, "--out", tmp_path / "whole")
    return path, (tmp_path / "whole").read_bytes()


def test_a_cut_label_ends_as_an_uncut_one(labelled, play_on, tmp_path):
    path, whole = labelled
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    rng = random.Random(0)
    for size in [0, ends[3], ends[4], ends[-1], *rng.sample(range(len(whole)), 5)]:
        (tmp_path / "out").write_bytes(whole[:size])
        play_on("tools", "--label", path, "--out", tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == whole, size


def at_batch(patch, n, act):
    """Call act() before the n-th batch is labelled."""
    calls, fill = [], play.fill

    def counted(*args):
        calls.append(args)
        if len(calls) == n:
            act()
        return fill(*args)

    patch.setattr(play, "fill", counted)


def test_a_stopped_label_goes_on(labelled, play_on, tmp_path, monkeypatch):
    path, whole = labelled
    argv = ["tools", "--label", path, "--out", tmp_path / "out"]

    def stop():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_batch(patch, 3, stop)
        assert "the same command goes on" in play_on(*argv, code=130)
    assert (tmp_path / "out").read_bytes() == b"".join(whole.splitlines(True)[:8])
    assert "11 of 11 rows" in play_on(*argv) and (tmp_path / "out").read_bytes() == whole


def test_a_second_process_is_noticed(labelled, play_on, tmp_path, monkeypatch):
    path, whole = labelled
    argv = ["tools", "--label", path, "--out", tmp_path / "out"]

    with monkeypatch.context() as patch:
        at_batch(patch, 2, lambda: (tmp_path / "out").write_bytes(whole))
        assert "another process" in play_on(*argv, code=2)
    assert (tmp_path / "out").read_bytes() == whole


def test_gzip_is_read(labelled, play_on, tmp_path):
    path, whole = labelled
    (tmp_path / "in.gz").write_bytes(gzip.compress(path.read_bytes()))
    play_on("tools", "--label", tmp_path / "in.gz", "--out", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == whole


def test_an_output_of_other_rows_stays_as_it_is(labelled, play_on, tmp_path):
    path, whole = labelled
    lines = whole.splitlines(True)
    other = json.loads(lines[5]) | {"z": "of another run"}
    for bad, says in [(b"hello", "out:1:"), (b"\n", "out:1:"), (lines[1], "out:1:"),
                      (path.read_bytes()[:-9], "out:1:"), (whole + b"{", "out:12:"),
                      (b"".join(lines[:5]) + play.to_line(other), "another run")]:
        (tmp_path / "out").write_bytes(bad)
        assert says in play_on("tools", "--label", path, "--out", tmp_path / "out", code=2)
        assert (tmp_path / "out").read_bytes() == bad


# --- bad input ------------------------------------------------------------------------------------

@pytest.mark.parametrize("task, line, says", [
    ("predict", b"{", "in:2: no JSON"), ("predict", b"\xff", "in:2: no JSON"),
    ("predict", b'{"x": "a", "z": "b", "n": NaN}', "in:2: no JSON"),
    ("predict", b'{"x": "a\\ud800", "z": "b"}', "in:2: no JSON"),
    ("predict", b'[1]', "in:2: no JSON object"), ("predict", b'{"z": "b"}', 'in:2: "x" is missing'),
    ("predict", b'{"x": "a"}', 'in:2: "z" is missing'),
    ("predict", b'{"x": "a", "z": " "}', '"z" is missing, empty'),
    ("predict", b'{"x": "a", "z": "b", "y": "c"}', '"y" is there already; rename it'),
    ("predict", b'{"x": "' + 999 * b"a b " + b'", "z": "b"}', "in:2: "),
    ("label", b'{"x": "a"}', '"y" is missing'),
    ("label", b'{"x": "a", "y": "b", "z": null}', '"z" is there already'),
    ("label", b'{"x": "a", "y": "' + 999 * b"a b " + b'"}', "shorten"),
    ("simulate", b'{"x": "a", "z": "b"}', "no list of actions"),
    ("simulate", b'{"x": "a", "z": []}', "no list of actions"),
    ("simulate", b'{"x": "a", "z": ["b", 1]}', '"z" is missing, empty or no string'),
    ("simulate", b'{"x": "a"}', "give --steps"),
    ("simulate", b'{"x": "a", "z": ["b"], "y": "c"}', '"y" is there already')])
def test_a_bad_line_is_one_line(task, line, says, play_on, tmp_path):
    good = {"predict": b'{"x": "a", "z": "b"}', "label": b'{"x": "a", "y": "b"}',
            "simulate": b'{"x": "a", "z": ["b"]}'}
    (tmp_path / "in").write_bytes(good[task] + b"\n" + line)
    assert says in play_on("tools", f"--{task}", tmp_path / "in", "--out", tmp_path / "out", code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_state_of_other_patches_is_refused(worlds, play_on, tmp_path):
    run = worlds["pixels"][1]
    x = run.test[0][0]
    for state in ("text", "<image><c0></image>", x.replace("<c", "<c9999", 1)):
        write(tmp_path / "in", [{"x": x, "y": state}])
        argv = "pixels", "--label", tmp_path / "in", "--out", tmp_path / "out"
        assert "no image of 64 codes" in play_on(*argv, code=2)


def test_bad_flags_are_one_line(worlds, play_on, tmp_path):
    path = write(tmp_path / "in", pairs(worlds["tools"][1], 2))
    for argv, says in [
        (["--label", path], "--out"), (["--out", path], "--out"), (["--start", "99"], "--start"),
        (["--label", path, "--out", path], "there already"),
        (["--label", path, "--out", tmp_path / "out.gz"], "drop .gz"),
        (["--label", path, "--out", tmp_path / "no" / "out"], "no such folder"),
        (["--label", tmp_path / "no", "--out", tmp_path / "out"], "no such file"),
        (["--predict", path, "--label", path], "not allowed"),
    ]:
        assert says in play_on("tools", *argv, code=2)
    write(tmp_path / "in", [])
    assert "no rows" in play_on("tools", "--label", path, "--out", tmp_path / "out", code=2)


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        play.main([str(tmp_path)])
    assert capsys.readouterr().err.startswith("error: ")


def test_each_text_world_can_tell():
    """`truth` needs their World, with step and text."""
    for name in ("tools", "physics", "web"):
        world = envs.WORLDS[name].World(random.Random(1))
        world.step(world.propose(random.Random(2)))
        assert world.text()
