"""Claims of `swirl_fwm.py`, `swirl_idm.py`: prompts, rewards; a phase moves one model and is given
no z."""

import copy
import dataclasses
import random

import pytest
import torch
from conftest import EOS, Recorder, ending, naive, tiny_llama, weights
from conftest import sample as draw
from test_grpo import sequences

import grpo
import lm
import swirl_fwm
import swirl_idm
from envs import tools
from models import optim, refusals
from models.text import decode
from support import evaluate
from swirl_idm import IDM

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
    ending(Q.net, tok.eos_token_id, 5.0)
    return Q


def seeing(Q, view, longest=MAX_Z):
    """The same Q in another view."""
    return IDM(Q.net, Q.tok, Q.options, longest, view)


def settings(**kw):
    plain = dict(group_size=3, temperature=1.0, form="sum", floor=0.0, scale="mean", beta=0.0,
                 kl="reward", clip=0.2, max_norm=1.0)
    return grpo.Phase(**plain | kw)


def ids(tok, *segments):
    """Each segment tokenised alone, as plain text: "<eos>" in it is five characters."""
    return [
        t
        for s in segments
        for t in tok.encode(s, add_special_tokens=False, split_special_tokens=True)
    ]


def fwm_prompt(tok, x, z):
    return ids(tok, "\n" + x, "\naction: " + z, "\nnext:")


def idm_prompt(tok, x, y, view):
    if view == "full":
        return ids(tok, "\n" + x, "\nnext:", "\n" + y, "\naction:")
    return ids(tok, *["\n" + line for line in swirl_idm.line_diff(x, y)], "\naction:")


def logp_y(P, tok, x, z, y):
    """log P(y | x, z): one row, one forward pass, the end token scored."""
    return naive(P.net, fwm_prompt(tok, x, z), ids(tok, "\n" + y) + [tok.eos_token_id]).sum().item()


def logq_ids(Q, tok, x, row, y, view):
    """log Q of these very ids."""
    return naive(Q.net, idm_prompt(tok, x, y, view), row).sum().item()


def logq_z(Q, tok, x, z, y, view):
    """Of the text z; the empty one is the refusal, the end alone."""
    row = (ids(tok, " " + z) if z else []) + [tok.eos_token_id]
    return logq_ids(Q, tok, x, row, y, view=view)


def shaped(logp, length, form, floor):
    value = logp / length if form == "mean" else logp
    return max(value, -floor) if floor else value


def take_step(which, P, Q, phase, pairs=PAIRS, optimizers=None, ref=None, seed=2):
    """One step of Phase `which`: (log, examples). With seed 2 Q names an action in every pair."""
    policy, frozen = (P, Q) if which == 1 else (Q, P)
    draw = swirl_fwm.phase1_rollouts if which == 1 else swirl_idm.phase2_rollouts
    optimizers = optimizers or optim.make_optimizers(policy.net, 1e-2)
    drawn = draw(policy, frozen, pairs, phase, torch.Generator().manual_seed(seed))
    if drawn is None:
        return None, []
    rollouts, R, examples = drawn
    return grpo.step(policy, ref, optimizers, rollouts, R, phase=phase, lr=1e-2), examples


# --- prompts --------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", range(len(PAIRS)))
def test_prompts_are_segments_tokenised_alone_x_first(tok, P, Q, n):
    x, z, y = XS[n], ZS[n], YS[n]
    begin = ids(tok, "\n" + x)
    assert P.prompt(x, z) == fwm_prompt(tok, x, z) and P.prompt(x, z)[:len(begin)] == begin
    full = seeing(Q, "full").prompt(x, y)
    assert full == idm_prompt(tok, x, y, "full") and full[:len(begin)] == begin
    assert Q.prompt(x, y) == idm_prompt(tok, x, y, "diff")


def test_prompts_do_not_hold_what_is_asked_for(tok, P, Q):
    """What is asked for is not shown: P reads x and z, Q reads x and y, or only the lines that
    change."""
    def show(row):
        return decode(tok, row)

    assert show(P.prompt("XX", "ZZ")) == "\nXX\naction: ZZ\nnext:"
    assert show(seeing(Q, "full").prompt("XX", "YY")) == "\nXX\nnext:\nYY\naction:"
    assert show(Q.prompt("XX\nsame", "YY\nsame")) == "\n- XX\n+ YY\naction:"
    assert show(Q.prompt("same", "same")) == "\naction:"


def test_diff_view_does_not_read_the_lines_that_stay(Q):
    """Around distinct lines, some replaced, anything may stand; the full view reads all of it."""
    rng = random.Random(0)
    for _ in range(50):
        x, y = replaced(rng)
        around = [f"top {rng.random()}\n%s\ntail {rng.random()}" for _ in range(2)]
        for view in VIEWS:
            prompts = [seeing(Q, view).prompt(a % "\n".join(x), a % "\n".join(y)) for a in around]
            assert (prompts[0] == prompts[1]) == (view == "diff")


def replaced(rng):
    """Distinct lines, and the same with some values changed."""
    x = [f"k{n} is {rng.randrange(3)}" for n in range(rng.randint(1, 8))]
    return x, [f"{line.split(' ')[0]} is {rng.randrange(3)}" for line in x]


def edited(rng, pool="abcdef"):
    """A random state and a random edit of it; lines repeat, may be empty, and may look like a
    diff."""
    line = lambda: rng.choice([*pool, "", "- a", "+ b", " a "])
    x = [line() for _ in range(rng.randint(1, 7))]
    y = list(x)
    for _ in range(rng.randint(0, 4)):
        i = rng.randrange(len(y) + 1)
        y[i:i + rng.randint(0, 2)] = [line() for _ in range(rng.randint(0, 2))]
    return "\n".join(x), "\n".join(y) if y else ""


def explains(diff, x, y):
    """Is there a walk through x and y that keeps, drops ("- ") and adds ("+ ") lines and spells the
    diff?"""
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
    # `explains` can say no
    assert wrong > 200


def test_line_diff_replaces_lines_in_place():
    """Distinct lines, some replaced: the diff alone turns x into y."""
    rng = random.Random(1)
    for _ in range(200):
        x, y = replaced(rng)
        out, gone, new = list(x), [], []
        for entry in [*swirl_idm.line_diff("\n".join(x), "\n".join(y)), "- end"]:
            if entry.startswith("+ "):
                new.append(entry[2:])
            # a block is complete
            elif gone and len(gone) == len(new):
                for a, b in zip(gone, new):
                    out[out.index(a)] = b
                gone, new = [entry[2:]], []
            else:
                gone.append(entry[2:])
        assert out == y


@pytest.mark.parametrize("text", ODD)
def test_what_is_written_is_read(tok, P, Q, text):
    for model in (P, Q):
        row = model.target(text)
        assert model.read(row) == text and model.read(row[:-1]) == text
        assert row[-1] == tok.eos_token_id and row.count(tok.eos_token_id) == 1
        # Else "" is a text to score
        assert len(row) > 1 or (model is Q and text == swirl_idm.REFUSAL)


def test_only_the_final_end_is_not_read(tok, P, Q):
    """A row with a special token inside is not the text without it."""
    for model, begin in ((P, "\n"), (Q, " ")):
        pad, eos, a = [tok.pad_token_id], [tok.eos_token_id], ids(tok, begin + "a")
        assert model.read(a + eos + eos) == "a<eos>"
        assert model.read(a + pad + eos) == model.read(a + pad) == "a<pad>"
        assert model.read(eos + a) == "<eos>" + begin + "a" and model.read(eos) == ""


# --- spoiled futures ------------------------------------------------------------------------------

def states(rng, n=5):
    """Two states that differ in at least one line, and a third; each line has a name of its own."""
    x, other = ([f"k{i} is {rng.randrange(4)}" for i in range(n)] for _ in range(2))
    y = [line if rng.random() < 0.6 else f"k{i} is {rng.randrange(4)}" for i, line in enumerate(x)]
    return (x, y, other) if x != y else states(rng, n)


def test_a_spoiled_future_is_wrong_in_exactly_one_line():
    rng, seen = random.Random(0), set()
    for _ in range(1000):
        x, y, other = states(rng, rng.randint(1, 5))
        bad = refusals.spoil("\n".join(x), "\n".join(y), "\n".join(other), rng)
        if bad is not None:
            bad = bad.split("\n")
            i, = (i for i, pair in enumerate(zip(y, bad, strict=True)) if pair[0] != pair[1])
            changes = sum(a != b for a, b in zip(x, y))
            kind = "stray" if x[i] == y[i] else "late" if bad[i] == x[i] else "wrong"
            assert bad[i] == (x if kind == "late" else other)[i]
            seen.add((changes, kind, i))
        else:
            assert sum(a != b for a, b in zip(x, y)) == 1 and all(
                x[i] != y[i] or y[i] == other[i] for i in range(len(y))
            )
    assert {i for _, _, i in seen} == set(range(5))
    assert {(n, kind) for n, kind, _ in seen} == {(1, "stray")} | {
        (n, kind) for n in range(2, 5) for kind in ("stray", "late", "wrong")
    }


def test_kinds_of_spoiled_futures_are_in_proportion():
    x, y, other = "a 1\nb 1\nc 1", "a 2\nb 2\nc 1", "a 3\nb 3\nc 3"
    drawn = [refusals.spoil(x, y, other, random.Random(seed)) for seed in range(2000)]
    for kind, share in (
        ({"a 1\nb 2\nc 1", "a 2\nb 1\nc 1"}, 0.25),
        ({"a 3\nb 2\nc 1", "a 2\nb 3\nc 1"}, 0.25),
        ({"a 2\nb 2\nc 3"}, 0.5),
    ):
        assert kind <= set(drawn) and abs(sum(bad in kind for bad in drawn) / 2000 - share) < 0.04


def test_nothing_to_spoil():
    # nothing changes
    for x, y, other in [("a 1\nb 1", "a 1\nb 1", "a 2\nb 2"),
                        # no line stays, and one change
                        ("a 1", "a 2", "a 3"),
                        # nor differs in the other
                        ("a 1\nb 1", "b 1", "a 2\nb 1"),
                        ("a 1\nb 1", "a 2\nb 1", "a 3\nb 1"), ("a 1\nb 1", "a 2\nb 1", "c 1")]:
        assert {refusals.spoil(x, y, other, random.Random(seed)) for seed in range(20)} == {None}


@pytest.mark.parametrize("view", VIEWS)
def test_scores_go_through_q_once_for_what_they_share(monkeypatch, tok, Q, view):
    """An x (view full) or a whole prompt (view diff) that comes again is one prefix; the scores are
    the naive ones."""
    (x, _), (other, y) = PAIRS[0], PAIRS[1]
    xs, ys, zs = [x, x, other, x], [y, other, y, y], ["a", "b", "a", "a b"]
    seen, prefill = [], lm.prefill
    monkeypatch.setattr(
        lm, "prefill", lambda net, prefixes: seen.append(len(prefixes)) or prefill(net, prefixes)
    )
    got = seeing(Q, view).logp(xs, zs, ys)
    want = [logq_z(Q, tok, x, z, y, view=view) for x, z, y in zip(xs, zs, ys)]
    assert torch.allclose(got, torch.tensor(want), atol=1e-4) and seen == [
        2 if view == "full" else 3
    ]


@pytest.mark.parametrize("view", VIEWS)
def test_warmup_rows_are_labelled_or_spoiled_refusals(Q, view):
    rng, Q = random.Random(0), seeing(Q, view)
    triples = [
        ("\n".join(x), f"do {n}", "\n".join(y)) for n in range(40) for x, y, _ in [states(rng)]
    ]
    true = [(Q.prompt(x, y), Q.target(z)) for x, z, y in triples]
    assert Q.rows(triples) == true
    counts, refusal = [], Q.target(swirl_idm.REFUSAL)
    for share in (0, 0.5, 1):
        rows = refusals.rows(Q, triples, share, random.Random(1), times=3)
        bad = [p for p, row in rows if row == refusal]
        assert [r for r in rows if r[1] != refusal] == [row for row in true for _ in range(3)]
        # a true change is not refused
        assert not [p for p in bad if p in [q for q, _ in true]]
        # another one each time
        assert not bad or len({tuple(p) for p in bad}) > len(bad) / 2
        counts.append(len(bad))
    assert counts[0] == 0 < counts[1] < counts[2] <= 120


def test_few_spoiled_futures_of_tools_are_reachable():
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
                bad = refusals.spoil(x, y, rng.choice(triples)[0], rng)
                if bad is not None and tuple(swirl_idm.line_diff(x, bad)) not in real:
                    rows, true = rows + 1, true + (bad in after.values())
            world.step(world.propose(rng))
    assert rows > 1000 and true < 0.03 * rows


def dictate(monkeypatch, Q, drawn):
    """Q draws these rows."""
    real = lm.sample
    monkeypatch.setattr(
        lm,
        "sample",
        lambda net, *rest, **kw: (
            (drawn, [[0.0] * len(row) for row in drawn]) if net is Q.net else real(net, *rest, **kw)
        ),
    )


def test_phase_1_leaves_out_pairs_that_q_refuses(monkeypatch, tok, P, Q):
    zs = ["go", swirl_idm.REFUSAL, "a", "stop"]
    dictate(monkeypatch, Q, [Q.target(z) for z in zs])
    got = captured(monkeypatch, 1, P, Q)
    kept = [(*PAIRS[i], zs[i]) for i in (0, 2, 3)]
    assert [(e["x"], e["y"], e["z"]) for e in got["examples"]] == kept
    assert got["rollouts"].prompts == [fwm_prompt(tok, x, z) for x, _, z in kept]


@pytest.mark.parametrize("view", VIEWS)
def test_phase_1_leaves_out_z_that_do_not_end(monkeypatch, tok, P, Q, view):
    """Also if Q would read the same text, ended: what was cut at the longest z is no action."""
    numbers, Q = {True: 0, False: 0}, seeing(Q, view, longest=3)
    for seed in range(5):
        with monkeypatch.context() as patch:
            got = captured(patch, 1, P, Q, seed=seed)
        named = [(row, row[-1] == tok.eos_token_id) for row in got["first"]]
        kept = [(x, y, Q.read(row)) for (x, y), (row, end) in zip(PAIRS, named)
                if end and row != Q.target(swirl_idm.REFUSAL)]
        assert [(e["x"], e["y"], e["z"]) for e in got["examples"]] == kept
        for _, end in named:
            numbers[end] += 1
    assert min(numbers.values()) >= 4
    cut, whole = ids(tok, " go"), Q.target("go")
    dictate(monkeypatch, Q, [cut, whole, cut, whole])
    got = captured(monkeypatch, 1, P, Q)
    assert [(e["x"], e["y"]) for e in got["examples"]] == PAIRS[1::2]


@pytest.mark.parametrize("why", ["never ends", "no action"])
def test_phase_1_does_nothing_if_no_z_is_readable(monkeypatch, tok, P, Q, why):
    if why == "never ends":
        ending(Q.net, tok.eos_token_id, -1e4)
    else:
        dictate(monkeypatch, Q, [Q.target(swirl_idm.REFUSAL)] * len(PAIRS))
    before, recorder = (weights(P.net), weights(Q.net)), Recorder(P.net)
    for optimizers in ([recorder], None):
        assert take_step(1, P, Q, settings(), optimizers=optimizers) == (None, [])
    assert torch.equal(weights(P.net), before[0]) and torch.equal(weights(Q.net), before[1])
    assert not recorder.seen


# --- scores ---------------------------------------------------------------------------------------

def test_logp_is_one_forward_pass_with_the_end_scored(tok, P, Q):
    ours = P.logp(XS, ZS, YS)
    assert ours.tolist() == pytest.approx([logp_y(P, tok, *t) for t in zip(XS, ZS, YS)], abs=1e-3)
    for view in VIEWS:
        ours = seeing(Q, view).logp(XS, ZS, YS)
        assert ours.tolist() == pytest.approx(
            [logq_z(Q, tok, *t, view=view) for t in zip(XS, ZS, YS)], abs=1e-3
        )


def test_logp_with_repeated_x_is_one_by_one_scoring(monkeypatch, tok, P):
    """An x that comes several times, in any order, goes through P once and changes no number."""
    asked, prefill = [], lm.prefill
    monkeypatch.setattr(
        lm,
        "prefill",
        lambda net, prefixes: asked.append(list(map(list, prefixes))) or prefill(net, prefixes),
    )
    rng = random.Random(0)
    triples = [(rng.choice(XS), rng.choice(ZS), rng.choice([*YS, "", XS[0]])) for _ in range(24)]
    triples += [triples[0], (XS[0] + "\n", "turn off", YS[0]), ("", "", "")]
    ours = P.logp(*map(list, zip(*triples)))
    assert ours.tolist() == pytest.approx([logp_y(P, tok, *t) for t in triples], abs=1e-3)
    once = list(dict.fromkeys(x for x, *_ in triples))
    assert asked == [[ids(tok, "\n" + x) for x in once]] and len(once) == 6


def captured(monkeypatch, which, P, Q, phase=None, **kw):
    """What a phase hands to `grpo.step` (rollouts, R), the rows that were drawn first, the
    examples."""
    got, step, real = {}, grpo.step, lm.sample

    def first(*args):
        out = real(*args)
        got.setdefault("first", out[0])
        return out

    def spy(policy, ref, optimizers, rollouts, R, phase, lr):
        got.update(policy=policy, rollouts=rollouts, R=R)
        return step(policy, ref, optimizers, rollouts, R, phase=phase, lr=lr)

    monkeypatch.setattr(grpo, "step", spy)
    monkeypatch.setattr(lm, "sample", first)
    got["examples"] = take_step(which, P, Q, phase or settings(), **kw)[1]
    return got


@pytest.mark.parametrize("form,floor", [("sum", 0), ("mean", 0), ("sum", 35.0), ("mean", 5.6)])
@pytest.mark.parametrize("view", VIEWS)
def test_phase_1_reward_is_log_q_of_z_given_y_hat(
    monkeypatch, tok, P, Q, view, form, floor
):
    """Eq. 3. Every future of a pair is judged by one z, the ids that Q drew, its end included."""
    got = captured(monkeypatch, 1, P, seeing(Q, view), settings(form=form, floor=floor),
                   optimizers=[Recorder(P.net)])
    examples, rollouts = got["examples"], got["rollouts"]
    assert all(set(e) == {"x", "z", "y", "y_hat", "reward"} for e in examples)
    assert [(e["x"], e["y"]) for e in examples] == PAIRS
    assert [e["z"] for e in examples] == [Q.read(row) for row in got["first"]]
    assert rollouts.prompts == [fwm_prompt(tok, e["x"], e["z"]) for e in examples]
    # not the ids of the text
    assert any(row != Q.target(Q.read(row)) for row in got["first"])
    truth = []
    for n, row in enumerate(rollouts.rows):
        x, z_row = examples[n // 3]["x"], got["first"][n // 3]
        logq = logq_ids(Q, tok, x, z_row, P.read(row), view=view)
        truth.append(shaped(logq, len(z_row), form, floor))
    assert got["R"].shape == (4, 3) and got["R"].flatten().tolist() == pytest.approx(
        truth, abs=1e-3
    )
    assert [e["reward"] for e in examples] == pytest.approx(truth[::3], abs=1e-3)
    assert [e["y_hat"] for e in examples] == [P.read(row) for row in rollouts.rows[::3]]
    # it binds, but not for all
    assert not floor or min(truth) == -floor < max(truth)


@pytest.mark.parametrize("form,floor", [("sum", 0), ("mean", 0), ("sum", 45.0), ("mean", 6.0)])
def test_phase_2_reward_is_log_p_of_the_observed_y(monkeypatch, tok, P, Q, form, floor):
    """Eq. 5. The whole y with its end, whatever the action."""
    got = captured(monkeypatch, 2, P, seeing(Q, "full"), settings(form=form, floor=floor),
                   optimizers=[Recorder(Q.net)])
    examples, rollouts = got["examples"], got["rollouts"]
    assert all(set(e) == {"x", "y", "z_hat", "reward"} for e in examples)
    assert [(e["x"], e["y"]) for e in examples] == PAIRS
    assert rollouts.prompts == [idm_prompt(tok, x, y, "full") for x, y in PAIRS]
    truth = []
    for n, row in enumerate(rollouts.rows):
        x, y = PAIRS[n // 3]
        logp = logp_y(P, tok, x, Q.read(row), y)
        truth.append(shaped(logp, len(ids(tok, "\n" + y)) + 1, form, floor))
    assert got["R"].shape == (4, 3) and got["R"].flatten().tolist() == pytest.approx(
        truth, abs=1e-3
    )
    assert [e["reward"] for e in examples] == pytest.approx(truth[::3], abs=1e-3)
    assert not floor or min(truth) == -floor < max(truth)


# --- phases ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("kl", ["reward", "loss"])
def test_a_phase_moves_one_model_and_only_that(P, Q, which, kl):
    policy, frozen = (P, Q) if which == 1 else (Q, P)
    ref, opt = lm.frozen(policy), optim.make_optimizers(policy.net, 1e-2)
    before = weights(policy.net), weights(frozen.net), weights(ref.net)
    for seed in range(3):
        log, _ = take_step(
            which, P, Q, settings(beta=0.1, kl=kl), optimizers=opt, ref=ref, seed=seed
        )
    assert not torch.equal(weights(policy.net), before[0])
    assert torch.equal(weights(frozen.net), before[1]) and torch.equal(weights(ref.net), before[2])
    assert all(p.grad is None for m in (frozen, ref) for p in m.net.parameters())
    assert log["gap"] < 1e-4 and log["kl"] != 0


@pytest.mark.parametrize("which", [1, 2])
def test_a_phase_takes_pairs_without_actions(P, Q, which):
    log, examples = take_step(which, P, Q, settings(), pairs=[("a", "b"), ("a\nb", "b")])
    assert len(examples) == 2 and log["gap"] < 1e-4
    with pytest.raises(ValueError):  # a z would not go unnoticed
        take_step(which, P, Q, settings(), pairs=[("a", "z", "b")])


@pytest.mark.parametrize("view", VIEWS)
def test_phase_1_draws_z_from_q_given_x_and_y(monkeypatch, tok, P, Q, view):
    """The first rows are Q's: one for each pair, at the prompts of (x, y). Then P draws groups."""
    calls, real = [], lm.sample

    def spy(net, prefixes, n, longest, *rest):
        out = real(net, prefixes, n, longest, *rest)
        calls.append((net, prefixes, n, longest, out[0]))
        return out

    monkeypatch.setattr(lm, "sample", spy)
    _, examples = take_step(1, P, seeing(Q, view), settings())
    net, prefixes, n, longest, rows = calls[0]
    assert net is Q.net and n == 1 and longest == MAX_Z
    assert prefixes == [idm_prompt(tok, x, y, view) for x, y in PAIRS]
    assert [e["z"] for e in examples] == [Q.read(r) for r in rows]
    net, prefixes, n, longest, rows = calls[1]
    assert net is P.net and n == 3 and longest == P.longest
    assert [e["y_hat"] for e in examples] == [P.read(r) for r in rows[::3]]


# --- forecasts ------------------------------------------------------------------------------------

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
    truth = [P.read(greedy_row(P.net, fwm_prompt(tok, x, z), 5, eos)) for x, z in zip(XS, ZS)]
    assert P.predict(XS, ZS) == truth
    for view in VIEWS:
        prompts = [idm_prompt(tok, x, y, view) for x, y in PAIRS]
        truth = [Q.read(greedy_row(Q.net, prompt, 6, eos, may_refuse=False)) for prompt in prompts]
        assert seeing(Q, view, longest=6).predict(XS, YS) == truth
        refused = [greedy_row(Q.net, prompt, 6, eos) == [eos] for prompt in prompts]
        assert seeing(Q, view).refuses(XS, YS) == refused and any(refused)


def not_at_first(net, token):
    """`Options.allowed` by hand: `token` may stand anywhere but at the beginning."""
    allowed = torch.ones(2, net.config.vocab_size, dtype=torch.bool)
    allowed[0, token] = False
    return allowed


@pytest.mark.parametrize("view", VIEWS)
def test_best_of_n_is_the_likeliest_under_the_opposite(tok, P, Q, view):
    def gen():
        return torch.Generator().manual_seed(5)

    Q, eos = seeing(Q, view, longest=6), tok.eos_token_id
    prompts = [fwm_prompt(tok, x, z) for x, z in zip(XS, ZS)]
    as_paper = dict(temperature=0.75, top_p=0.96)
    rows, _ = draw(P.net, prompts, 5, 5, eos, generator=gen(), **as_paper)
    drawn = [P.read(r) for r in rows]
    best = [max(drawn[5 * i:5 * i + 5], key=lambda h: logq_z(Q, tok, x, z, h, view=view))
            for i, (x, z) in enumerate(zip(XS, ZS))]
    assert swirl_fwm.best_of_n(P, Q, XS, ZS, n=5, generator=gen()) == best
    prompts, allowed = [idm_prompt(tok, x, y, view) for x, y in PAIRS], not_at_first(Q.net, eos)
    rows, _ = draw(Q.net, prompts, 5, 6, eos, generator=gen(), allowed=allowed, **as_paper)
    drawn = [Q.read(r) for r in rows]
    best = [max(drawn[5 * i:5 * i + 5], key=lambda z: logp_y(P, tok, x, z, y))
            for i, (x, y) in enumerate(PAIRS)]
    assert swirl_idm.best_of_n(Q, P, XS, YS, n=5, generator=gen()) == best


# --- the refusal ----------------------------------------------------------------------------------

def small(net, allowed=None):
    """An IDM of nine tokens."""
    class Tok:
        eos_token_id, chat_template = EOS, None

        def encode(self, text):
            return []

    return IDM(net, Tok(), lm.Options(EOS, allowed=allowed))


def test_without_refusal_log_q_is_renormalised():
    """log Q - log(1 - Q(refusal)) of every row, which then sum to 1; the refusal itself has none of
    it."""
    net, rows = tiny_llama(4, 3), sequences(4, 3)
    refusal = naive(net, [1, 2], [EOS]).item()
    free = torch.stack([naive(net, [1, 2], row).sum() for row in rows]).detach()
    bound = lm.score(
        net, [[1, 2]] * len(rows), [list(row) for row in rows], small(net).no_refusal()
    )
    others = [n for n, row in enumerate(rows) if row != (EOS,)]
    truth = free[others] - torch.log1p(-torch.tensor(refusal).exp())
    assert -3 < refusal < -0.05 and torch.allclose(bound[others], truth, atol=1e-4)
    assert bound[rows.index((EOS,))] == -torch.inf
    assert bound.exp().sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_without_refusal_no_row_is_the_end_alone(temperature):
    net, prompts = ending(tiny_llama(9, 3), EOS, 8.0), [[1, 2], [3], [4, 5, 6]]
    Q = small(net)

    def rows_of(options):
        options = dataclasses.replace(options, temperature=temperature)
        gen = torch.Generator().manual_seed(0)
        return lm.sample(net, prompts, 30, 5, options, generator=gen)

    assert [EOS] in rows_of(Q.options)[0]
    rows, sampled = rows_of(Q.no_refusal())
    assert [EOS] not in rows and any(row[-1] == EOS for row in rows)
    if temperature:  # the trainer sees what was drawn from
        scored = lm.logprobs(net, prompts, rows, [n // 30 for n in range(90)], Q.no_refusal())
        for n, logp in enumerate(sampled):
            assert scored[n, :len(logp)].tolist() == pytest.approx(logp, abs=1e-4)


def test_without_refusal_what_was_ruled_out_stays_so():
    """As Q of images has it, which may draw words alone."""
    net = ending(tiny_llama(9, 3), EOS, 3.0)
    Q = small(net, torch.tensor([[True] * 4 + [False] * 5]))
    gen = torch.Generator().manual_seed(0)
    rows, _ = lm.sample(net, [[1, 2]], 200, 4, Q.no_refusal(), generator=gen)
    assert {token for row in rows for token in row} == {EOS, 1, 2, 3}
    assert {row[0] for row in rows} == {1, 2, 3}


@pytest.mark.parametrize("n", [1, 3])
def test_without_refusal_later_tokens_keep_their_sets(n):
    net = tiny_llama(9, 3)
    Q = small(net, torch.eye(9, dtype=torch.bool)[[2, 3, EOS]] if n == 3 else None)
    gen = torch.Generator().manual_seed(0)
    rows, _ = lm.sample(net, [[1, 2]], 400, 3, Q.no_refusal(), generator=gen)
    if n == 1:
        assert any(len(row) == 2 for row in rows)
    else:
        assert all(row == [2, 3, EOS] for row in rows)


def test_q_scores_do_not_depend_on_wish_to_refuse(monkeypatch, Q):
    """`refused` alone does."""
    data, log_policy, scores = list(zip(XS, ["turn off", "b", "go", "a"], YS)), lm.log_policy, []
    one_hot = torch.eye(Q.net.config.vocab_size)[Q.tok.eos_token_id]

    def wishing(shift):
        def shifted(logits, t, *rest):
            first = (torch.as_tensor(t) == 0).expand(len(logits))
            return log_policy(logits + shift * first[:, None] * one_hot, t, *rest)
        return shifted

    for shift in (-50.0, 0.0, 50.0):
        monkeypatch.setattr(lm, "log_policy", wishing(shift))
        scores.append(evaluate.evaluate_Q(Q, data))
    refused = [found.pop("refused") for found, _ in scores]
    assert refused[0] == 0 and refused[2] == 1
    assert scores[0] == scores[1] == scores[2] and scores[0][0]["logp"] < -1


@pytest.mark.parametrize("kl", ["reward", "loss"])
def test_phase_2_never_draws_a_refusal(monkeypatch, tok, P, Q, kl):
    """Neither does the reference: the KL is 0 as the phase begins."""
    drawn, real = [], lm.sample
    monkeypatch.setattr(lm, "sample", lambda *args: drawn.append(real(*args)) or drawn[-1])
    log, _ = take_step(2, P, Q, settings(group_size=30, beta=0.1, kl=kl), ref=lm.frozen(Q))
    (rows, _), = drawn
    assert [tok.eos_token_id] not in rows and any(row[-1] == tok.eos_token_id for row in rows)
    assert log["gap"] < 1e-4 and abs(log["kl"]) < 1e-4
    prompt = idm_prompt(tok, *PAIRS[0], "diff")
    assert [tok.eos_token_id] in real(Q.net, [prompt], 100, 5, Q.options)[0]
