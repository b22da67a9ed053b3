"""Claims of `evaluate.py`: what `sampled` and `refused` count, which rows are scored, and by whom
no side is scored twice."""
import types

import pytest
import torch

import lm
import swirl_fwm
import swirl_idm
from models.text import encode
from support import evaluate

DATA = [("a", "go", "b"), ("c", "stay", "c"), ("d", "go", "e"), ("f", "go", "g")]


def lab_of(**parts):
    """A Lab without a model; its run keeps the samples in `samples`."""
    samples = []
    run = types.SimpleNamespace(log=lambda _, **line: samples.append(line))
    plain = dict(run=run, test=DATA, windows=[], book=None, held_out={}, samples=samples)
    return types.SimpleNamespace(**plain | parts)


class Model:
    """Says what it is told to, and remembers what it was asked."""

    def __init__(self, logp=None):
        self.asked, self.answer, self.options = [], logp, lm.Options(eos=0)
        self.net = types.SimpleNamespace(device=torch.device("cpu"))

    def target(self, z):
        return [z]

    def score(self, xs, z_rows, ys):
        return self.logp(xs, z_rows, ys)

    def logp(self, xs, zs, ys, options=None):
        self.asked.append((xs, zs, ys, options))
        return torch.arange(float(len(xs))) if self.answer is None else self.answer


def test_sampled_is_the_mean_chance_of_changed_y():
    P = Model(torch.tensor([0.5, 0.25, 0.0]).log())  # a y that top-p leaves out has no chance
    assert evaluate.sampled(P, DATA) == pytest.approx(0.25)
    options = lm.Options(eos=0, temperature=0.75, top_p=0.96)
    assert P.asked == [(["a", "d", "f"], ["go"] * 3, ["b", "e", "g"], options)]


def test_chance_of_y_follows_the_sampling_options(P):
    xs, zs, ys = zip(*DATA)
    options = lm.Options(P.tok.eos_token_id, temperature=0.75, top_p=0.99)
    logp = lm.score(
        P.net, [P.prompt(x, z) for x, z in zip(xs, zs)], [P.target(y) for y in ys], options
    )
    assert P.logp(xs, zs, ys, options).tolist() == pytest.approx(logp.tolist(), abs=1e-3)
    assert logp.tolist() != pytest.approx(P.logp(xs, zs, ys).tolist(), abs=0.1)


def test_refused_is_the_share_that_q_would_refuse(monkeypatch, Q):
    monkeypatch.setattr(Q, "refuses", lambda xs, ys: [x == "a" for x in xs])
    scores, z_hat = evaluate.evaluate_Q(Q, DATA)
    assert scores["refused"] == 0.25 and len(z_hat) == 4 and swirl_idm.REFUSAL not in z_hat


@pytest.fixture
def counted(monkeypatch):
    """["fwm" or "idm"] of each side that is scored."""
    sides = []
    monkeypatch.setattr(evaluate, "evaluate_P", lambda *_: sides.append("fwm")
                        or ({"n": len(sides)}, ["y"] * 4))
    monkeypatch.setattr(evaluate, "evaluate_Q", lambda *_: sides.append("idm")
                        or ({"n": len(sides)}, ["z"] * 4))
    return sides


def test_a_side_that_did_not_move_keeps_its_scores(counted):
    lab = lab_of()
    first, _ = evaluate.evaluate(None, Model(), lab, "sft")
    second, _ = evaluate.evaluate(None, Model(), lab, "iteration1/phase1", ("fwm",))
    assert counted == ["fwm", "idm", "fwm"] and second["idm"] is first["idm"]
    assert second["fwm"] != first["fwm"]
    # Of a run that was resumed
    evaluate.evaluate(None, Model(), lab_of(), "iteration1/phase2", ("idm",))
    assert counted[3:] == ["fwm", "idm"]


def test_samples_hold_truth_forecast_and_reward(counted):
    lab, Q = lab_of(), Model()
    _, sample = evaluate.evaluate(None, Q, lab, "sft")
    assert sample == dict(x="a", z="go", y="b", y_hat="y", z_hat="z")
    assert lab.samples[2] == dict(stage="sft", x="d", z="go", y="e", y_hat="y", z_hat="z",
                                  reward=2.0, reward_of_y=2.0)
    assert [ys[2] for _, _, ys, _ in Q.asked] == ["y", "e"]


def test_best_of_8_draws_eight_in_both_directions(monkeypatch):
    asked = []

    def forward(P, Q, xs, zs, n, generator):
        asked.append((P, Q, n, generator.initial_seed()))
        return ["b"] * 4

    def inverse(Q, P, xs, ys, n, generator):
        asked.append((P, Q, n, generator.initial_seed()))
        return ["go"] * 4

    monkeypatch.setattr(swirl_fwm, "best_of_n", forward)
    monkeypatch.setattr(swirl_idm, "best_of_n", inverse)
    P, Q = Model(), Model()
    scores = evaluate.verify(P, Q, DATA, 8, seed=3)
    assert asked == [(P, Q, 8, 3)] * 2
    assert (scores["fwm"]["exact"], scores["idm"]["exact"]) == (0.25, 0.75)


def test_long_states_cut_the_rows_scored_down_to_20(tok):
    short, long = [("a", "z", "b")] * 300, [("a", "z", "lamp " * 2000)] * 300
    assert evaluate.affordable(tok, short) == short
    tokens = len(encode(tok, "\n" + long[0][2]))
    assert len(evaluate.affordable(tok, long)) == max(20, 60000 // tokens) < 300
    assert len(evaluate.affordable(tok, [("a", "z", "lamp " * 9000)] * 300)) == 20


def test_sampled_is_none_where_nothing_changes():
    assert evaluate.sampled(Model(), [("c", "stay", "c")]) is None
