"""Claims of `sft.py`: the rate, the gradient, and as many steps as it is told."""
import collections
import itertools
import random
import time
import types

import pytest
import torch
from conftest import Net, Recorder, grads, naive, relative, tiny_llama, weights

import sft
from models import optim
from settings import parse

ROWS = [([1, 2], [3, 4, 0]), ([2], [5, 6, 7, 8, 0]), ([3, 1, 4], [1, 0]), ([5], [0]),
        ([2, 7, 1, 8], [2, 8, 0])]                             # 14 tokens in the targets


def lab_of(*argv, **parts):
    """A Lab with the settings of argv, whose run keeps its log in `lines`."""
    lines, bar = [], types.SimpleNamespace(show=lambda *_, **__: None, close=lambda: None)
    run = types.SimpleNamespace(log=lambda _, **line: lines.append(line), elapsed=lambda: 0.0,
                                bar=lambda name, steps: bar,
                                steps=lambda name, n, *_: range(1, n + 1))
    return types.SimpleNamespace(cfg=parse([*argv]), run=run, lines=lines,
                                 tally=collections.Counter(), **parts)


# --- the rate -------------------------------------------------------------------------------------

def test_the_rate_rises_stays_and_falls_to_0():
    rates = [sft.rate(t, 100, 3.0) for t in range(1, 101)]
    rise, flat, fall = rates[:20], rates[19:51], rates[51:]
    assert rise == pytest.approx([3.0 * t / 20 for t in range(1, 21)]) and set(flat) == {3.0}
    steps = [a - b for a, b in zip(fall, fall[1:])]
    assert steps == pytest.approx([3.0 / 50] * 48) and 0 < fall[-1] == pytest.approx(3.0 / 50)


@pytest.mark.parametrize("steps", [1, 2, 7, 39, 5000])
def test_the_rate_is_never_0_nor_above_its_peak(steps):
    rates = [sft.rate(t, steps, 2e-3) for t in range(1, steps + 1)]
    assert 0 < min(rates) and max(rates) <= 2e-3


# --- a step ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("tokens", [1, 8, 15, 10**6])
def test_a_step_s_gradient_is_that_of_the_mean_nll(tokens):
    """Per token of the targets, over all rows, whatever goes through the model at a time."""
    model = tiny_llama(9, 1)
    truth = -sum(naive(model, prompt, row).sum() for prompt, row in ROWS) / 14
    truth.backward()
    exact, recorder = grads(model), Recorder(model)
    model.zero_grad()
    loss, norm = sft.step(Net(model, tokens=tokens), ROWS, [recorder], 0.5)
    assert loss == pytest.approx(truth.item(), rel=1e-5)
    assert norm == pytest.approx(exact.norm().item(), rel=1e-4)
    assert len(recorder.seen) == 1 and recorder.param_groups[0]["lr"] == 0.5
    assert relative(recorder.seen[0], exact / max(1, exact.norm())) < 1e-4         # clipped to 1


# --- fit ------------------------------------------------------------------------------------------

def fit(model, lab, steps, validate=lambda model, lab: 0.0):
    """`sft.fit` of an FWM on ROWS, two a step."""
    batches = sft.shuffled(ROWS, 2, random.Random(f"{lab.cfg.seed} FWM"))
    return sft.fit(model, "FWM", batches, steps=steps, validate=validate, lab=lab)


@pytest.mark.parametrize("steps", [1, 3, 9])
def test_fit_takes_the_steps_that_it_is_told(monkeypatch, steps):
    rates, sizes, step = [], [], sft.step
    monkeypatch.setattr(sft, "step", lambda model, rows, optimizers, lr: rates.append(lr)
                        or sizes.append(len(rows))
                        or step(model, rows, optimizers, lr))
    lab, model = lab_of("--warmup-lr", ".01"), Net(tiny_llama(9, 1))
    assert fit(model, lab, steps) is model
    assert rates == [sft.rate(t, steps, .01) for t in range(1, steps + 1)] and set(sizes) == {2}
    assert [line["step"] for line in lab.lines] == list(range(1, steps + 1))


def fitted(monkeypatch, clock, seed="0"):
    """Weights after 12 steps, and what was logged; `clock` says the time."""
    monkeypatch.setattr(time, "monotonic", clock)
    lab, model = lab_of("--seed", seed), tiny_llama(9, 1)
    fit(Net(model), lab, 12)
    return weights(model), [(line["loss"], line["grad_norm"]) for line in lab.lines]


def test_fit_is_repeatable_bit_for_bit_at_any_speed(monkeypatch):
    slow = itertools.count(0, 1000.0)
    fast, log = fitted(monkeypatch, lambda: 0.0)
    late, late_log = fitted(monkeypatch, lambda: next(slow))
    other, _ = fitted(monkeypatch, lambda: 0.0, "1")
    assert torch.equal(fast, late) and log == late_log
    assert not torch.equal(fast, other)  # it depends on the seed


def test_fit_validates_four_times_on_the_way():
    seen, lab, model = [], lab_of(), tiny_llama(9, 1)
    fit(Net(model), lab, 12, lambda model, lab: seen.append(weights(model.net)) or len(seen) / 10)
    assert [line["validation"] for line in lab.lines if line["validation"]] == [.1, .2, .3, .4]
    assert torch.equal(seen[-1], weights(model)) and not torch.equal(seen[0], seen[-1])


def test_fit_takes_its_optimizer_from_the_settings(monkeypatch):
    seen, make = [], optim.make_optimizers
    monkeypatch.setattr(optim, "make_optimizers",
                        lambda model, *settings: seen.append(settings) or make(model, *settings))
    lab = lab_of("--warmup-lr", ".01", "--no-muon")
    fit(Net(tiny_llama(9, 0)), lab, 1)
    assert seen == [(.01, False, 0.0)]


def test_batches_take_every_row_before_repeating_any():
    batch = sft.shuffled(list(range(7)), 3, random.Random(0))
    drawn = [next(batch) for _ in range(40)]
    assert all(len(set(part)) == 3 for part in drawn[::2])
    assert {n for part in drawn for n in part} == set(range(7))
    counts = [sum(part.count(n) for part in drawn) for n in range(7)]
    assert max(counts) - min(counts) <= 1 and drawn[:2] != [[0, 1, 2], [3, 4, 5]]
