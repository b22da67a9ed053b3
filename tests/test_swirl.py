"""Claims of `swirl_fwm.py`, `swirl_idm.py`: prompts, rewards; a phase moves one model and is given no z."""

import copy
import random
import types

import pytest
import torch

from support import evaluate
import grpo
import lm
import swirl_fwm
import swirl_idm
from conftest import EOS, Recorder, ending, naive, tiny_llama, weights
from envs import tools
from grpo import GRPO
from test_grpo import sequences

PAIRS = [("lamp is on\ndoor is shut", "lamp is off\ndoor is shut"), ("a\nb\nc", "a\nc"),
         ("door is open", "door is open"), ("x\ny", "x\ny\nlamp is on\nq")]
XS, YS = map(list, zip(*PAIRS))
ZS = ["turn off", "drop b", "", "add two lines"]
ODD = ["", " ", "\n", "\n\n", " a", "a ", "\na", "a\n", "\t", "caf\u00e9 \U0001f916\u200d",
       "\r\n", "action:", "a  b", "\x00", "<eos>", "a <pad>", "<eos> a"]
VIEWS = ["diff", "full"]
MAX_Z = 24


@pytest.fixture
def Q(Q, tok):
    """Ends a row with a probability of about a quarter at each token: most z are readable."""
    return ending(Q, tok.eos_token_id, 5.0)


def settings(**kw):
    plain = dict(group_size=3, max_new=5, temperature=1.0, top_p=1.0, top_k=0, scale="mean", beta=0.0,
                 kl="reward", updates=1, clip=0.2, lr=1e-2, max_norm=1.0, budget=10**6)
    return GRPO(**{**plain, **kw})


def ids(tok, *segments):
    """Each segment tokenised alone, as plain text: "<eos>" in it is five characters."""
    return [t for s in segments for t in tok.encode(s, add_special_tokens=False, split_special_tokens=True)]


def fwm_prompt(tok, x, z):
    return ids(tok, "\n" + x, "\naction: " + z, "\nnext:")


def idm_prompt(tok, x, y, view):
    if view == "full":
        return ids(tok, "\n" + x, "\nnext:", "\n" + y, "\naction:")
    return ids(tok, *["\n" + line for line in swirl_idm.line_diff(x, y)], "\naction:")


def logp_y(P, tok, x, z, y):
    """log P(y | x, z): one row, one forward pass, the end token scored."""
    return naive(P, fwm_prompt(tok, x, z), ids(tok, "\n" + y) + [tok.eos_token_id]).sum().item()


def logq_ids(Q, tok, x, row, y, view):
    """log Q of these very ids."""
    return naive(Q, idm_prompt(tok, x, y, view), row).sum().item()


def logq_z(Q, tok, x, z, y, view):
    """Of the text z; the empty one is the refusal, the end alone."""
    return logq_ids(Q, tok, x, (ids(tok, " " + z) if z else []) + [tok.eos_token_id], y, view)


def shaped(logp, length, form, floor):
    value = logp / length if form == "mean" else logp
    return max(value, -floor) if floor else value


def run_phase(which, P, Q, tok, cfg, pairs=PAIRS, optimizers=None, ref=None, view="diff", seed=0, max_z=MAX_Z,
              **kw):
    policy, frozen = (P, Q) if which == 1 else (Q, P)
    step = swirl_fwm.phase1_step if which == 1 else swirl_idm.phase2_step
    optimizers = lm.make_optimizers(policy, cfg.lr) if optimizers is None else optimizers
    extra = {"max_z": max_z} if which == 1 else {}
    return step(policy, frozen, ref, optimizers, tok, pairs, cfg, view=view,
                generator=torch.Generator().manual_seed(seed), **extra, **kw)


# --- prompts ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", range(len(PAIRS)))
def test_prompts_are_segments_tokenised_alone_x_first(tok, n):
    x, z, y = XS[n], ZS[n], YS[n]
    begin = ids(tok, "\n" + x)
    assert swirl_fwm.prompt(tok, x, z) == fwm_prompt(tok, x, z)
    assert swirl_fwm.prompt(tok, x, z)[:len(begin)] == begin
    assert swirl_idm.prompt(tok, x, y, "full") == idm_prompt(tok, x, y, "full")
    assert swirl_idm.prompt(tok, x, y, "full")[:len(begin)] == begin
    assert swirl_idm.prompt(tok, x, y, "diff") == idm_prompt(tok, x, y, "diff")


def test_prompt_of_p_does_not_hold_y_nor_the_prompt_of_q_z(tok):
    """What is asked for is not shown: P reads x and z, Q reads x and y, or only the lines that change."""
    show = lambda row: lm.decode(tok, row)
    assert show(swirl_fwm.prompt(tok, "XX", "ZZ")) == "\nXX\naction: ZZ\nnext:"
    assert show(swirl_idm.prompt(tok, "XX", "YY", "full")) == "\nXX\nnext:\nYY\naction:"
    assert show(swirl_idm.prompt(tok, "XX\nsame", "YY\nsame", "diff")) == "\n- XX\n+ YY\naction:"
    assert show(swirl_idm.prompt(tok, "same", "same", "diff")) == "\naction:"


def test_diff_view_does_not_read_the_lines_that_stay(tok):
    """Around distinct lines, some replaced, anything may stand; the full view reads all of it."""
    rng = random.Random(0)
    for _ in range(50):
        x, y = replaced(rng)
        around = [f"top {rng.random()}\n%s\ntail {rng.random()}" for _ in range(2)]
        for view in VIEWS:
            prompts = [swirl_idm.prompt(tok, a % "\n".join(x), a % "\n".join(y), view) for a in around]
            assert (prompts[0] == prompts[1]) == (view == "diff")


def replaced(rng):
    """Distinct lines, and the same with some values changed."""
    x = [f"k{n} is {rng.randrange(3)}" for n in range(rng.randint(1, 8))]
    return x, [f"{line.split(' ')[0]} is {rng.randrange(3)}" for line in x]


def edited(rng, pool="abcdef"):
    """A random state and a random edit of it; lines repeat, may be empty, and may look like a diff."""
    line = lambda: rng.choice([*pool, "", "- a", "+ b", " a "])
    x = [line() for _ in range(rng.randint(1, 7))]
    y = list(x)
    for _ in range(rng.randint(0, 4)):
        i = rng.randrange(len(y) + 1)
        y[i:i + rng.randint(0, 2)] = [line() for _ in range(rng.randint(0, 2))]
    return "\n".join(x), "\n".join(y) if y else ""


def explains(diff, x, y):
    """Is there a walk through x and y that keeps, drops ("- ") and adds ("+ ") lines and spells the diff?"""
    todo = {(0, 0, 0)}
    seen = set()
    while todo:
        i, j, k = state = todo.pop()
        if state == (len(x), len(y), len(diff)):
            return True
        seen.add(state)
        if i < len(x) and j < len(y) and x[i] == y[j]:
            todo |= {(i + 1, j + 1, k)} - seen
        if k < len(diff) and i < len(x) and diff[k] == "- " + x[i]:
            todo |= {(i + 1, j, k + 1)} - seen
        if k < len(diff) and j < len(y) and diff[k] == "+ " + y[j]:
            todo |= {(i, j + 1, k + 1)} - seen
    return False


def test_line_diff_applied_to_x_gives_y():
    rng, wrong = random.Random(0), 0
    for _ in range(400):
        x, y = edited(rng)
        diff = swirl_idm.line_diff(x, y)
        assert explains(diff, x.split("\n"), y.split("\n")) and (diff == []) == (x == y)
        other = edited(rng)[1]
        wrong += other != y and not explains(diff, x.split("\n"), other.split("\n"))
    assert wrong > 200                                                             # `explains` can say no


def test_line_diff_replaces_lines_in_place():
    """Distinct lines, some replaced: the diff alone turns x into y."""
    rng = random.Random(1)
    for _ in range(200):
        x, y = replaced(rng)
        out, gone, new = list(x), [], []
        for entry in [*swirl_idm.line_diff("\n".join(x), "\n".join(y)), "- end"]:
            if entry.startswith("+ "):
                new.append(entry[2:])
            elif gone and len(gone) == len(new):                                   # a block is complete
                for a, b in zip(gone, new):
                    out[out.index(a)] = b
                gone, new = [entry[2:]], []
            else:
                gone.append(entry[2:])
        assert out == y


@pytest.mark.parametrize("text", ODD)
def test_what_is_written_is_read(tok, text):
    for module in (swirl_fwm, swirl_idm):
        row = module.target(tok, text)
        assert module.read(tok, row) == text and module.read(tok, row[:-1]) == text
        assert row[-1] == tok.eos_token_id and row.count(tok.eos_token_id) == 1
        # Else "" is a text to score
        assert len(row) > 1 or (module is swirl_idm and text == swirl_idm.IMPOSSIBLE)


def test_only_the_final_end_is_not_read(tok):
    """A row with a special token inside is not the text without it."""
    for module, begin in ((swirl_fwm, "\n"), (swirl_idm, " ")):
        pad, eos, a = [tok.pad_token_id], [tok.eos_token_id], ids(tok, begin + "a")
        assert module.read(tok, a + eos + eos) == "a<eos>"
        assert module.read(tok, a + pad + eos) == module.read(tok, a + pad) == "a<pad>"
        assert module.read(tok, eos + a) == "<eos>" + begin + "a" and module.read(tok, eos) == ""


# --- spoiled futures ----------------------------------------------------------------------------------------

def states(rng, n=5):
    """Two states that differ in at least one line, and a third; each line has a name of its own."""
    x, other = ([f"k{i} is {rng.randrange(4)}" for i in range(n)] for _ in range(2))
    y = [line if rng.random() < 0.6 else f"k{i} is {rng.randrange(4)}" for i, line in enumerate(x)]
    return (x, y, other) if x != y else states(rng, n)


def test_a_spoiled_future_is_wrong_in_exactly_one_line():
    rng, seen = random.Random(0), set()
    for _ in range(1000):
        x, y, other = states(rng, rng.randint(1, 5))
        bad = swirl_idm.spoil("\n".join(x), "\n".join(y), "\n".join(other), rng)
        if bad is not None:
            bad = bad.split("\n")
            i, = (i for i, pair in enumerate(zip(y, bad, strict=True)) if pair[0] != pair[1])
            changes = sum(a != b for a, b in zip(x, y))
            kind = "stray" if x[i] == y[i] else "late" if bad[i] == x[i] else "wrong"
            assert bad[i] == (x if kind == "late" else other)[i]
            seen.add((changes, kind, i))
        else:
            assert sum(a != b for a, b in zip(x, y)) == 1 and all(x[i] != y[i] or y[i] == other[i] for i in range(len(y)))
    assert {i for _, _, i in seen} == set(range(5))
    assert {(n, kind) for n, kind, _ in seen} == {(1, "stray")} | {(n, kind) for n in range(2, 5)
                                                                   for kind in ("stray", "late", "wrong")}


def test_a_quarter_of_the_spoiled_futures_lacks_a_change_and_a_quarter_has_another_one():
    x, y, other = "a 1\nb 1\nc 1", "a 2\nb 2\nc 1", "a 3\nb 3\nc 3"
    drawn = [swirl_idm.spoil(x, y, other, random.Random(seed)) for seed in range(2000)]
    for kind, share in (({"a 1\nb 2\nc 1", "a 2\nb 1\nc 1"}, 0.25), ({"a 3\nb 2\nc 1", "a 2\nb 3\nc 1"}, 0.25),
                        ({"a 2\nb 2\nc 3"}, 0.5)):
        assert kind <= set(drawn) and abs(sum(bad in kind for bad in drawn) / 2000 - share) < 0.04


def test_nothing_to_spoil():
    for x, y, other in [("a 1\nb 1", "a 1\nb 1", "a 2\nb 2"),                        # nothing changes
                        ("a 1", "a 2", "a 3"),                                      # no line stays, and one change
                        ("a 1\nb 1", "b 1", "a 2\nb 1"),                            # nor differs in the other
                        ("a 1\nb 1", "a 2\nb 1", "a 3\nb 1"), ("a 1\nb 1", "a 2\nb 1", "c 1")]:
        assert {swirl_idm.spoil(x, y, other, random.Random(seed)) for seed in range(20)} == {None}


@pytest.mark.parametrize("view", VIEWS)
def test_scores_go_through_q_once_for_what_they_share(monkeypatch, tok, Q, view):
    """An x (view full) or a whole prompt (view diff) that comes again is one prefix; the scores are the naive ones."""
    (x, _), (other, y) = PAIRS[0], PAIRS[1]
    xs, ys, zs = [x, x, other, x], [y, other, y, y], ["a", "b", "a", "a b"]
    seen, prefill = [], lm.prefill
    monkeypatch.setattr(lm, "prefill", lambda Q, prefixes: seen.append(len(prefixes)) or prefill(Q, prefixes))
    got = swirl_idm.logp(Q, tok, xs, zs, ys, view)
    want = [logq_z(Q, tok, x, z, y, view) for x, z, y in zip(xs, zs, ys)]
    assert torch.allclose(got, torch.tensor(want), atol=1e-4) and seen == [2 if view == "full" else 3]


@pytest.mark.parametrize("view", VIEWS)
def test_warmup_rows_are_the_labelled_ones_and_spoiled_ones_without_action(tok, view):
    rng = random.Random(0)
    triples = [("\n".join(x), f"do {n}", "\n".join(y)) for n in range(40) for x, y, _ in [states(rng)]]
    true = [(swirl_idm.prompt(tok, x, y, view), swirl_idm.target(tok, z)) for x, z, y in triples]
    counts, refusal = [], swirl_idm.target(tok, swirl_idm.IMPOSSIBLE)
    for share in (0, 0.5, 1):
        rows = swirl_idm.warmup_rows(tok, triples, view, share, random.Random(1), times=3)
        bad = [p for p, row in rows if row == refusal]
        copies = 3 if share else 1
        assert [r for r in rows if r[1] != refusal] == [row for row in true for _ in range(copies)]
        assert not [p for p in bad if p in [q for q, _ in true]]                    # a true change is not refused
        assert not bad or len({tuple(p) for p in bad}) > len(bad) / 2               # another one each time
        counts.append(len(bad))
    assert counts[0] == 0 < counts[1] < counts[2] <= 120


def test_hardly_any_spoiled_future_of_the_tools_world_is_what_another_call_does():
    """A refusal of a true change would teach Q that nothing does what P should learn."""
    triples = [t for seed in range(12) for t in tools.episode(random.Random(seed))]
    rng, true, rows = random.Random(0), 0, 0
    real = {tuple(swirl_idm.line_diff(x, y)) for x, _, y in triples}
    calls = sorted({z for _, z, _ in triples})
    for seed in range(12):
        world = tools.World(random.Random(seed))
        for _ in range(10):
            x, after = world.text(), {}
            for z in calls:
                copied = copy.deepcopy(world)
                copied.step(z)
                after[z] = copied.text()
            for z, y in after.items():
                bad = swirl_idm.spoil(x, y, rng.choice(triples)[0], rng)
                if bad is not None and tuple(swirl_idm.line_diff(x, bad)) not in real:
                    rows, true = rows + 1, true + (bad in after.values())
            world.step(world.propose(rng))
    assert rows > 1000 and true < 0.03 * rows


def dictate(monkeypatch, Q, drawn):
    """Q draws these rows."""
    sample = lm.sample
    monkeypatch.setattr(lm, "sample", lambda model, *rest, **kw: (drawn, None) if model is Q
                        else sample(model, *rest, **kw))


def test_phase_1_leaves_out_pairs_in_which_q_reads_no_action(monkeypatch, tok, P, Q):
    zs = ["go", swirl_idm.IMPOSSIBLE, "a", "stop"]
    dictate(monkeypatch, Q, [swirl_idm.target(tok, z) for z in zs])
    got = captured(monkeypatch, 1, P, Q, tok, floor=0.0)
    kept = [(*PAIRS[i], zs[i]) for i in (0, 2, 3)]
    assert [(e["x"], e["y"], e["z"]) for e in got["examples"]] == kept
    assert got["prompts"] == [fwm_prompt(tok, x, z) for x, _, z in kept]
    futures = ["lamp is on", "", "b"]
    rewards = got["reward"]([2, 0, 1], [swirl_fwm.target(tok, h) for h in futures]).tolist()
    truth = [logq_z(Q, tok, kept[o][0], kept[o][2], h, "diff") for o, h in zip([2, 0, 1], futures)]
    assert rewards == pytest.approx(truth, abs=1e-3)


@pytest.mark.parametrize("view", VIEWS)
def test_phase_1_leaves_out_z_that_do_not_end(monkeypatch, tok, P, Q, view):
    """Also if Q would read the same text, ended: what was cut at max_z is no action."""
    numbers = {True: 0, False: 0}
    for seed in range(5):
        with monkeypatch.context() as patch:
            got = captured(patch, 1, P, Q, tok, view=view, max_z=3, seed=seed)
        named = [(row, row[-1] == tok.eos_token_id) for row in got["z_rows"]]
        kept = [(x, y, swirl_idm.read(tok, row)) for (x, y), (row, end) in zip(PAIRS, named)
                if end and row != swirl_idm.target(tok, swirl_idm.IMPOSSIBLE)]
        assert [(e["x"], e["y"], e["z"]) for e in got["examples"]] == kept
        for _, end in named:
            numbers[end] += 1
    assert min(numbers.values()) >= 4
    cut, whole = ids(tok, " go"), swirl_idm.target(tok, "go")
    dictate(monkeypatch, Q, [cut, whole, cut, whole])
    got = captured(monkeypatch, 1, P, Q, tok)
    assert [(e["x"], e["y"]) for e in got["examples"]] == PAIRS[1::2]


@pytest.mark.parametrize("why", ["never ends", "no action"])
def test_phase_1_does_nothing_if_no_z_is_readable(monkeypatch, tok, P, Q, why):
    if why == "never ends":
        ending(Q, tok.eos_token_id, -1e4)
    else:
        dictate(monkeypatch, Q, [swirl_idm.target(tok, swirl_idm.IMPOSSIBLE)] * len(PAIRS))
    before, recorder = (weights(P), weights(Q)), Recorder(P)
    for optimizers in ([recorder], None):
        assert run_phase(1, P, Q, tok, settings(), optimizers=optimizers) == (None, [])
    assert torch.equal(weights(P), before[0]) and torch.equal(weights(Q), before[1]) and not recorder.seen


# --- scores -------------------------------------------------------------------------------------------------

def test_logp_is_a_single_row_forward_with_the_end_scored(tok, P, Q):
    ours = swirl_fwm.logp(P, tok, XS, ZS, YS)
    assert ours.tolist() == pytest.approx([logp_y(P, tok, *t) for t in zip(XS, ZS, YS)], abs=1e-3)
    for view in VIEWS:
        ours = swirl_idm.logp(Q, tok, XS, ZS, YS, view)
        assert ours.tolist() == pytest.approx([logq_z(Q, tok, *t, view) for t in zip(XS, ZS, YS)], abs=1e-3)


def test_logp_with_repeated_x_is_one_by_one_scoring(monkeypatch, tok, P):
    """An x that comes several times, in any order, goes through P once and changes no number."""
    asked, prefill = [], lm.prefill
    monkeypatch.setattr(lm, "prefill", lambda P, prefixes: asked.append(list(map(list, prefixes))) or prefill(P, prefixes))
    rng = random.Random(0)
    triples = [(rng.choice(XS), rng.choice(ZS), rng.choice([*YS, "", XS[0]])) for _ in range(24)]
    triples += [triples[0], (XS[0] + "\n", "turn off", YS[0]), ("", "", "")]
    ours = swirl_fwm.logp(P, tok, *map(list, zip(*triples)))
    assert ours.tolist() == pytest.approx([logp_y(P, tok, *t) for t in triples], abs=1e-3)
    once = list(dict.fromkeys(x for x, *_ in triples))
    assert asked == [[ids(tok, "\n" + x) for x in once]] and len(once) == 6


def captured(monkeypatch, which, P, Q, tok, cfg=None, **kw):
    """The prompts and the reward function that a phase hands to `grpo.step`, and the first sampled rows."""
    got, step, sample = {}, grpo.step, lm.sample

    def first(*args, **more):
        out = sample(*args, **more)
        got.setdefault("z_rows", out[0])
        return out

    def spy(policy, ref, optimizers, prompts, reward, cfg, eos, *rest, **more):
        got.update(prompts=prompts, reward=reward, eos=eos)
        return step(policy, ref, optimizers, prompts, reward, cfg, eos, *rest, **more)

    monkeypatch.setattr(grpo, "step", spy)
    monkeypatch.setattr(lm, "sample", first)
    got["examples"] = run_phase(which, P, Q, tok, cfg or settings(), **kw)[1]
    return got


@pytest.mark.parametrize("which", [1, 2])
def test_a_phase_hands_its_replay_to_the_update(monkeypatch, tok, P, Q, which):
    calls, policy = [], P if which == 1 else Q

    def replay():
        calls.append(which)
        return sum(p.sum() for p in policy.parameters()) * 0.0

    run_phase(which, P, Q, tok, settings(group_size=4, updates=3), floor=0.0, replay=replay)
    assert calls == [which] * 3


FORMS = [("sum", 0), ("mean", 0), ("sum", 45.0), ("mean", 6.0)]


@pytest.mark.parametrize("form,floor", [("sum", 0), ("mean", 0), ("sum", 24.0), ("mean", 4.8)])
@pytest.mark.parametrize("view", VIEWS)
def test_phase_1_reward_is_log_q_of_the_group_s_z_given_y_hat(monkeypatch, tok, P, Q, view, form, floor):
    """Eq. 3. Every future of a pair is judged by one z, the ids that Q drew, its end token included."""
    kw = dict(optimizers=[Recorder(P)], view=view, form=form, floor=floor)
    got = captured(monkeypatch, 1, P, Q, tok, **kw)
    examples, z_rows = got["examples"], got["z_rows"]
    truth = lambda x, z_row, y_hat: shaped(logq_ids(Q, tok, x, z_row, y_hat, view), len(z_row), form, floor)
    assert all(set(e) == {"x", "z", "y", "y_hat", "reward"} for e in examples)
    assert [(e["x"], e["y"]) for e in examples] == PAIRS
    assert [e["z"] for e in examples] == [swirl_idm.read(tok, row) for row in z_rows]
    assert any(row != swirl_idm.target(tok, e["z"]) for e, row in zip(examples, z_rows))  # not the text's ids
    assert got["prompts"] == [fwm_prompt(tok, e["x"], e["z"]) for e in examples]
    for e, row in zip(examples, z_rows):
        assert e["reward"] == pytest.approx(truth(e["x"], row, e["y_hat"]), abs=1e-3)
    futures, owner = ["a", "lamp is off", "", "b\nc", "a"], [3, 0, 2, 0, 1]  # in no order, not one a pair
    rewards = got["reward"](owner, [swirl_fwm.target(tok, h) for h in futures])
    expected = [truth(XS[o], z_rows[o], y_hat) for o, y_hat in zip(owner, futures)]
    assert rewards.tolist() == pytest.approx(expected, abs=1e-3)
    assert not floor or min(expected) == -floor < max(expected)  # it binds, but not for all
    assert got["eos"] == tok.eos_token_id


@pytest.mark.parametrize("form,floor", FORMS)
def test_phase_2_reward_is_log_p_of_the_observed_y(monkeypatch, tok, P, Q, form, floor):
    """Eq. 5. The whole y with its end, whatever the action."""
    got = captured(monkeypatch, 2, P, Q, tok, optimizers=[Recorder(Q)], view="full", form=form, floor=floor)
    truth = lambda x, y, z: shaped(logp_y(P, tok, x, z, y), len(ids(tok, "\n" + y)) + 1, form, floor)
    assert all(set(e) == {"x", "y", "z_hat", "reward"} for e in got["examples"])
    assert [(e["x"], e["y"]) for e in got["examples"]] == PAIRS
    assert got["prompts"] == [idm_prompt(tok, x, y, "full") for x, y in PAIRS]
    for e in got["examples"]:
        assert e["reward"] == pytest.approx(truth(e["x"], e["y"], e["z_hat"]), abs=1e-3)
    actions, owner = ["turn off", "", "open the door", "drop b"], [2, 0, 0, 3]
    rewards = got["reward"](owner, [swirl_idm.target(tok, z) for z in actions])
    assert rewards.tolist() == pytest.approx([truth(*PAIRS[o], z) for o, z in zip(owner, actions)], abs=1e-3)


def test_floor_binds_for_some_and_not_for_all(tok, P, Q):
    """The floors above are tested for real: they lie inside the range of the rewards."""
    values = [logp_y(P, tok, *t) for t in zip(XS, ZS, YS)]
    lengths = [len(ids(tok, "\n" + y)) + 1 for y in YS]
    assert min(values) < -45 < max(values)
    assert min(v / n for v, n in zip(values, lengths)) < -6 < max(v / n for v, n in zip(values, lengths))


# --- phases -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("kl", ["reward", "loss"])
def test_a_phase_moves_one_model_and_only_that(tok, P, Q, which, kl):
    policy, frozen = (P, Q) if which == 1 else (Q, P)
    ref, opt = lm.freeze(policy), lm.make_optimizers(policy, 1e-2)
    before = weights(policy), weights(frozen), weights(ref)
    for seed in range(3):
        log, _ = run_phase(which, P, Q, tok, settings(beta=0.1, kl=kl), optimizers=opt, ref=ref, seed=seed,
                           floor=0.0)
    assert not torch.equal(weights(policy), before[0])
    assert torch.equal(weights(frozen), before[1]) and torch.equal(weights(ref), before[2])
    assert all(p.grad is None for m in (frozen, ref) for p in m.parameters())
    assert log["gap"] < 1e-4 and log["kl"] != 0


@pytest.mark.parametrize("which", [1, 2])
def test_a_phase_takes_pairs_without_actions(tok, P, Q, which):
    log, examples = run_phase(which, P, Q, tok, settings(), pairs=[("a", "b"), ("a\nb", "b")])
    assert len(examples) == 2 and log["gap"] < 1e-4
    with pytest.raises(ValueError):  # a z would not go unnoticed
        run_phase(which, P, Q, tok, settings(), pairs=[("a", "z", "b")])


@pytest.mark.parametrize("view", VIEWS)
def test_phase_1_draws_z_from_q_given_x_and_y(monkeypatch, tok, P, Q, view):
    """The first sample is Q's: one row for each pair, at the prompts of (x, y), at most max_z tokens."""
    calls, sample = [], lm.sample

    def spy(model, prefixes, G, max_new, *rest, **kw):
        out = sample(model, prefixes, G, max_new, *rest, **kw)
        calls.append((model, prefixes, G, max_new, out[0]))
        return out

    monkeypatch.setattr(lm, "sample", spy)
    _, examples = run_phase(1, P, Q, tok, settings(), view=view)
    model, prefixes, G, max_new, rows = calls[0]
    assert model is Q and G == 1 and max_new == MAX_Z
    assert prefixes == [idm_prompt(tok, x, y, view) for x, y in PAIRS]
    assert [e["z"] for e in examples] == [swirl_idm.read(tok, r) for r in rows]
    model, prefixes, G, max_new, rows = calls[1]
    assert model is P and G == 3
    assert [e["y_hat"] for e in examples] == [swirl_fwm.read(tok, r) for r in rows[::3]]


# --- forecasts ----------------------------------------------------------------------------------------------

@torch.no_grad()
def greedy_row(model, prefix, max_new, eos, may_refuse=True):
    """The likeliest row, token by token, the whole text anew for each."""
    row = []
    while len(row) < max_new and eos not in row:
        logits = model(torch.tensor([[*prefix, *row]]), use_cache=False).logits[0, -1]
        if not row and not may_refuse:
            logits[eos] = -torch.inf
        row.append(logits.argmax().item())
    return row


def test_predict_is_greedy_and_in_order(tok, P, Q):
    """Also when the batch is sorted by length inside. Q names an action where it would rather
    refuse."""
    eos = tok.eos_token_id
    truth = [swirl_fwm.read(tok, greedy_row(P, fwm_prompt(tok, x, z), 6, eos))
             for x, z in zip(XS, ZS)]
    assert swirl_fwm.predict(P, tok, XS, ZS, 6) == truth
    for view in VIEWS:
        prompts = [idm_prompt(tok, x, y, view) for x, y in PAIRS]
        truth = [swirl_idm.read(tok, greedy_row(Q, prompt, 6, eos, may_refuse=False))
                 for prompt in prompts]
        assert swirl_idm.predict(Q, tok, XS, YS, 6, view) == truth
        refused = [greedy_row(Q, prompt, 6, eos) == [eos] for prompt in prompts]
        assert swirl_idm.refuses(Q, tok, XS, YS, view) == refused and any(refused)


def not_at_first(model, token):
    """`model.allowed` by hand: `token` may stand anywhere but at the beginning."""
    allowed = torch.ones(2, model.config.vocab_size, dtype=torch.bool)
    allowed[0, token] = False
    return allowed


@pytest.mark.parametrize("view", VIEWS)
def test_best_of_n_is_the_likeliest_under_the_opposite(tok, P, Q, view):
    gen = lambda: torch.Generator().manual_seed(5)
    rows = lm.sample_all(P, [fwm_prompt(tok, x, z) for x, z in zip(XS, ZS)], 5, 6, tok.eos_token_id, gen())
    drawn = [swirl_fwm.read(tok, r) for r in rows]
    best = [max(drawn[5 * i:5 * i + 5], key=lambda h: logq_z(Q, tok, x, z, h, view))
            for i, (x, z) in enumerate(zip(XS, ZS))]
    assert swirl_fwm.best_of_n(P, Q, tok, XS, ZS, 6, view, n=5, generator=gen()) == best
    Q.allowed = not_at_first(Q, tok.eos_token_id)
    rows = lm.sample_all(Q, [idm_prompt(tok, x, y, view) for x, y in PAIRS], 5, 6, tok.eos_token_id, gen())
    Q.allowed = None
    drawn = [swirl_idm.read(tok, r) for r in rows]
    best = [max(drawn[5 * i:5 * i + 5], key=lambda z: logp_y(P, tok, x, z, y))
            for i, (x, y) in enumerate(PAIRS)]
    assert swirl_idm.best_of_n(Q, P, tok, XS, YS, 6, view, n=5, generator=gen()) == best


# --- the refusal ----------------------------------------------------------------------------------

END = types.SimpleNamespace(eos_token_id=EOS)       # all that `no_refusal` asks of a tokenizer


def test_without_refusal_log_q_is_renormalised():
    """log Q - log(1 - Q(refusal)) of every row, which then sum to 1; the refusal itself has none of
    it."""
    Q, rows = tiny_llama(4, 3), sequences(4, 3)
    refusal = naive(Q, [1, 2], [EOS]).item()
    free = torch.stack([naive(Q, [1, 2], row).sum() for row in rows]).detach()
    with swirl_idm.no_refusal(Q, END):
        bound = lm.score(Q, [[1, 2]] * len(rows), [list(row) for row in rows])
    others = [n for n, row in enumerate(rows) if row != (EOS,)]
    truth = free[others] - torch.log1p(-torch.tensor(refusal).exp())
    assert -3 < refusal < -0.05 and torch.allclose(bound[others], truth, atol=1e-4)
    assert bound[rows.index((EOS,))] == -torch.inf
    assert bound.exp().sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_without_refusal_no_row_is_the_end_alone(temperature):
    Q, prompts = ending(tiny_llama(9, 3), EOS, 8.0), [[1, 2], [3], [4, 5, 6]]

    def draw():
        gen = torch.Generator().manual_seed(0)
        return lm.sample(Q, prompts, 30, 5, EOS, temperature, generator=gen)

    assert [EOS] in draw()[0]
    with swirl_idm.no_refusal(Q, END):
        rows, sampled = draw()
        scored = lm.logprobs(Q, prompts, rows, [n // 30 for n in range(90)])
    assert [EOS] not in rows and any(row[-1] == EOS for row in rows)
    if temperature:  # the trainer sees what was drawn from
        for n, logp in enumerate(sampled):
            assert scored[n, :len(logp)].tolist() == pytest.approx(logp, abs=1e-4)


@pytest.mark.parametrize("before", [None, torch.tensor([[True] * 7 + [False] * 2])])
def test_allowed_is_put_back_even_after_an_exception(before):
    Q = tiny_llama(9, 3)
    if before is not None:
        Q.allowed = before
    with pytest.raises(KeyError), swirl_idm.no_refusal(Q, END):
        assert not Q.allowed[0, EOS] and Q.allowed[1, EOS]
        raise KeyError
    assert getattr(Q, "allowed", None) is before


def test_without_refusal_what_was_ruled_out_stays_so():
    """As Q of images has it, which may draw words alone."""
    Q = ending(tiny_llama(9, 3), EOS, 3.0)
    Q.allowed = torch.tensor([[True] * 4 + [False] * 5])
    with swirl_idm.no_refusal(Q, END):
        rows = lm.sample(Q, [[1, 2]], 200, 4, EOS, generator=torch.Generator().manual_seed(0))[0]
    assert {token for row in rows for token in row} == {EOS, 1, 2, 3}
    assert {row[0] for row in rows} == {1, 2, 3}


@pytest.mark.parametrize("rows", [1, 3])
def test_without_refusal_later_tokens_keep_their_own_sets(rows):
    """rows 1: within itself, so that the end stays allowed as the second token."""
    Q = tiny_llama(9, 3)
    if rows == 3:
        Q.allowed = torch.eye(9, dtype=torch.bool)[[2, 3, EOS]]
    with swirl_idm.no_refusal(Q, END), swirl_idm.no_refusal(Q, END):
        drawn = lm.sample(Q, [[1, 2]], 400, 3, EOS, generator=torch.Generator().manual_seed(0))[0]
    if rows == 1:
        assert any(len(row) == 2 for row in drawn)
    else:
        assert all(row == [2, 3, EOS] for row in drawn)


def test_scores_of_q_do_not_depend_on_its_wish_to_refuse(monkeypatch, tok, Q):
    """`refused` alone does."""
    data, restrict, scores = list(zip(XS, ["turn off", "b", "go", "a"], YS)), lm.restrict, []
    lab = types.SimpleNamespace(tok=tok, cfg=types.SimpleNamespace(view="diff"), max_z=8)

    def wishing(shift):
        def shifted(model, logits, t):
            first = (torch.as_tensor(t) == 0).expand(len(logits))
            return restrict(model, logits + shift * first[:, None] * one_hot, t)
        return shifted

    one_hot = torch.eye(Q.config.vocab_size)[tok.eos_token_id]
    for shift in (-50.0, 0.0, 50.0):
        monkeypatch.setattr(lm, "restrict", wishing(shift))
        scores.append(evaluate.evaluate_Q(Q, lab, data))
    refused = [found.pop("refused") for found, _ in scores]
    assert refused[0] == 0 and refused[2] == 1
    assert scores[0] == scores[1] == scores[2] and scores[0][0]["logp"] < -1


@pytest.mark.parametrize("kl", ["reward", "loss"])
def test_phase_2_never_draws_a_refusal_and_scores_as_it_draws(monkeypatch, tok, P, Q, kl):
    """Neither does the reference: the KL is 0 as the phase begins."""
    drawn, sample = [], lm.sample
    monkeypatch.setattr(lm, "sample", lambda *args, **kw: drawn.append(sample(*args, **kw))
                        or drawn[-1])
    ref, cfg = lm.freeze(Q), settings(group_size=30, beta=0.1, kl=kl)
    log, _ = run_phase(2, P, Q, tok, cfg, ref=ref)
    (rows, _), = drawn
    assert [tok.eos_token_id] not in rows and any(row[-1] == tok.eos_token_id for row in rows)
    assert log["gap"] < 1e-4 and abs(log["kl"]) < 1e-4
    assert getattr(Q, "allowed", None) is None and getattr(ref, "allowed", None) is None
    assert [tok.eos_token_id] in sample(Q, [idm_prompt(tok, *PAIRS[0], "diff")], 100, 5,
                                        tok.eos_token_id)[0]
