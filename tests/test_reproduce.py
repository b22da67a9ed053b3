"""The tables: what is run, what is kept, what is chosen."""
import json
import shutil

import pytest

import reproduce
import settings
from methods import METHODS


def scores(sampled, changed=0.5, logp=-1.0):
    return {"fwm": {"exact_changed": changed, "sampled": sampled, "logp": logp},
            "idm": {"exact": 0.8}, "steps": 5, "seconds": 10.0}


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """stage(*argv): (exit code, the commands of train.py that ran, the folder of results)."""
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    commands = []

    def run(argv):
        commands.append(argv)
        of = dict(zip(argv[::2], argv[1::2])) if "--no-rivals" not in argv else {}
        method = argv[argv.index("--method") + 1]
        rate = float(argv[argv.index("--lr-fwm") + 1]) if "--lr-fwm" in argv else 1e-4
        first = {"name": "sft", **scores(0.3, logp=-float(argv[argv.index("--seed") + 1]))}
        last = {"name": method, **scores(0.6 if rate > 2e-4 else 0.5)}
        found = {"stages": [first, last] if method == "sft" else [first, last, last],
                 "validation": {"sampled": last["fwm"]["sampled"]}, "collapse": {},
                 "splits": {}, "hardware": "a CPU"}
        out = tmp_path / argv[argv.index("--out") + 1]
        out.mkdir(parents=True)
        (out / "results.json").write_text(json.dumps(found))
        assert of.get("--env", "tools") in reproduce.WORLDS
        return found

    monkeypatch.setattr(reproduce, "run", run)

    def go(*argv):
        commands.clear()
        code = reproduce.main([*argv])
        return code, list(commands), tmp_path / "results"
    return go


def test_all_rows_begin_with_one_sft_model_a_seed(stage, capsys):
    code, commands, _ = stage("--worlds", "physics", "--seeds", "50", "51")
    warmups = [argv for argv in commands if argv[argv.index("--method") + 1] == "sft"]
    rows = [argv for argv in commands if argv not in warmups]
    assert code == 0 and len(warmups) == 2 and len(rows) == 2 * (len(METHODS) - 1)
    for argv in rows:
        seed = argv[argv.index("--seed") + 1]
        assert argv[argv.index("--start") + 1] == f"runs/reproduce/physics-{seed}/sft"
        settings.parse(argv)                                       # a command that train.py takes


def test_a_killed_run_goes_on_where_it_was(stage, monkeypatch):
    stage("--worlds", "tools", "--seeds", "50")
    code, commands, folder = stage("--worlds", "tools", "--seeds", "50")
    assert code == 0 and commands == []
    path = folder / "methods.json"
    rows = json.loads(path.read_text())
    lost = "tools, seed 50, em"
    path.write_text(json.dumps({key: row for key, row in rows.items() if key != lost}))
    shutil.rmtree(folder.parent / "runs/reproduce/tools-50/methods-em")
    _, commands, _ = stage("--worlds", "tools", "--seeds", "50")
    assert len(commands) == 1 and "em" in commands[0]
    assert set(json.loads(path.read_text())) == set(rows)


def test_a_failed_row_is_one_line(stage, monkeypatch, capsys):
    def fails(argv):
        raise RuntimeError("train.py --env tools: no room")

    monkeypatch.setattr(reproduce, "run", fails)
    with pytest.raises(SystemExit) as stop:
        stage("--worlds", "tools", "--seeds", "50")
    assert stop.value.code == 2 and "no room" in capsys.readouterr().err


def test_the_table_has_means_and_ranges(stage, capsys):
    stage("--worlds", "tools", "--seeds", "50", "51", "52")
    text = capsys.readouterr().out
    assert "| SFT | 50.0 (50.0 to 50.0) | 30.0 (30.0 to 30.0) |" in text
    assert "| swirl | 50.0 (50.0 to 50.0) | 50.0 (50.0 to 50.0) |" in text
    assert "methods, tools, 3 seeds" in text
    assert reproduce.spread([0.1, 0.2, 0.6]) == "30.0 (10.0 to 60.0)"
    assert reproduce.spread([0.25]) == "25.0"


def test_tuning_keeps_the_best_rate_on_validation(stage):
    _, commands, folder = stage("--tune")
    chosen = json.loads((folder / "tuned.json").read_text())
    assert set(chosen) == set(METHODS) - {"sft"}
    assert all(flags["lr-fwm"] == 3e-4 for flags in chosen.values())       # of the stub above
    assert len([argv for argv in commands if "--start" in argv]) == 4 * len(chosen)
    for argv in commands:
        assert argv[argv.index("--seed") + 1] == str(reproduce.TUNING_SEED)


def test_each_method_gets_the_same_four_tries():
    for method in set(METHODS) - {"sft"}:
        tries = [flags for flags, _ in reproduce.grid(method).values()]
        rates = sorted({flags["warmup-lr"] for flags in tries})
        assert len(tries) == 4 and rates == [1e-3, 3e-3, 9e-3]
        steps = [flags[name] for flags in tries for name in flags if name.endswith("steps")]
        assert min(steps) < max(steps)


@pytest.mark.parametrize("table", list(reproduce.TABLES))
def test_every_row_is_a_command_that_train_takes(table):
    for flags, data in reproduce.TABLES[table]({}).values():
        settings.parse(reproduce.words({"env": "physics", **flags, **data}))


def test_tuning_and_final_seeds_differ():
    assert reproduce.TUNING_SEED not in reproduce.SEEDS


def test_pictures_are_drawn(stage):
    pytest.importorskip("matplotlib")
    _, _, folder = stage("--worlds", "tools", "physics", "--seeds", "50", "51")
    for name in ("methods.png", "methods-curves.png"):
        assert (folder / name).stat().st_size > 5000


def test_the_map_says_who_wins():
    rows = {}
    for busy, swirl in ((0.0, 0.4), (1.0, 0.7)):
        for seed in (1, 2):
            for method, sampled in (("swirl", swirl), ("bootstrap", 0.5)):
                label = f"{method}, busy {busy}, 105 pairs"
                of = scores(sampled + seed / 100)
                rows[f"{label} {seed}"] = {"label": label, "stages": [of, of, of]}
    across, up, gains = reproduce.who_wins(rows)
    assert (across, up) == ([0.0, 1.0], [105])
    assert gains == [pytest.approx([-10.0, 20.0])]


@pytest.mark.slow
def test_quick_runs_for_real(tmp_path):
    argv = ["--quick", "--worlds", "tools", "--results", str(tmp_path), "--runs",
            str(tmp_path / "runs")]
    assert reproduce.main(argv) == 0
    rows = json.loads((tmp_path / "quick" / "methods.json").read_text())
    assert len(rows) == len(METHODS) - 1
