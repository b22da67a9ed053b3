"""Scenes of shapes: the rules by hand, pictures and codes there and back, P and Q on images,
several steps ahead."""
import copy
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sample

import envs
import lm
import swirl_fwm
import swirl_idm
import train
from envs import images, pixels
from envs.pixels import Room, Toy, step
from evals import aurora, bytemorph, export, metrics, rollout, visual, worldprediction
from grpo import Phase
from models import images as image_models
from models import tiny
from support import evaluate, loading, pictures, rollouts, tables


def room(piles=((), (), (), ()), figure=0, curtain=None, near=True, **more):
    out = Room(random.Random(0))
    out.piles = [[Toy(*toy.split()) for toy in pile] for pile in piles]
    out.figure, out.curtain, out.near, out.camera = figure, curtain, near, pixels.HOME
    vars(out).update(more)
    return out


def piles(room):
    return [[f"{toy.colour} {toy.shape}" for toy in pile] for pile in room.piles]


A, B, C = "red ball", "blue box", "yellow cone"


@pytest.mark.parametrize("before, z, after", [
    ([[], [A], [], []], "move the red ball right", [[], [], [A], []]),
    # what stood on it comes down
    ([[], [A, B, C], [], []], "move the red ball right", [[], [B, C], [A], []]),
    # it comes to rest on the pile
    ([[], [A], [B], []], "move the red ball right", [[], [], [B, A], []]),
    # the figure stands there
    ([[], [A], [], []], "move the red ball left", None),
    # the wall ends
    ([[], [], [], [A]], "move the red ball right", None),
    ([[], [A], [], [B]], "put the red ball left of the blue box", [[], [], [A], [B]]),
    ([[], [A], [B], []], "put the red ball right of the blue box", [[], [], [B], [A]]),
    ([[], [A], [B], []], "put the red ball on the blue box", [[], [], [B, A], []]),
    # the cone stands there
    ([[], [A], [B, C], []], "put the red ball on the blue box", None),
    ([[], [A, B], [], []], "put the red ball on the blue box", [[], [B, A], [], []]),
    ([[], [A], [B, C], []], "put the red ball under the yellow cone", [[], [], [B, A, C], []]),
    ([[], [A, B, C], [], []], "put the yellow cone under the red ball", [[], [C, A, B], [], []]),
    ([[], [A, B], [], []], "remove the red ball", [[], [B], [], []]),
    ([[], [A, B], [], []], "add a yellow ball", [[], [A, B, "yellow ball"], [], []]),
    ([[], [], [A], []], "add a yellow cone", [[], [C], [A], []]),
    # three are enough
    ([[], [A, B], [], [C]], "add a red cone", None),
    ([[], [A], [], []], "add a red ball", None),
    ([[], [A], [], []], "paint the red ball blue", [[], ["blue ball"], [], []]),
    # two would look the same
    ([[], [A, "blue ball"], [], []], "paint the red ball blue", None),
    ([[], [A], [], []], "push the red ball right", [[], [], [A], []]),
    ([[], [A, B], [], []], "push the red ball right", None),
    # out of reach
    ([[], [], [A], []], "push the red ball right", None),
    ([[], [A], [], []], "sing", None),
])
def test_toys_fall_push_and_stack(before, z, after):
    old = room(before)
    new = step(old, z)
    assert (new is old) if after is None else piles(new) == after
    # the old room is as it was
    assert piles(old) == [list(pile) for pile in before]
    if z.startswith("push") and after:
        assert new.figure == 1


def test_the_figure_lifts_and_puts_down_the_top_toy():
    start = room([[], [A, B], [], []])
    # not free, not on top
    assert step(start, "walk right") is start and step(start, "pick up the red ball") is start
    held = step(start, "pick up the blue box")
    assert (
        piles(held) == [[], [A], [], []]
        and held.held.name == "the blue box"
        and held.up == {"left": True, "right": True}
    )
    for z in ("kneel", "lower the left arm", "pick up the red ball", "put it down left"):
        assert step(held, z) is held
    down = step(held, "put it down right")
    assert piles(down) == piles(start) and not down.held and not any(down.up.values())


def test_the_figure_raises_an_arm_once():
    start = room([[], [A, B], [], []])
    up = step(start, "raise the left arm")
    assert up.up == {"left": True, "right": False} and step(up, "raise the left arm") is up


def test_a_kneeling_figure_does_not_walk():
    kneeling = step(room(), "kneel")
    assert kneeling.kneels and step(kneeling, "walk right") is kneeling
    assert not step(kneeling, "stand up").kneels


def test_the_figure_walks_but_not_behind_the_curtain():
    assert step(room(), "walk right").figure == 1
    assert step(room(curtain=1), "walk right").figure == 0


def test_the_curtain_hides_and_gives_back():
    seen = room([[], [A], [], []], curtain=2)
    hidden = step(seen, "move the red ball right")
    assert np.array_equal(pixels.draw(hidden), pixels.draw(room(curtain=2)))
    assert piles(step(hidden, "move the red ball right")) == [[], [], [], [A]]
    assert step(hidden, "paint the red ball blue") is hidden
    both = room([[], [A], [B], []], curtain=2)
    # nobody sees what else to name
    assert {z.rpartition(" the ")[2] for z in pixels.sentences(both)["put"]} == {A}


def test_every_room_of_an_episode_is_consistent():
    for seed in range(6):
        now, rng = Room(random.Random(seed)), random.Random(seed)
        for _ in range(12):
            said = pixels.sentences(now)
            for kind, some in said.items():
                for z in some:
                    assert pixels.kind(z) == kind
                    new = step(now, z)
                    names = [toy.name for toy in [*new.toys(), *([new.held] if new.held else [])]]
                    assert (
                        len(set(names)) == len(names)
                        and not new.piles[new.figure]
                        and new.figure != new.curtain
                    )
                    assert all(len(pile) <= 3 for pile in new.piles) and new.near in (True, False)
                    assert not new.near or new.camera == pixels.HOME
            z, after, y = pixels.propose(now, pixels.draw(now), rng)
            assert vars(step(now, z)) == vars(after) and np.array_equal(y, pixels.draw(after))
            now = after


def patchwork(frame):
    """(8, 8) of the bytes of each patch, cut by loops."""
    return [
        [frame[16 * r : 16 * r + 16, 16 * c : 16 * c + 16].tobytes() for c in range(8)]
        for r in range(8)
    ]


NEAR = room([[], [A, B], [C], []], figure=3, curtain=0)
FAR = step(NEAR, "zoom out")


def test_the_camera_zooms_out_to_half_the_size():
    near, out = NEAR, FAR
    big, small = pixels.draw(near).astype(float), pixels.draw(out).astype(float)
    half = big.reshape(64, 2, 64, 2, 3).mean((1, 3))
    # the stage, without the half cells above and below
    assert np.abs(half[8:56] - small[48:96, 32:96]).max() <= 1


def test_the_camera_pans_and_tilts_by_one_patch():
    out, left = FAR, step(FAR, "pan left")
    now, moved = patchwork(pixels.draw(out)), patchwork(pixels.draw(left))
    assert all(moved[r][c] == now[r][c - 1] for r in range(8) for c in range(1, 8))
    low = patchwork(pixels.draw(step(out, "tilt down")))
    assert (
        all(low[r][c] == now[r + 1][c] for r in range(7) for c in range(8))
        and step(out, "tilt up") is out
    )


def test_a_near_camera_only_zooms_out():
    assert step(NEAR, "pan left") is NEAR and step(NEAR, "zoom in") is NEAR


def test_zooming_in_centres_the_camera():
    again = step(step(step(FAR, "pan left"), "zoom in"), "zoom out")
    assert np.array_equal(pixels.draw(again), pixels.draw(FAR))


@pytest.fixture(scope="module")
def episodes():
    return [pixels.episode(random.Random(f"train {i}")) for i in range(14)]


@pytest.fixture(scope="module")
def book(episodes):
    return images.Codebook.fit(
        np.stack([f for steps in episodes for x, _, y in steps for f in (x, y)]), pixels.PATCH
    )


def test_a_change_has_one_sentence(monkeypatch):
    monkeypatch.setattr(pixels, "SLIP", 0)
    several = 0
    for seed in range(8):
        now, said = Room(random.Random(seed)), {}
        for k in range(60):
            z, after, _ = pixels.propose(now, pixels.draw(now), random.Random(k))
            said.setdefault(repr(vars(after)), set()).add(z)
        assert all(len(zs) == 1 for zs in said.values())
        ways = [step(now, z) for some in pixels.sentences(now).values() for z in some]
        several += any(
            sum(vars(new) == vars(old) for old in ways) > 1 for new in ways if new is not now
        )
    # there are changes that could be said otherwise
    assert several


def test_a_change_is_said_in_the_simplest_way(monkeypatch):
    monkeypatch.setattr(pixels, "SLIP", 0)
    start = room([[], ["red ball"], ["blue box"], []], near=False)
    said = {
        pixels.propose(start, pixels.draw(start), random.Random(seed))[0] for seed in range(300)
    }
    assert {
        "move the red ball right",
        "put the red ball right of the blue box",
        "put the red ball under the blue box",
    } <= said
    assert "put the red ball on the blue box" not in said


def test_episodes_are_chains_of_changes(episodes):
    for steps in episodes:
        assert len(steps) >= 8 and all(np.array_equal(a[2], b[0]) for a, b in zip(steps, steps[1:]))
        assert steps[0][0].shape == (128, 128, 3) and steps[0][0].dtype == np.uint8
    assert np.mean([np.array_equal(x, y) for steps in episodes for x, _, y in steps]) < 0.1


def test_frames_decode_to_what_was_encoded(episodes, book):
    known = np.stack([y for steps in episodes for _, _, y in steps])
    assert np.array_equal(book.decode(book.encode(known)), known) and len(book.centres) <= 256
    new = np.stack([y for i in range(6) for _, _, y in pixels.episode(random.Random(f"test {i}"))])
    right = [
        a == b
        for f, g in zip(new, book.decode(book.encode(new)))
        for r, s in zip(patchwork(f), patchwork(g))
        for a, b in zip(r, s)
    ]
    assert np.mean(right) >= 0.99


def test_k_means_fits_more_patches_than_codes(episodes):
    frames = np.stack([y for steps in episodes[:4] for _, _, y in steps])
    points, count = np.unique(images.cut(frames, 16).reshape(-1, 768), axis=0, return_counts=True)
    book = images.Codebook.fit(frames, 16, size=24, rounds=50)
    # (n, 24)
    distance = ((points[:, None].astype(float) - book.centres[None]) ** 2).sum(-1)
    assert len(book.centres) == 24 and np.array_equal(book.nearest(points), distance.argmin(1))
    # each centre is the mean of its points
    for k in range(24):
        mine = distance.argmin(1) == k
        if mine.any():
            assert (
                np.abs(
                    np.average(points[mine], axis=0, weights=count[mine]) - book.centres[k]
                ).max()
                < 1
            )
    commonest = images.Codebook(points[np.argsort(-count)[:24]])
    error = lambda book: (
        ((points - book.centres[book.nearest(points)].astype(float)) ** 2).sum(1) * count
    ).sum()
    assert error(book) < error(commonest)


def test_a_codebook_is_saved_and_found_again(book, tmp_path):
    book.save(tmp_path / "codebook.npz")
    assert np.array_equal(images.Codebook.load(tmp_path / "codebook.npz").centres, book.centres)


@pytest.fixture(scope="module")
def rows(episodes, book):
    xs, zs, ys = zip(*(row for steps in episodes for row in steps))
    return list(zip(images.strings(book, xs), zs, images.strings(book, ys)))


def test_an_image_is_a_string_and_back():
    codes = np.arange(9).reshape(3, 3)
    image = images.spell(codes)
    assert image == "<image><c0><c1><c2><c3><c4><c5><c6><c7><c8></image>" and np.array_equal(
        images.codes(image), codes
    )
    assert images.patches(image)[5] == "<c5>"
    for broken in (
        "",
        "<image></image>",
        image[:-1],
        image + " ",
        image.replace("<c3>", ""),
        image.replace("<c3>", "<cx>"),
        "<c1>",
    ):
        assert images.patches(broken) is None and images.codes(broken) is None


def shifted(codes, r, c):
    """[64] moved down by r and right by c, by hand; the border is repeated."""
    inside = lambda i: min(7, max(0, i))
    return [codes[8 * inside(i - r) + inside(j - c)] for i in range(8) for j in range(8)]


def changes(x, y):
    """What Q reads."""
    return image_models.ImageIDM.changes(None, x, y)


def test_q_reads_changed_patches_and_their_neighbours(rows):
    moved = 0
    for x, z, y in rows:
        now, then = images.patches(x), images.patches(y)
        if x == y:
            assert changes(x, y) == []
            continue
        first, second = changes(x, y)
        shift = re.match(r"<1,1><(\d),(\d)>(?!<c)", first)
        if shift:
            r, c = (int(number) - 1 for number in shift.groups())
            assert abs(r) + abs(c) == 1
            still = sum(a != b for a, b in zip(now, then))
            now, first = shifted(now, r, c), first[shift.end():]
            assert 2 * sum(a != b for a, b in zip(now, then)) < still
        moved += bool(shift)
        assert shift or pixels.kind(z) != "camera motion"
        # no walk is a pan
        assert first or pixels.kind(z) == "camera motion"
        columns = lambda places: sorted(places, key=lambda place: place[0][::-1])
        changed = {
            (int(r), int(c)): codes
            for r, c, *codes in re.findall(r"<(\d+),(\d+)>(<c\d+>)(<c\d+>)", first)
        }
        beside = {
            (int(r), int(c)): code for r, c, code in re.findall(r"<(\d+),(\d+)>(<c\d+>)", second)
        }
        assert (
            "".join(
                images.place(8 * r + c, 64) + "".join(codes)
                for (r, c), codes in columns(changed.items())
            )
            == first
        )
        assert (
            "".join(images.place(8 * r + c, 64) + code for (r, c), code in columns(beside.items()))
            == second
        )
        assert changed == {
            (i // 8, i % 8): [now[i], then[i]] for i in range(64) if now[i] != then[i]
        }
        assert beside == {
            (r, c): now[8 * r + c]
            for r in range(8)
            for c in range(8)
            if (r, c) not in changed and any(abs(r - a) + abs(c - b) == 1 for a, b in changed)
        }
    assert moved


def test_q_reads_the_whole_of_an_odd_image(rows):
    x, other = rows[0][0], "<image><c1></image>"
    assert changes(x, other) == [x, other] and changes("<image>", "<image>") == []


@pytest.mark.parametrize(
    "z, shift",
    [
        ("pan left", "<1,1><1,2>"),
        ("pan right", "<1,1><1,0>"),
        ("tilt up", "<1,1><2,1>"),
        ("tilt down", "<1,1><0,1>"),
    ],
)
def test_q_reads_a_moved_camera_as_a_shift(book, z, shift):
    out = room([[], [A, B], [], []], figure=3, curtain=0, near=False)
    if z == "tilt up":
        out.camera = 2, 2
    moved = step(out, z)
    assert moved is not out
    x, y = images.strings(book, [pixels.draw(out), pixels.draw(moved)])
    assert changes(x, y) == [shift, ""]
    codes = images.patches(y)
    right, codes[9] = codes[9], "<c7>"
    bad = "<image>" + "".join(codes) + "</image>"
    assert changes(x, bad)[0] == f"{shift}<1,1>{right}<c7>"
    # three wrong ones hide no shift
    codes[0] = codes[63] = "<c7>"
    assert changes(x, "<image>" + "".join(codes) + "</image>")[0].startswith(f"{shift}<0,0>")


def test_spoiled_image_has_one_or_two_wrong_patches(rows):
    rng, seen = random.Random(0), set()
    for x, _, y in rows * 3:
        other = rng.choice(rows)[0]
        bad = images.spoil(x, y, other, rng)
        if x == y:
            assert bad is None
        elif bad is not None:
            was, now, then = map(images.patches, (x, bad, y))
            wrong = [i for i in range(64) if now[i] != then[i]]
            assert (
                len(then) == len(now) == 64
                and len(wrong) in (1, 2)
                and {now[i] for i in wrong} <= {*was, *then, *images.patches(other)}
            )
            i, j = wrong[0], wrong[-1]
            if i == j:
                seen.add("stray" if was[i] == then[i] else "stays" if now[i] == was[i] else "other")
            else:
                assert abs(i // 8 - j // 8) + abs(i % 8 - j % 8) == 1 and (now[i], now[j]) == (
                    then[j],
                    then[i],
                )
                assert was[i] != then[i] or was[j] != then[j]
                seen.add("exchanged")
    assert seen == {"stray", "stays", "other", "exchanged"}


def test_an_image_that_cannot_be_spoiled():
    one, two = images.spell([["1"]]), images.spell([["2"]])
    drawn = {images.spoil(one, two, two, random.Random(seed)) for seed in range(40)}
    # no code that is about is wrong here
    assert drawn == {None} and images.spoil(one, one, two, random.Random(0)) is None
    assert {
        images.spoil(one, two, images.spell([["3"]]), random.Random(seed)) for seed in range(40)
    } == {None, images.spell([["3"]])}


@pytest.fixture(scope="module")
def pixel_tok(rows):
    tok = tiny.make_tokenizer(
        [" " + z for _, z, _ in rows] + ["\n- \n+ \nnext:\naction: " + swirl_idm.REFUSAL] * 20
    )
    tok.add_tokens(images.vocabulary([s for x, _, y in rows for s in (x, y)]))
    return tok


def models_of(tok, x, net, other=None):
    """(P, Q) for images like x."""
    cfg = train.parse(SMALL)
    other = other or copy.deepcopy(net)
    return loading.wrap(net, other, tok, cfg, half=False, longest=(68, 16), state=x)


def test_y_stands_at_a_fixed_distance_behind_x(rows, pixel_tok):
    P = image_models.ImageFWM(None, pixel_tok)
    for x, z, y in rows[:20]:
        row = [*P.prompt(x, z), *P.target(y)]
        tokens = pixel_tok.convert_ids_to_tokens(row)
        first, second = (i for i, t in enumerate(tokens) if t == images.IMAGE)
        assert second - first == 67 and tokens[second + 1:second + 65] == images.patches(y)
        assert P.read(P.target(y)) == y


def test_embeddings_reflect_places_and_looks(pixel_tok, book):
    P = copying(pixel_tok, torch.tensor(book.features()))
    E = torch.nn.functional.normalize(P.get_input_embeddings().weight.detach(), dim=1)
    at = lambda *tokens: E[pixel_tok.convert_tokens_to_ids(list(tokens))]
    a, beside, column, row, far = at("<2,3>", "<2,4>", "<7,3>", "<2,7>", "<7,7>")
    # half of it is shared; near places are alike
    assert a @ beside > 0.7 > a @ column > 0.3 and 0.7 > a @ row > 0.3 > a @ far
    codes, looks = at(*(f"<c{i}>" for i in range(book.size))), torch.tensor(book.features())
    looks = torch.nn.functional.normalize(looks, dim=1)
    i, j = torch.triu_indices(book.size, book.size, 1)
    assert (
        torch.corrcoef(torch.stack([(codes @ codes.T)[i, j], (looks @ looks.T)[i, j]]))[0, 1] > 0.6
    )
    assert (codes @ codes.T)[i, j].max() < 0.99


def test_random_p_draws_images_and_random_q_words(rows, pixel_tok):
    x, z, y = rows[0]
    # random: it knows nothing
    P, Q = models_of(pixel_tok, x, tiny.make_model(pixel_tok, width=32, layers=2))
    gen = torch.Generator().manual_seed(0)
    y_hats = P.sample([x], [z], 8, gen)
    assert all(len(images.patches(y_hat)) == 64 for y_hat in y_hats) and len(set(y_hats)) == 8
    one_by_one, _ = lm.sample(P.net, [P.prompt(x, z)], 8, 100, P.options, generator=gen)
    assert all(len(images.patches(P.read(row))) == 64 and len(row) == 68 for row in one_by_one)
    words, _ = lm.sample(Q.net, [Q.prompt(x, y)], 8, 12, Q.options, generator=gen)
    assert not any(
        images.is_token(t) for row in words for t in pixel_tok.convert_ids_to_tokens(row)
    )
    images_ids = [i for t, i in pixel_tok.get_added_vocab().items() if images.is_token(t)]
    assert len(images_ids) == len(images.vocabulary([s for x, _, y in rows for s in (x, y)]))
    assert not Q.options.allowed[0, images_ids].any()
    row = one_by_one[0]
    total = [
        lm.score(P.net, [P.prompt(x, z)], [row[:3] + [c] + row[4:]], P.options).isfinite().item()
        for c in images_ids
    ]
    assert sum(total) == sum(
        t.startswith("<c") for t in map(pixel_tok.convert_ids_to_tokens, images_ids)
    )


def test_images_begin_as_a_guess_and_end_as_without(rows, pixel_tok, monkeypatch):
    """y where it is known, else x; each prompt its own, also where Q reads no action in some
    pair."""
    some = [row for row in rows if row[0] != row[2]][:4]
    xs, zs, ys = zip(*some)
    P, Q = models_of(pixel_tok, xs[0], copying(pixel_tok), tiny.make_model(pixel_tok))
    guesses, settle = [], image_models.settle
    greedy, _ = sample(
        P.net,
        [P.prompt(x, z) for x, z in zip(xs, zs)],
        n=1,
        longest=68,
        eos=pixel_tok.eos_token_id,
        temperature=0,
        allowed=P.options.allowed,
    )
    monkeypatch.setattr(image_models, "settle", lambda net, prefixes, guess, *rest:
                        guesses.append((prefixes, guess)) or settle(net, prefixes, guess, *rest))
    assert P.predict(xs, zs) == [P.read(row) for row in greedy]
    swirl_fwm.best_of_n(P, Q, xs, zs, n=2, generator=torch.Generator().manual_seed(0))
    named = [(xs[i], Q.target(zs[i]), ys[i]) for i in (0, 2, 3)]
    monkeypatch.setattr(Q, "label", lambda *_: named)
    swirl_fwm.phase1_rollouts(P, Q, list(zip(xs, ys)), Phase(group_size=2), None)
    pairs = [dict(zip(map(tuple, prefixes), guess)) for prefixes, guess in guesses]

    def asked(states, kept):
        return {tuple(P.prompt(xs[i], zs[i])): P.target(states[i]) for i in kept}

    assert pairs == [asked(xs, range(4)), asked(xs, range(4)), asked(ys, (0, 2, 3))]
    # An image and its end
    splits = some, some, list(zip(xs, ys)), some
    assert loading.check_data(P.net, pixel_tok, splits, train.parse(SMALL))[0] == 68


def copying(tok, features=None):
    P = tiny.make_model(tok, bias=True)
    ids = lambda mark: [
        i for i, t in sorted((i, t) for t, i in tok.get_added_vocab().items()) if re.match(mark, t)
    ]
    seen = image_models.embed_images(P, ids("<c"), ids(r"<\d"), features)
    image_models.write_copy_heads(P, seen, 67)
    return P


def test_logp_does_not_depend_on_the_batch(rows, pixel_tok):
    P, _ = models_of(pixel_tok, rows[0][0], copying(pixel_tok))
    xs, zs, ys = map(list, zip(*rows[:6]))
    alone = [P.logp([x], [z], [y]).item() for x, z, y in rows[:6]]
    assert P.logp(xs, zs, ys).tolist() == pytest.approx(alone, abs=1e-3)


@pytest.mark.parametrize("known", [True, False])
def test_heads_copy_by_place(rows, pixel_tok, book, known):
    net = copying(pixel_tok, torch.tensor(book.features()) if known else None)
    P, _ = models_of(pixel_tok, rows[0][0], net)
    xs, zs, _ = map(list, zip(*rows[::15]))
    right = metrics.right_patches(P.predict(xs, zs), xs)
    with torch.no_grad():
        # they look everywhere now
        net.model.layers[0].self_attn.q_proj.bias.zero_()
    assert right > 0.9 > metrics.right_patches(P.predict(xs, zs), xs)


def test_heads_attend_to_the_patch_and_its_neighbours(rows, pixel_tok):
    net = copying(pixel_tok)
    net.set_attn_implementation("eager")
    P, (x, z, y) = image_models.ImageFWM(net, pixel_tok), rows[0]
    # the patch in row 3, column 4
    prompt, i = P.prompt(x, z), 8 * 3 + 4
    ids = torch.tensor([[*prompt, *P.target(y)]])
    # where x's patches begin
    first = len(prompt) - 65
    # from here patch i of y is predicted
    at = len(prompt) + 2 + i - 1
    seen = [
        layer[0, :, at].argmax(-1).tolist()
        for layer in net(ids, output_attentions=True).attentions[:2]
    ]
    assert [j - first for j in seen[0]] == [i, i - 1, i + 1, i - 8] and seen[1][0] - first == i + 8


def test_right_patches_by_hand():
    x, y, y_hat = (
        images.spell(np.array(codes))
        for codes in ([[1, 2], [3, 4]], [[1, 5], [6, 4]], [[1, 5], [3, 9]])
    )
    assert (
        metrics.right_patches([y_hat], [y]) == 0.5
        and metrics.right_patches([y_hat], [y], [x]) == 0.5
    )
    assert (
        metrics.right_patches([x], [y], [x]) == 0
        and metrics.right_patches(["<image><c1></image>"], [y]) == 0
    )
    assert metrics.right_patches([x], [x], [x]) is None
    assert metrics.fwm_scores([x], [y_hat], [y])[
        "patches_changed"
    ] == 0.5 and "patches_changed" not in metrics.fwm_scores(["a"], ["b"], ["b"])


# ---- Several steps ahead -------------------------------------------------------------------------


def world(x, z):
    return str((int(x) * 2 + int(z)) % 1000)


def chain(x, zs):
    out = []
    for z in zs:
        out.append((x, z, world(x, z)))
        x = out[-1][2]
    return out


def test_p_reads_its_own_output():
    steps = [chain("3", ["1", "2", "1"]), chain("7", ["2", "2", "2"])]
    # one slip, at the second's first step
    careless = lambda xs, zs: [str(int(world(x, z)) + (x == "7")) for x, z in zip(xs, zs)]
    y_hat = rollouts.rollout(careless, steps, 3)
    assert y_hat == [["7", "17"], ["17", "36"], ["35", "74"]]
    rows = rollouts.score(y_hat, steps)
    assert [row["exact"] for row in rows] == [0.5, 0.0, 0.0] and rows[0]["changed"] is None
    perfect = rollouts.score(
        rollouts.rollout(lambda xs, zs: [world(x, z) for x, z in zip(xs, zs)], steps, 3), steps
    )
    assert [row["exact"] for row in perfect] == [1, 1, 1] and perfect[2]["score"] == pytest.approx(
        100
    )


def test_windows_are_whole_and_joined():
    whole, short = chain("3", list("12121212")), chain("3", list("12"))
    torn = whole[:2] + whole[4:]
    assert (
        rollouts.windows([whole, short, torn], 6) == [whole[:6]]
        and rollouts.windows([short], 6) == []
    )
    # first windows first
    assert rollouts.windows([whole, short, whole[1:]], 6, every=2) == [
        whole[:6],
        whole[1:7],
        whole[2:],
    ]
    assert rollouts.windows([[], short], 6) == rollouts.windows([], 6) == []


def test_changes_are_counted_from_the_first_frame():
    frames = [
        images.spell(np.array(codes))
        for codes in ([[1, 1], [1, 1]], [[2, 1], [1, 1]], [[2, 2], [1, 1]])
    ]
    steps = [[(frames[0], "a", frames[1]), (frames[1], "b", frames[2])]]
    copy_x = rollouts.score(rollouts.rollout(lambda xs, zs: xs, steps, 2), steps)
    assert [row["score"] for row in copy_x] == [75, 50] and [row["changed"] for row in copy_x] == [
        0,
        0,
    ]
    one = rollouts.score([[frames[1]], [frames[1]]], steps)
    assert [row["changed"] for row in one] == [1, 0.5] and [row["exact"] for row in one] == [1, 0]


# ---- What is drawn -------------------------------------------------------------------------------


def test_sheet_shows_frames_and_marks_differences_red(episodes, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    (x, z, y), (_, _, other) = episodes[0][0], episodes[1][0]
    pictures.predictions([(x, z, y, other), (x, z, y, y)], tmp_path / "a.png")
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    cell = lambda r, c: sheet[18 + 134 * r:146 + 134 * r, 6 + 134 * c:134 + 134 * c]
    assert all(np.array_equal(cell(0, c), frame) for c, frame in ((0, x), (2, y), (3, other)))
    red = (cell(0, 4) == (220, 40, 40)).all(-1)
    assert (
        np.array_equal(red, (y != other).any(-1))
        and not (cell(1, 4) == (220, 40, 40)).all(-1).any()
    )
    # something is written there
    assert (cell(0, 1) < 100).any()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_an_animation_has_a_frame_a_picture(episodes, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    (x, _, y), (_, _, other) = episodes[0][0], episodes[1][0]
    pictures.animation([x, other, y], tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]


# ---- Real tokenizers of images -------------------------------------------------------------------


def test_vocabulary_holds_all_codes_of_book_and_images():
    image = images.spell([["0", "7"], ["2", "3"]])
    for size, top in ((0, 7), (5, 7), (12, 11)):
        got = images.vocabulary([image, "a text"], size)
        assert got == [
            "<image>",
            "</image>",
            *(f"<c{i}>" for i in range(top + 1)),
            "<0,0>",
            "<0,1>",
            "<1,0>",
            "<1,1>",
        ]
    assert images.vocabulary(["a text"], 12) == []


def test_state_only_episodes_carry_no_sentence():
    cfg = train.parse(["--env", "pixels", "--episodes", "8"])
    assert envs.shares(cfg) == {"labelled": 2, "validation": 2, "state-only": 20, "test": 60}
    assert envs.shares(train.parse(["--episodes", "8"]))["state-only"] == 4
    assert all(
        z is None for steps in envs.draw(pixels.episode, 0, "state-only", 2) for _, z, _ in steps
    )


# ---- In the benchmarks' own formats --------------------------------------------------------------


def scores(main, *argv):
    out = Path(argv[-1])
    assert main([*map(str, argv[:-1]), "--embedder", "pixels", "--json", str(out)]) == 0
    return json.loads(out.read_text())["scores"]


def test_the_scorers_read_what_is_exported(episodes, tmp_path):
    pytest.importorskip("PIL")
    steps = [row for chain in episodes for row in chain]
    rows = {
        motion: [
            (x, z, y, y if i % 2 else x)
            for i, (x, z, y) in enumerate(steps)
            if (pixels.kind(z) in pixels.MOTION) == motion and (x != y).any()
        ]
        # every second prediction is right, the others are copies
        for motion in (False, True)
    }
    (
        (aurora_out := tmp_path / "a").mkdir(),
        (byte_out := tmp_path / "b").mkdir(),
        (world_out := tmp_path / "w").mkdir(),
    )
    export.write_aurora(rows[False], aurora_out)
    right = [np.array_equal(y, y_hat) for _, _, y, y_hat in rows[False]]
    got = scores(
        aurora.main,
        "--data",
        aurora_out / "test.json",
        "--generated",
        aurora_out / "generated",
        "--tasks",
        "all",
        tmp_path / "a.json",
    )
    assert got["all"]["n"] == len(right) and got["all"]["model"]["clip_success"] == pytest.approx(
        np.mean(right)
    )
    assert got["all"]["copy_x"]["clip_success"] == 0 and set(got) - {"all"} == {
        pixels.kind(z) for _, z, _, _ in rows[False]
    }
    export.write_bytemorph(rows[True], byte_out)
    got = scores(
        bytemorph.main,
        "--data",
        byte_out / "test.jsonl",
        "--generated",
        byte_out / "generated",
        tmp_path / "b.json",
    )
    moved = [np.array_equal(y, y_hat) for _, _, y, y_hat in rows[True]]
    # a copy has no direction
    assert got["all"]["n"] == len(moved) and got["all"]["counts"]["clip_dir_img"] == sum(moved)
    assert got["all"]["model"]["clip_dir_img"] == pytest.approx(1, abs=1e-5)
    zs, frames = (
        [z for _, z, _ in episodes[0][:6]],
        [episodes[0][0][0], *(y for _, _, y in episodes[0][:6])])
    export.write_worldprediction(
        [(zs, frames, frames[1:]), (zs, frames, [frames[0]] * 6)], world_out
    )
    got = scores(
        worldprediction.main,
        "--data",
        world_out / "pp.json",
        "--frames",
        world_out,
        "--generated",
        world_out / "generated",
        tmp_path / "w.json",
    )
    for t in range(1, 7):
        same = visual.cosine(*visual.Pixels().images([frames[0], frames[t]]))
        assert got[f"T={t}"]["n"] == 2 and got[f"T={t}"]["model"]["clip"] == pytest.approx(
            (1 + same) / 2, abs=1e-5
        )
        assert got[f"T={t}"]["copy_x"]["clip"] == pytest.approx(same, abs=1e-5)


# ---- The whole job in small ----------------------------------------------------------------------

SMALL = [
    "--env", "pixels", "--episodes", "8", "--warmup-steps", "4", "--warmup-steps-idm", "3",
    "--bootstrap-steps", "2", "--iterations", "1", "--phase1-steps", "2", "--phase2-steps", "2",
    "--group-size", "4", "--batch", "4", "--eval-size", "6", "--validation-size", "10",
    "--threads", "1"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """(folder of a run, [(temperature, min_p, pairs) of each step of a phase], [the windows of each
    evaluation])."""
    out, steps, windows = tmp_path_factory.mktemp("run") / "pixels", [], []
    roll_out = evaluate.roll_out

    def noting(draw):
        def call(policy, frozen, pairs, phase, generator):
            steps.append((phase.temperature, phase.min_p, len(pairs)))
            return draw(policy, frozen, pairs, phase, generator)
        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swirl_fwm, "phase1_rollouts", noting(swirl_fwm.phase1_rollouts))
        patch.setattr(swirl_idm, "phase2_rollouts", noting(swirl_idm.phase2_rollouts))
        patch.setattr(evaluate, "roll_out", lambda P, lab: windows.append(lab.windows)
                      or roll_out(P, lab))
        train.main([*SMALL, "--out", str(out)])
    return out, steps, windows


@pytest.fixture(scope="module")
def done(watched):
    out, _, _ = watched
    return out


def test_pixels_run_has_its_own_temperature(watched):
    """Phase I, Phase II; of the rivals first."""
    _, steps, windows = watched
    assert steps == [(1.3, 0.05, 4)] * 8
    firsts = [episode[0] for episode in envs.test_episodes(train.parse(SMALL))[:4]]
    assert len(windows) == 4 and all([window[0] for window in some] == firsts for some in windows)


def test_a_run_of_pixels_scores_rollouts_and_patches(done):
    result = json.loads((done / "results.json").read_text())
    for stage in result["stages"]:
        assert len(stage["fwm"]["rollout"]) == 6 and all(
            0 <= score <= 100 for score in stage["fwm"]["rollout"]
        )
        assert 0 <= stage["fwm"]["patches_changed"] <= 1


def test_a_run_of_pixels_leaves_pictures(done):
    Image = pytest.importorskip("PIL.Image")
    for name in ("picture-sft.png", "picture-iteration1-phase1.png", "rollout.png", "rollout.gif",
                 "rivals/picture-bootstrap.png"):
        with Image.open(done / name) as picture:
            assert picture.size[0] > 200
    # frames that are alike are one, shown longer
    with Image.open(done / "rollout.gif") as film:
        assert film.size == (256, 256)


def test_phase_1_of_pixels_cuts_no_image(done):
    steps = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert all(
        row["truncated"] == 0 and row["gap"] < 1e-3
        for row in steps
        if row["phase"] == "phase1" and row["reward"] is not None
    )


def test_a_run_of_pixels_keeps_its_codebook(done):
    assert len(images.Codebook.load(done / "codebook.npz").centres) > 40


def test_pixels_table_has_its_own_columns(done, capsys):
    result = json.loads((done / "results.json").read_text())
    result["stages"][-2]["fwm"].update(patches_changed=0.1234,
                                       kinds={"motion": {"exact_changed": 0.2345}},
                                       rollout_exact=[0.9] * 5 + [0.3456])
    tables.report(result)
    lines = capsys.readouterr().out.splitlines()
    head, last = (next(line for line in lines if line.startswith(begin))
                  for begin in (" " * 22, "iteration1/phase2"))
    names = [head[i:i + 11].strip() for i in range(22, len(head), 11)]
    assert names[3:6] == ["patches %", "motion %", "T = 6 %"] and "BLEU" not in head
    assert last.split()[4:7] == ["12.34", "23.45", "34.56"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s.replace("</image>", ""),
        lambda s: s.replace("<c", "<c999", 1),
        lambda s: "a text",
        lambda s: "<image><c0></image>",
    ],
)
def test_a_file_of_images_is_checked(rows, tmp_path, capsys, spoil):
    with open(tmp_path / "d.jsonl", "w") as file:
        for i, (x, z, y) in enumerate(rows[:120]):
            x = spoil(x) if i // 10 == 11 else x
            file.write(
                json.dumps(
                    {
                        "episode": f"{['train', 'train', 'dev', 'test'][i // 10 % 4]}-{i // 10}",
                        "t": i,
                        "x": x,
                        "z": z,
                        "y": y,
                    }
                )
                + "\n"
            )
    with pytest.raises(SystemExit) as stop:
        train.main(
            [
                "--data",
                str(tmp_path / "d.jsonl"),
                "--out",
                str(tmp_path / "run"),
                *SMALL[4:],
                "--eval-size",
                "99",
            ]
        )
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "every code seen in training" in err and err.count("\n") == 1


@pytest.mark.parametrize("argv", [["--lora", "4"], ["--max-state", "40"]])
def test_flags_that_do_not_go_with_images(argv, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*SMALL, *argv, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "leave out" in capsys.readouterr().err


def test_a_run_is_rolled_out_again(done, tmp_path, capsys):
    assert rollout.main(["--run", str(done), "--json", str(tmp_path / "r.json")]) == 0
    now, then = (
        json.loads((tmp_path / "r.json").read_text()),
        json.loads((done / "results.json").read_text()))
    assert now["n"] == 60 and "copy x" in capsys.readouterr().out and len(now["scores"]["P"]) == 6
    assert rollout.main(["--run", str(done), "--actions", "idm", "--steps", "2"]) == 0
    assert then["stages"][-1]["fwm"]["rollout"]


def test_run_with_another_codebook_is_refused(done, tmp_path, capsys):
    shutil.copytree(done, tmp_path / "run")
    images.Codebook(images.Codebook.load(done / "codebook.npz").centres[::-1]).save(
        tmp_path / "run" / "codebook.npz"
    )
    with pytest.raises(SystemExit) as stop:
        rollout.main(["--run", str(tmp_path / "run")])
    assert stop.value.code == 2 and "other patches" in capsys.readouterr().err


def test_a_run_is_exported_whole_or_not_at_all(done, tmp_path, capsys):
    pytest.importorskip("PIL")
    out = tmp_path / "out"
    assert export.main(["--run", str(done), "--out", str(out)]) == 0
    table = json.loads((out / "aurora" / "test.json").read_text())
    lines = (out / "bytemorph" / "test.jsonl").read_text().splitlines()
    assert (
        len(table) + len(lines) == 6
        and len(json.loads((out / "worldprediction" / "pp.json").read_text())["pixels"]) == 60
    )
    assert (
        scores(
            worldprediction.main,
            "--data",
            out / "worldprediction" / "pp.json",
            "--frames",
            out / "worldprediction",
            "--generated",
            out / "worldprediction" / "generated",
            tmp_path / "w.json",
        )["all"]["n"]
        == 360
    )
    refused_export(["--run", str(done), "--out", str(out)], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "w.json"]


def refused_export(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        export.main(argv)
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_a_folder_without_a_run_is_not_exported(tmp_path, capsys):
    refused_export(["--run", str(tmp_path), "--out", str(tmp_path / "new")], capsys)
    assert not list(tmp_path.iterdir())


def test_a_rollout_overwrites_nothing_of_the_users(done, tmp_path):
    (tmp_path / "mine.json").write_text("[1]")
    with pytest.raises(SystemExit) as stop:
        rollout.main(["--run", str(done), "--json", str(tmp_path / "mine.json")])
    assert stop.value.code == 2 and (tmp_path / "mine.json").read_text() == "[1]"


@pytest.mark.parametrize(
    "argv, text",
    [
        (["--steps", "0"], "--steps"),
        (["--steps", "99"], "99 steps"),
        (["--run", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_of_rollout_is_one_line(done, argv, text, capsys):
    with pytest.raises(SystemExit) as stop:
        rollout.main(["--run", str(done), *argv])
    err = capsys.readouterr().err
    assert (
        stop.value.code == 2 and err.startswith("error: ") and text in err and err.count("\n") == 1
    )
