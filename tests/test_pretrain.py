"""Claims of `pretrain.py`: which tokens count as changed, what a step is made of, the gradient of its
loss, and that it ends in a folder that loads."""
import random
import types

import pytest
import torch

import lm
import pretrain
import pretrained
import swirl_fwm
import swirl_idm
from conftest import grads, naive, relative, tiny_llama
from envs import made_up


@pytest.fixture(scope="module")
def tok():
    return pretrain.make_tokenizer(random.Random(0), n=200)


# --- the parts of a target ------------------------------------------------------------------------

@pytest.mark.parametrize("x, y, stretch", [
    ([1, 2, 3, 9], [1, 2, 3, 9], []),                 # nothing changes
    ([1, 2, 3, 9], [1, 5, 3, 9], [5]),                # one token is another
    ([1, 2, 9], [1, 5, 6, 2, 9], [5, 6]),             # two come in
    ([1, 2, 3, 9], [1, 3, 9], [3]),                   # one goes: the token that follows
    ([1, 2, 3, 4, 9], [5, 2, 3, 6, 9], [5, 2, 3, 6]), # two changes and what lies between
    ([1, 2, 2, 9], [1, 2, 9], [9]),                   # of equals the last goes
    ([9], [1, 9], [1])])
def test_changed_tokens_are_those_that_x_has_not(x, y, stretch):
    begin, end = pretrain.changed(x, y)
    assert y[begin:end] == stretch


def test_what_is_not_changed_stands_in_x():
    rng = random.Random(3)
    for _ in range(2000):
        x, y = ([rng.randrange(3) for _ in range(rng.randint(0, 6))] + [9] for _ in range(2))
        begin, end = pretrain.changed(x, y)
        assert 0 <= begin <= end <= len(y) and (begin < end) == (x != y)
        assert x[:begin] == y[:begin] and (end == len(y) or x[end - len(y):] == y[end:])


def test_a_transition_is_a_row_for_p_and_one_for_q(tok):
    x, z, y = "a: 1\nb: 2", "set a to 3", "a: 3\nb: 2"
    P_row, Q_row = pretrain.rows_of(tok, x, z, y, random.Random(1))
    assert P_row[:2] == (swirl_fwm.prompt(tok, x, z), swirl_fwm.target(tok, y))
    assert Q_row[:2] == (swirl_idm.prompt(tok, x, y, "diff"), swirl_idm.target(tok, z))
    new = [token for token, part in zip(*P_row[1:]) if part == pretrain.CHANGED]
    assert tok.decode(new).strip() == "3" and set(P_row[2]) == {pretrain.COPIED, pretrain.CHANGED}
    assert set(Q_row[2]) == {pretrain.ACTION} and len(Q_row[2]) == len(Q_row[1])


def test_q_learns_nothing_where_nothing_changes(tok):
    rows = pretrain.rows_of(tok, "a: 1", "look at a", "a: 1", random.Random(1))
    assert len(rows) == 1 and set(rows[0][2]) == {pretrain.COPIED}


def test_q_sees_both_views(tok):
    rng, x, y = random.Random(0), "a: 1\nb: 2", "a: 3\nb: 2"
    seen = [pretrain.rows_of(tok, x, "z", y, rng)[1][0] for _ in range(300)]
    full = seen.count(swirl_idm.prompt(tok, x, y, "full"))
    assert 10 < full < 60 and full + seen.count(swirl_idm.prompt(tok, x, y, "diff")) == 300


def test_babble_is_a_row_and_the_same_row(tok):
    rng = random.Random(0)
    for _ in range(100):
        prompt, target, parts = pretrain.babble(tok, rng)
        assert prompt == target and target[-1] == tok.eos_token_id
        assert max(target) < len(tok) and parts == [pretrain.COPIED] * len(target)


# --- a step ---------------------------------------------------------------------------------------

def share_of_babble(rows):
    tokens = [len(prompt) + len(target) for prompt, target, _ in rows]
    return sum(n for n, (prompt, target, _) in zip(tokens, rows) if prompt == target) / sum(tokens)


@pytest.mark.parametrize("step, share", [(1, 1.0), (50, 0.55), (100, 0.1), (1000, 0.1)])
def test_random_rows_come_first(tok, step, share):
    args, rng = types.SimpleNamespace(tokens=20000, steps=1000), random.Random(step)
    rows = pretrain.draw(tok, step, args, rng)
    assert share_of_babble(rows) == pytest.approx(share, abs=0.03)
    assert 20000 <= sum(len(prompt) + len(target) for prompt, target, _ in rows) < 23000


def test_worlds_grow(tok, monkeypatch):
    asked = []
    monkeypatch.setattr(made_up, "transition", lambda rng, most: asked.append(most) or ("a: 1", "z", "a: 2"))
    args = types.SimpleNamespace(tokens=500, steps=100)
    sizes = []
    for step in (11, 50, 80, 100):
        asked.clear()
        pretrain.draw(tok, step, args, random.Random(0))
        sizes.append(asked[0])
    assert sizes == sorted(sizes) and sizes[0] == 4 and sizes[-1] == 64


@pytest.mark.parametrize("tokens", [1, 12, 10**6])
def test_the_gradient_is_that_of_three_means(monkeypatch, tokens):
    """By hand: over all tokens of a part, whatever goes through the model at a time."""
    monkeypatch.setattr(lm, "TOKENS", tokens)
    rows = [([1, 2], [3, 4, 0], [0, 1, 0]), ([2], [5, 6, 7, 8, 0], [0, 0, 1, 1, 0]),
            ([3, 1, 4], [1, 0], [2, 2]), ([5], [0], [0])]
    model, nll = tiny_llama(9, 1), {0: [], 1: [], 2: []}
    for prompt, target, parts in rows:
        for logp, part in zip(naive(model, prompt, target), parts):
            nll[part].append(-logp)
    means = [torch.stack(nll[part]).mean() for part in range(3)]
    (means[0] + 0.3 * means[1] + means[2]).backward()
    exact = grads(model)
    model.zero_grad()
    assert torch.allclose(pretrain.backward(model, rows), torch.stack(means).detach(), atol=1e-5)
    assert relative(grads(model), exact) < 1e-4


def test_a_step_without_actions_has_a_gradient():
    model = tiny_llama(9, 1)
    means = pretrain.backward(model, [([1, 2], [1, 2], [0, 0])])
    assert means[0] > 0 and means[1:].tolist() == [0.0, 0.0] and grads(model).isfinite().all()


# --- the command ----------------------------------------------------------------------------------

def test_it_ends_in_a_folder_that_loads(tmp_path, monkeypatch, capsys):
    small = pretrain.make_tokenizer
    monkeypatch.setattr(pretrain, "make_tokenizer", lambda rng: small(rng, n=50))
    monkeypatch.setattr(pretrain, "held_out", lambda *_: {"exact": 0.0})
    threads = torch.get_num_threads()
    pretrain.main(["--out", str(tmp_path), "--steps", "3", "--tokens", "200", "--threads", str(threads)])
    model, tok = pretrained.load(tmp_path)
    assert model.config.hidden_size == 128 and lm.encode(tok, " 12") and "exact" in capsys.readouterr().out


@pytest.mark.slow
def test_the_shipped_model_copies_what_stays():
    """Of unseen made-up transitions, in free-running decoding."""
    model, tok = pretrained.load("data/tiny")
    assert pretrain.held_out(model, tok)["unchanged_lines"] > 0.99
