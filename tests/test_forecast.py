"""A real model's settings, memory and minutes, before a run begins."""
import json
import re
import types

import pytest
import torch
from conftest import weights, write_lamps
from transformers import LlamaConfig

import lm
import methods
import settings
import train
from models import memory, presets, pretrained
from models.text import Spelt
from support import forecast, loading, plan


def parse(*argv):
    return settings.parse(["--model", "some/model", *argv])


def planned(n, on_cpu, labels=1568, pairs=1500, argv=()):
    """The Config of a model of n parameters."""
    cfg = parse(*argv)
    presets.fill(cfg, presets.of_size(n, on_cpu, cfg.lora))
    presets.fill(cfg, presets.of_data(cfg, n, on_cpu, labels, pairs))
    return cfg


# --- settings -------------------------------------------------------------------------------------

@pytest.mark.parametrize("labels", [100, 1568, 30000])
def test_a_gpu_trains_for_three_epochs(labels):
    cfg = planned(5e8, False, labels)
    for steps, batch in ((cfg.warmup_steps, cfg.warmup_batch),
                         (cfg.warmup_steps_idm, cfg.warmup_batch_idm)):
        assert 3 * labels <= steps * batch < 3 * labels + batch


def test_a_phase_on_a_gpu_is_one_epoch_of_its_share():
    cfg = planned(5e8, False, pairs=1500)
    taken = cfg.iterations * cfg.phase1_steps * cfg.batch
    assert 1500 - cfg.iterations * cfg.batch < taken <= 1500


def test_30000_labels_and_a_large_model_get_the_paper_s():
    cfg = planned(3e9, False, labels=30000, pairs=30000)
    assert (cfg.warmup_batch, cfg.warmup_batch_idm, cfg.batch) == (128, 128, 128)
    assert (cfg.warmup_lr, cfg.lr_fwm, cfg.lr_idm) == (2e-5, 1e-6, 1e-6)


def test_smaller_models_take_larger_steps():
    rates = [planned(n, False).warmup_lr for n in (1e8, 5e8, 3e9)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 3


@pytest.mark.parametrize("n", [1.35e8, 5e8])
def test_rows_on_a_cpu_fall_with_the_parameters(n):
    cfg = planned(n, True)
    rows = presets.CPU_ROWS / n
    assert rows <= cfg.warmup_steps * cfg.warmup_batch < rows + cfg.warmup_batch
    rollouts = cfg.phase1_steps * cfg.batch * cfg.group_size
    assert abs(rollouts - rows) <= cfg.batch * cfg.group_size
    assert planned(2 * n, True).eval_size < cfg.eval_size


def test_few_labels_bound_a_cpu_s_warm_up_too():
    cfg = planned(1e8, True, labels=20)
    assert cfg.warmup_steps * cfg.warmup_batch < 3 * 20 + cfg.warmup_batch


def test_a_flag_wins_over_the_size():
    argv = ["--batch", "6", "--warmup-steps", "7", "--eval-size", "9", "--lr-fwm", ".1"]
    cfg = planned(5e8, True, argv=argv)
    assert (cfg.batch, cfg.warmup_steps, cfg.eval_size, cfg.lr_fwm) == (6, 7, 9, 0.1)


def test_lora_has_ten_times_the_rates():
    one, ten = planned(5e8, False), planned(5e8, False, argv=["--lora", "8"])
    for name in ("warmup_lr", "lr_fwm", "lr_idm"):
        assert getattr(ten, name) == pytest.approx(10 * getattr(one, name))


def test_images_for_a_real_model_are_never_busy():
    assert parse("--env", "pixels").busy == 0 and parse("--env", "tools").busy == 0.5


def test_a_method_that_begins_again_refuses_lora_at_once(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--method", "share", "--lora", "8")
    assert stop.value.code == 2 and "leave out --lora" in capsys.readouterr().err


def test_no_setting_waits_after_the_plan():
    cfg = planned(5e8, True)
    waiting = [name for name in presets.PLANNED if presets.is_open(cfg, name)]
    assert waiting == ["tokens"]


# --- memory ---------------------------------------------------------------------------------------

CONFIG = LlamaConfig(vocab_size=50000, hidden_size=512, intermediate_size=1024, num_hidden_layers=8,
                     num_attention_heads=8, num_key_value_heads=2)


@pytest.mark.parametrize("free", [2.5e9, 4e9, 64e9])
def test_the_micro_batch_fills_what_is_free_and_no_more(free):
    held, token = memory.parts(CONFIG)
    tokens = memory.micro_batch(held, token, free, on_cpu=False)
    assert memory.peak(held, token, tokens) <= memory.USED * free
    assert tokens == 16384 or memory.peak(held, token, tokens + 1) > memory.USED * free


def test_too_little_memory_leaves_no_micro_batch():
    held, token = memory.parts(CONFIG)
    assert memory.micro_batch(held, token, sum(held.values()), on_cpu=True) == 0
    assert memory.micro_batch(held, token, 1e12, on_cpu=True) == 1024


def test_rivals_hold_two_models_more():
    (alone, _), (beside, _) = (memory.parts(CONFIG, rivals=rivals) for rivals in (False, True))
    assert sum(beside.values()) - sum(alone.values()) == 2 * alone["opposite"]


@pytest.mark.parametrize("longest", [50, 500])
def test_the_sampler_s_cache_fits_where_a_micro_batch_does(longest):
    """Keys and values by hand: 8 layers, 2 heads of 64, float32, copied as they grow."""
    _, token = memory.parts(CONFIG)
    cached = memory.cached(CONFIG, 1000, longest)
    keys = 2 * 8 * 2 * 64 * 4
    assert 2.25 * keys * cached < 1000 * token
    rows = cached / (2 * longest)
    assert rows * CONFIG.vocab_size * 40 < 1000 * token


def test_sampling_batches_keep_to_the_cache():
    prompts = [[1] * 30] * 40
    options = lm.Options(0, tokens=10**6, cached=2000)
    size = lm.batch_size(prompts, 4, 20, options)
    assert size * 4 * (30 + 20) <= 2000 < (size + 1) * 4 * (30 + 20)


def test_free_memory_is_read_from_linux(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    assert memory.available(tmp_path / "meminfo") == 2048 * 1024
    assert memory.available(tmp_path / "none") is None
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert memory.left(tmp_path) == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.left(tmp_path) is None


def test_encoded_texts_are_forgotten_from_the_oldest(tok):
    encode = Spelt(most=20)
    first = encode(tok, "lamp is on")
    encode(tok, "door is")
    assert encode(tok, "lamp is on") is first              # used: the youngest now
    encode(tok, "lamp")
    assert {text for _, text in encode.ids} == {"lamp is on", "lamp"}
    assert encode.size == len("lamp is on") + len("lamp") <= 20
    encode(tok, "x" * 100)
    assert encode.size == 0 and encode(tok, "lamp is on") == first


def test_a_resumed_run_holds_no_third_model(small_folder, monkeypatch):
    cfg = types.SimpleNamespace(lora=0, shard=False)
    run = types.SimpleNamespace(dir=None, progress={"stages": []}, done=lambda name: False)
    lab = types.SimpleNamespace(cfg=cfg, run=run)
    P, Q, load = types.SimpleNamespace(net=1), types.SimpleNamespace(net=2), pretrained.load

    def counted(folder):
        assert [P.net, Q.net].count(None) == 1
        return load(folder)

    monkeypatch.setattr(pretrained, "load", counted)
    monkeypatch.setattr(loading, "saved_model", lambda *where: small_folder)
    P, Q = loading.settle(P, Q, lab, torch.device("cpu"), "sft")
    assert P.net is not Q.net and P.net.config.model_type == "llama"


# --- minutes --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def argv(small_folder, tmp_path_factory):
    data = write_lamps(tmp_path_factory.mktemp("data") / "lamps.jsonl")
    return ["--model", str(small_folder), "--data", str(data), "--dtype", "float32"]


@pytest.fixture(scope="module")
def lab(argv):
    """(P, Q, lab) as a plan finds them, with its settings."""
    cfg = settings.parse(argv)
    forecast.size_up(cfg, "cpu")
    P, Q, lab = loading.open_lab(cfg, torch.device("cpu"))
    pairs = len(methods.kept_pairs(lab))
    n = P.net.num_parameters()
    presets.fill(cfg, presets.of_data(cfg, n, True, len(lab.labelled), pairs))
    return P, Q, lab


def seconds_at(lab, **speed):
    """`forecast.seconds` where only some things take time."""
    P, Q, lab = lab
    zero = dict.fromkeys(forecast.Speed._fields, 0.0) | {"cached": 1e9}
    return forecast.seconds(lab.cfg, lab, P, Q, forecast.Speed(**zero | speed))


def test_a_step_of_the_warm_up_costs_its_tokens(lab):
    P, _, some = lab
    of = seconds_at(lab, train=2.0, step=7.0)
    rows = P.rows(some.labelled)
    tokens = sum(len(prompt) + len(target) for prompt, target in rows)
    assert of["warmup_steps"] == pytest.approx(
        2 * tokens * some.cfg.warmup_batch / len(rows) + 7)


def test_a_score_of_p_counts_two_passes_and_one_draw(lab):
    P, _, some = lab
    rows = P.rows(some.labelled)
    mean = sum(len(prompt) + len(target) for prompt, target in rows) / len(rows)
    assert seconds_at(lab, nucleus=1.0)["FWM"] == pytest.approx(len(some.test) * mean)
    assert seconds_at(lab, place=1.0)["FWM"] == P.longest


def test_the_parts_of_a_plan_count_each_stage_once(lab):
    _, _, some = lab
    of = dict.fromkeys(seconds_at(lab), 0.0)
    cfg = some.cfg
    counted = {
        "phase1_steps": (cfg.iterations + 1) * cfg.phase1_steps,
        "phase2_steps": (cfg.iterations + 1) * cfg.phase2_steps,
        "warmup_steps": cfg.warmup_steps,
        "bootstrap_steps": cfg.bootstrap_steps,
        "FWM": 1 + cfg.iterations + 2,                     # sft, Phase I, and two of the rivals
        "IDM": 1 + cfg.iterations + 2,                     # the rivals score Q as they begin
        "best_of_8": 1,
        "labels": 1,
        "bounds": 1,
    }
    for name, times in counted.items():
        found = forecast.parts_of(cfg, of | {name: 1.0})
        assert sum(map(sum, found.values())) == times, name


@pytest.mark.parametrize("method, steps", [("em", 2 * (225 + 40)), ("share", 600 + 2 * 90),
                                           ("sft-merge", 600 + 450)])
def test_each_method_is_planned_with_its_own_steps(method, steps):
    cfg = settings.parse(["--method", method])
    of = dict.fromkeys(plan.STEPS, 1.0)                    # a step takes a second
    of |= dict.fromkeys(["labels", "all_labels", "validate_P"], 0.0)
    stages = methods.stages(method, cfg.iterations)
    assert forecast.cost(stages, cfg, of) == (steps, 0.0)


def test_measuring_moves_no_weight(lab):
    P, _, some = lab
    before = weights(P.net)
    speed = forecast.measure(P, some)
    assert torch.equal(weights(P.net), before)
    assert all(p.grad is None for p in P.net.parameters())
    assert min(speed) >= 0 and speed.train > 0 and speed.score > 0


@pytest.fixture
def fitted(lab):
    """minutes -> (the Config with steps for so many, their seconds); 100 steps of each before."""
    def fit(minutes):
        cfg = settings.parse(["--model", "some/model", "--minutes", str(minutes)])
        for name in presets.PLANNED:
            setattr(cfg, name, 100)
            cfg.preset[name] = 100
        cfg.iterations = 1
        of = dict.fromkeys(seconds_at(lab), 0.5)
        forecast.fit(cfg, forecast.parts_of(cfg, of))
        return cfg, sum(map(sum, forecast.parts_of(cfg, of).values()))
    return fit


@pytest.mark.parametrize("minutes", [4, 6, 20, 90])
def test_steps_are_fitted_into_the_minutes(fitted, minutes):
    cfg, seconds = fitted(minutes)
    assert seconds == pytest.approx(60 * minutes, rel=0.05)
    assert cfg.preset["warmup_steps"] == cfg.warmup_steps


def test_the_warm_up_is_cut_last(fitted):
    for minutes, whole in ((2, False), (5, True)):
        cfg, _ = fitted(minutes)
        assert cfg.phase1_steps < cfg.warmup_steps
        assert (cfg.warmup_steps == 100) == whole
    cfg, _ = fitted(90)
    assert cfg.phase1_steps == cfg.warmup_steps > 100


@pytest.mark.parametrize("flags", [["--method", "sft"], ["--start", "run"]])
def test_what_has_no_steps_is_not_fitted(lab, flags):
    cfg = settings.parse(["--model", "some/model", "--minutes", "9", *flags])
    for name in presets.PLANNED:
        setattr(cfg, name, 10)
    of = dict.fromkeys(seconds_at(lab), 1.0)
    forecast.fit(cfg, forecast.parts_of(cfg, of))
    assert min(getattr(cfg, name) for name in forecast.plan.STEPS) >= 1


# --- a run ----------------------------------------------------------------------------------------

def test_a_dry_run_prints_the_plan_and_writes_nothing(argv, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*argv, "--dry-run", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert not out.exists() and list(tmp_path.iterdir()) == []
    for part in ("SFT", "Phase I ", "Phase II", "rivals", "scores", "in all"):
        assert re.search(rf"^  {part} .* \d+\.\d min$", said, re.M), part
    assert re.search(r"memory +\d+\.\d of \d+\.\d GiB", said) and "epochs" in said


def test_a_dry_run_of_the_tiny_model_writes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(["--dry-run", "--out", str(out)]) == 0
    assert "600 (FWM) and 200 (IDM)" in capsys.readouterr().out and not out.exists()


def cut_at_phase1(monkeypatch):
    def cut(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "run_phase", cut)


@pytest.mark.slow
def test_a_real_model_runs_untouched_and_resumes(argv, tmp_path, monkeypatch, capsys):
    argv = [*argv, "--no-rivals", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        cut_at_phase1(patch)
        assert train.main(argv) == 130
    found = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert found["warmup_steps"] > 1 and "dry_run" not in found
    with monkeypatch.context() as patch:                   # on another machine: its settings stay
        patch.setattr(presets, "EPOCHS", 1)
        patch.setattr(forecast, "measure", None)
        assert train.main(argv) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["stages"][0]["steps"] == found["warmup_steps"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train.main([*argv[:-2], "--warmup-steps", "1", *argv[-2:]])
    assert "warmup_steps" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(argv, capsys, monkeypatch):
    monkeypatch.setattr(memory, "free", lambda device: 10**6)
    monkeypatch.setattr(pretrained, "load", None)
    with pytest.raises(SystemExit) as stop:
        train.main([*argv, "--dry-run"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "--no-rivals needs" in said and "--lora 32 needs" in said


def test_a_model_that_cannot_be_read_is_refused(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        train.main(["--model", str(tmp_path), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
