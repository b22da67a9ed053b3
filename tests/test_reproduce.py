"""The tables: what is run, what is kept, what is chosen."""
import json
import shutil
import types

import pytest

import reproduce
import settings
from methods import METHODS
from support import comparison

COLLAPSE = {"unique": 0.2, "mean_length": 4.0, "true_unique": 0.1, "true_mean_length": 3.5,
            "perplexity_ratio": 1.02}


def scores(sampled, changed=0.5):
    return {"fwm": {"exact": 0.4, "exact_changed": changed, "sampled": sampled,
                    "rollout_exact": [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]},
            "idm": {"exact": 0.8}, "steps": 5, "examples": 40, "tokens": 7, "seconds": 10.0}


def after(argv, flag):
    return argv[argv.index(flag) + 1]


def of_training(commands):
    return [argv for argv in commands if argv[0] == "train.py"]


@pytest.fixture
def go(monkeypatch, tmp_path):
    """go(*argv): (exit code, the commands of train.py that ran, the folder of results)."""
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    commands = []

    def train(command, **_):
        argv = command[1:]
        commands.append(argv)
        if argv[0] != "train.py":
            return verify(argv)
        method = after(argv, "--method")
        rate = float(after(argv, "--lr-fwm")) if "--lr-fwm" in argv else 1e-4
        first = {"name": "sft", **scores(0.3)}
        last = {"name": method, **scores(0.6 if rate > 2e-4 else 0.5)}
        stages = [first, last] if method == "sft" else [first, last, last]
        out = tmp_path / after(argv, "--out")
        out.mkdir(parents=True)
        (out / "results.json").write_text(json.dumps({
            "stages": stages, "validation": {"sampled": last["fwm"]["sampled"]},
            "collapse": COLLAPSE,
            "baselines": {"copy_x": {"exact": 0.1, "exact_changed": 0.0}}, "splits": {},
            "hardware": "a CPU"}))
        return types.SimpleNamespace(returncode=0)

    def verify(argv):
        assert argv[:2] == ["-m", "evals.verify"] and after(argv, "--n") == "8"
        fwm = {"exact": 0.2, "exact_changed": 0.7}
        best = {"scores": {"8": {"fwm": fwm, "idm": {"exact": 0.9}}}}
        (tmp_path / after(argv, "--json")).write_text(json.dumps(best))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(reproduce.subprocess, "run", train)
    monkeypatch.setattr(reproduce.rundir, "git_revision", lambda: "abcdef0123")

    def call(*argv):
        commands.clear()
        code = reproduce.main([*argv])
        return code, list(commands), tmp_path / "results"
    return call


def test_all_rows_begin_with_one_sft_model_a_seed(go):
    code, commands, _ = go("--worlds", "physics", "--seeds", "50", "51")
    commands = of_training(commands)
    warmups = [argv for argv in commands if after(argv, "--method") == "sft"]
    rows = [argv for argv in commands if argv not in warmups]
    assert code == 0 and len(warmups) == 2 and len(rows) == 2 * (len(METHODS) - 1)
    start = {after(argv, "--seed"): after(argv, "--out") for argv in warmups}
    for argv in rows:
        assert after(argv, "--start") == start[after(argv, "--seed")]
        settings.parse(argv[1:])                                   # a command that train.py takes


def test_a_killed_run_goes_on_where_it_was(go):
    go("--worlds", "tools", "--seeds", "50")
    code, commands, folder = go("--worlds", "tools", "--seeds", "50")
    assert code == 0 and commands == []
    path = folder / "methods.json"
    rows = json.loads(path.read_text())
    lost = rows["tools, seed 50, em"]["command"]
    path.write_text(json.dumps({key: row for key, row in rows.items() if row["command"] != lost}))
    shutil.rmtree(folder.parent / lost.split()[-1])
    _, commands, _ = go("--worlds", "tools", "--seeds", "50")
    assert [" ".join(argv) for argv in commands] == [lost]
    assert json.loads(path.read_text()) == rows


def test_a_row_with_other_flags_runs_again(go, monkeypatch):
    go("--worlds", "tools", "--seeds", "50", "--tables", "groups")
    monkeypatch.setitem(reproduce.STEPS, "phase1", {"phase1-steps": 5})
    _, commands, folder = go("--worlds", "tools", "--seeds", "50", "--tables", "groups")
    assert len(commands) == 5 and {after(argv, "--phase1-steps") for argv in commands} == {"5"}
    rows = json.loads((folder / "groups.json").read_text())
    assert len(rows) == 5 and all("--phase1-steps 5" in row["command"] for row in rows.values())


def test_quick_is_one_world_one_seed_few_steps(go):
    _, commands, folder = go("--quick")
    commands = of_training(commands)
    assert len(commands) == len(METHODS) and (folder / "quick" / "methods.json").exists()
    for argv in commands:
        cfg = settings.parse(argv[1:])
        assert (cfg.env, cfg.seed, cfg.iterations) == ("physics", reproduce.SEEDS[0], 1)
        assert cfg.warmup_steps <= 100 and cfg.bootstrap_steps <= 30 and cfg.phase1_steps <= 5


def test_a_failed_row_is_one_line(go, monkeypatch, capsys):
    def fails(command, **_):
        return types.SimpleNamespace(returncode=2, stderr="error: no room")

    monkeypatch.setattr(reproduce.subprocess, "run", fails)
    with pytest.raises(SystemExit) as stop:
        go("--worlds", "tools", "--seeds", "50")
    assert stop.value.code == 2 and "no room" in capsys.readouterr().err


def test_the_table_has_means_and_ranges(go, capsys):
    _, _, folder = go("--worlds", "tools", "--seeds", "50", "51", "52")
    text = (folder / "RESULTS.md").read_text()
    same = "50.0 (50.0 to 50.0)"
    assert capsys.readouterr().out.strip().splitlines()[-1] in text
    assert "methods, tools, 3 seeds" in text
    assert "36 rows, 6 minutes after SFT, a CPU, commit abcdef0" in text
    assert "| best of 8 | 20.0 (20.0 to 20.0) | 70.0 (70.0 to 70.0) | 70.0 (" in text
    assert f"| SFT | 40.0 (40.0 to 40.0) | {same} | 30.0 (30.0 to 30.0) |" in text
    assert f"| swirl | 40.0 (40.0 to 40.0) | {same} | {same} |" in text
    assert "| copy x | 10.0 | 0.0 | - | - | - | - | - |" in text
    assert f"| swirl | 60.0 (60.0 to 60.0) | {same} | 40.0 (" in text             # T = 1, 2, ..
    assert "| SFT | 20.0 (20.0 to 20.0) | 10.0 (10.0 to 10.0) | 4.0 (4.0 to 4.0) | 3.5 (" in text
    assert "| 50.0 (50.0 to 50.0) | 80.0 (80.0 to 80.0) | 40 | 7 | 10 |" in text
    assert comparison.spread([0.1, 0.2, 0.6]) == "30.0 (10.0 to 60.0)"
    assert comparison.spread([0.25]) == "25.0" and comparison.spread([None]) == "-"


def test_each_kind_of_data_has_its_own_sft_line(go):
    _, _, folder = go("--tables", "labelled", "--seeds", "50", "51")
    text = (folder / "RESULTS.md").read_text()
    assert "labelled, physics, 2 seeds" in text
    assert [f"| SFT --labelled {n} |" in text for n in (80, 200, 600)] == [True] * 3
    assert "| SFT |" in text                                       # of all labels


def test_a_row_that_two_tables_share_runs_once(go):
    _, commands, folder = go("--worlds", "physics", "--seeds", "50", "--tables", "methods", "map")
    outs = [after(argv, "--out") for argv in of_training(commands)]
    assert len(set(outs)) == len(outs)
    of_map, of_methods = (json.loads((folder / f"{table}.json").read_text())
                          for table in ("map", "methods"))
    same = of_map["physics, seed 50, swirl, busy 0.5, all pairs"]
    assert same["command"] == of_methods["physics, seed 50, swirl"]["command"]


def test_pixels_has_its_own_settings(go):
    _, commands, _ = go("--worlds", "pixels", "--seeds", "50")
    for argv in of_training(commands):
        assert not any(word.startswith("--lr") or word.endswith("-steps") for word in argv)


def test_four_iterations_have_a_line_each():
    stages = [{"name": name, **scores(0.5)} for name in
              ["sft", "iteration1/phase1", "iteration1/phase2", "iteration2/phase1",
               "iteration2/phase2", "iteration3/phase1", "iteration3/phase2", "swirl"]]
    lines = comparison.stages_of({"label": "swirl", "stages": stages})
    assert [label for label, _ in lines] == [f"swirl, iteration{i}" for i in (1, 2, 3)]
    assert lines[0][1]["name"] == "iteration1/phase2"


def test_tuning_keeps_the_best_rate_on_validation(go):
    _, commands, folder = go("--tune")
    chosen = json.loads((folder / "tuned.json").read_text())
    assert set(chosen) == set(METHODS) - {"sft"}
    assert all(flags["lr-fwm"] == 3e-4 for flags in chosen.values())       # of the stub above
    tries = sum(len(reproduce.grid(method)) for method in chosen)
    assert len([argv for argv in commands if "--start" in argv]) == tries
    assert {after(argv, "--seed") for argv in commands} == {str(reproduce.TUNING_SEED)}
    assert "| swirl, rate x 3 | 60.0 | 60.0 |" in (folder / "RESULTS.md").read_text()
    # What was chosen is used
    _, commands, _ = go("--worlds", "tools", "--seeds", "50")
    assert {after(argv, "--lr-fwm") for argv in commands if "--start" in argv} == {"0.0003"}


MIXED = {"share", "em", "em+swirl", "bootstrap+swirl"}


def test_each_method_gets_the_same_four_tries():
    for method in set(METHODS) - {"sft"} - MIXED:
        tries = [flags for flags, _ in reproduce.grid(method).values()]
        rates = sorted({flags["warmup-lr"] for flags in tries})
        assert len(tries) == 4 and rates == [1e-3, 3e-3, 9e-3]
        moved = [name for name in tries[0] if len({flags[name] for flags in tries}) > 1]
        assert [name for name in moved if name.endswith("steps")]
        assert "warmup-steps" not in moved and "iterations" not in moved


@pytest.mark.parametrize("method", sorted(MIXED))
def test_a_mixed_method_may_move_each_rate(method):
    tries = [flags for flags, _ in reproduce.grid(method).values()]
    rates = {(flags["warmup-lr"], flags["lr-fwm"]) for flags in tries}
    assert len(tries) == 7 and {(1e-3, 1e-4), (3e-3, 3e-4), (1e-3, 3e-4)} <= rates


@pytest.mark.parametrize("table", list(reproduce.TABLES))
def test_every_row_is_a_command_that_train_takes(table):
    for flags, data in reproduce.TABLES[table]({}).values():
        if flags["method"] != reproduce.BEST_OF_8:
            settings.parse(reproduce.words({"env": "physics", **flags, **data}))


def test_tuning_and_final_seeds_differ():
    assert reproduce.TUNING_SEED not in reproduce.SEEDS


def test_pictures_are_drawn(go):
    pytest.importorskip("matplotlib")
    _, _, folder = go("--worlds", "tools", "physics", "--seeds", "50", "51")
    for name in ("methods.png", "methods-curves.png"):
        assert (folder / name).stat().st_size > 5000


def test_the_map_says_who_wins():
    rows = []
    for busy, swirl in ((0.0, 0.4), (1.0, 0.7)):
        for seed in (1, 2):
            for method, sampled in (("swirl", swirl), ("bootstrap", 0.5)):
                flags = {"method": method, "busy": busy, "state-only": 105}
                of = scores(sampled + seed / 100)
                rows.append({"flags": flags, "stages": [of, of, of]})
    across, up, gains = comparison.who_wins(rows)
    assert (across, up) == ([0.0, 1.0], [105])
    assert gains == [pytest.approx([-10.0, 20.0])]


@pytest.mark.slow
def test_quick_runs_for_real(tmp_path):
    argv = ["--quick", "--worlds", "tools", "--results", str(tmp_path), "--runs",
            str(tmp_path / "runs")]
    assert reproduce.main(argv) == 0
    rows = json.loads((tmp_path / "quick" / "methods.json").read_text())
    assert len(rows) == len(METHODS) - 1


def test_two_iterations_are_one_line():
    stages = [{"name": name, **scores(0.5)} for name in
              ["sft", "bootstrap", "iteration1/phase1", "iteration2/phase1", "bootstrap+swirl"]]
    lines = comparison.stages_of({"label": "bootstrap+swirl", "stages": stages})
    assert [label for label, _ in lines] == ["bootstrap+swirl"]
