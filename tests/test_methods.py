"""Each method trains on what it says, and on nothing else."""
import inspect
import json
import random
import types
from pathlib import Path

import pytest
from conftest import write_lamps
from test_train import SMALL

import envs
import grpo
import methods
import sft
import train
from settings import parse
from swirl_fwm import FWM

LABELLED = [("a", "true", "b"), ("b", "true", "b")]
PAIRS = [("c", "d"), ("e", "e"), ("f", "g")]
PSEUDO = [("c", "guess c", "d"), ("f", "guess f", "g")]            # not of ("e", "e")


class Guesser:
    """A Q that counts: its n-th draw is "n"; greedily it guesses by x."""
    net = types.SimpleNamespace(device="cpu")

    def __init__(self):
        self.asked, self.n = [], 0

    def predict(self, xs, ys):
        self.asked.append(list(zip(xs, ys)))
        return [f"guess {x}" for x in xs]

    def sample(self, xs, ys, n, generator):
        assert n == 1
        self.n += len(xs)
        return [f"draw {self.n} {x}" for x in xs]


@pytest.fixture
def taught(monkeypatch, tok):
    """taught(stage, *argv): (P's rows in the batches of a stage, steps, Q)."""
    def of(kind, *argv, rows=40):
        seen = []

        def fit(model, name, batches, steps, validate, lab):
            while sum(map(len, seen)) < rows:
                seen.append(next(batches))
            return model

        monkeypatch.setattr(sft, "fit", fit)
        cfg = parse(["--bootstrap-steps", "7", "--warmup-batch", "5", *argv])
        lab = types.SimpleNamespace(cfg=cfg, labelled=LABELLED, state_only=PAIRS)
        Q = Guesser()
        _, _, steps = methods.likelihood(methods.Stage(kind), FWM(None, tok), Q, lab)
        return [row for batch in seen for row in batch], steps, Q
    return of


@pytest.mark.parametrize("kind, triples", [
    ("longer", LABELLED), ("continue", PSEUDO), ("bootstrap", LABELLED + PSEUDO)])
def test_what_p_goes_on_with(kind, triples, taught, tok):
    rows, steps, Q = taught(kind)
    for row in FWM(None, tok).rows(triples):
        assert row in rows
    assert all(row in FWM(None, tok).rows(triples) for row in rows) and steps == 7
    assert Q.asked == ([] if kind == "longer" else [[("c", "d"), ("f", "g")]])     # once


def test_merge_is_bootstrap_from_the_start(tok, monkeypatch):
    start = types.SimpleNamespace(device="cpu")
    P = FWM(start, tok)
    monkeypatch.setattr(sft, "fit", lambda model, *_: model)
    lab = types.SimpleNamespace(cfg=parse(["--bootstrap-steps", "7", "--warmup-steps", "11"]),
                                labelled=LABELLED, state_only=PAIRS,
                                fresh_net=lambda device: "pretrained")
    P, _, steps = methods.merge(P, Guesser(), lab, methods.Stage("merge"))
    assert P.net == "pretrained" and steps == 18


def test_em_draws_z_anew_for_each_batch(taught, tok):
    rows, steps, Q = taught("em", "--iterations", "2", rows=60)
    known = FWM(None, tok).rows(LABELLED)
    drawn = [row for row in rows if row not in known]
    assert steps == 3 and not Q.asked
    assert len(drawn) == Q.n and len(set(map(str, drawn))) > len(drawn) / 2
    assert {str(target) for _, target in drawn} == {
        str(target) for _, target in FWM(None, tok).rows(PSEUDO)}


def test_the_oracle_sees_the_actions_that_were_taken(tok):
    cfg = parse(["--env", "tools", "--episodes", "8", "--seed", "3", "--busy", "0"])
    true = envs.with_actions(cfg)
    state_only = envs.load_splits(cfg)[2]
    assert [(x, y) for x, _, y in true] == state_only and all(z for _, z, _ in true)
    few = parse(["--env", "tools", "--episodes", "8", "--seed", "3", "--state-only", "9"])
    assert [(x, y) for x, _, y in envs.with_actions(few)] == envs.load_splits(few)[2]
    episodes = [envs.tools.episode(random.Random(f"3 state-only {i}"))
                for i in range(envs.shares(cfg)["state-only"])]
    assert true == [row for rows in episodes for row in rows]


def test_the_oracle_needs_a_world(capsys):
    with pytest.raises(SystemExit):
        parse(["--method", "oracle", "--data", "x.jsonl"])
    assert "oracle" in capsys.readouterr().err


def test_stages_of_an_iteration_are_numbered():
    assert methods.Stage("em", 2).name == "iteration2/em"
    assert methods.Stage("longer").name == "longer"


# --- whole runs -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def job(small_folder, tmp_path_factory):
    """job(method, *argv): the folder of a small run, made once."""
    folder, data = tmp_path_factory.mktemp("methods"), tmp_path_factory.mktemp("data")
    write_lamps(data / "lamps.jsonl")

    def run(method, *argv):
        out = folder / method
        if not out.exists():
            argv = [*SMALL, "--model", str(small_folder), "--data", str(data / "lamps.jsonl"),
                    "--method", method, *argv, "--out", str(out)]
            assert train.main(argv) == 0
        return out
    return run


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("method, stages", [
    ("sft", []), ("sft-longer", ["longer"]), ("sft-continue", ["continue"]),
    ("sft-merge", ["merge"]), ("bootstrap", ["bootstrap"]), ("phase1", ["iteration1/phase1"]),
    ("em", ["iteration1/em", "iteration1/phase2"]),
    ("em+swirl", ["iteration1/em", "iteration1/phase1", "iteration1/phase2"])])
def test_a_method_leaves_its_stages(method, stages, job):
    got = results(job(method))
    assert [stage["name"] for stage in got["stages"]] == ["sft", *stages, method]
    assert set(got["baselines"]) == {"copy_x"}


def test_six_calls_lead_from_main_to_the_surrogate(small_folder, tmp_path, monkeypatch):
    write_lamps(tmp_path / "lamps.jsonl")
    surrogate, ways, root = grpo.surrogate, set(), str(Path(grpo.__file__).parent)

    def noting(*args):
        frames = [f for f in inspect.stack()[1:] if f.filename.startswith(root)]
        names = [f.function for f in frames if "/tests/" not in f.filename]
        ways.add(tuple(names[::-1]))
        return surrogate(*args)

    monkeypatch.setattr(grpo, "surrogate", noting)
    argv = [*SMALL, "--model", str(small_folder), "--data", str(tmp_path / "lamps.jsonl")]
    assert train.main([*argv, "--no-rivals", "--out", str(tmp_path / "run")]) == 0
    assert ways == {("main", "train", "follow", "run_phase", "step", "backward")}


def test_share_trains_one_model_in_both_roles(job):
    out = job("share")
    names = [stage["name"] for stage in results(out)["stages"]]
    assert names == ["sft", "joint", "iteration1/phase1", "iteration1/phase2", "share"]
    same = [(out / side / "model.safetensors").read_bytes() for side in ("fwm", "idm")]
    assert same[0] == same[1]
    # Both columns move in each phase
    stages = results(out)["stages"]
    assert stages[2]["idm"]["logp"] != stages[1]["idm"]["logp"]
    assert stages[3]["fwm"]["logp"] != stages[2]["fwm"]["logp"]


def test_start_takes_the_place_of_the_warm_up(job):
    first = job("sft")
    out = first.parent / "started"
    config = json.loads((first / "config.json").read_text())["settings"]
    argv = [*SMALL, "--model", config["model"], "--data", config["data"], "--method", "sft-longer"]
    assert train.main([*argv, "--start", str(first), "--out", str(out)]) == 0
    got, before = results(out)["stages"], results(first)["stages"]
    assert got[0] == before[0] and got[1]["name"] == "longer"
    # From the same weights with the same draws: what one run makes in one go
    whole = results(job("sft-longer"))["stages"]
    assert got[1]["fwm"] == whole[1]["fwm"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert not [line for line in lines if line.get("model") in ("FWM", "IDM")]


def test_a_start_without_sft_is_one_line(small_folder, tmp_path, capsys):
    write_lamps(tmp_path / "lamps.jsonl")
    argv = [*SMALL, "--model", str(small_folder), "--data", str(tmp_path / "lamps.jsonl")]
    with pytest.raises(SystemExit) as error:
        train.main([*argv, "--start", str(tmp_path), "--out", str(tmp_path / "run")])
    assert error.value.code == 2 and "--start" in capsys.readouterr().err


def test_a_cut_share_goes_on_as_one_model(job, monkeypatch):
    whole = job("share")
    config = json.loads((whole / "config.json").read_text())["settings"]
    argv = [*SMALL, "--model", config["model"], "--data", config["data"], "--method", "share",
            "--out", str(whole.parent / "cut")]

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.swirl_idm, "phase2_rollouts", cut)
        assert train.main(argv) == 130
    assert train.main(argv) == 0
    for side in ("fwm", "idm"):
        file = f"{side}/model.safetensors"
        assert (whole / file).read_bytes() == (whole.parent / "cut" / file).read_bytes()


@pytest.mark.parametrize("flags, says", [
    (["--seed", "5"], "seed=0"), (["--view", "full"], "view=diff"),
    (["--eval-size", "5"], "eval_size")])
def test_a_start_of_other_data_is_one_line(flags, says, job, tmp_path, capsys):
    first = job("sft")
    config = json.loads((first / "config.json").read_text())["settings"]
    argv = [*SMALL, "--model", config["model"], "--data", config["data"], *flags]
    with pytest.raises(SystemExit):
        train.main([*argv, "--start", str(first), "--out", str(tmp_path / "run")])
    assert says in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_start_is_never_the_folder_that_is_deleted(job, capsys):
    first = job("sft")
    config = json.loads((first / "config.json").read_text())["settings"]
    argv = [*SMALL, "--model", config["model"], "--data", config["data"]]
    with pytest.raises(SystemExit):
        train.main([*argv, "--start", str(first), "--out", str(first), "--fresh"])
    assert "one folder" in capsys.readouterr().err and (first / "results.json").exists()


def test_a_stage_counts_its_examples_and_tokens(job):
    stages = results(job("em+swirl"))["stages"]
    cfg = json.loads((job("em+swirl") / "config.json").read_text())["settings"]
    rows = cfg["warmup_batch"]
    # Steps times batch; of the warm-up P's
    assert [stage["examples"] for stage in stages[:4]] == [6 * rows, 4 * rows, 3 * 6, 2 * 6]
    # A rollout has at least one token, and there are four for an example
    assert all(stage["tokens"] >= 4 * stage["examples"] for stage in stages[2:4])


def test_q_of_em_is_scored_after_phase_ii(job):
    stages = results(job("em"))["stages"]
    assert stages[1]["idm"] == stages[0]["idm"] and stages[2]["fwm"] == stages[1]["fwm"]
