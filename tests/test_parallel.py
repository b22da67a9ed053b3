"""Two processes (gloo, CPU) take the step of one: held against one process and against the naive
losses, with copies and with shards."""
import collections
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
import types

import pytest
import torch
import torch.distributed as dist
from conftest import (
    EOS,
    TEXTS,
    Net,
    frozen,
    grads,
    naive,
    relative,
    tiny_gpt2,
    tiny_llama,
    weights,
    without_times,
)
from test_grpo import PROMPTS, naive_loss, reward, settings, take_step
from test_train import SMALL

import grpo
import lm
import methods
import sft
import swirl_fwm
import swirl_idm
import train
from grpo import Phase
from models import optim, parallel, pretrained, tiny

# 14 tokens
ROWS = [
    ([1, 2], [3, 4, 0]), ([2], [5, 6, 7, 8, 0]), ([3, 1, 4], [1, 0]), ([5], [0]),
    ([2, 7, 1, 8], [2, 8, 0])]
PAIRS = [
    ("lamp is on\ndoor is shut", "lamp is off\ndoor is shut"),
    ("lamp is on\ndoor is shut", "lamp is on\ndoor is open")]
CASES = ["grpo", "k3", "no rows", "no advantage", "nothing", "warm-up", "phase 1"]
sample = lm.sample


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


class Recorder:
    """An optimizer that keeps the gradient, of all shards, and changes nothing."""

    def __init__(self, model):
        with parallel.masters(model):
            self.params, self.param_groups, self.seen = list(model.parameters()), [{"lr": 0.0}], []

    def step(self):
        self.seen.append(torch.cat([full(p.grad).flatten() for p in self.params]))

    def zero_grad(self, set_to_none=True):
        for p in self.params:
            p.grad = None


def drawn_by_prompt(net, prefixes, n, longest, options, generator=None):
    """`lm.sample` with a generator for each prompt: which process draws for it then makes no
    difference."""
    out = [sample(net, [prefix], n, longest, options,
                  generator=torch.Generator().manual_seed(sum(prefix)))
           for prefix in prefixes]
    return [row for rows, _ in out for row in rows], [lp for _, logps in out for lp in logps]


def lab_of(logged, *argv):
    """A lab without data, whose run logs into a list."""
    bar = types.SimpleNamespace(show=lambda *_, **__: None, close=lambda: None)
    run = types.SimpleNamespace(log=lambda _, **line: logged.append(line), elapsed=lambda: 0.0,
                                label="", bar=lambda *_: bar, logged=lambda _: logged,
                                steps=lambda name, n, *_: range(1, n + 1))
    return types.SimpleNamespace(cfg=train.parse([*argv]), run=run, tok=None,
                                 tally=collections.Counter())


def cases(prepare):
    """{case: (log, [gradients that the optimizer sees])}, of this process's share. prepare(model)
    -> the model to train."""
    # unlike numbers of micro-batches; clipped
    out, cfg = {}, settings(beta=0.3, max_norm=0.5, tokens=20)
    flat = lambda owner, rows: torch.full((len(rows),), -2.0)
    # of the others no group has spread
    first = lambda owner, rows: torch.where(torch.tensor(owner) == 0, reward(owner, rows), -2.0)

    for name, make, prompts, R, change in (
        ("grpo", tiny_llama, PROMPTS, reward, {}),
        ("k3", tiny_gpt2, PROMPTS, reward, {"kl": "loss"}),
        ("no rows", tiny_llama, PROMPTS[:1], reward, {}),
        ("nothing", tiny_llama, PROMPTS, flat, {"beta": 0.0}),
        ("no advantage", tiny_llama, PROMPTS, first, {"beta": 0.0}),
    ):
        policy, ref = prepare(make(9, 1)), make(9, 2)
        recorder = Recorder(policy)
        numbered = lambda owner, rows: (
            R([parallel.share(range(len(prompts)))[o] for o in owner], rows)
            if rows
            else torch.zeros(0)
        )
        log, _, _ = take_step(
            policy,
            ref,
            [recorder],
            reward=numbered,
            cfg=dataclasses.replace(cfg, **change),
            prompts=parallel.share(prompts),
        )
        out[name] = log, recorder.seen

    # one step of the warm-up, on all five rows
    net = prepare(tiny_llama(9, 1))
    recorder, logged = Recorder(net), []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(optim, "make_optimizers", lambda *_: [recorder])
        batches = sft.shuffled(ROWS, 5, random.Random(0))
        sft.fit(Net(net, tokens=8), "FWM", batches, steps=1, validate=lambda model, lab: 0.0,
                lab=lab_of(logged))
    out["warm-up"] = {k: logged[0][k] for k in ("loss", "grad_norm")}, recorder.seen

    tok = tiny.make_tokenizer(TEXTS, vocab_size=300)
    P = swirl_fwm.FWM(prepare(tiny.make_model(tok, 32, 2, seed=1)), tok, longest=6)
    Q = swirl_idm.IDM(tiny.make_model(tok, 32, 2, seed=2), tok)
    # the second pair's action cannot be read
    read = {tuple(Q.prompt(x, y)): Q.target(z)
            for (x, y), z in zip(PAIRS, ("turn off", swirl_idm.REFUSAL))}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(
            lm,
            "sample",
            lambda net, prefixes, n, *rest: (
                ([read[tuple(p)] for p in prefixes], None)
                if n == 1
                else drawn_by_prompt(net, prefixes, n, *rest)
            ),
        )
        recorder = Recorder(P.net)
        def step(pairs):
            mine, phase = parallel.share(pairs), settings()
            drawn = swirl_fwm.phase1_rollouts(P, Q, mine, phase, None)
            if drawn is None:
                return None
            return grpo.step(P, None, [recorder], *drawn[:2], phase=phase, lr=0.1)

        out["phase 1"] = step(PAIRS), recorder.seen
        out["unread"] = step([PAIRS[1]] * 2)
    return out


def a_phase(prepare):
    """[of each of two steps: the pairs, a number drawn], and the weights at the end."""
    policy, other, seen = Net(prepare(tiny_llama(9, 1))), Net(prepare(tiny_llama(9, 2))), []

    def draw(policy, frozen, pairs, phase, generator):
        seen.append((pairs, torch.rand(1, generator=generator).item()))
        return None, None, []

    def step(policy, ref, optimizers, rollouts, R, phase, lr):
        (
            lm.logprobs(policy.net, [[1]], [[2]], [0], policy.options).sum() / parallel.world()
        ).backward()
        optim.step(policy.net, optimizers, lr)
        return {"reward": 0.0, "kl": None, "tokens": 1, "zero_std_groups": 0.0, "floored": 0.0}

    phase = Phase(steps=2, peak=0.1, batch=5)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(grpo, "step", step)
        m.setattr(methods, "pairs_of", lambda *_: [(n, n) for n in range(20)])
        train.run_phase(draw, policy, other, phase, methods.Stage("phase1", 1), lab_of([]))
    return seen, weights(policy.net)


def thrice(model, optimizers):
    for _ in range(3):
        prompts, targets = zip(*parallel.share(ROWS))
        (
            -lm.logprobs(model, prompts, targets, range(len(targets)), lm.Options(EOS)).sum() / 14
        ).backward()
        optim.step(model, optimizers, 1e-3, clip=0.5)


def with_muon(prepare):
    """The weights after three steps of Muon and AdamW, and the most matrices of a shape that it
    took at once."""
    model, orthogonal, most = prepare(tiny_llama(9, 1)), optim.orthogonal, []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(optim, "orthogonal", lambda M: most.append(len(M)) or orthogonal(M))
        thrice(model, optim.make_optimizers(model, 1e-3, muon=True, decay=0.1))
    return weights(model), max(most)


def three_steps(prepare, folder):
    """The weights after three steps of AdamW on ROWS, and what is saved and copied of them."""
    model = prepare(tiny_llama(9, 1))
    optimizers = optim.make_optimizers(model, 1e-3, muon=False, decay=0.1)
    held = sum(
        v.to_local().numel() if hasattr(v, "to_local") else v.numel()
        for v in optimizers[0].param_groups[0]["params"]
    )
    thrice(model, optimizers)
    tok = tiny.make_tokenizer(TEXTS, vocab_size=300)
    if parallel.rank() == 0:
        pretrained.save(model, tok, folder)
    out = {"held": held, "whole": weights(model), "frozen": weights(frozen(model))}
    with parallel.masters(model):
        out["masters"] = torch.cat([full(p).flatten() for p in model.parameters()])
    return out


def everything(prepare, folder):
    return {
        "cases": cases(prepare),
        "steps": three_steps(prepare, folder),
        "phase": a_phase(prepare),
        "muon": with_muon(prepare),
    }


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    lm.sample = drawn_by_prompt
    out = {
        how: everything(prepare, f"{folder}/{how}")
        for how, prepare in (("copies", lambda model: model), ("shards", parallel.shard))
    }
    rows = list(range(7))
    out["numbers"] = [
        parallel.divide(lambda a, b: [x * y for x, y in zip(a, b)], rows, rows),
        parallel.agree(rank), parallel.total(rank + 1),
        parallel.divide(lambda a: [x for x in a if a], [5])]
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes saved what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """What each of two processes found."""
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process found, and the folder where it saved."""
    folder = tmp_path_factory.mktemp("alone") / "alone"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(lm, "sample", drawn_by_prompt)
        return everything(lambda model: model, folder) | {"folder": folder}


@pytest.mark.parametrize("how", ["copies", "shards"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_match_the_gradient_of_one(ranks, alone, case, how):
    log, seen = alone["cases"][case]
    for rank in ranks:
        theirs, grad = rank[how]["cases"][case]
        assert len(grad) == len(seen) == (case != "nothing")
        for a, b in zip(grad, seen):
            assert b.norm() > 1e-3 and relative(a, b) < 1e-5
        for k in log:
            assert theirs[k] == log[k] or theirs[k] == pytest.approx(log[k], rel=1e-5, abs=1e-5), k
        # no rank reads an action: no step, no hanging
        assert rank[how]["cases"]["unread"] is None


def test_one_process_matches_the_naive_losses(alone):
    """So that the test above is held against something that `grpo`, `sft` and `lm` did not
    compute."""
    policy, ref, cfg = tiny_llama(9, 1), tiny_llama(9, 2), settings(beta=0.3)
    rows, _ = drawn_by_prompt(policy, PROMPTS, 4, cfg.longest, lm.Options(EOS))
    naive_loss(policy, ref, PROMPTS, rows, cfg)[0].backward()
    log, (seen,) = alone["cases"]["grpo"]
    assert log["grad_norm"] == pytest.approx(grads(policy).norm().item(), rel=1e-4)
    assert relative(seen, grads(policy) * 0.5 / grads(policy).norm()) < 1e-4
    model = tiny_llama(9, 1)
    (-sum(naive(model, prompt, row).sum() for prompt, row in ROWS) / 14).backward()
    _, (seen,) = alone["cases"]["warm-up"]
    assert relative(seen, grads(model) / grads(model).norm()) < 1e-4


@pytest.mark.parametrize("how", ["copies", "shards"])
def test_muon_on_two_processes_matches_one(ranks, alone, how):
    truth, most = alone["muon"]
    for rank in ranks:
        ours, n = rank[how]["muon"]
        assert relative(ours - weights(tiny_llama(9, 1)), truth - weights(tiny_llama(9, 1))) < 1e-3
        # a stack of shards might be cut between matrices
        assert n == (most if how == "copies" else 1) and most > 1


@pytest.mark.parametrize("how", ["copies", "shards"])
def test_weights_on_two_processes_match_one(ranks, folder, alone, how):
    start, saved = weights(tiny_llama(9, 1)), pretrained.load(folder / how)[0]
    for rank in ranks:
        ours = rank[how]["steps"]
        assert relative(ours["whole"] - start, alone["steps"]["whole"] - start) < 1e-3
        # ranks do not drift apart
        assert torch.equal(ours["whole"], ranks[0][how]["steps"]["whole"])
        assert torch.equal(ours["frozen"], ours["whole"]) and torch.equal(
            weights(saved), ours["whole"]
        )
        assert torch.equal(ours["masters"], ours["whole"])
        share = ours["held"] / alone["steps"]["held"]
        assert share == 1 if how == "copies" else share < 0.55
    names = lambda folder: sorted(p.name for p in folder.iterdir())
    assert names(folder / how) == names(alone["folder"])
    config = lambda folder: (folder / "config.json").read_text()
    assert config(folder / how) == config(alone["folder"])


@pytest.mark.parametrize("how", ["copies", "shards"])
def test_a_phase_cuts_one_batch_and_draws_apart(ranks, alone, how):
    one, _ = alone["phase"]
    (zero, end), (first, other) = (rank[how]["phase"] for rank in ranks)
    for (pairs, u), (pairs_0, u_0), (pairs_1, u_1) in zip(one, zero, first):
        assert pairs_0 == pairs[::2] and pairs_1 == pairs[1::2] and len(pairs) == 5
        assert u_0 == u != u_1                                 # rollouts of their own
    start = weights(tiny_llama(9, 1))
    assert torch.equal(other, end) and not torch.equal(end, start)


def test_rows_gather_in_order_and_rank_0_decides(ranks):
    for rank in ranks:
        assert rank["numbers"] == [[n * n for n in range(7)], 0, 3, [5]]


def test_one_process_is_asked_nothing():
    assert parallel.world() == 1 and parallel.agree(3) == parallel.total(3) == 3
    assert parallel.divide(sorted, [3, 1]) == [1, 3] and parallel.share([1, 2]) == [1, 2]


def test_shard_alone_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        train.main(["--shard", "--out", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert (
        e.value.code == 2
        and err.startswith("error: --shard")
        and err.count("\n") == 1
        and not (tmp_path / "out").exists()
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory, small_folder):
    """(arguments, the folder of what one process made of them)."""
    out, sizes = tmp_path_factory.mktemp("one") / "run", ["--warmup-batch", "8", "--warmup-lr",
                                                          "2e-3", "--lr-fwm", "4e-4"]
    argv = [*SMALL, "--model", str(small_folder), *sizes]
    train.main([*argv, "--out", str(out)])
    return argv, out


@pytest.mark.slow
@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["copies", "shards"])
def test_torchrun_finishes_a_run_and_resumes_a_cut_one(one, tmp_path, shard):
    """The same files as one process leaves; a run that was killed before Phase II ends as the one
    that was not."""
    argv, one = one

    def start(out):
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
                train.__file__,
                *argv,
                *shard,
                "--out",
                str(out),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
        )

    two, cut = tmp_path / "two", tmp_path / "cut"
    run = start(two)
    said = run.communicate()[0]
    assert run.returncode == 0 and said.count("held-out transitions") == 1, said
    names = lambda out: sorted(str(p.relative_to(out)) for p in out.rglob("*"))
    assert names(one) == names(two)
    lines = lambda out: [
        (line["phase"], line["step"])
        for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    ]
    assert lines(one) == lines(two)                            # each line once
    run = start(cut)
    while run.poll() is None and not (
        (cut / "progress.json").exists() and "phase1" in (cut / "progress.json").read_text()
    ):
        time.sleep(.05)
    run.terminate()
    run.communicate()
    assert run.returncode and not (cut / "results.json").exists()
    run = start(cut)
    assert "resuming after iteration1/phase1" in run.communicate()[0] and run.returncode == 0
    a, b = (json.loads((out / "results.json").read_text()) for out in (two, cut))
    assert without_times(a["stages"]) == without_times(b["stages"])
    assert without_times(a["baselines"]) == without_times(b["baselines"])
    assert a["hardware"].startswith("2 processes")
