"""Nothing is lost: kills, signals, a full or damaged disk, a second process, numbers that are none.

`tests/kills.py` does the same at random instants, a hundred times.
"""
import errno
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kills
import pytest
import torch
from conftest import tiny_llama, weights, write_lamps

import grpo
import reproduce
import sft
import train
from envs import records
from models import next_token, optim, pretrained
from support import aside, checkpoint, disk, rundir, tables

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def argv(small_folder, tmp_path_factory):
    """Flags of a small run, which saves at the end of its stages."""
    data = write_lamps(tmp_path_factory.mktemp("data") / "lamps.jsonl")
    return [*kills.FLAGS, "--data", str(data), "--model", str(small_folder)]


@pytest.fixture(scope="module")
def truth(argv, tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("truth") / "run"
    assert train.main([*argv, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def plain(argv, tmp_path_factory):
    """A run without rivals that nobody disturbed."""
    out = tmp_path_factory.mktemp("plain") / "run"
    assert train.main([*argv, "--no-rivals", "--out", str(out)]) == 0
    return out


def finish(argv, truth, out):
    """Go on with a run to its end, which must be that of the other one."""
    assert train.main([*argv, "--out", str(out)]) == 0
    assert kills.differences(truth, out) == []


def refused(capsys, argv):
    """The one line of a command that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def at_line(monkeypatch, number, do):
    """Call do(run) when a run logs its number-th line of metrics.jsonl."""
    count, log = [0], rundir.Run.log

    def noting(run, name, **line):
        log(run, name, **line)
        count[0] += name == "metrics.jsonl"
        if count[0] == number and name == "metrics.jsonl":
            do(run)

    monkeypatch.setattr(rundir.Run, "log", noting)


# --- kills and signals ------------------------------------------------------------------------

@pytest.mark.skipif(torch.cuda.is_available() or not hasattr(os, "fork"), reason="forks")
def test_a_killed_run_ends_as_one_that_was_not(argv, truth, tmp_path):
    """Killed -9 inside three saves, which are drawn at random."""
    rng, out = random.Random(1), tmp_path / "run"
    for _ in range(3):
        number = kills.forked(kills.quiet_train, [*argv, "--save-every", "0", "--out", str(out)],
                              tmp_path / "log", rng.randint(20, 120))
        assert kills.ended(number) == -signal.SIGKILL
    finish(argv, truth, out)


SIGNALS = [pytest.param(3, "SIGINT", 130, marks=pytest.mark.slow), (24, "SIGTERM", 143),
           pytest.param(15, "SIGUSR1", 138, marks=pytest.mark.slow)]


@pytest.mark.parametrize("line, name, code", SIGNALS)
def test_a_signal_loses_no_step(argv, plain, tmp_path, monkeypatch, capfd, line, name, code):
    """In the warm-up of Q, in Phase I, in the warm-up of P."""
    out = tmp_path / "run"
    argv = [*argv, "--no-rivals", "--out", str(out)]
    with monkeypatch.context() as patch:
        at_line(patch, line, lambda run: os.kill(os.getpid(), getattr(signal, name)))
        assert train.main(argv) == code
    err = capfd.readouterr().err
    assert f"stopped by {name}" in err and "resumes" in err
    assert kills.steps_logged(out) == kills.steps_saved(out)
    finish(argv, plain, out)


@pytest.mark.slow
def test_a_signal_between_steps_stops_at_once(argv, plain, tmp_path, monkeypatch):
    """While a stage is scored; its steps are saved already."""
    argv, out, scored = [*argv, "--no-rivals"], tmp_path / "run", []

    def evaluate(*args):
        scored.append(kills.steps_saved(out))
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it goes on")

    with monkeypatch.context() as patch:
        patch.setattr("support.results.evaluate", evaluate)
        assert train.main([*argv, "--out", str(out)]) == 143
    assert len(scored[0]) == 20
    monkeypatch.setattr(sft, "step", lambda *args: pytest.fail("a step is made again"))
    finish(argv, plain, out)


def test_a_second_ctrl_c_stops_at_once(monkeypatch):
    signals = checkpoint.Signals()
    with pytest.raises(KeyboardInterrupt), signals.wait():
        signals.hear(signal.SIGINT, None)
        assert signals.asked == signal.SIGINT
        signals.hear(signal.SIGTERM, None)                     # such as torchrun's
        signals.hear(signal.SIGINT, None)
        signals.hear(signal.SIGINT, None)


@pytest.mark.slow
def test_the_second_process_saves_its_step_too(argv, truth, tmp_path, monkeypatch):
    """A signal to the first one; both warm-ups go on where they stood."""
    monkeypatch.setattr(aside, "possible", lambda cfg: True)
    out = tmp_path / "run"
    argv = [*argv, "--out", str(out)]
    with monkeypatch.context() as patch:
        at_line(patch, 2, lambda run: wait_for_idm(out) or os.kill(os.getpid(), signal.SIGTERM))
        assert train.main(argv) == 143
    assert kills.steps_logged(out) == kills.steps_saved(out)
    assert {step[2] for step in kills.steps_saved(out)} == {"FWM", "IDM"}
    finish(argv, truth, out)


def wait_for_idm(out):
    while '"IDM"' not in (out / "metrics.jsonl").read_text():
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["em", "share", "sft-merge"])
def test_other_methods_go_on_within_a_stage(argv, tmp_path, monkeypatch, method):
    """Their batches, their models that begin again, their shared weights."""
    argv = [*argv, "--method", method]
    assert train.main([*argv, "--out", str(tmp_path / "truth")]) == 0
    for line in (24, 5):                                       # the second counts from the cut
        with monkeypatch.context() as patch:
            at_line(patch, line, lambda run: os.kill(os.getpid(), signal.SIGTERM))
            assert train.main([*argv, "--out", str(tmp_path / "run")]) in (0, 143)
    finish(argv, tmp_path / "truth", tmp_path / "run")


@pytest.mark.slow
def test_a_clock_that_runs_backwards_changes_nothing(argv, plain, tmp_path, monkeypatch):
    clock = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    finish([*argv, "--no-rivals"], plain, tmp_path / "run")


# --- damage -----------------------------------------------------------------------------------

@pytest.fixture
def cut(argv, tmp_path, monkeypatch):
    """cut(line): a run that saves each step, and was stopped at this line of metrics.jsonl."""
    argv = [*argv, "--no-rivals", "--save-every", "0", "--out", str(tmp_path / "run")]

    def make(line):
        with monkeypatch.context() as patch:
            at_line(patch, line, lambda run: os.kill(os.getpid(), signal.SIGTERM))
            assert train.main(argv) == 143
        return tmp_path / "run"
    return make


def damage(path, how):
    if how == "gone":
        path.unlink()
    elif how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))


@pytest.mark.slow
@pytest.mark.parametrize("how", [
    "a bit", pytest.param("cut", marks=pytest.mark.slow),
    pytest.param("gone", marks=pytest.mark.slow)])
def test_a_damaged_state_gives_way_to_the_one_before(argv, plain, cut, capsys, how):
    out = cut(24)
    states = sorted((out / "steps").glob("iteration1-phase1-*"), key=checkpoint.step_of)
    assert len(states) == 2
    damage(states[-1] / "state.pt", how)
    finish([*argv, "--no-rivals"], plain, out)
    said = capsys.readouterr().out
    assert f"{states[-1].name} is damaged" in said and "goes on after step 2" in said


@pytest.mark.slow
def test_a_damaged_checkpoint_gives_way_to_the_other(argv, plain, cut, capsys):
    out = cut(30)                                              # in Phase II
    folder = out / json.loads((out / "progress.json").read_text())["folder"]
    damage(folder / "fwm" / "model.safetensors", "cut")
    finish([*argv, "--no-rivals"], plain, out)
    said = capsys.readouterr().out
    assert f"{folder} is damaged; the run goes on from checkpoint-" in said


@pytest.mark.slow
def test_without_any_checkpoint_the_states_are_left(argv, plain, cut, monkeypatch, capsys):
    """The first checkpoint is damaged; no step of the warm-up is made again."""
    out = cut(23)                                              # in Phase I
    damage(out / "checkpoint-a" / "idm" / "model.safetensors", "cut")
    monkeypatch.setattr(sft, "step", lambda *args: pytest.fail("a step is made again"))
    finish([*argv, "--no-rivals"], plain, out)
    assert "goes on from its begin" in capsys.readouterr().out


def test_what_takes_a_place_has_reached_the_disk(argv, tmp_path, monkeypatch):
    """Whatever os.replace moves was synced before, and its folder afterwards."""
    events = []

    def noting(f, note):
        def call(*args):
            events.append(note(*args))
            return f(*args)
        return call

    monkeypatch.setattr(records, "sync", noting(records.sync, lambda path: ("sync", str(path))))
    monkeypatch.setattr(os, "replace", noting(os.replace, lambda a, b: ("move", str(a), str(b))))
    argv = [*argv, "--no-rivals", "--method", "sft", "--out", str(tmp_path / "run")]
    assert train.main(argv) == 0
    made_again = "report.html", "curves.png"
    moves = [i for i, event in enumerate(events)
             if event[0] == "move" and not event[2].endswith(made_again)]
    assert len(moves) > 8
    for i in moves:
        _, a, b = events[i]
        synced = [event[1] for event in events[:i] if event[0] == "sync"]
        if not b.endswith(("run/fwm", "run/idm")):             # these have been synced as they were
            assert a in synced, a
        assert ("sync", str(Path(b).parent)) in events[i:], b


@pytest.mark.slow
def test_a_foreign_file_is_never_deleted(argv, plain, cut, tmp_path, capsys):
    """Neither in a checkpoint, nor a codebook of somebody else's."""
    out = cut(24)
    mine = [out / "checkpoint-a" / "results.json", out / "steps" / "notes.txt",
            out / "codebook.npz", out / "fwm", out / "steps" / "FWM-1" / "metrics.jsonl"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        assert path.name in refused(capsys, [*argv, "--no-rivals", "--fresh", "--out", str(out)])
        assert path.read_text() == "mine"
        path.unlink()
    (out / "checkpoint-b").mkdir()
    (out / "checkpoint-b" / "mine.txt").write_text("mine")
    assert "mine.txt" in refused(capsys, [*argv, "--no-rivals", "--out", str(out)])
    (out / "checkpoint-b" / "mine.txt").unlink()
    finish([*argv, "--no-rivals"], plain, out)


@pytest.mark.slow
def test_a_changed_commit_is_said_and_noted(argv, plain, cut, monkeypatch, capsys):
    out = cut(24)
    monkeypatch.setattr(rundir, "git_revision", lambda: "0123456789")
    assert train.main([*argv, "--no-rivals", "--out", str(out)]) == 0
    assert "goes on with commit 0123456," in capsys.readouterr().out
    code = json.loads((out / "results.json").read_text())["code"]
    assert len(code) == 2 and len(json.loads((plain / "results.json").read_text())["code"]) == 1


def test_a_state_of_other_processes_is_refused(argv, cut, monkeypatch, capsys):
    out = cut(24)
    monkeypatch.setattr(checkpoint, "place", lambda net: "2 process(es) on cpu")
    assert "2 process(es)" in refused(capsys, [*argv, "--no-rivals", "--out", str(out)])


# --- the disk ---------------------------------------------------------------------------------

def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place, name", [
    (torch, "save"), (json, "dumps"), pytest.param(pretrained, "save", marks=pytest.mark.slow),
    pytest.param(records, "sync", marks=pytest.mark.slow)])
def test_a_full_disk_ends_in_one_line(argv, plain, tmp_path, monkeypatch, capsys, place, name):
    """And the run goes on when there is room again."""
    out, f, count, at = tmp_path / "run", getattr(place, name), [0], {torch: 3, pretrained: 1}

    def sometimes(*args, **kwargs):
        count[0] += 1
        return full() if count[0] == at.get(place, 20) else f(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, sometimes)
        err = refused(capsys, [*argv, "--no-rivals", "--out", str(out)])
    assert "No space left on device" in err and "goes on" in err
    finish([*argv, "--no-rivals"], plain, out)


@pytest.mark.slow
@pytest.mark.parametrize("at", ["begin", "save"])
def test_room_is_checked_before_it_is_needed(argv, plain, tmp_path, monkeypatch, capsys, at):
    out, usage = tmp_path / "run", shutil.disk_usage
    with monkeypatch.context() as patch:
        few = lambda path: usage(path)._replace(free=100)
        when = {"begin": "run", "save": "FWM-12.new"}[at]
        patch.setattr(shutil, "disk_usage",
                      lambda path: few(path) if Path(path).name == when else usage(path))
        err = refused(capsys, [*argv, "--no-rivals", "--out", str(out)])
    assert "MB are needed and 0.0 MB are free" in err
    assert (out / "steps").exists() == (at == "save")
    finish([*argv, "--no-rivals"], plain, out)


def test_a_folder_that_vanishes_ends_in_one_line(argv, tmp_path, monkeypatch, capsys):
    at_line(monkeypatch, 5, lambda run: shutil.rmtree(run.dir))
    err = refused(capsys, [*argv, "--out", str(tmp_path / "run")])
    assert "No such file or directory" in err and str(tmp_path / "run") in err


def test_a_folder_that_cannot_be_written_is_refused(argv, tmp_path, monkeypatch, capsys):
    def read_only(path, *args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(disk, "lock", read_only)
    err = refused(capsys, [*argv, "--out", str(tmp_path / "run")])
    assert "Read-only file system" in err and "give a folder" in err


# --- a second process -------------------------------------------------------------------------

@pytest.mark.skipif(disk.fcntl is None, reason="no locks here")
def test_a_second_process_is_refused_and_harms_nothing(argv, cut, capsys):
    """Until the first one is dead; however it died."""
    out = cut(24)
    code = f"from support import disk; disk.lock({str(out)!r}); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        err = refused(capsys, [*argv, "--no-rivals", "--out", str(out)])
        assert f"process {other.pid} on " in err and "is at work" in err
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        other.kill()
    assert train.main([*argv, "--no-rivals", "--out", str(out)]) == 0


@pytest.mark.skipif(disk.fcntl is None, reason="no locks here")
def test_the_second_process_of_a_run_holds_its_folder(tmp_path, monkeypatch):
    """So that no other run begins while an orphan still writes."""
    disk.lock(tmp_path)
    code = f"from support import disk; disk.lock({str(tmp_path)!r}, child=True); " \
           "print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        disk.release()
        take = disk.take
        monkeypatch.setattr(disk, "take", lambda file, kind: take(file, kind, seconds=0.1))
        with pytest.raises(SystemExit):
            disk.lock(tmp_path)
        child.kill()
    disk.lock(tmp_path)
    disk.release()


@pytest.mark.slow
@pytest.mark.skipif(disk.fcntl is None, reason="no locks here")
def test_a_second_reproduce_is_refused(tmp_path, capsys):
    code = f"from support import disk; disk.lock({str(tmp_path)!r}); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(SystemExit):
            reproduce.main(["--tune", "--results", str(tmp_path)])
        assert f"process {other.pid} on " in capsys.readouterr().err
        other.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock"]


# --- numbers that are none --------------------------------------------------------------------

@pytest.mark.parametrize("muon", [True, False])
def test_a_gradient_that_is_not_finite_moves_nothing(muon):
    net = tiny_llama()
    optimizers = optim.make_optimizers(net, 1e-2, muon)
    before = weights(net)
    for bad in (math.nan, math.inf):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        p.grad[0] = bad
        assert not math.isfinite(optim.step(net, optimizers, 1e-2))
        assert torch.equal(weights(net), before) and not any(o.state for o in optimizers)
        assert all(p.grad is None for p in net.parameters())


def broken_now_and_then(monkeypatch, bad):
    """Let some steps of SFT and of GRPO end with a loss that is no number; bad(call)."""
    count, logprobs = [0], sft.lm.logprobs

    def noting(*args, **kwargs):
        count[0] += torch.is_grad_enabled()
        broken = torch.is_grad_enabled() and bad(count[0])
        return logprobs(*args, **kwargs) * (math.nan if broken else 1.0)

    monkeypatch.setattr(sft.lm, "logprobs", noting)


@pytest.mark.slow
def test_skipped_steps_are_counted_and_leave_json(argv, tmp_path, monkeypatch):
    broken_now_and_then(monkeypatch, lambda call: call % 4 == 0)
    assert train.main([*argv, "--no-rivals", "--out", str(tmp_path / "run")]) == 0

    def literal(name):
        raise AssertionError(f"{name} is no JSON")

    skipped = []
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        line = json.loads(line, parse_constant=literal)
        skipped.append(line.get("skipped"))
        assert (line.get("grad_norm", 0) is None) == bool(line.get("skipped"))
    assert 5 <= skipped.count(True) < skipped.count(False)


def test_ten_skipped_steps_in_a_row_end_the_run(argv, plain, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        broken_now_and_then(patch, lambda call: call > 10)     # the warm-up of P goes wrong
        err = refused(capsys, [*argv, "--no-rivals", "--out", str(out)])
    assert "10 steps in a row" in err and "--warmup-lr" in err
    lines = list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))
    assert [line["skipped"] for line in lines[-11:]] == [False] + [True] * 10


def test_logits_that_are_no_numbers_draw_some_token():
    """And leave what other rows draw as it is."""
    logp = torch.randn(3, 7).log_softmax(-1)
    at, u = torch.arange(3).repeat(50), torch.rand(150, dtype=torch.float64)
    whole = next_token.draw(logp, at, u)
    logp[1] = math.nan
    broken = next_token.draw(logp, at, u)
    assert torch.equal(whole[at != 1], broken[at != 1])
    assert ((0 <= broken) & (broken < 7)).all()


# --- memory -----------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"),
    pytest.param(MemoryError(), marks=pytest.mark.slow),
    pytest.param(RuntimeError("DefaultCPUAllocator: can't allocate memory"),
                 marks=pytest.mark.slow)])
def test_memory_that_runs_out_halves_the_micro_batch(argv, tmp_path, monkeypatch, capsys, error):
    tokens, step = [], grpo.step

    def hungry(policy, *args):
        tokens.append(policy.options.tokens)
        if policy.options.tokens > 512:
            raise error
        return step(policy, *args)

    monkeypatch.setattr(grpo, "step", hungry)
    argv = [*argv, "--no-rivals", "--out", str(tmp_path / "run")]
    assert train.main(argv) == 0 and tokens[:2] == [1024, 512]
    assert "--tokens 512" in capsys.readouterr().out
    monkeypatch.setattr(grpo, "step", lambda *args: (_ for _ in ()).throw(error))
    assert "out of memory with --tokens 512" in refused(capsys, [*argv[:-1], str(tmp_path / "b")])


# --- the terminal and the model ---------------------------------------------------------------

def test_a_terminal_without_the_letters_prints_a_mark(monkeypatch):
    """Chinese and an arrow, on a terminal of Windows."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    records.show_anything()
    sample = {"x": "灯 关", "z": "开 →", "y": "灯 开", "y_hat": "灯", "z_hat": "é"}
    tables.show_sample(sample, lambda x, y: [x, y])
    sys.stdout.flush()
    assert b"? ?" in raw.getvalue() and "é".encode("cp1252") in raw.getvalue()


def test_a_temperature_without_sampling_is_no_fault(small_folder, tmp_path):
    """A generation_config that transformers reads but refuses to write."""
    shutil.copytree(small_folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "top_p": 0.95, "eos_token_id": 1}))
    net, tok = pretrained.load(tmp_path / "model")
    pretrained.save(net, tok, tmp_path / "saved")
    again, _ = pretrained.load(tmp_path / "saved")
    assert again.generation_config.eos_token_id == tok.eos_token_id
