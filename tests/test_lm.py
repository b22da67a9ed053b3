"""Claims of `lm.py`: cache, batch and padding change no number, and what is sampled is what is
scored."""

import itertools
import random
import types

import pytest
import torch
from conftest import (
    EOS,
    MAKERS,
    frozen,
    grads,
    greedy,
    logprobs,
    naive,
    naive_greedy,
    relative,
    sample,
    score,
    sharpen,
    weights,
)
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicLayer

import lm
from models import batches, next_token, optim, pretrained
from models.cache import Room
from models.text import decode, encode

RAGGED = [[5], [3, 1, 4, 1, 5, 2, 6], [2, 7], [1, 8, 2, 8], [8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8]]


def draw(seed, n=14, V=9):
    """Rows of every length, with eos in odd places, in no order, some prompts asked twice and one
    never."""
    rng = random.Random(seed)
    rows = [[rng.randrange(V) for _ in range(rng.randint(1, 7))] for _ in range(n)]
    return rows, [rng.choice([0, 1, 2, 4]) for _ in rows]


# --- score ----------------------------------------------------------------------------------------

# eager adds a mask, sdpa applies it
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampler_and_trainer_agree_on_every_token(model, temperature, attention):
    model.set_attn_implementation(attention)
    gen = torch.Generator().manual_seed(0)
    rows, sampled = sample(model, RAGGED, 6, 10, temperature=temperature, generator=gen)
    owner = [b for b in range(len(RAGGED)) for _ in range(6)]
    scored = logprobs(model, RAGGED, rows, owner, temperature=temperature)
    assert len(set(map(len, rows))) > 3  # ragged, some cut, some ended
    assert {r[-1] == EOS for r in rows} == {True, False}
    for n, row in enumerate(rows):
        truth = naive(model, RAGGED[owner[n]], row, temperature)
        assert torch.allclose(torch.tensor(sampled[n]), truth, atol=1e-4)
        assert torch.allclose(scored[n, :len(row)], truth, atol=1e-4)
        assert (scored[n, len(row):] == 0).all()
    assert (
        naive(model, RAGGED[1], rows[6], 0.7) - naive(model, RAGGED[1], rows[6])
    ).abs().max() > 1e-2


@pytest.mark.parametrize("partial", [False, True])
def test_shared_prefix_equals_each_row_alone(model, partial):
    rows, owner = draw(1)
    rng = random.Random(2)
    k = [rng.randint(1, len(r)) for r in rows] if partial else None
    weight = torch.randn(len(rows), max(map(len, rows)), generator=torch.Generator().manual_seed(3))
    shared = logprobs(model, RAGGED, rows, owner, k, temperature=0.7)
    (shared * weight).sum().backward()
    ours = grads(model)
    model.zero_grad()
    for n, row in enumerate(rows):
        alone = naive(model, RAGGED[owner[n]], row, 0.7)
        first = len(row) - k[n] if partial else 0
        assert torch.allclose(shared[n, first:len(row)], alone[first:], rtol=1e-5, atol=1e-5)
        assert (shared[n, :first] == 0).all() and (shared[n, len(row):] == 0).all()
        (alone[first:] * weight[n, first:len(row)]).sum().backward()
    assert relative(ours, grads(model)) < 1e-5


def one_by_one(model, prefix, row, temperature, min_p, allowed):
    """(T,) log p(row_t | prefix, row_<t) by full passes, among what `allowed` leaves of each
    token."""
    out = []
    for t, token in enumerate(row):
        ids = torch.tensor([[*prefix, *row[:t]]])
        logits = model(ids, use_cache=False).logits[0, -1] / temperature
        if allowed is not None:
            logits = logits.masked_fill(~allowed[min(t, len(allowed) - 1)], -torch.inf)
        likely = logits.detach().softmax(-1) >= min_p * logits.detach().softmax(-1).max()
        likely[token] = True
        out.append(logits.masked_fill(~likely, -torch.inf).log_softmax(-1)[token])
    return torch.stack(out)


# A row for each of RAGGED
ALONE = [[3, 1, 4], [1], [2, 6, EOS, 5, 3, 1, 7], [8, EOS], [5, 5, 5, 2]]


@pytest.mark.parametrize("temperature, min_p, few", [(1.0, 0.0, False), (0.7, 0.0, False),
                                                     (1.5, 0.1, False), (0.7, 0.05, True)])
@pytest.mark.parametrize("partial", [False, True])
def test_one_row_per_prefix_is_a_single_exact_pass(model, monkeypatch, partial,
                                                            temperature, min_p, few):
    """Unlike lengths, prefixes in any order and one of them not asked: values, and gradients."""
    allowed = None
    if few:  # of the first scored tokens, each another set
        allowed = torch.rand(3, 9, generator=torch.Generator().manual_seed(4)) < 0.7
        allowed[:, 1] = True
    owner, rows = [3, 0, 4, 2], [ALONE[n] for n in (3, 0, 2, 4)]
    rows = [[1] * len(row) for row in rows] if few else rows
    k = [2, 1, 4, 3] if partial else None
    passes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **kw: passes.append(kw) or forward(*a, **kw))
    options = dict(temperature=temperature, min_p=min_p, allowed=allowed)
    logp = logprobs(model, RAGGED, rows, owner, k, **options)
    assert len(passes) == 1 and passes[0].get("attention_mask") is None
    weight = torch.randn(logp.shape, generator=torch.Generator().manual_seed(3))
    (logp * weight).sum().backward()
    ours = grads(model)
    model.zero_grad()
    for n, row in enumerate(rows):
        first = len(row) - k[n] if partial else 0
        truth = one_by_one(
            model, RAGGED[owner[n]] + row[:first], row[first:], **options
        )
        assert torch.allclose(logp[n, first:len(row)], truth, rtol=1e-4, atol=1e-4)
        assert not logp[n, :first].any() and not logp[n, len(row):].any()
        (truth * weight[n, first:len(row)]).sum().backward()
    assert ours.norm() > 1e-2 and relative(ours, grads(model)) < 1e-4


def test_one_pass_agrees_with_the_shared_prefix(model):
    """The same rows with one of them twice, so that the prefixes are cached."""
    owner = [0, 1, 2, 3, 4]
    once = logprobs(model, RAGGED, ALONE, owner)
    twice = logprobs(model, RAGGED, [*ALONE, ALONE[0]], [*owner, 0])
    assert torch.allclose(once, twice[:5], atol=1e-4)


def test_gradient_reaches_the_prompt(model):
    """The cache is not detached: the embedding of a token that only the prompt holds learns."""
    logprobs(model, [[7, 3, 2]], [[1, 4], [5]], [0, 0]).sum().backward()
    table = model.get_input_embeddings().weight
    ours = table.grad.clone()
    model.zero_grad()
    (naive(model, [7, 3, 2], [1, 4]).sum() + naive(model, [7, 3, 2], [5]).sum()).backward()
    assert ours[7].norm() > 0 and relative(ours, table.grad) < 1e-5


@pytest.mark.parametrize("budget", [1, 20, 60, 10**6])
def test_score_does_not_depend_on_the_budget(model, budget):
    rows, owner = draw(4)
    k = [1 + n % len(r) for n, r in enumerate(rows)]
    truth = [naive(model, RAGGED[o], r)[-j:].sum().item() for r, o, j in zip(rows, owner, k)]
    total = score(model, RAGGED, rows, owner, k, tokens=budget)
    assert total.tolist() == pytest.approx(truth, abs=1e-4) and not total.requires_grad


def test_score_without_owner_pairs_prompt_and_row(model):
    rows = [[1, 2], [3], [4, 4, 4], [EOS], [6, 5, 4, 3]]
    truth = [naive(model, p, r, 0.7).sum().item() for p, r in zip(RAGGED, rows)]
    assert score(model, RAGGED, rows, temperature=0.7).tolist() == pytest.approx(truth, abs=1e-4)


@pytest.mark.parametrize("budget", [1, 15, 40, 100, 10**6])
def test_chunks_hold_each_row_once_within_the_budget(budget):
    for seed in range(20):
        rows, owner = draw(seed, n=25)
        parts = batches.chunks(RAGGED, rows, owner, budget)
        assert sorted(n for part in parts for n in part) == list(range(25))
        for part in parts:
            used = {owner[n] for n in part}
            prompts, ours = [len(RAGGED[o]) for o in used], [len(rows[n]) for n in part]
            # one prefix is free
            many = len(used) if len(used) > 1 else 0
            # equal rows cost nothing
            kinds = len({(owner[n], tuple(rows[n])) for n in part})
            assert many * max(prompts) + kinds * max(ours) <= budget or kinds == 1
        assert len(parts) == 1 or budget < 10**6


@pytest.mark.parametrize("budget", [1, 15, 40, 10**6])
def test_one_row_per_prefix_chunks_sort_by_length(budget):
    rng = random.Random(0)
    prefixes, rows = ([[1] * rng.randint(1, 12) for _ in range(25)] for _ in range(2))
    owner = rng.sample(range(25), 25)
    whole = [len(prefixes[o]) + len(row) for o, row in zip(owner, rows)]
    parts = batches.chunks(prefixes, rows, owner, budget)
    order = [n for part in parts for n in part]
    assert sorted(order) == list(range(25)) and [whole[n] for n in order] == sorted(whole)
    for part in parts:
        assert len(part) * max(whole[n] for n in part) <= budget or len(part) == 1
    assert len(parts) == 1 or budget < 10**6


def test_rows_of_one_long_prompt_stay_together():
    """The prompt would be computed anew in each chunk; only the rows count."""
    rows = [[2, 2, 2, 2, n] for n in range(8)]
    assert batches.chunks([[1] * 100], rows, [0] * 8, 40) == [list(range(8))]
    assert batches.chunks([[1] * 100], rows, [0] * 8, 20) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert batches.chunks([[1] * 100, [3] * 100], rows[:4], [0, 0, 1, 1], 40) == [[0, 1], [2, 3]]


def test_equal_ids_with_unequal_scored_parts_differ(model):
    rows, owner = [[1, 2, 3], [1, 2, 3], [4]], [0, 0, 0]
    logp = logprobs(model, RAGGED, rows, owner, n_scored=[3, 1, 1])
    whole = naive(model, RAGGED[0], rows[0])
    assert torch.allclose(logp[0], whole, atol=1e-4)
    assert not logp[1, :2].any() and logp[1, 2].item() == pytest.approx(whole[2].item(), abs=1e-4)


def test_no_prompts_are_no_rows(model):
    """Of a process whose share of a step is empty."""
    for tokens in (0, 100):
        assert sample(model, [], 3, 4, tokens=tokens) == ([], [])


def test_equal_rows_of_a_prompt_are_computed_once(model, monkeypatch):
    """They stay in one chunk, count once, and each gets its values and its share of the
    gradient."""
    rows, owner = [[1, 2], [3], [1, 2], [1, 2]], [0, 1, 0, 1]
    assert batches.chunks(RAGGED, rows, [0] * 4, 4) == [[1, 0, 2, 3]]
    passes, forward = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda ids, **kw: passes.append(len(ids)) or forward(ids, **kw)
    )
    logp = logprobs(model, RAGGED, rows, owner)
    assert max(passes[1:]) == 3
    logp.sum().backward()
    ours = grads(model)
    model.zero_grad()
    alone = [naive(model, RAGGED[o], row) for o, row in zip(owner, rows)]
    assert all(torch.allclose(logp[n, :len(row)], row, atol=1e-4) for n, row in enumerate(alone))
    torch.cat(alone).sum().backward()
    assert relative(ours, grads(model)) < 1e-5


def test_take_keeps_each_row_with_its_own_prompt():
    rng = random.Random(0)
    for seed in range(20):
        rows, owner = draw(seed)
        chosen = rng.sample(range(len(rows)), rng.randint(1, len(rows)))
        few, some, where = batches.take(RAGGED, rows, owner, chosen)
        assert [(few[o], r) for o, r in zip(where, some)] == [
            (RAGGED[owner[n]], rows[n]) for n in chosen
        ]
        assert len(few) == len({owner[n] for n in chosen})  # no prompt runs for nothing


def test_end_token_is_learned_though_it_pads(model):
    rows = [[3, EOS], [EOS], [1, 2, 4, 5, EOS]]
    logp = logprobs(model, RAGGED[:3], rows, [0, 1, 2])
    ends = torch.stack([logp[n, len(r) - 1] for n, r in enumerate(rows)])
    truth = torch.stack([naive(model, p, r)[-1] for p, r in zip(RAGGED, rows)])
    assert torch.allclose(ends, truth, atol=1e-4) and (ends < 0).all()
    ends.sum().backward()
    ours = grads(model)
    model.zero_grad()
    truth.sum().backward()
    assert ours.norm() > 1e-2 and relative(ours, grads(model)) < 1e-5


@pytest.mark.parametrize("how", ["checkpointing", "train"])
def test_modes_that_change_numbers_are_refused(model, how):
    if how == "checkpointing":
        model.gradient_checkpointing_enable()
    else:
        model.train()
    with pytest.raises(AssertionError):
        logprobs(model, RAGGED, [[1]], [0])
    with pytest.raises(AssertionError):
        sample(model, RAGGED, 1, 2, EOS)


# --- sample ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("eos", [0, 3])
def test_rows_end_at_the_first_eos_or_at_max_new(model, eos):
    rows, logps = sample(model, RAGGED, 12, 7, eos, generator=torch.Generator().manual_seed(1))
    assert len(rows) == 12 * len(RAGGED) and len(set(map(len, rows))) > 3
    for row, logp in zip(rows, logps):
        assert eos not in row[:-1] and len(row) == len(logp)
        assert row[-1] == eos or len(row) == 7


@pytest.mark.parametrize("eos", range(9))
def test_greedy_is_a_loop_without_cache_token_by_token(model, eos):
    """For every choice of the end token: rows leave the batch at different times, and it changes
    nothing."""
    truth = [naive_greedy(model, p, 8, eos) for p in RAGGED]
    assert greedy(model, RAGGED, 8, eos) == truth
    assert greedy(model, RAGGED, 8, eos, tokens=2) == truth
    rows, logps = sample(model, RAGGED, 2, 8, eos, temperature=0)
    assert rows == [r for r in truth for _ in range(2)]
    for n, row in enumerate(rows):
        assert torch.allclose(torch.tensor(logps[n]), naive(model, RAGGED[n // 2], row), atol=1e-4)


def test_greedy_equals_transformers_generate(model):
    for prefix, row in zip(RAGGED, greedy(model, RAGGED, 8, EOS)):
        ids = torch.tensor([prefix])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=EOS,
            pad_token_id=EOS,
        )
        assert out[0, len(prefix):].tolist() == row


def test_rows_are_prompt_major(model):
    """Each row is likely under its own prompt: prompts of one repeated token, a model that
    copies."""
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.ndim > 1 and ("layers." in n or ".h." in n or "wpe" in n):
                p.zero_()  # only the embedding is left
        # gpt2, llama: head is tied
        model.get_input_embeddings().weight.copy_(12 * torch.eye(9, 32))
    gen = torch.Generator().manual_seed(0)
    rows, _ = sample(model, [[3], [5, 5], [7, 7, 7]], 4, 3, EOS, generator=gen)
    assert rows == [[t] * 3 for t in (3, 5, 7) for _ in range(4)]


def chi_square(tokens, p):
    """Tokens that are expected fewer than 5 times count as one."""
    seen, want = torch.bincount(tokens, minlength=len(p)).double(), len(tokens) * p
    rare = want < 5
    seen = torch.cat([seen[~rare], seen[rare].sum(0, keepdim=True)])
    want = torch.cat([want[~rare], want[rare].sum(0, keepdim=True)])
    return ((seen - want) ** 2 / want.clamp(min=.1)).sum().item()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_first_token_follows_the_tempered_softmax(model, temperature):
    """Chi-square of at most 8 degrees of freedom: 40 has p = 3e-6. The other temperature is told
    apart."""
    gen = torch.Generator().manual_seed(0)
    rows, _ = sample(model, RAGGED, 3000, 1, temperature=temperature, generator=gen)
    for b, prefix in enumerate(RAGGED):
        logits = model(torch.tensor([prefix])).logits[0, -1].double()
        tokens = torch.tensor(rows[3000 * b:3000 * (b + 1)])[:, 0]
        assert chi_square(tokens, (logits / temperature).softmax(-1)) < 40
        assert chi_square(tokens, (logits / (1.7 - temperature)).softmax(-1)) > 40


DRAWN_FROM = torch.tensor(
    [[0.125, 0.0, 0.375, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0], [1 - 1e-9, 0.0, 0.0, 0.0, 1e-9]]
).log()


def test_draw_inverts_the_distribution_function():
    """Each token as often as its probability says, one of probability 0 never."""
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for row, count in ((0, [125, 0, 375, 500, 0]), (1, [0, 1000, 0, 0, 0])):
        drawn = next_token.draw(DRAWN_FROM, torch.full((1000,), row), grid)
        assert torch.bincount(drawn, minlength=5).tolist() == count


def test_a_rare_token_is_not_lost_to_rounding():
    grid = torch.tensor([0.0, 1 - 2e-9, 1 - 5e-10], dtype=torch.float64)
    assert next_token.draw(DRAWN_FROM, torch.tensor([2, 2, 2]), grid).tolist() == [0, 0, 4]


def test_an_impossible_token_is_not_drawn_at_its_edge():
    grid = torch.tensor([0.125, 0.0], dtype=torch.float64)
    assert next_token.draw(DRAWN_FROM, torch.tensor([0, 1]), grid).tolist() == [2, 1]
    assert next_token.draw(
        torch.tensor([[0.25, 0.25, 0.0]] * 3).log(),
        torch.tensor([0, 1, 1]),
        torch.tensor([0.4, 0.6, 0.999]),
    ).tolist() == [0, 1, 1]


def test_the_largest_random_number_stays_in_its_row():
    most = torch.full((10**5,), 1 - 2**-53, dtype=torch.float64)
    assert (next_token.draw(DRAWN_FROM[[1]].repeat(10**5, 1), torch.arange(10**5), most) == 1).all()


def test_roomy_cache_holds_what_a_copying_one_holds():
    rng = random.Random(0)
    for _ in range(20):
        ours, plain, U = Room(), DynamicLayer(), 3
        for step in range(60):
            # keys and values, 2 heads of 4
            new = torch.randn(2, U, 2, rng.choice([1, 1, 1, 5]), 4)
            with torch.no_grad():
                got, want = ours.update(*new), plain.update(*new)
            assert all(torch.equal(a, b) for a, b in zip(got, want)), step
            if rng.random() < 0.2:
                U = rng.randint(1, 5)
                parent = torch.tensor([rng.randrange(len(got[0])) for _ in range(U)])
                ours.batch_select_indices(parent)
                plain.batch_select_indices(parent)


@pytest.mark.parametrize("width", [1, 16])
def test_a_cache_with_room_seldom_copies(width):
    layer, new = Room(), torch.ones(2, 2, width, 4)
    with torch.no_grad():
        places = [layer.update(new, new)[0].data_ptr() for _ in range(64)]
    assert sum(a != b for a, b in zip(places, places[1:])) < 16


def test_a_sliding_window_shorter_than_the_text_is_kept():
    """Rows drawn behind a cached prompt see what a plain forward pass sees."""
    torch.manual_seed(0)
    model = sharpen(
        MistralForCausalLM(
            MistralConfig(
                vocab_size=9,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                sliding_window=4,
                max_position_embeddings=256,
                eos_token_id=EOS,
            )
        ).eval(),
        12.0,
    )
    assert pretrained.context(model) == 256
    rows, logps = sample(
        model, [RAGGED[1][:6], RAGGED[2]], 8, 8, EOS, generator=torch.Generator().manual_seed(0)
    )
    for n, (row, logp) in enumerate(zip(rows, logps)):
        assert torch.allclose(
            torch.tensor(logp), naive(model, (RAGGED[1][:6], RAGGED[2])[n // 8], row), atol=1e-4
        )


def test_rollouts_of_a_group_are_independent(model):
    """They share the prefix and, while equal, the work; never the dice. Pairs of rollouts against
    products of exact probabilities: of both first tokens, and of both second ones after equal first
    ones."""
    gen = torch.Generator().manual_seed(0)
    rows, _ = sample(model, [[2, 7]] * 2000, 2, 2, temperature=1.5, generator=gen)
    pairs, tested = list(zip(rows[::2], rows[1::2])), 0

    def check(pairs, before):
        p = (
            (model(torch.tensor([[2, 7, *before]])).logits[0, -1].double() / 1.5)
            .softmax(-1)
            .detach()
        )
        tokens = torch.tensor([a[len(before)] * 9 + b[len(before)] for a, b in pairs])
        # at most 80 degrees: 80 +- 13
        assert chi_square(tokens, torch.outer(p, p).flatten()) < 160
        assert chi_square(torch.cat([tokens // 9, tokens % 9]), p) < 40

    check(pairs, [])
    for first in range(9):
        equal = [(a, b) for a, b in pairs if a[0] == b[0] == first]
        if first != EOS and len(equal) > 50:
            check(equal, [first])
            tested += 1
    assert tested > 0 and all(len(r) == 1 for r in rows if r[0] == EOS)


def smallest_set(p, top_p):
    """By enumeration: of the smallest sets whose mass reaches top_p, the heaviest."""
    for k in range(1, len(p) + 1):
        best = max(itertools.combinations(range(len(p)), k), key=lambda s: sum(p[i] for i in s))
        if sum(p[i] for i in best) >= top_p:
            return set(best)
    return set(range(len(p)))


def kept(p, top_p):
    out = next_token.nucleus(torch.tensor([p]).log(), top_p)[0]
    return {i for i, v in enumerate(out.tolist()) if v > -1e9}


def test_top_p_keeps_the_right_sets_by_hand():
    p = [.2, .4, .1, .3]
    assert kept(p, .01) == kept(p, .35) == {1}                                     # never empty
    assert kept(p, .45) == kept(p, .65) == {1, 3} and kept(p, .75) == {0, 1, 3}
    assert kept(p, .95) == {0, 1, 2, 3}


def test_top_p_is_the_smallest_set_with_enough_mass():
    gen = torch.Generator().manual_seed(0)
    for _ in range(50):
        p = torch.randn(6, generator=gen).mul(2).softmax(-1).tolist()
        top_p = torch.rand(1, generator=gen).item()
        assert kept(p, top_p) == smallest_set(p, top_p)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_min_p_is_the_same_in_sampler_and_trainer(model, temperature):
    gen, min_p, left = torch.Generator().manual_seed(0), 0.3, set()
    options = dict(temperature=temperature, min_p=min_p)
    rows, sampled = sample(model, RAGGED, 40, 6, generator=gen, **options)
    owner = [b for b in range(len(RAGGED)) for _ in range(40)]
    scored = logprobs(model, RAGGED, rows, owner, **options)
    assert torch.equal(scored, logprobs(model, RAGGED, rows, owner, tokens=10**6, **options))
    for n in range(0, len(rows), 7):
        # by hand, one token at a time
        for t, token in enumerate(rows[n]):
            p = (
                model(torch.tensor([[*RAGGED[owner[n]], *rows[n][:t]]])).logits[0, -1] / temperature
            ).softmax(-1)
            stay = p >= min_p * p.max()
            left.add(int(stay.sum()))
            assert stay[token] and sampled[n][t] == pytest.approx(
                (p[token] / p[stay].sum()).log().item(), abs=1e-4
            )
            assert scored[n, t].item() == pytest.approx(sampled[n][t], abs=1e-4)
    assert len(left) > 2 and min(left) < 9


def test_scores_use_the_sampling_temperature_and_top_p(model):
    gen, left = torch.Generator().manual_seed(0), []
    rows, sampled = sample(model, RAGGED, 20, 4, temperature=0.75, top_p=0.8, generator=gen)
    owner = [b for b in range(len(RAGGED)) for _ in range(20)]
    scored = score(model, RAGGED, rows, owner, temperature=0.75, top_p=0.8)
    assert scored.tolist() == pytest.approx([sum(logps) for logps in sampled], abs=1e-3)
    # and what it never draws has no chance
    for b, prefix in enumerate(RAGGED):
        alone = score(
            model, [prefix] * 9, [[token] for token in range(9)], temperature=0.75, top_p=0.8
        )
        left.append(int(torch.isfinite(alone).sum()))
        assert alone.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert min(left) < 9


def test_drawn_token_keeps_a_finite_log_prob():
    logits = torch.tensor([[0.0, -9.0, -1.0]], requires_grad=True)
    out = next_token.drop_unlikely(logits, 0.1, torch.tensor([1]))
    assert out[0].tolist() == [0, -9, -1] and next_token.drop_unlikely(logits, 0.1)[0].tolist() == [
        0,
        -float("inf"),
        -1,
    ]
    out.log_softmax(-1)[0, 1].backward()
    assert logits.grad.isfinite().all()


# of the first token, of the second, of all that follow
FEW = torch.zeros(3, 9, dtype=torch.bool)
FEW[0, [3, 5]] = FEW[1, 7] = FEW[2, [EOS, 4, 6]] = True


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_allowed_tokens_have_mass_one(model, temperature):
    gen = torch.Generator().manual_seed(0)
    rows, logps = sample(
        model, RAGGED, 8, 6, temperature=temperature, generator=gen, allowed=FEW
    )
    for t, emitted in enumerate(({3, 5}, {7}, {EOS, 4, 6})):
        seen = {token for row in rows for token in (row[t:] if t == 2 else row[t:t + 1])}
        assert seen == emitted if temperature else seen <= emitted
    for n, row in enumerate(rows):
        for t, token in enumerate(row):
            logits = model(torch.tensor([[*RAGGED[n // 8], *row[:t]]])).logits[0, -1]
            truth = logits.masked_fill(~FEW[min(t, 2)], -torch.inf).log_softmax(-1)[token].item()
            assert logps[n][t] == pytest.approx(truth, abs=1e-4)


def test_min_p_is_relative_to_the_likeliest_allowed(model):
    logits = model(torch.tensor([[5]])).logits[0, -1]
    # the two least likely ones
    a, b = logits.argsort()[:2].tolist()
    allowed = torch.zeros(1, 9, dtype=torch.bool).index_fill(1, torch.tensor([a, b]), True)
    how = dict(min_p=0.9 * (logits[a] - logits[b]).exp().item(), allowed=allowed)
    rows, logps = sample(model, [[5]], 8, 1, generator=torch.Generator().manual_seed(0), **how)
    assert {row[0] for row in rows} <= {a, b}
    for row, (lp,) in zip(rows, logps):
        assert lp == pytest.approx(
            logits[[a, b]].log_softmax(0)[[a, b].index(row[0])].item(), abs=1e-4
        )
        assert logprobs(model, [[5]], [row], [0], **how).item() == pytest.approx(lp, abs=1e-4)


def test_the_trainer_scores_what_the_sampler_may_emit(model):
    owner = [n // 4 for n in range(4 * len(RAGGED))]
    gen = torch.Generator().manual_seed(0)
    rows, logps = sample(model, RAGGED, 4, 6, generator=gen, allowed=FEW)
    logp = logprobs(model, RAGGED, rows, owner, allowed=FEW)
    for row, lp, got in zip(rows, logps, logp):
        assert got[:len(row)].tolist() == pytest.approx(lp, abs=1e-4)
    behind = logprobs(model, RAGGED, [[1, 2, *row] for row in rows], owner,
                      n_scored=[len(row) for row in rows], allowed=FEW)
    longer = logprobs(
        model, [[*RAGGED[o], 1, 2] for o in owner], rows, range(len(rows)), allowed=FEW
    )
    assert torch.allclose(behind[:, 2:], longer, atol=1e-4) and not behind[:, :2].any()
    # -inf logits leave no nan in the gradient
    logp.sum().backward()
    assert torch.isfinite(grads(model)).all()
    # not to be emitted
    assert score(model, [RAGGED[0]], [[1]], allowed=FEW).item() == -torch.inf


def test_rows_match_their_prompts_across_batches(model):
    """Greedy or drawn: the random numbers of a row do not depend on the batch."""
    assert greedy(model, RAGGED, 6, tokens=2) == greedy(model, RAGGED, 6)
    gen = torch.Generator().manual_seed(0)
    parts = [sample(model, [prefix], 3, 6, generator=gen)[0] for prefix in RAGGED]
    for tokens in (0, 2):
        gen = torch.Generator().manual_seed(0)
        rows, _ = sample(model, RAGGED, 3, 6, generator=gen, tokens=tokens)
        assert rows == sum(parts, [])


# --- tokenizer ------------------------------------------------------------------------------------

def odd_text(rng):
    """Any characters at all, surrogates aside, with much white space."""
    pools = ["abc lamp is", " \n\t\r ", "\u00e9\u00df\u0416\u4e2d", "\U0001f916\u200d\u0301\ufeff",
             "\x00\x1b\u2028"]
    chars = [rng.choice(rng.choice(pools)) for _ in range(rng.randrange(25))]
    chars += [
        chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(3)
    ]
    rng.shuffle(chars)
    return "".join(chars)


def test_no_text_is_unknown(tok):
    rng = random.Random(0)
    for _ in range(300):
        text = odd_text(rng)
        ids = encode(tok, text)
        assert decode(tok, ids) == text and not {tok.eos_token_id, tok.pad_token_id} & set(ids)


@pytest.mark.parametrize("text", ["say <eos> aloud", "<eos>", "a<pad>b"])
def test_text_that_spells_a_special_token_is_text(tok, text):
    """A page may hold "<eos>"; read as the end token it would cut a target in two."""
    ids = encode(tok, text)
    assert decode(tok, ids) == text and not {tok.eos_token_id, tok.pad_token_id} & set(ids)


def test_white_space_segments_join_by_ids_as_by_text(tok):
    rng = random.Random(0)
    for _ in range(100):
        a, b = odd_text(rng), rng.choice(" \n") + odd_text(rng)
        assert encode(tok, a) + encode(tok, b) == encode(tok, a + b)
    # others do not: join ids
    assert encode(tok, " la") + encode(tok, "mp") != encode(tok, " lamp")


# --- optimizers, copies, files --------------------------------------------------------------------

@pytest.mark.parametrize("kind", list(MAKERS))
@pytest.mark.parametrize("muon", [True, False])
def test_optimizers_hold_every_parameter_once(kind, muon):
    model = MAKERS[kind]()
    optimizers = optim.make_optimizers(model, 1e-3, muon)
    held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert all(g["weight_decay"] == 0 for o in optimizers for g in o.param_groups)
    muons = [o for o in optimizers if isinstance(o, optim.Muon)]
    mine = [p for o in muons for g in o.param_groups for p in g["params"]]
    assert all(p.ndim == 2 and p is not model.get_input_embeddings().weight for p in mine)
    assert bool(mine) == (muon and kind == "llama")


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3)])
def test_newton_schulz_maps_singular_values(shape):
    M = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    U, s, V = torch.linalg.svd(M.double(), full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    assert (
        torch.allclose(optim.orthogonal(M).double(), U @ torch.diag_embed(s) @ V, atol=1e-4)
        and s.min() > 0.3
        and s.max() < 1.3
    )
    assert not optim.orthogonal(torch.zeros(1, *shape)).any()


def test_muon_steps_as_torch_s_does():
    gen = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=gen) for shape in ((8, 8), (8, 8), (24, 8), (8, 24))]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    a = optim.Muon(ours, dict(lr=0.1, weight_decay=0.5))
    b = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    for k in range(4):
        for p, q in zip(ours, theirs):
            # without a gradient nothing moves
            p.grad = torch.randn(p.shape, generator=gen) if k else None
            q.grad = p.grad.clone() if k else None
        a.step(), b.step()
    for p, q, w in zip(ours, theirs, start):
        # torch's works in bfloat16
        assert (p - q).norm() < 0.02 * (q - w).norm()


def test_optimizer_step_clips_the_joint_norm(model):
    before = weights(model)
    logprobs(model, RAGGED, [[1, 2]], [1]).sum().backward()
    g = grads(model)
    parts = list(model.parameters())[:3], list(model.parameters())[3:]
    sgd = [torch.optim.SGD(part, lr=9.0) for part in parts]
    norm = optim.step(model, sgd, 0.5, clip=0.1)
    assert norm == pytest.approx(g.norm().item(), rel=1e-5) and norm > 0.1
    assert torch.allclose(weights(model), before - 0.5 * 0.1 * g / g.norm(), atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_a_frozen_copy_stays_behind(model):
    ref, before = frozen(model), weights(model)
    assert not any(p.requires_grad for p in ref.parameters())
    assert all(p.requires_grad for p in model.parameters())
    logprobs(model, RAGGED, [[1, 2]], [1]).sum().backward()
    optim.step(model, optim.make_optimizers(model, 1e-2), 1e-2)
    assert torch.equal(weights(ref), before) and not torch.equal(weights(model), before)


def test_saved_folder_gives_the_same_log_probs(tmp_path, tok, P):
    ids = list(encode(tok, "\nlamp is on"))
    pretrained.save(P.net, tok, tmp_path)
    truth = naive(P.net, ids, [5, 9, tok.eos_token_id])
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model, tok2 = pretrained.load(str(tmp_path))
    for other in (again, model):
        assert torch.allclose(naive(other, ids, [5, 9, tok.eos_token_id]), truth, atol=1e-6)
    assert list(encode(tok2, "\nlamp is on")) == ids and tok2.eos_token_id == tok.eos_token_id
    assert not model.training and decode(tok2, ids) == "\nlamp is on"


def test_context_is_the_longest_text_the_model_takes(model):
    assert pretrained.context(model) == 256
    assert logprobs(model, [[1] * 250], [[2] * 6], [0]).isfinite().all()


def test_token_budget_is_the_users_or_the_devices():
    gpu, cpu = (types.SimpleNamespace(device=torch.device(kind)) for kind in ("cuda", "cpu"))
    plain, own = lm.Options(EOS), lm.Options(EOS, tokens=77)
    assert lm.budget(gpu, plain) > lm.budget(cpu, plain) > 0
    assert lm.budget(gpu, own) == lm.budget(cpu, own) == 77


def test_sampling_batches_keep_to_the_token_budget(model, monkeypatch):
    prompts, sizes, batch = RAGGED * 5, [], lm.sample_batch
    truth = greedy(model, prompts, 8)
    monkeypatch.setattr(
        lm, "sample_batch", lambda net, part, *a: sizes.append(len(part)) or batch(net, part, *a)
    )
    assert greedy(model, prompts, 8, tokens=4) == truth
    assert max(sizes) == 16 * 4 // (max(map(len, prompts)) + 8) < len(prompts)
