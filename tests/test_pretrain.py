"""Claims of `pretrain.py`: what a step is made of, the gradient of its loss, and that it ends in a
folder that loads."""
import random
import types

import pytest
import torch
from conftest import Net, grads, naive, relative, tiny_llama

import pretrain
from envs import made_up
from models import pretrained
from models.text import encode
from swirl_fwm import FWM
from swirl_idm import IDM


@pytest.fixture(scope="module")
def tok():
    return pretrain.make_tokenizer(random.Random(0), n=200)


@pytest.fixture
def P(tok):
    return FWM(None, tok)


@pytest.fixture
def Q(tok):
    return IDM(None, tok)


# --- the rows of a step ---------------------------------------------------------------------------

def test_a_transition_is_a_row_for_p_and_one_for_q(P, Q):
    x, z, y = "a: 1\nb: 2", "set a to 3", "a: 3\nb: 2"
    rows_P, rows_Q = pretrain.rows_of(P, Q, x, z, y, rng=random.Random(1))
    assert rows_P == P.rows([(x, z, y)])
    assert rows_Q == Q.rows([(x, z, y)])


def test_q_learns_nothing_where_nothing_changes(P, Q):
    rows_P, rows_Q = pretrain.rows_of(P, Q, "a: 1", "look at a", "a: 1", rng=random.Random(1))
    assert len(rows_P) == 1 and not rows_Q


def test_q_sees_both_views(tok, P, Q):
    rng, x, y = random.Random(0), "a: 1\nb: 2", "a: 3\nb: 2"
    seen = [pretrain.rows_of(P, Q, x, "z", y, rng=rng)[1][0][0] for _ in range(300)]
    full = seen.count(IDM(None, tok, view="full").prompt(x, y))
    assert 10 < full < 60 and full + seen.count(Q.prompt(x, y)) == 300


def test_babble_is_a_row_and_the_same_row(tok):
    rng, kinds = random.Random(0), []
    for _ in range(300):
        prompt, target = pretrain.babble(tok, 60, rng)
        assert prompt == target and target[-1] == tok.eos_token_id and max(target) < len(tok)
        assert 5 <= len(target) <= 61
        kinds.append(len(set(target)) / len(target))
    assert sum(kind < 0.8 for kind in kinds) > 60 and sum(kind > 0.95 for kind in kinds) > 60


@pytest.mark.parametrize("step, share", [(1, 1.0), (50, 0.55), (100, 0.1), (1000, 0.1)])
def test_random_rows_come_first(P, Q, step, share):
    args, rng = types.SimpleNamespace(tokens=20000, steps=1000), random.Random(step)
    rows_P, rows_Q = pretrain.draw(P, Q, step, args, rng)
    tokens = {kind: sum(len(prompt) + len(target) for prompt, target in rows) for kind, rows in
              (("all", rows_P + rows_Q), ("babble", [row for row in rows_P if row[0] == row[1]]))}
    assert tokens["babble"] / tokens["all"] == pytest.approx(share, abs=0.03)
    assert 20000 <= tokens["all"] < 23000


def test_worlds_and_random_rows_grow(P, Q, monkeypatch):
    worlds, rows = [], []
    monkeypatch.setattr(made_up, "transition",
                        lambda rng, most: worlds.append(most) or ("a: 1", "z", "a: 2"))
    monkeypatch.setattr(pretrain, "babble",
                        lambda tok, longest, rng: rows.append(longest) or ([1] * 50, [1] * 50))
    sizes = []
    for step in (11, 20, 50, 80, 100):
        pretrain.draw(P, Q, step, types.SimpleNamespace(tokens=500, steps=100), random.Random(0))
        sizes.append((worlds[-1], rows[-1]))
    assert sizes == [(6, 46), (13, 64), (64, 124), (64, 184), (64, 224)]


@pytest.mark.parametrize("tokens", [1, 12, 10**6])
def test_the_gradient_is_that_of_both_means(tokens):
    """By hand: the mean over all tokens of y, and half the mean over those of z."""
    rows_P = [([1, 2], [3, 4, 0]), ([2], [5, 6, 7, 8, 0]), ([5], [0])]
    rows_Q = [([3, 1, 4], [1, 0]), ([7], [7, 7, 0])]
    model = tiny_llama(9, 1)
    y, z = (-torch.cat([naive(model, *row) for row in rows]).mean() for rows in (rows_P, rows_Q))
    (y + 0.5 * z).backward()
    exact = grads(model)
    model.zero_grad()
    both = Net(model, tokens=tokens)
    assert pretrain.backward(both, both, rows_P, rows_Q) == pytest.approx(
        (y.item(), z.item()), rel=1e-5
    )
    assert relative(grads(model), exact) < 1e-4


def test_a_step_without_actions_has_a_gradient():
    model = tiny_llama(9, 1)
    both = Net(model)
    y, z = pretrain.backward(both, both, [([1, 2], [1, 2])], [])
    assert y > 0 and z == 0 and grads(model).isfinite().all() and grads(model).any()


# --- the command ----------------------------------------------------------------------------------

def test_it_ends_in_a_folder_that_loads(tmp_path, monkeypatch, capsys):
    small = pretrain.make_tokenizer
    monkeypatch.setattr(pretrain, "make_tokenizer", lambda rng: small(rng, n=50))
    monkeypatch.setattr(pretrain, "held_out", lambda *_: {"exact": 0.0})
    threads = torch.get_num_threads()
    pretrain.main(
        ["--out", str(tmp_path), "--steps", "3", "--tokens", "200", "--threads", str(threads)]
    )
    model, tok = pretrained.load(tmp_path)
    assert (
        model.config.hidden_size == 128
        and encode(tok, " 12")
        and "exact" in capsys.readouterr().out
    )


@pytest.mark.slow
def test_the_shipped_model_copies_what_stays():
    """Of unseen made-up transitions, in free-running decoding."""
    net, tok = pretrained.load("data/tiny")
    assert pretrain.held_out(FWM(net, tok), IDM(net, tok))["unchanged_lines"] > 0.99
