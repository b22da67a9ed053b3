"""Claims of `models/images.py`: rows drawn all at once are those drawn one token after the
other."""
import random

import pytest
import torch
from conftest import EOS, ending, greedy, sample
from test_lm import RAGGED

GUESSES = {
    "none right": lambda rng, truth: [rng.randrange(9) for _ in range(7)],
    "empty": lambda rng, truth: [],
    "too long": lambda rng, truth: [*truth, 3] * 9,
    "one wrong": lambda rng, truth: (
        [*truth[:2], 8 - truth[2], *truth[3:]] if len(truth) > 2 else truth
    ),
}


# rows never end, end here and there, end early
@pytest.mark.parametrize("bias", [-1e4, 0.0, 2.0])
@pytest.mark.parametrize("guessed", GUESSES)
def test_any_guess_gives_the_rows_of_sequential_draws(model, guessed, bias):
    """The sequential sampler of the same random numbers, by full passes: equal rows, equal
    log-probs. And the greedy ones."""
    model, rng, min_p, G, T = ending(model, EOS, bias), random.Random(0), 0.02, 4, 8
    draws = lambda seed: torch.Generator().manual_seed(seed)
    u, truth, logps = (
        torch.rand(len(RAGGED) * G, T, dtype=torch.float64, generator=draws(5)), [], [])
    # another set at each of the first tokens
    allowed = torch.rand(5, 9, generator=draws(2)) < 0.8
    allowed[:, EOS] = True
    for n in range(len(RAGGED) * G):
        row, logp = [], []
        while len(row) < T and EOS not in row:
            p = (model(torch.tensor([[*RAGGED[n // G], *row]])).logits[0, -1] / 0.8).softmax(
                -1
            ).double() * allowed[min(len(row), 4)]
            p = torch.where(p < min_p * p.max(), 0, p)
            row.append(int((p.cumsum(0) / p.sum() > u[n, len(row)]).nonzero()[0]))
            logp.append((p[row[-1]] / p.sum()).log().item())
        truth.append(row)
        logps.append(logp)
    guess = [GUESSES[guessed](rng, row) for row in truth[::G]]
    rows, sampled = sample(
        model, RAGGED, G, T, temperature=0.8, generator=draws(5), min_p=min_p, allowed=allowed,
        guess=guess,
    )
    assert rows == truth and len(set(map(tuple, rows))) > 6
    assert all(got == pytest.approx(want, abs=1e-4) for got, want in zip(sampled, logps))
    want = greedy(model, RAGGED, T, allowed=allowed)
    assert greedy(model, RAGGED, T, allowed=allowed, guess=guess) == want
    twice, _ = sample(model, RAGGED, 2, T, temperature=0, allowed=allowed, guess=guess)
    assert twice == [row for row in want for _ in range(2)]


@pytest.mark.parametrize("G", [1, 3])
def test_right_part_of_a_guess_is_computed_once(model, monkeypatch, G):
    model, passes, forward = ending(model, EOS, -1e4), [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda ids, **kwargs: passes.append(ids.shape) or forward(ids, **kwargs)
    )
    truth = greedy(model, RAGGED, 20, EOS)
    # the first wrong token
    for wrong in (20, 19, 7, 0):
        guess = [[(t + 1) % 9 if i == wrong else t for i, t in enumerate(row)] for row in truth]
        passes.clear()
        rows, _ = sample(model, RAGGED, G, 20, temperature=0, guess=guess)
        assert rows == [row for row in truth for _ in range(G)]
        prefill, first, *more = passes
        # equal rows are computed once
        assert prefill == (5, 10) and first == (5, 20) and len(more) <= max(0, 19 - wrong)
        # at least one more token is right each time
        assert all(T <= 19 - wrong - i for i, (_, T) in enumerate(more)), passes
    passes.clear()
    # all rows end at once, whatever was guessed behind
    model.lm_head.bias.data[EOS] = 1e4
    rows, _ = sample(model, RAGGED, G, 20, temperature=0, guess=truth)
    assert rows == [[EOS]] * (5 * G) and len(passes) == 2
    model.lm_head.bias.data[EOS] = -1e4
    # a row that is done leaves
    one = [truth[0], *([(t + 1) % 9 for t in row] for row in truth[1:])]
    passes.clear()
    sample(model, RAGGED, G, 20, temperature=0, guess=one)
    assert passes[2][0] == 4
