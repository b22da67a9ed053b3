"""The whole job in small, what it leaves behind, and what it says to bad input."""
import collections
import contextlib
import io
import json
import random
import shutil
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import Net, tiny_llama, weights, without_times, write_lamps
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import envs
import methods
import sft
import train
from envs import records, tools
from evals import stabletoolbench
from grpo import Phase
from models import tiny
from support import aside, plan, rundir

SMALL = [
    "--episodes", "8", "--warmup-steps", "6", "--warmup-steps-idm", "4", "--bootstrap-steps", "4",
    "--iterations", "1", "--phase1-steps", "3", "--phase2-steps", "2", "--group-size", "4",
    "--batch", "6", "--warmup-batch-idm", "4", "--eval-size", "6", "--validation-size", "6",
    "--threads", "1"]
FWM = {"n", "exact", "exact_changed", "bleu", "rouge_l", "logp", "sampled"}
IDM = {"n", "exact", "bleu", "rouge_l", "logp", "refused"}


# --- settings -------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv", [["--model", "some/model"], ["--env", "pixels"],
                                  ["--data", "some.jsonl"],
                                  ["--model", "some/model", "--lora", "4"]])
def test_a_flag_of_the_user_s_wins_over_a_preset(argv):
    preset = train.parse(argv)
    cfg = train.parse([*argv, "--warmup-steps", "17", "--reward-form", "sum", "--floor", "3",
                       "--tokens", "99", "--lr-fwm", ".5"])
    assert (cfg.warmup_steps, cfg.tokens, cfg.lr_fwm) == (17, 99, .5)
    assert (cfg.reward_form, cfg.floor) == ("sum", 3)
    assert preset != train.parse([]) and (preset.warmup_steps, preset.lr_fwm) != (17, .5)


def test_a_file_of_one_s_own_is_rewarded_per_token():
    assert train.parse(["--data", "some.jsonl"]).reward_form == "mean"
    assert train.parse([]).reward_form == "sum"


# --- a run ----------------------------------------------------------------------------------------

def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def results_of(out):
    return json.loads((out / "results.json").read_text())


def same_run(a, b):
    """Equal results but for times, and equal weights, bit for bit."""
    assert without_times(results_of(a)) == without_times(results_of(b))
    for side in ("fwm", "idm"):
        one, two = (load_file(out / side / "model.safetensors") for out in (a, b))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Done(NamedTuple):
    """A finished run."""
    argv: list
    out: Path


@pytest.fixture(scope="module", autouse=True)
def small_model(small_folder):
    """`--model tiny` is a smaller one still."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "FOLDER", small_folder)
        yield small_folder


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """(folder of a run of the tools world, its exit code, what it printed)."""
    out, said = tmp_path_factory.mktemp("run") / "tools", io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = train.main([*SMALL, "--out", str(out)])
    return out, code, said.getvalue()


@pytest.fixture(scope="module")
def done(told):
    out, _, _ = told
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lamps(tmp_path_factory.mktemp("data") / "lamps.jsonl")


@pytest.fixture(scope="module")
def lamps(data, small_folder, tmp_path_factory):
    """A run on a file of short states: its arguments, its folder."""
    out, argv = tmp_path_factory.mktemp("run") / "lamps", [*SMALL, "--data", str(data)]
    train.main([*argv, "--out", str(out)])
    return Done(argv, out)


def test_results_hold_every_field_of_the_contract(told):
    done, code, _ = told
    r = results_of(done)
    assert code == 0 and r["version"] == 2
    assert (r["env"], r["model"], r["seed"]) == ("tools", "tiny", 0) and r["hardware"]
    assert {"unique", "mean_length", "true_mean_length"} <= set(r["collapse"])


def test_results_measure_seconds_rows_and_memory(done):
    r = results_of(done)
    assert set(r["seconds"]) == {"total", "warmup", "phase1", "phase2", "eval"} and all(
        r["seconds"].values()
    )
    assert set(r["splits"]) == {"labelled", "state_only", "test"} and all(r["splits"].values())
    assert r["sizes"]["parameters"] > 1e4 and r["sizes"]["peak_rss_mb"] > 100


def test_stages_have_their_names_and_steps(done):
    stages = results_of(done)["stages"]
    assert [s["name"] for s in stages] == ["sft", "iteration1/phase1", "iteration1/phase2", "swirl"]
    assert [s["steps"] for s in stages] == [6, 3, 2, 2] and all(s["seconds"] > 0 for s in stages)


def test_scores_of_a_stage_lie_in_their_ranges(done):
    for s in results_of(done)["stages"]:
        assert FWM <= set(s["fwm"]) and IDM <= set(s["idm"]) and s["fwm"]["n"] == s["idm"]["n"] == 6
        assert all(0 <= s["fwm"][k] <= 1 for k in ("exact", "exact_changed", "sampled"))
        assert 0 <= s["idm"]["refused"] <= 1
        assert s["fwm"]["logp"] < 0 and s["idm"]["logp"] < 0 and len(s["fwm"]["rollout"]) == 6


def test_a_side_that_did_not_move_keeps_its_scores(done):
    stages = results_of(done)["stages"]
    assert stages[0]["idm"] == stages[1]["idm"] != stages[2]["idm"]
    assert stages[0]["fwm"] != stages[1]["fwm"] == stages[2]["fwm"]
    assert stages[3] == stages[2] | {"name": "swirl"}


def test_baselines_hold_copy_x_and_the_rivals(done):
    base = results_of(done)["baselines"]
    assert set(base) == {"copy_x", "best_of_8", "bootstrap", "bootstrap_swirl"}
    assert base["copy_x"]["exact_changed"] == 0


def test_best_of_8_is_beside_sft_on_the_same_rows(done):
    r = results_of(done)
    best, sft_scores = r["baselines"]["best_of_8"], r["stages"][0]
    assert best["fwm"]["n"] == best["sft"]["fwm"]["n"] == 6
    assert FWM - {"sampled"} <= set(best["fwm"])
    for side in ("fwm", "idm"):  # of the same rows, of the same models
        assert best["sft"][side].items() <= sft_scores[side].items()


def test_bootstrap_moves_p(done):
    r = results_of(done)
    boot, sft_scores = r["baselines"]["bootstrap"], r["stages"][0]
    assert FWM <= set(boot["fwm"]) and boot["steps"] == 4 and boot["seconds"] > 0
    assert boot["fwm"] != sft_scores["fwm"]


def test_bootstrap_swirl_goes_on_from_bootstrap(done):
    r = results_of(done)
    then, sft_scores = r["baselines"]["bootstrap_swirl"], r["stages"][0]
    assert [s["name"] for s in then["stages"]] == ["iteration1/phase1", "iteration1/phase2"]
    assert (then["fwm"], then["idm"]) == (then["stages"][-1]["fwm"], then["stages"][-1]["idm"])
    assert IDM <= set(then["idm"])
    assert then["stages"][0]["idm"] == sft_scores["idm"]
    assert then["fwm"] != r["baselines"]["bootstrap"]["fwm"]


def test_each_step_of_a_phase_is_logged_and_consistent(done):
    for folder in (done, done / "rivals"):
        metrics, gaps = lines(folder / "metrics.jsonl"), 0
        assert {m["phase"] for m in metrics} == {"warmup", "phase1", "phase2", "eval"}
        for m in metrics:
            if m["phase"].startswith("phase") and m["reward"] is not None:  # None: Q read no action
                assert {"iteration", "step", "seconds", "reward", "reward_std", "grad_norm",
                        "zero_std_groups", "truncated",
                        "tokens_per_second", "gap", "loss", "floored"} <= set(m)
                assert m["gap"] < 1e-4  # sampler and trainer agree
                gaps += 1
                if m["step"] == 1:
                    assert abs(m["kl"]) < 1e-4  # the reference is the policy at the phase's start
        assert gaps >= 4


def test_each_step_of_the_warm_up_is_logged(done):
    warmup = [m for m in lines(done / "metrics.jsonl") if m["phase"] == "warmup"]
    for name, steps in (("FWM", 6), ("IDM", 4)):
        assert [m["step"] for m in warmup if m["model"] == name] == list(range(1, steps + 1))


def test_samples_hold_truth_and_forecast(done):
    assert {"x", "z", "y", "y_hat", "z_hat"} <= set(lines(done / "samples.jsonl")[0])


def test_saved_folders_load_with_from_pretrained(done):
    for side in ("fwm", "idm"):
        tok = AutoTokenizer.from_pretrained(done / side)
        assert AutoModelForCausalLM.from_pretrained(done / side).config.vocab_size == len(tok)


def test_without_a_terminal_only_whole_lines_print(told):
    _, _, said = told
    assert "\r" not in said and "\x1b" not in said and "\nsft" in said and "best of 8" in said


def test_the_table_has_a_row_a_stage_and_a_rival(done, capsys):
    assert train.main([*SMALL, "--out", str(done)]) == 0
    out = capsys.readouterr().out.splitlines()
    heads = [row[:22].strip() for row in out[-9:]]
    assert heads == ["sft", "iteration1/phase1", "iteration1/phase2", "bootstrap",
                     "+ iteration1/phase1", "+ iteration1/phase2",
                     "sft, the first 6", "best of 8 of these", "copy x"]


def test_scorer_reproduces_the_last_scores_of_a_run(done, tmp_path):
    out, last = tmp_path / "scores.json", results_of(done)
    assert stabletoolbench.main(["--run", str(done), "--json", str(out)]) == 0
    row = json.loads(out.read_text())["scores"]["all"]
    for scores, swirl in (
        (row["model"], last["stages"][-1]["fwm"]),
        (row["copy_x"], last["baselines"]["copy_x"]),
    ):
        assert (scores["exact"], scores["rouge_l"]) == (
            swirl["exact"],
            pytest.approx(swirl["rouge_l"], abs=1e-9),
        )
        assert scores["bleu"] == pytest.approx(swirl["bleu"], abs=.01) and row["n"] == swirl["n"]
    assert row["changed"]["exact"] == last["stages"][-1]["fwm"]["exact_changed"]


def test_scorer_refuses_a_run_of_other_test_rows(done, tmp_path, capsys):
    last = results_of(done)
    shutil.copytree(done, tmp_path / "other")
    (tmp_path / "other" / "results.json").write_text(json.dumps(last | {"splits": {"test": 7}}))
    with pytest.raises(SystemExit):
        stabletoolbench.main(["--run", str(tmp_path / "other")])
    assert "7 test transitions" in capsys.readouterr().err


def test_finished_run_only_prints_its_result(done, capsys):
    before = {p: p.stat().st_mtime_ns for p in done.rglob("*")}
    assert train.main([*SMALL, "--out", str(done)]) == 0
    assert "iteration1/phase2" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in done.rglob("*")}


# --- the same command -----------------------------------------------------------------------------

def test_the_same_command_gives_the_same_results(lamps, tmp_path):
    argv, out = lamps
    assert train.main([*argv, "--out", str(tmp_path / "again")]) == 0
    same_run(out, tmp_path / "again")
    assert train.main([*argv, "--seed", "1", "--out", str(tmp_path / "other")]) == 0
    one, other = (without_times(results_of(folder)) for folder in (out, tmp_path / "other"))
    assert one["stages"] != other["stages"]


def test_a_second_process_changes_no_number(small_folder, data, tmp_path, monkeypatch):
    """It finds its model by `--model`, since what a test patches stays in this process."""
    small = ["--muon", "--warmup-lr", "2e-3", "--lr-fwm", "4e-4", "--warmup-batch", "8",
             "--threads", "1"]
    argv = [*SMALL, "--data", str(data), "--model", str(small_folder), *small]
    monkeypatch.setattr(aside, "possible", lambda cfg: cfg.threads == 0)
    started, start = [], aside.concurrent.futures.ProcessPoolExecutor
    monkeypatch.setattr(aside.concurrent.futures, "ProcessPoolExecutor",
                        lambda *args: started.append(args) or start(*args))
    assert train.main([*argv, "--out", str(tmp_path / "alone")]) == 0 and not started
    assert train.main([*argv, "--threads", "0", "--out", str(tmp_path / "aside")]) == 0
    assert len(started) == 2
    same_run(tmp_path / "alone", tmp_path / "aside")
    # No line of a process is lost, or cut by another's
    for name in ("metrics.jsonl", "rivals/metrics.jsonl"):
        a, b = (lines(tmp_path / which / name) for which in ("alone", "aside"))
        assert len(a) == len(b) > 6
    for which in ("alone", "aside"):
        config = json.loads((tmp_path / which / "config.json").read_text())
        assert config["settings"]["threads"] == (which == "alone")


@pytest.mark.parametrize("changed, fine", [({}, True), ({"model": "smollm2"}, False),
                                           ({"device": "cuda"}, False), ({"threads": 2}, False)])
def test_a_second_process_wants_one_thread_and_a_core(monkeypatch, changed, fine):
    monkeypatch.setattr(aside, "cores", lambda: 2)
    cfg = types.SimpleNamespace(**{"model": "tiny", "device": "cpu", "threads": 0} | changed)
    assert aside.possible(cfg) == fine
    monkeypatch.setattr(aside, "cores", lambda: 1)
    assert not aside.possible(cfg)
    assert aside.start(cfg, sorted, [2, 1]).result() == [1, 2]


CUTS = {"in the rivals' Phase II": ("swirl_idm", "phase2_rollouts", 2,
                                    "resuming after bootstrap, iteration1/phase1"),
        "in best of 8": (None, "best_of_8", 1, "resuming after sft"),
        "in Bootstrap": ("methods", "bootstrap", 1, "resuming after sft"),
        "in Phase II": ("swirl_idm", "phase2_rollouts", 4, "resuming after iteration1/phase1"),
        "in the rivals' Phase I": ("swirl_fwm", "phase1_rollouts", 1,
                                   "resuming after bootstrap, bootstrap"),
        "at the end": (None, "finish", 1, "resuming after iteration1/phase2")}


@pytest.mark.parametrize("where", CUTS)
def test_a_cut_run_resumes_to_the_same_results(lamps, tmp_path, monkeypatch, capsys, where):
    """Nothing depends on where it was cut: in which call of which function."""
    module, name, call, says = CUTS[where]
    argv, out = lamps
    place = getattr(train, module) if module else train
    f, calls = getattr(place, name), []

    def cut(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return f(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, cut)
        assert train.main([*argv, "--out", str(tmp_path / "cut")]) == 130
    assert "resumes" in capsys.readouterr().err and not (tmp_path / "cut" / "results.json").exists()
    assert train.main([*argv, "--out", str(tmp_path / "cut")]) == 0
    assert says in capsys.readouterr().out
    same_run(out, tmp_path / "cut")
    for name in ("metrics.jsonl", "rivals/metrics.jsonl"):   # without those of the cut stage
        one, two = ([(m["phase"], m["step"]) for m in lines(folder / name)]
                    for folder in (out, tmp_path / "cut"))
        assert one == two


def test_a_run_without_rivals_has_the_same_stages(lamps, tmp_path, capsys):
    argv, out = lamps
    assert train.main([*argv, "--no-rivals", "--out", str(tmp_path / "run")]) == 0
    alone, beside = (without_times(results_of(folder)) for folder in (tmp_path / "run", out))
    assert set(alone["baselines"]) == {"copy_x"} and alone["stages"] == beside["stages"]
    assert not (tmp_path / "run" / "rivals").exists()
    assert "bootstrap" not in capsys.readouterr().out.lower()


def test_run_may_resume_only_with_another_micro_batch(tmp_path, capsys):
    start = lambda *argv: train.rundir.Run(
        train.parse([*SMALL, *argv, "--out", str(tmp_path / "run")]), 0.0
    )
    start()
    start("--tokens", "77")
    with pytest.raises(SystemExit):
        start("--batch", "3")
    assert "batch=" in capsys.readouterr().err


# --- a file that changes --------------------------------------------------------------------------

@pytest.fixture
def moved(lamps, tmp_path):
    """(arguments, run) as above, of a file that then gets a line more."""
    argv, out = lamps
    shutil.copytree(out, tmp_path / "run")
    shutil.copy(argv[-1], tmp_path / "f.jsonl")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["settings"]["data"] = str(tmp_path / "f.jsonl")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    return [*SMALL, "--data", str(tmp_path / "f.jsonl"), "--out", str(tmp_path / "run")], tmp_path


def test_config_holds_the_sum_of_the_file_s_bytes(lamps, done):
    argv, out = lamps
    assert json.loads((out / "config.json").read_text())["data_sha256"] == records.sha256(argv[-1])
    assert json.loads((done / "config.json").read_text())["data_sha256"] is None


@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_file_is_refused_when_a_run_resumes(moved, capsys, finished):
    argv, folder = moved
    if not finished:
        (folder / "run" / "results.json").unlink()
    rundir.Run(train.parse(argv), 0.0)
    with open(folder / "f.jsonl", "a") as file:
        file.write("\n")  # not even a transition
    assert "has changed" in refused(capsys, argv)


def test_a_changed_file_is_refused_by_a_scorer(moved, capsys):
    argv, folder = moved
    assert stabletoolbench.main(["--run", str(folder / "run")]) == 0
    with open(folder / "f.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(SystemExit) as stop:
        stabletoolbench.main(["--run", str(folder / "run")])
    assert stop.value.code == 2 and "has changed" in capsys.readouterr().err


# --- --minutes ------------------------------------------------------------------------------------

def timed(monkeypatch, second=1.0):
    """Let each measured call take so many seconds; returns the list of calls."""
    calls = []
    monkeypatch.setattr(plan, "seconds_of", lambda f: calls.append(f()) or second)
    return calls


def minutes_for(factor, argv):
    """`--minutes` that give so many times the steps of argv, if each step and each evaluation (of
    fewer than 64 transitions) takes a second."""
    cfg = train.parse(argv)
    steps, scores = plan.path(cfg, {name: getattr(cfg, name) for name in plan.STEPS}, 1.0)
    return (factor * steps + scores) / 60


def test_resumed_run_keeps_the_steps_of_minutes(lamps, tmp_path, monkeypatch, capsys):
    argv, out = lamps.argv, tmp_path / "run"
    argv = [*argv, "--minutes", repr(minutes_for(2, argv)), "--out", str(out)]
    with monkeypatch.context() as patch:
        measured = timed(patch)
        # Measured, 4 of the rivals, 2
        cut = interrupted_at(7, train.swirl_idm.phase2_rollouts)
        patch.setattr(train.swirl_idm, "phase2_rollouts", cut)
        assert train.main(argv) == 130
    assert len(measured) == 6 and "--minutes" in capsys.readouterr().out
    settings = json.loads((out / "config.json").read_text())["settings"]
    assert [settings[name] for name in plan.STEPS] == [12, 8, 8, 6, 4]
    with monkeypatch.context() as patch:
        measured = timed(patch, 99.0)
        assert train.main(argv) == 0 and not measured
    results = results_of(out)
    assert [s["steps"] for s in results["stages"]] == [12, 6, 4, 4]
    assert results["baselines"]["bootstrap"]["steps"] == 8
    # Finished, it prints its table again
    assert train.main(argv) == 0 and "copy x" in capsys.readouterr().out


def interrupted_at(call, f):
    calls = []

    def cut(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return f(*args, **kwargs)
    return cut


def test_measuring_changes_no_result(lamps, tmp_path, monkeypatch):
    """Neither the models nor any random number: the same steps give the same run."""
    argv, out = lamps
    timed(monkeypatch)
    assert train.main([*argv, "--minutes", repr(minutes_for(1, argv)), "--out",
                       str(tmp_path / "run")]) == 0
    same_run(out, tmp_path / "run")


def test_call_is_timed_by_its_fastest_after_the_first(monkeypatch):
    now, takes = [0.0], iter([100.0, 5.0, 2.0, 7.0])
    monkeypatch.setattr(plan.time, "monotonic", lambda: now[0])

    def f():
        now[0] += next(takes)

    assert plan.seconds_of(f) == 2.0


@pytest.mark.parametrize("flags, seconds, evaluations", [
    (["--no-rivals"], 20 + 2 * (3 + 4), 5),
    (["--method", "sft-merge"], 20 + 10 + 30, 2), (["--method", "em"], 20 + 2 * (15 + 4), 5),
    (["--threads", "1"], 10 + 20 + 30 + 3 * (3 + 4), 9),
    ([], 20 + 30 + (3 + 4), 5)])
def test_the_longest_way_is_planned(monkeypatch, flags, seconds, evaluations):
    """Two iterations; the warm-ups and the rivals side by side where there is a second process."""
    monkeypatch.setattr(aside, "cores", lambda: 2)
    cfg = train.parse(["--iterations", "2", *flags])
    of = {"warmup_steps": 10, "warmup_steps_idm": 20, "bootstrap_steps": 30, "phase1_steps": 3,
          "phase2_steps": 4}
    assert plan.path(cfg, of, 0.5) == (seconds, evaluations * 0.5)


# --- the stages, one by one -----------------------------------------------------------------------

@pytest.fixture(scope="module")
def noted(data, tmp_path_factory):
    """{name of a fit or label and name of a phase: the arguments by name} of a run that neither
    fits nor steps."""
    seen, out = {}, tmp_path_factory.mktemp("noted") / "run"

    def fit(model, name, batches, steps, validate, lab):
        first = next(batches)
        rows = first + [row for _ in range(20) for row in next(batches)]
        seen[name] = types.SimpleNamespace(model=model, rows=rows, size=len(first), steps=steps)
        return model

    def run_phase(draw, policy, frozen, phase, stage, lab):
        pairs = methods.pairs_of(stage, phase, lab)
        seen[lab.run.label + stage.name] = types.SimpleNamespace(
            draw=draw, policy=policy, frozen=frozen, pairs=pairs, phase=phase, lab=lab
        )
        return phase.steps

    argv = [*SMALL, "--data", str(data), "--warmup-batch", "3", "--warmup-batch-idm", "5",
            "--lr-fwm", ".1", "--lr-idm", ".2", "--beta", ".3", "--beta-fwm", ".4",
            "--temperature", "1.1", "--min-p", ".05",
            "--reward-form", "mean", "--floor", "7", "--view", "full"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "fit", fit)
        patch.setattr(train, "run_phase", run_phase)
        seen["exit code"] = train.main([*argv, "--out", str(out)])
    return seen


def test_each_fit_gets_its_own_rows_and_steps(noted):
    P, Q, boot = noted["FWM"], noted["IDM"], noted["bootstrap"]
    longest = lambda rows: max(len(target) for _, target in rows)
    assert noted["exit code"] == 0
    assert (P.size, P.steps, Q.size, Q.steps, boot.size, boot.steps) == (3, 6, 5, 4, 3, 4)
    assert longest(P.rows) > longest(Q.rows)
    assert set(map(str, boot.rows)) - set(map(str, P.rows))                # pseudo-labels


both_runs = pytest.mark.parametrize("label", ["", "bootstrap, "], ids=["run", "rivals"])


@both_runs
def test_policy_of_one_phase_is_frozen_in_the_other(noted, label):
    one, two = noted[label + "iteration1/phase1"], noted[label + "iteration1/phase2"]
    assert (one.policy, one.frozen) == (two.frozen, two.policy)
    assert (label == "") == (one.policy is noted["FWM"].model)
    assert one.frozen.view == "full" and one.policy.longest > one.frozen.longest
    assert one.draw is train.swirl_fwm.phase1_rollouts
    assert two.draw is train.swirl_idm.phase2_rollouts


@both_runs
def test_each_phase_gets_its_own_settings(noted, label):
    one, two = (noted[f"{label}iteration1/phase{n}"].phase for n in (1, 2))
    assert (one.peak, one.beta, one.steps) == (.1, .4, 3)
    assert (two.peak, two.beta, two.steps) == (.2, .3, 2)
    assert {(phase.temperature, phase.min_p) for phase in (one, two)} == {(1.1, .05)}
    assert {(phase.form, phase.floor) for phase in (one, two)} == {("mean", 7)}


@both_runs
def test_both_phases_get_the_pairs_that_change(noted, label):
    one, two = noted[label + "iteration1/phase1"], noted[label + "iteration1/phase2"]
    assert one.pairs == two.pairs and all(x != y for x, y in one.pairs)
    assert len(one.pairs) < len(one.lab.state_only)


def test_iterations_take_separate_pairs_if_enough():
    pairs = [(i, -1) for i in range(32)]
    enough, many = Phase(steps=5, batch=2), Phase(steps=6, batch=2)
    lab = types.SimpleNamespace(cfg=train.parse(["--iterations", "3"]), state_only=pairs)

    def shares(phase):
        return [methods.pairs_of(methods.Stage("phase1", i), phase, lab) for i in (1, 2, 3)]

    assert shares(enough) == [pairs[:10], pairs[10:20], pairs[20:30]]
    assert shares(many) == [pairs] * 3


def test_later_iterations_take_a_fifth_of_the_rates(monkeypatch):
    rates = {}
    monkeypatch.setattr(train, "run_phase", lambda draw, policy, frozen, phase, stage, lab:
                        rates.update({stage.name: phase.peak}))
    monkeypatch.setattr(train, "end_stage", lambda *_: None)
    lab = types.SimpleNamespace(cfg=train.parse(["--lr-fwm", ".5", "--lr-idm", ".1"]),
                                run=types.SimpleNamespace(done=lambda name: False),
                                state_only=[("a", "b")] * 3)
    train.follow(methods.stages("swirl", 3), None, None, lab)
    assert rates == pytest.approx({
        "iteration1/phase1": .5, "iteration1/phase2": .1, "iteration2/phase1": .1,
        "iteration2/phase2": .02, "iteration3/phase1": .1, "iteration3/phase2": .02})


PLAIN = {"reward": 0.0, "kl": None, "gap": 0.0, "tokens": 1, "zero_std_groups": 0.0, "floored": 0.0}


def run(drawn_and_step, policy=None, frozen=None, seed=0, iteration=1, **phase):
    """`train.run_phase` with these in place of a phase's rollouts and of `grpo.step`; returns
    (policy, the lines that are logged)."""
    draw, step = drawn_and_step
    logged, bar = [], types.SimpleNamespace(show=lambda *_, **__: None, close=lambda: None)
    run = types.SimpleNamespace(log=lambda file, **line: logged.append((file, line)),
                                elapsed=lambda: 0.0, label="", bar=lambda name, steps: bar,
                                steps=lambda name, n, *_: range(1, n + 1),
                                logged=lambda name: [line for file, line in logged if file == name])
    pairs = [(n, -n - 1) for n in range(40)]
    cfg = train.parse(["--seed", str(seed), "--iterations", "1"])
    lab = types.SimpleNamespace(cfg=cfg, run=run, state_only=pairs, tally=collections.Counter())
    policy, frozen = policy or Net(tiny_llama(9, 0)), frozen or Net(tiny_llama(9, 1))
    phase = Phase(**dict(steps=3, peak=0.1) | phase)
    stage = methods.Stage("phase1", iteration)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "pairs_of", lambda *_: pairs)
        patch.setattr(train.grpo, "step", step)
        train.run_phase(draw, policy, frozen, phase, stage, lab)
    return policy, logged


def step_that(log=PLAIN, note=None, examples=()):
    """(rollouts of a phase, step) that only note their arguments, as note(policy=, pairs=, ..);
    the step returns this log."""
    def draw(policy, frozen, pairs, phase, generator):
        u = torch.rand(1, generator=generator).item()
        return log and ((pairs, u), None, list(examples))

    def step(policy, ref, optimizers, rollouts, R, phase, lr):
        pairs, u = rollouts
        if note:
            note(policy=policy, ref=ref, pairs=pairs, lr=lr, u=u)
        return dict(log)
    return draw, step


def test_a_phase_that_moves_the_frozen_model_stops():
    frozen = Net(tiny_llama(9, 1))

    def turned(**_):
        # no sum would tell
        with torch.no_grad():
            w = frozen.net.model.embed_tokens.weight
            w.copy_(w.flip(0))

    with pytest.raises(AssertionError, match="frozen"):
        run(step_that(note=turned), frozen=frozen)


def test_the_rate_of_a_phase_rises_and_falls_to_0():
    seen = []
    run(step_that(note=lambda lr, **_: seen.append(lr)), steps=20, peak=0.5)
    assert seen == pytest.approx([0.5 * min(1, t / 10) * (1 - (t - 1) / 20) for t in range(1, 21)])
    assert max(seen) < 0.5 and 0 < seen[-1] == pytest.approx(0.5 / 20)


def test_a_phase_is_a_function_of_its_seed_and_name():
    def notes(**how):
        seen = []
        run(step_that(note=lambda pairs, u, **_: seen.append((pairs, u))), steps=4, batch=8, **how)
        return seen

    once = notes()
    assert once == notes() and {len(pairs) for pairs, _ in once} == {8}
    # No pair twice while there are others
    assert len({n for pairs, _ in once for n, _ in pairs}) == 32
    for other in (notes(seed=1), notes(iteration=2)):
        assert other[0][0] != once[0][0] and other[0][1] != once[0][1]


def test_reference_is_the_policy_as_the_phase_begins():
    policy, seen = Net(tiny_llama(9, 0)), []

    def moving(policy, ref, **_):
        seen.append(ref and weights(ref.net))
        with torch.no_grad():
            policy.net.model.norm.weight += 1

    start = weights(policy.net)
    run(step_that(note=moving), policy=policy, steps=12)
    # Without beta it is only logged
    assert [ref is not None for ref in seen] == [True] + [False] * 9 + [True, False]
    assert torch.equal(seen[0], start) and torch.equal(seen[10], start)
    assert not torch.equal(weights(policy.net), start)


def test_step_without_a_readable_action_is_skipped(capsys):
    _, logged = run(step_that(log=None), steps=3)
    assert [line["reward"] for _, line in logged] == [None] * 3
    assert "could learn nothing" in capsys.readouterr().out


def test_examples_of_first_and_last_step_are_kept():
    _, logged = run(step_that(examples=[{"x": "a"}]), steps=5)
    assert sum(file == "samples.jsonl" for file, _ in logged) == 2
    assert sum(file == "metrics.jsonl" for file, _ in logged) == 5


@pytest.mark.parametrize("log, says", [({"zero_std_groups": 1.0}, "could learn nothing"),
                                       ({"floored": 0.6}, "60% of the rewards"),
                                       ({"floored": 0.4}, ""), ({"zero_std_groups": 0.9}, "")])
def test_a_phase_without_a_lesson_says_so(capsys, log, says):
    run(step_that(PLAIN | log))
    out = capsys.readouterr().out
    assert says in out and ("warning" in out) == bool(says)


# --- the splits -----------------------------------------------------------------------------------

def test_test_rows_known_to_training_are_dropped(tmp_path):
    rows = [
        ("train-1", "a", "b"), ("train-2", "c", "d"), ("dev-1", "v", "w"), ("test-1", "a", "q"),
        ("test-2", "a", "d"), ("test-3", "p", "q")]
    records.write(tmp_path / "f.jsonl", [records.Transition(e, 0, x, "z", y) for e, x, y in rows])
    test = envs.load_splits(train.parse(["--data", str(tmp_path / "f.jsonl")]))[3]
    assert set(test) == {("a", "z", "q"), ("p", "z", "q")}


def test_state_only_pairs_carry_no_action():
    labelled, validation, state_only, test = envs.load_splits(train.parse(["--episodes", "8"]))
    assert all(len(pair) == 2 for pair in state_only)
    states = lambda rows: {s for row in rows for s in (row[0], row[-1])}
    assert not {x for x, _, _ in test} & (states(labelled) | states(state_only))


def test_no_action_of_the_state_only_half_is_in_memory():
    drawn = envs.episodes(train.parse(["--episodes", "8"]), "state-only")
    assert len(drawn) == 4 and all(z is None for steps in drawn for _, z, _ in steps)


def test_validation_takes_only_episodes_it_uses():
    labelled, validation, state_only, _ = envs.load_splits(train.parse(["--episodes", "64"]))
    assert (len(labelled), len(validation), len(state_only)) == (24 * 14, 100, 32 * 14)
    labelled, validation, *_ = envs.load_splits(train.parse(["--episodes", "8"]))
    assert len(labelled) == len(validation) == 2 * 14


def test_no_state_of_a_test_row_was_held_by_training(monkeypatch):
    """Neither its x nor its y, in any split with or without actions."""
    world = {
        "labelled": [("a", "z", "b")],
        "validation": [("v", "z", "w")],
        "state-only": [("c", "z", "d")],
        "test": [
            ("p", "z", "q"),
            ("a", "z", "q"),
            ("p", "z", "b"),
            ("d", "z", "q"),
            ("p", "z", "c"),
        ],
    }
    splits = {
        random.Random(f"0 {split} {i}").random(): rows
        for split, rows in world.items()
        for i in range(60)
    }
    monkeypatch.setattr(tools, "episode", lambda rng, busy=0.0: splits[rng.random()])
    assert set(envs.load_splits(train.parse(["--episodes", "4"]))[3]) == {("p", "z", "q")}


# --- bad input: one line, exit code 2, nothing half-written ---------------------------------------

def refused(capsys, argv):
    with pytest.raises(SystemExit) as e:
        train.main(argv)
    err = capsys.readouterr().err
    assert (
        e.value.code == 2
        and err.startswith("error: ")
        and err.count("\n") == 1
        and "Traceback" not in err
    )
    return err


def row(t, **change):
    return json.dumps({"episode": "e", "t": t, "x": "a", "z": "go", "y": "b"} | change)


@pytest.mark.parametrize(
    "text, says",
    [
        (None, "no such file"),
        ("{broken\n", ":1:"),
        (row(0) + "\n" + row(1, x=" "), ":2:"),
        (row(0), "1 line"),
        (
            "\n".join(
                json.dumps({"episode": e, "t": t, "x": f"{e}{t}", "y": "b"})
                for e in "abcdef"
                for t in (0, 1)
            ),
            "z",
        ),
    ],
    ids=["missing", "broken JSON", "empty state", "one line", "no z at all"],
)
def test_bad_data_is_refused_in_one_line(tmp_path, capsys, text, says):
    path = tmp_path / "t.jsonl"
    if text is not None:
        path.write_text(text)
    err = refused(capsys, ["--data", str(path), "--out", str(tmp_path / "out")])
    assert "t.jsonl" in err and says in err.lower()
    assert not (tmp_path / "out").exists()


def test_states_longer_than_the_context_are_refused(tmp_path, capsys):
    long = " ".join(f"w{i}" for i in range(3000))
    records.write(
        tmp_path / "t.jsonl",
        [
            records.Transition(f"e{i}", t, f"{long} {i} {t}", "go", "b")
            for i in range(6)
            for t in range(2)
        ],
    )
    err = refused(
        capsys, ["--data", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "out"), *SMALL]
    )
    assert "longer than the model takes" in err and not (tmp_path / "out").exists()


def test_bad_arguments_are_refused(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert "--env" in refused(capsys, ["--env", "mars", *out])
    assert "--nonsense" in refused(capsys, ["--nonsense", *out])
    assert "--model" in refused(capsys, ["--model", str(tmp_path / "no-such-folder"), *out])
    assert not (tmp_path / "out").exists()


def test_an_out_that_no_run_wrote_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "--out" in refused(capsys, ["--out", str(tmp_path / "file")])
    assert "--out" in refused(capsys, ["--out", str(tmp_path)])
    assert (tmp_path / "file").read_text() == "mine"


def test_another_run_in_the_same_folder_is_refused(done, lamps, tmp_path, capsys):
    assert "seed=0" in refused(capsys, [*SMALL, "--out", str(done), "--seed", "1"])
    shutil.copytree(lamps.out, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()  # also if it is not finished
    assert "seed=0" in refused(capsys, [*lamps.argv, "--out", str(tmp_path / "run"), "--seed", "1"])


ZERO = ("--group-size", "--batch", "--iterations", "--lr-fwm", "--warmup-lr", "--warmup-steps",
        "--phase1-steps", "--bootstrap-steps")
BAD = [(name, "0") for name in ZERO] + [
    ("--lr-idm", "nan"), ("--seed", "-1"), ("--seed", "1" * 20),
    ("--min-p-fwm", "1"), ("--min-p-fwm", "nan"), ("--busy", "1.1"),
    ("--busy", "nan"), ("--minutes", "-1"), ("--minutes", "inf"), ("--threads", "-1"),
    ("--floor", "-1")]


@pytest.mark.parametrize("name, value", BAD)
def test_a_value_that_makes_no_sense_is_refused(tmp_path, capsys, name, value):
    assert name in refused(capsys, [name, value, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_fresh_refuses_a_folder_with_foreign_files(lamps, tmp_path, capsys):
    argv, out = lamps.argv, tmp_path / "copy"
    argv = [*argv, "--out", str(out), "--fresh"]
    shutil.copytree(lamps.out, out)
    (out / "notes.txt").write_text("mine")
    assert "notes.txt" in refused(capsys, argv)
    (out / "notes.txt").rename(out / "fwm" / "notes.txt")
    assert "fwm/notes.txt" in refused(capsys, argv)
    assert (out / "results.json").exists() and (out / "fwm" / "notes.txt").read_text() == "mine"


def test_fresh_refuses_a_folder_with_a_cut_record(lamps, tmp_path, capsys):
    argv, out = lamps.argv, tmp_path / "copy"
    argv = [*argv, "--out", str(out), "--fresh"]
    shutil.copytree(lamps.out, out)
    for name in ("progress.json", "config.json"):
        (out / "results.json").unlink(missing_ok=True)
        (out / name).write_text('{"cut')
        assert name in refused(capsys, argv) and (out / "fwm" / "config.json").exists()


@pytest.mark.parametrize("folder", ["rivals", "sft"])
def test_fresh_keeps_foreign_files_of_subfolders(lamps, tmp_path, capsys, folder):
    argv, out = lamps.argv, tmp_path / "copy"
    shutil.copytree(lamps.out, out)
    (out / folder / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        rundir.Run(train.parse([*argv, "--out", str(out), "--fresh"]), 0.0)
    assert (out / folder / "notes.txt").read_text() == "mine"
    assert "notes.txt" in capsys.readouterr().err


def test_fresh_starts_over(lamps, tmp_path):
    shutil.copytree(lamps.out, tmp_path / "copy")
    argv = [*lamps.argv, "--seed", "5", "--out", str(tmp_path / "copy"), "--fresh"]
    rundir.Run(train.parse(argv), 0.0)
    assert {p.name for p in (tmp_path / "copy").iterdir()} == {"config.json", "lock"}


def test_packed_data_trains_to_the_end(tmp_path):
    rows = [records.Transition(f"e{i}", t, x, z, y) for i in range(14)
            for t, (x, z, y) in enumerate(tools.episode(random.Random(i), 3))]
    records.write(tmp_path / "t.jsonl.gz", rows)
    argv = [*SMALL, "--no-rivals", "--data", str(tmp_path / "t.jsonl.gz"), "--out",
            str(tmp_path / "out")]
    assert train.main(argv) == 0 and (tmp_path / "out" / "results.json").exists()
