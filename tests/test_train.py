"""The whole job in small, what it leaves behind, and what it says to bad input."""
import json
import random
import shutil
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import envs
import lm
import sft
import train
from conftest import tiny_llama
from envs import records, tools
from evals import stabletoolbench

SMALL = ["--episodes", "8", "--warmup-steps", "6", "--warmup-every", "3", "--iterations", "1",
         "--phase1-steps", "3", "--phase2-steps", "2", "--group-size", "4", "--batch", "6", "--eval-size", "6",
         "--validation-size", "6", "--minutes", "3"]
FWM, IDM = {"n", "exact", "exact_changed", "bleu", "rouge_l", "logp"}, {"n", "exact", "bleu", "rouge_l", "logp"}


def test_a_pretrained_model_is_spared_the_tricks_of_tiny_ones():
    cfg, ours = train.parse(["--model", "some/model"]), train.parse(["--model", "some/model", "--warmup-decay", "0.1"])
    assert (cfg.warmup_decay, cfg.warmup_decay_idm, cfg.replay, cfg.muon, cfg.undo, cfg.minutes) == (0.0, 0.0, 0, False, 1.0, None) and ours.warmup_decay == 0.1
    assert cfg.patience < train.parse([]).patience
    assert train.parse([]).warmup_decay == 1 and train.parse([]).replay == 8
    pixels, texts = train.parse(["--env", "pixels", "--patience", "7"]), train.parse(["--env", "pixels", "--data", "some.jsonl"])
    assert (pixels.warmup_decay, pixels.warmup_decay_idm, pixels.temperature, pixels.temperature_fwm, pixels.patience, pixels.minutes) == (0.1, 1, 1, 1.3, 7, 16.8)
    assert (pixels.min_p_fwm, pixels.batch, pixels.pool, pixels.lr_fwm, pixels.warmup_steps, pixels.phase1_steps, pixels.tokens) == (0.05, 16, 3, 1.2e-3, 3000, 300, 2048)
    assert (pixels.warmup_batch_idm, pixels.share_idm) == (32, 0.13) and (texts.warmup_batch_idm, texts.share_idm) == (64, 0.22)
    assert (texts.min_p_fwm, texts.batch, texts.pool, texts.lr_fwm, texts.warmup_steps, texts.tokens) == (0, 8, 1, 8e-4, 2800, 0)
    for wrong in ("min-p-fwm=1", "min-p-fwm=-.1", "min-p-fwm=nan", "share-idm=0", "share-idm=.68", "share-idm=1", "share-idm=nan", "pool=0"):
        with pytest.raises(SystemExit):
            train.parse([f"--{wrong}"])
    assert (texts.warmup_decay, texts.warmup_decay_idm, texts.temperature_fwm, texts.minutes) == (1, 1, 1, 10) and train.parse(["--temperature", "0.75"]).temperature_fwm == 0.75
    with pytest.raises(SystemExit):
        train.parse(["--replay", "-1"])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "tools"
    assert train.main([*SMALL, "--out", str(out)]) == 0
    return out


def test_results_hold_every_field_of_the_contract(done):
    r = json.loads((done / "results.json").read_text())
    assert r["version"] == 1 and r["env"] == "tools" and r["model"] == "tiny" and r["seed"] == 0 and r["hardware"]
    assert set(r["seconds"]) == {"total", "warmup", "phase1", "phase2", "eval"} and all(r["seconds"].values())
    assert set(r["splits"]) == {"labelled", "state_only", "test"} and all(r["splits"].values())
    assert [s["name"] for s in r["stages"]] == ["sft", "iteration1/phase1", "iteration1/phase2", "swirl"]
    for scores in [*r["stages"], r["baselines"]["best_of_8"]]:
        assert FWM <= set(scores["fwm"]) and IDM <= set(scores["idm"]) and scores["fwm"]["n"] == 6
    assert all(len(s["fwm"]["rollout"]) == 6 for s in r["stages"])
    assert r["baselines"]["copy_x"]["exact_changed"] == 0
    assert {"unique", "mean_length", "true_mean_length"} <= set(r["collapse"])
    assert r["sizes"]["parameters"] > 1e5 and r["sizes"]["peak_rss_mb"] > 100


def test_metrics_and_samples_are_there_line_by_line(done):
    metrics = lines(done / "metrics.jsonl")
    assert {m["phase"] for m in metrics} == {"warmup", "phase1", "phase2", "eval"}
    for m in metrics:
        if m["phase"].startswith("phase") and m["reward"] is not None:             # None: Q read no action
            assert {"iteration", "step", "seconds", "reward", "reward_std", "grad_norm", "zero_std_groups", "truncated",
                    "tokens_per_second", "gap", "loss"} <= set(m)
            assert m["gap"] < 1e-4                             # sampler and trainer agree
            if m["step"] == 1:
                assert abs(m["kl"]) < 1e-4                     # the reference is the policy at the phase's start
    assert {"x", "z", "y", "y_hat", "z_hat"} <= set(lines(done / "samples.jsonl")[0])


def test_saved_folders_load_with_from_pretrained(done):
    for side in ("fwm", "idm"):
        tok = AutoTokenizer.from_pretrained(done / side)
        assert AutoModelForCausalLM.from_pretrained(done / side).config.vocab_size == len(tok)


def test_a_scorer_reads_a_run_and_finds_its_last_scores(done, tmp_path, capsys):
    out, last = tmp_path / "scores.json", json.loads((done / "results.json").read_text())
    assert stabletoolbench.main(["--run", str(done), "--json", str(out)]) == 0
    row = json.loads(out.read_text())["scores"]["all"]
    for scores, swirl in ((row["model"], last["stages"][-1]["fwm"]), (row["copy_x"], last["baselines"]["copy_x"])):
        assert (scores["exact"], scores["rouge_l"]) == (swirl["exact"], pytest.approx(swirl["rouge_l"], abs=1e-9))
        assert scores["bleu"] == pytest.approx(swirl["bleu"], abs=.01) and row["n"] == swirl["n"]
    assert row["changed"]["exact"] == last["stages"][-1]["fwm"]["exact_changed"]
    shutil.copytree(done, tmp_path / "other")
    (tmp_path / "other" / "results.json").write_text(json.dumps(last | {"splits": {"test": 7}}))
    with pytest.raises(SystemExit):
        stabletoolbench.main(["--run", str(tmp_path / "other")])
    assert "7 test transitions" in capsys.readouterr().err


def test_the_same_command_on_a_finished_run_prints_the_result_and_does_nothing_else(done, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in done.iterdir()}
    assert train.main([*SMALL, "--out", str(done)]) == 0
    assert "swirl" in capsys.readouterr().out
    assert before == {p.name: p.stat().st_mtime_ns for p in done.iterdir()}


def test_a_cut_run_resumes_from_the_last_finished_stage(done, tmp_path, monkeypatch, capsys):
    out = tmp_path / "cut"

    def cut(*args, **kwargs):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(train.swirl_idm, "phase2_step", cut)
        assert train.main([*SMALL, "--out", str(out)]) == 130
    assert "resumes" in capsys.readouterr().err
    assert train.main([*SMALL, "--out", str(out)]) == 0
    assert "resuming after iteration1/phase1" in capsys.readouterr().out
    a, b = (json.loads((d / "results.json").read_text())["stages"] for d in (done, out))
    assert a == b                                              # nothing depends on where it was cut


def test_a_run_may_resume_with_another_micro_batch_and_with_nothing_else(tmp_path, capsys):
    start = lambda *argv: train.rundir.Run(train.parse([*SMALL, *argv, "--out", str(tmp_path / "run")]), 0.0)
    start(), start("--tokens", "77")
    with pytest.raises(SystemExit):
        start("--batch", "3")
    assert "batch=" in capsys.readouterr().err


def test_the_warm_up_keeps_the_best_running_mean_and_ends_when_no_better_one_comes(monkeypatch, capsys):
    model, raw, seen, scores = tiny_llama(9, 0), [], [], iter([0.1, 0.5, 0.4, 0.5])
    step = lm.optimizer_step

    def recorded(model, *rest):
        norm = step(model, *rest)
        raw.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return norm

    def validate(mean):
        seen.append(torch.cat([p.flatten() for p in mean.parameters()]))
        return next(scores)

    monkeypatch.setattr(lm, "optimizer_step", recorded)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    cfg = train.parse(["--warmup-every", "2", "--patience", "2"])
    run = types.SimpleNamespace(log=lambda *_, **__: None, elapsed=lambda: 0.0)
    sft.warm_up(model, "P", [([1, 2], [3, 4]), ([2], [5, 6])] * 4, 4, 1.0, validate, cfg, run, 60)
    assert len(seen) == 4 and "step 4 of 8 (converged)" in capsys.readouterr().out     # an equal score is not better
    kept = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(kept, seen[1]) and not torch.equal(kept, raw[3])
    mean = start
    for t, weights in enumerate(raw[:4], 1):
        mean = mean * t / (t + 9) + weights * 9 / (t + 9)
    assert torch.allclose(kept, mean, atol=1e-5) and (raw[3] - start).abs().max() > 1e-3


def test_a_warm_up_with_nothing_right_yet_has_not_converged(capsys):
    run = types.SimpleNamespace(log=lambda *_, **__: None, elapsed=lambda: 0.0)
    cfg = train.parse(["--warmup-every", "1", "--patience", "2", "--warmup-steps", "5"])
    sft.warm_up(tiny_llama(9, 0), "P", [([1, 2], [3, 4])] * 4, 4, cfg.warmup_decay, lambda mean: 0.0, cfg, run, 60)
    assert "step 5 of 5 (cut off by warmup_steps)" in capsys.readouterr().out


def test_each_stage_gets_its_own_models_rows_and_settings(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(sft, "warm_up", lambda model, name, rows, size, *rest: seen.update({name: (rows, size, rest[-1])}))
    monkeypatch.setattr(train, "phase", lambda run, cfg, name, policy, frozen, validate, pairs, rows, settings, *_, **more:
                        seen.update({name: (rows, settings.lr, pairs)}))
    assert train.main([*SMALL, "--out", str(tmp_path / "run"), "--warmup-batch", "3", "--warmup-batch-idm", "5", "--share-idm", ".1",
                       "--lr-fwm", ".1", "--lr-idm", ".2"]) == 0
    longest = lambda rows: max(len(target) for _, target in rows)
    assert seen["FWM"][1] == 3 and seen["IDM"][1] == 5 and longest(seen["FWM"][0]) > longest(seen["IDM"][0])
    assert (seen["FWM"][2], seen["IDM"][2]) == pytest.approx((0.58 * 3 * 54, 0.1 * 3 * 54))                  # seconds, of the 3 minutes of SMALL: .68 together
    one, two = seen["iteration1/phase1"], seen["iteration1/phase2"]
    assert one[0] == seen["FWM"][0] and two[0] == seen["IDM"][0] and (one[1], two[1]) == (.1, .2)
    assert all(x != y for x, y in one[2]) and any(x == y for x, y in two[2])


def test_the_warm_up_takes_its_optimizer_from_the_settings(monkeypatch):
    seen, make = [], lm.make_optimizers
    monkeypatch.setattr(lm, "make_optimizers", lambda model, *settings: seen.append(settings) or make(model, *settings))
    run = types.SimpleNamespace(log=lambda *_, **__: None, elapsed=lambda: 0.0)
    cfg = train.parse(["--warmup-steps", "1", "--warmup-lr", ".01", "--no-muon", "--warmup-decay", ".3"])
    sft.warm_up(tiny_llama(9, 0), "P", [([1, 2], [3, 4])] * 4, 4, cfg.warmup_decay, lambda mean: 0.0, cfg, run, 60)
    assert seen == [(.01, False, .3)]


@pytest.mark.parametrize("scores, undone", [((0.5, 0.44), True), ((0.5, 0.46), False), ((0.4, 0.5), False)])
def test_a_phase_that_clearly_lowers_the_validation_is_undone(capsys, scores, undone):
    """validate sees the model of the phase's start, then the one of its end."""
    policy, frozen, seen = tiny_llama(9, 0), tiny_llama(9, 1), []
    flat = lambda model: torch.cat([p.detach().flatten() for p in model.parameters()])
    start = flat(policy)

    def take_step(ref, optimizers, pairs, gen, replay):
        with torch.no_grad():
            policy.model.norm.weight += 1
        return {"reward": 0.0, "kl": None, "gap": 0.0, "tokens": 1}, []

    def validate(model):
        seen.append(flat(model))
        return scores[len(seen) - 1]

    run = types.SimpleNamespace(log=lambda *_, **__: None, elapsed=lambda: 0.0, progress={"stages": [{"fwm": {"exact": 0.0}}]})
    cfg = train.parse([])
    settings = train.phase_settings(cfg, 0.0, 0.1, 1.0, 4)
    train.phase(run, cfg, "iteration1/phase1", policy, frozen, validate, [("a", "b")] * 8, [([1], [2])], settings, 2, 60, take_step)
    assert torch.equal(seen[0], start) and not torch.equal(seen[1], start)
    assert torch.equal(flat(policy), seen[0] if undone else seen[1]) and ("undone" in capsys.readouterr().out) == undone


@pytest.mark.parametrize("min_p, gap, fine", [(0.0, 5e-4, True), (0.0, 0.02, False), (0.05, 0.02, True), (0.05, 0.06, False)])
def test_a_phase_s_first_step_holds_the_sampler_against_the_trainer(min_p, gap, fine):
    """With min-p a token at its edge may be in for one and out for the other: log(1 + min_p) at most."""
    run = types.SimpleNamespace(log=lambda *_, **__: None, elapsed=lambda: 0.0, progress={"stages": [{"fwm": {"exact": 0.0}}]})
    cfg = train.parse([])
    go = lambda: train.phase(run, cfg, "iteration1/phase1", tiny_llama(9, 0), tiny_llama(9, 1), lambda model: 0.0, [("a", "b")] * 8, [([1], [2])],
                             train.phase_settings(cfg, 0.0, 0.1, 1.0, 4, min_p), 1, 60,
                             lambda *_: ({"reward": 0.0, "kl": None, "gap": gap, "tokens": 1}, []))
    if fine:
        return go()
    with pytest.raises(RuntimeError, match="disagree"):
        go()


def test_a_phase_that_moves_the_frozen_model_stops():
    policy, frozen = tiny_llama(9, 0), tiny_llama(9, 1)

    def take_step(*_):
        with torch.no_grad():                                                      # no sum would tell
            w = frozen.model.embed_tokens.weight
            w.copy_(w.flip(0))
        return {"reward": 0.0, "kl": None, "gap": 0.0, "tokens": 1}, []

    run = types.SimpleNamespace(log=lambda *_, **__: None, elapsed=lambda: 0.0, progress={"stages": [{"fwm": {"exact": 0.0}}]})
    cfg = train.parse([])
    with pytest.raises(AssertionError, match="frozen"):
        train.phase(run, cfg, "iteration1/phase1", policy, frozen, lambda model: 0.0, [("a", "b")] * 8, [([1], [2])],
                    train.phase_settings(cfg, 0.0, 0.1, 1.0, 4), 1, 60, take_step)


def test_of_a_user_s_file_a_test_transition_goes_if_training_knows_both_of_its_states(tmp_path):
    rows = [("train-1", "a", "b"), ("train-2", "c", "d"), ("dev-1", "v", "w"), ("test-1", "a", "q"), ("test-2", "a", "d"), ("test-3", "p", "q")]
    records.write(tmp_path / "f.jsonl", [records.Transition(e, 0, x, "z", y) for e, x, y in rows])
    test = envs.load_splits(train.parse(["--data", str(tmp_path / "f.jsonl")]))[3]
    assert set(test) == {("a", "z", "q"), ("p", "z", "q")}


def test_state_only_pairs_carry_no_action_and_splits_share_no_episode():
    labelled, validation, state_only, test = envs.load_splits(train.parse(["--episodes", "8"]))
    assert all(len(pair) == 2 for pair in state_only)
    states = lambda rows: {s for row in rows for s in (row[0], row[-1])}
    assert not {x for x, _, _ in test} & (states(labelled) | states(state_only))


def test_validation_takes_no_more_episodes_than_it_uses():
    labelled, validation, state_only, _ = envs.load_splits(train.parse(["--episodes", "64"]))
    assert (len(labelled), len(validation), len(state_only)) == (20 * 14, 160, 32 * 14)
    labelled, validation, *_ = envs.load_splits(train.parse(["--episodes", "8"]))
    assert len(labelled) == len(validation) == 2 * 14


def test_no_state_of_a_test_row_was_held_by_training(monkeypatch):
    """Neither its x nor its y, in any split with or without actions."""
    world = {"labelled": [("a", "z", "b")], "validation": [("v", "z", "w")], "state-only": [("c", "z", "d")],
             "test": [("p", "z", "q"), ("a", "z", "q"), ("p", "z", "b"), ("d", "z", "q"), ("p", "z", "c")]}
    splits = {random.Random(f"0 {split} {i}").random(): rows for split, rows in world.items() for i in range(60)}
    monkeypatch.setattr(tools, "episode", lambda rng: splits[rng.random()])
    assert set(envs.load_splits(train.parse(["--episodes", "4"]))[3]) == {("p", "z", "q")}


# --- bad input: one line, exit code 2, nothing half-written ---------------------------------------------------------------

def refused(capsys, argv):
    with pytest.raises(SystemExit) as e:
        train.main(argv)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


def row(t, **change):
    return json.dumps({"episode": "e", "t": t, "x": "a", "z": "go", "y": "b"} | change)


@pytest.mark.parametrize("text, says", [
    (None, "no such file"), ("{broken\n", ":1:"), (row(0) + "\n" + row(1, x=" "), ":2:"), (row(0), "1 line"),
    ("\n".join(json.dumps({"episode": e, "t": t, "x": f"{e}{t}", "y": "b"}) for e in "abcdef" for t in (0, 1)), "z"),
], ids=["missing", "broken JSON", "empty state", "one line", "no z at all"])
def test_bad_data_is_refused_in_one_line(tmp_path, capsys, text, says):
    path = tmp_path / "t.jsonl"
    if text is not None:
        path.write_text(text)
    err = refused(capsys, ["--data", str(path), "--out", str(tmp_path / "out")])
    assert "t.jsonl" in err and says in err.lower()
    assert not (tmp_path / "out").exists()


def test_states_longer_than_the_model_takes_are_refused(tmp_path, capsys):
    long = " ".join(f"w{i}" for i in range(3000))
    records.write(tmp_path / "t.jsonl", [records.Transition(f"e{i}", t, f"{long} {i} {t}", "go", "b")
                                         for i in range(6) for t in range(2)])
    err = refused(capsys, ["--data", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "out"), *SMALL])
    assert "longer than the model takes" in err and not (tmp_path / "out").exists()


def test_bad_arguments_are_refused(tmp_path, capsys, done):
    out = ["--out", str(tmp_path / "out")]
    assert "--env" in refused(capsys, ["--env", "mars", *out])
    assert "--nonsense" in refused(capsys, ["--nonsense", *out])
    assert "--model" in refused(capsys, ["--model", str(tmp_path / "no-such-folder"), *out])
    (tmp_path / "file").write_text("mine")
    assert "--out" in refused(capsys, ["--out", str(tmp_path / "file")])
    assert "--out" in refused(capsys, ["--out", str(tmp_path)])           # holds files that no run wrote
    assert (tmp_path / "file").read_text() == "mine"
    assert "seed=0" in refused(capsys, [*SMALL, "--out", str(done), "--seed", "1"])   # another run lives there
    for zero in ("--group-size", "--batch", "--iterations", "--lr-fwm", "--warmup-lr"):
        assert zero in refused(capsys, [zero, "0", *out])
    for name, value in (("--lr-idm", "nan"), ("--warmup-decay", "-1"), ("--seed", "-1"), ("--seed", "1" * 20)):
        assert name in refused(capsys, [name, value, *out])
    assert not (tmp_path / "out").exists()


def test_fresh_deletes_what_a_run_wrote_and_nothing_else(done, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(done, out)
    (out / "notes.txt").write_text("mine")
    assert "notes.txt" in refused(capsys, [*SMALL, "--out", str(out), "--fresh"])
    (out / "notes.txt").rename(out / "fwm" / "notes.txt")
    assert "fwm/notes.txt" in refused(capsys, [*SMALL, "--out", str(out), "--fresh"])
    assert (out / "results.json").exists() and (out / "fwm" / "notes.txt").read_text() == "mine"
    for name in ("progress.json", "config.json"):
        (out / "results.json").unlink(missing_ok=True)
        (out / name).write_text('{"cut')
        assert name in refused(capsys, [*SMALL, "--out", str(out), "--fresh"]) and (out / "fwm" / "config.json").exists()


def test_own_data_trains_to_the_end(tmp_path):
    rows = [records.Transition(f"e{i}", t, x, z, y) for i in range(14)
            for t, (x, z, y) in enumerate(tools.episode(random.Random(i), 3))]
    records.write(tmp_path / "t.jsonl.gz", rows)
    assert train.main([*SMALL, "--data", str(tmp_path / "t.jsonl.gz"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "results.json").exists()
