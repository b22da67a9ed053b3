"""Claim: the visual scorers give the benchmarks' numbers on files in the official formats, and no
image or reply gives a wrong one."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sharpen
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from evals import aurora, bytemorph, judge, visual, worldprediction

PIL = pytest.importorskip("PIL.Image")
ROOT = Path(__file__).parent.parent
rng = np.random.default_rng(0)


# ---- What the tests are made of, and the references ----------------------------------------------

def picture(height=32, width=32):
    """Two flat colours and a little noise: features of such pictures are far apart."""
    image = np.zeros((height, width, 3)) + rng.integers(0, 200, 3)
    image[rng.integers(0, height // 2):, rng.integers(0, width // 2):] = rng.integers(0, 200, 3)
    return (image + rng.integers(0, 50, image.shape)).astype(np.uint8)


def save(path, image=None):
    image = picture() if image is None else image
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.fromarray(image).save(path)
    return image


def run(scorer, tmp_path, *argv):
    """What the scorer writes with --json."""
    assert scorer.main([*map(str, argv), "--json", str(tmp_path / "scores.json")]) == 0
    return json.loads((tmp_path / "scores.json").read_text())


def refused(scorer, capsys, *argv):
    """The one line on standard error of a command that exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        scorer.main(list(map(str, argv)))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err


def write_replies(path, replies):
    path.write_text(
        "".join(json.dumps({"id": id, "reply": reply}) + "\n" for id, reply in replies.items())
    )
    return path


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A folder with a random CLIP for 16 x 16 pixels and 8 tokens, and the tokenizer of 26
    letters."""
    folder, letters = tmp_path_factory.mktemp("clip"), [chr(97 + i) for i in range(26)]
    vocab = {
        piece: i
        for i, piece in enumerate(
            ["!", *letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
        )
    }
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=8).save_pretrained(folder)
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = small | dict(
        vocab_size=len(vocab),
        max_position_embeddings=8,
        bos_token_id=53,
        eos_token_id=54,
        pad_token_id=54,
    )
    vision = small | dict(image_size=16, patch_size=8)
    sharpen(
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)), 8
    ).save_pretrained(folder)
    return str(folder)


def crop_by_transformers(image):
    """(3, 16, 16), the library's own preprocessing of CLIP, on Pillow."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    return processor(PIL.fromarray(image), return_tensors="pt")["pixel_values"][0]


def stretch_by_hand(image):
    """(3, 16, 16): each axis by a matrix of four cubic weights (a = -.75) around each sample, edges
    repeated, no antialias."""
    def matrix(n):
        kernel = lambda d: (
            (1.25 * d - 2.25) * d * d + 1 if d <= 1 else -0.75 * (((d - 5) * d + 8) * d - 4)
        )
        M = np.zeros((16, n))
        for i in range(16):
            at = (i + .5) * n / 16 - .5
            for tap in range(math.floor(at) - 1, math.floor(at) + 3):
                M[i, min(max(tap, 0), n - 1)] += kernel(abs(at - tap))
        return M
    out = np.einsum("ih,jw,hwc->cij", matrix(image.shape[0]), matrix(image.shape[1]), image / 255.0)
    mean, std = (
        np.array([.48145466, .4578275, .40821073]), np.array([.26862954, .26130258, .27577711]))
    return torch.tensor((out - mean[:, None, None]) / std[:, None, None]).float()


class Reference:
    """Unit features of images and texts: of a CLIP by its own forward pass, or (folder None) of 32
    x 32 pixels as they are."""

    def __init__(self, folder, preprocess=None):
        self.preprocess, self.model = (
            preprocess, folder and CLIPModel.from_pretrained(folder).eval())
        self.tok = folder and CLIPTokenizer.from_pretrained(folder)

    def __call__(self, what):
        if self.model is None:
            return (
                None if isinstance(what, str) else what.ravel() / np.linalg.norm(what.astype(float))
            )
        is_text = isinstance(what, str)
        ids = self.tok(what if is_text else "a", truncation=True, max_length=8, return_tensors="pt")
        pixels = torch.zeros(1, 3, 16, 16) if is_text else self.preprocess(what)[None]
        with torch.no_grad():
            out = self.model(input_ids=ids["input_ids"], pixel_values=pixels)
        return (out.text_embeds if is_text else out.image_embeds)[0].double().numpy()


def cos(a, b):
    return (
        None
        if a is None or b is None
        else float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    )


def mean(numbers):
    numbers = [n for n in numbers if n is not None]
    return pytest.approx(sum(numbers) / len(numbers), abs=1e-5) if numbers else None


def embedders(clip):
    return {"pixels": Reference(None), clip: Reference(clip, crop_by_transformers)}


# ---- Images --------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(32, 32), (16, 16), (9, 33), (70, 21), (1, 7), (50, 51)])
def test_preprocessing_matches_the_library(clip, size):
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    for fit, reference, tolerance in (
        ("crop", crop_by_transformers, 1e-5),
        ("stretch", stretch_by_hand, 1e-4),
    ):
        embedder, expected = visual.CLIP(clip, fit), Reference(clip, reference)
        ours = (embedder.fit(image, 16) - torch.tensor(visual.MEAN)[:, None, None]) / torch.tensor(
            visual.STD
        )[:, None, None]
        assert (ours - reference(image)).abs().max() < tolerance
        rows = embedder.images([image, picture(), image])
        assert (
            np.abs(rows[0] - expected(image)).max() < 1e-3
            and (rows[0] == rows[2]).all()
            and rows.dtype == np.float32
        )
        for text in ("a cat", "a text that is far longer than eight tokens"):
            assert np.abs(embedder.texts([text])[0] - expected(text)).max() < 1e-4
        assert (
            clip in embedder.name
            and {"crop": "centre crop", "stretch": "stretched"}[fit] in embedder.name
        )
    assert (crop_by_transformers(image) - stretch_by_hand(image)).abs().max() > 0.1 or size == (
        16,
        16,
    )


def test_pixels_embedder_uses_unit_block_means():
    image = picture(64, 96)
    blocks = image.reshape(32, 2, 32, 3, 3).mean((1, 3)).ravel()
    rows = visual.Pixels().images(
        [image, np.zeros((5, 5, 3), np.uint8), np.full((9, 4, 3), 7, np.uint8)]
    )
    assert (
        cos(rows[0], blocks) > 1 - 1e-4
        and cos(rows[1], rows[2]) == pytest.approx(1)
        and visual.Pixels().texts(["a"]) is None
    )
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(3))


def test_a_strip_is_no_image(tmp_path):
    save(tmp_path / "strip.png", picture(2, 200))
    with pytest.raises(visual.BadData, match="strip of 200 x 2"):
        visual.read_image(tmp_path / "strip.png")


# ---- AURORA --------------------------------------------------------------------------------------

def make_aurora(tmp_path):
    """(flags, {id: (task, source, target, generated, instruction)}) of three tasks, one without
    targets, and seven broken rows."""
    rows, kept = [], {}
    for i in range(12):
        task = ("ag", "Kubric", "emu")[i % 3]
        row = {"input": f"data/{i}.png", "instruction": "turn left" + "abc"[i % 3], "task": task}
        images = save(tmp_path / row["input"]), None
        if task != "emu":
            row["output"] = f"data/{i}_out.png"
            # 4: the target is the source
            images = images[0], save(tmp_path / row["output"], images[0] if i == 4 else None)
        made = save(
            tmp_path / f"GEN/fullset/{task.lower()}/aurora_{i:05d}.png",
            images[0] if i == 3 else None,
        )
        kept[f"aurora_{i:05d}"] = task.lower(), *images, made, row["instruction"]
        rows.append(row)
    # a generation that is not there, one that is broken
    for i in (0, 5):
        kept.pop(f"aurora_{i:05d}")
    (tmp_path / "GEN/fullset/ag/aurora_00000.png").unlink()
    (tmp_path / "GEN/fullset/emu/aurora_00005.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    good = {"input": "data/0.png", "instruction": "a", "task": "ag"}
    rows += [
        good | {"instruction": None},
        7,
        good | {"output": "nowhere.png"},
        good | {"input": "data/\ud800.png"},
        {"task": 3},
    ]
    save(tmp_path / "GEN/fullset/ag/aurora_00014.png")
    (tmp_path / "test.json").write_text(json.dumps(rows))
    return ["--data", tmp_path / "test.json", "--generated", tmp_path / "GEN"], kept


def test_aurora_is_its_definition(clip, tmp_path, capsys):
    argv, kept = make_aurora(tmp_path)
    for name, feature in embedders(clip).items():
        result = run(aurora, tmp_path, *argv, "--embedder", name, "--tasks", "all")
        assert (result["n"], result["n_missing"], len(result["missing"])) == (
            10,
            7,
            7,
        ) and name in result["embedder"]
        assert "7 rows are missing" in capsys.readouterr().err
        assert (
            set(result["scores"]) == {"ag", "kubric", "emu", "all"}
            and result["scores"]["ag"]["n_missing"] == 4
        )
        for group in result["scores"]:
            items = [(feature(s), t if t is None else feature(t), feature(g), feature(z))
                     for task, s, t, g, z in kept.values() if group in (task, "all")]
            row = result["scores"][group]
            for side, made in (
                ("model", [g for *_, g, _ in items]),
                ("copy_x", [s for s, *_ in items]),
            ):
                near, far = (
                    [cos(g, t) for g, (_, t, _, _) in zip(made, items)],
                    [cos(g, s) for g, (s, *_) in zip(made, items)])
                assert row[side]["clip_sim_source"] == mean(far) and row[side][
                    "clip_sim_target"
                ] == mean(near)
                success = mean([None if n is None else float(n > f) for n, f in zip(near, far)])
                assert row[side]["clip_success"] == row[side]["disc_edit_swirl"] == success
                assert row[side]["clip_sim_text"] == mean(
                    [cos(g, i[3]) for g, i in zip(made, items)]
                )
        assert (
            result["scores"]["all"]["copy_x"]["clip_success"] == 0
            and result["scores"]["emu"]["counts"]["clip_success"] == 0
        )
        assert (
            run(aurora, tmp_path, *argv, "--embedder", name, "--released")["scores"]["all"][
                "model"
            ]["clip_sim_text"]
            is None
        )
    assert set(run(aurora, tmp_path, *argv, "--embedder", "pixels")["scores"]) == {
        "ag",
        "kubric",
        "all",
    }


def test_aurora_judge_means_are_of_parsed_replies(tmp_path, monkeypatch):
    argv, kept = make_aurora(tmp_path)
    replies = {id: f'{{"score": [{i}, {9 - i}], "reasoning": ""}}' for i, id in enumerate(kept)} | {
        "aurora_00001": "[7.9, True]"
    }
    file = write_replies(tmp_path / "r.jsonl", replies | {f"{id}/copy": "[0, 10]" for id in kept})
    argv, asked = [*argv, "--embedder", "pixels", "--replies", file], []
    monkeypatch.setattr(judge.Recorded, "__call__", spy(judge.Recorded.__call__, asked))
    result = run(aurora, tmp_path, *argv, "--no-judge-copy")
    assert len(asked) == 7 and all("turn left" in text for text, *_ in asked)
    assert result["scores"]["all"]["copy_x"]["avg_min"] is None
    result = run(aurora, tmp_path, *argv)
    told = {
        id: (float(i), 9.0 - i)
        for i, id in enumerate(kept)
        if kept[id][0] != "emu" and id != "aurora_00001"
    }
    for quirk in (False, True):
        for group in ("ag", "kubric", "all"):
            row, numbers = (
                result["scores"][group],
                [n for id, n in told.items() if group in (kept[id][0], "all")])
            assert row["model"]["avg_edit_success"] == mean([a for a, _ in numbers])
            assert row["model"]["avg_overediting"] == mean([b for _, b in numbers])
            assert row["model"]["avg_min"] == mean([min(n) for n in numbers]) and row["counts"][
                "avg_min"
            ] == len(numbers)
            assert row["copy_x"]["avg_overediting"] == 10 and row["copy_x"]["avg_min"] == 0
        assert result["released"] is quirk and len(result["judge_missing"]) == (not quirk)
        asked.clear()
        result, told["aurora_00001"] = run(aurora, tmp_path, *argv, "--released"), (7, 1)
    assert len(asked) == 14 and not any("turn left" in text for text, *_ in asked)


def spy(call, asked):
    def wrapped(self, parse, id, text, images, **how):
        asked.append((text, images, how))
        return call(self, parse, id, text, images, **how)
    return wrapped


def test_disc_edit_is_the_share_of_nearer_pairs(clip, tmp_path, capsys):
    more = (
        {"input": "x.png", "pos": "q"}, {"input": "x.png", "pos": ""},
        {"image": "x.png", "neg": "n", "prompt": ""}, {"input": "x.png", "neg": "n"},
        {"input": "x.png"})
    rows, wins = [{"prompt": "p"} | row for row in more], {}
    source = save(tmp_path / "x.png", picture(40, 30))
    for task in ("ag", "whatsup"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "valid.json").write_text(json.dumps(rows))
        for n in range(5):
            for i in range(3):
                # a tie: not nearer
                same = n == 3 and i == 1
                pos = save(tmp_path / f"S/{task}/{n:05d}/pos_{i}.png")
                neg = save(tmp_path / f"S/{task}/{n:05d}/neg_{i}.png", pos if same else None)
                fitted = np.asarray(PIL.fromarray(source).resize((32, 32), PIL.Resampling.LANCZOS))
                assert aurora.distance("pixels", None, pos, source) == pytest.approx(
                    math.dist(pos.ravel(), fitted.ravel()) / 255
                )
                wins[task, n, i] = (
                    pos, neg,
                    math.dist(pos.ravel(), fitted.ravel()) < math.dist(neg.ravel(), fitted.ravel()))
    (tmp_path / "S/whatsup/00003/neg_2.png").unlink()
    argv = [
        "--disc-edit", tmp_path / "ag/valid.json", f"whatsup={tmp_path}/whatsup/valid.json",
        "--generated", tmp_path / "S", "--root", tmp_path, "--samples", 3]
    feature = Reference(clip, crop_by_transformers)
    for extra in ([], ["--distance", "embedder", "--embedder", clip]):
        near = {
            k: cos(feature(p), feature(source)) > cos(feature(n), feature(source)) if extra else win
            for k, (p, n, win) in wins.items()
        }
        result = run(aurora, tmp_path, *argv, *extra)
        # rows 1, 4: pos = neg = prompt; row 2: no pos at all
        for task, numbers in {"ag": (0,), "whatsup": (0, 3)}.items():
            shares = [
                float(near[task, n, i])
                for n in numbers
                for i in range(3)
                if (task, n, i) != ("whatsup", 3, 2)
            ]
            p, row = sum(shares) / len(shares), result["scores"][task]
            assert (
                row["model"]["disc_edit_aurora"] == pytest.approx(p)
                and row["copy_x"]["disc_edit_aurora"] == 0
            )
            assert row["se"]["disc_edit_aurora"] == pytest.approx(
                math.sqrt(p * (1 - p) / len(shares))
            ) and row["n"] == len(shares)
        assert (
            result["scores"]["ag"]["n_missing"] == 0
            and result["scores"]["whatsup"]["n_missing"] == 4
        )
        assert ("1 - cosine" if extra else "pixel L2") in capsys.readouterr().out
    pairs = [
        p
        for p in aurora.read_disc_edit(str(tmp_path / "whatsup/valid.json"), "whatsup")
        if isinstance(p, aurora.Pair)
    ]
    assert [(p.id, p.pos, p.neg) for p in pairs] == [("00000", "q", "p"), ("00003", "p", "n")]


# ---- ByteMorph -----------------------------------------------------------------------------------

def bytemorph_reference(feature, s, g, t, c_s, c_t, g_at_t=None, s_at_t=None):
    s, g, t, c_s, c_t = (None if v is None else feature(v) for v in (s, g, t, c_s, c_t))
    away = lambda a, b: None if a is None or b is None or (a == b).all() else a - b
    g_at_t, s_at_t = (b if a is None else feature(a) for a, b in ((g_at_t, g), (s_at_t, s)))
    return {
        "clip_sim_txt": cos(g, c_t),
        "clip_sim_img": cos(s, g),
        "clip_dir_txt": cos(away(g, s), away(c_t, c_s)),
        "clip_dir_img": cos(away(t, s_at_t), away(g_at_t, s_at_t)),
    }


def agrees(row, side, items):
    for c in items[0]:
        assert row[side][c] == mean([i[c] for i in items]), c
        assert row["counts" if side == "model" else "copy_counts"][c] == sum(
            i[c] is not None for i in items
        )


def test_bytemorph_is_its_definition(clip, tmp_path, monkeypatch):
    rows, kept = [], {}
    for i, id in enumerate(("A_1", "b_1", 3, "d.4", "e", "gone")):
        kind = ("camera/zoom", "human motion")[i > 2]
        row = {
            "edit_type": kind, "image_id": id, "src_img": f"{i}s.png", "tgt_img": f"{i}t.png",
            "src_img_caption": "a dog", "tgt_img_caption": "a cat" if i != 3 else "",
            "edit_prompt": "plain",
            "edit_prompt_rewrite_instruction": "  " if i % 2 else "rewritten"}
        s, t = (save(tmp_path / "B" / row[key], picture(20, 32)) for key in ("src_img", "tgt_img"))
        g = s if i == 4 else picture(24, 24)
        if id != "gone":
            save(tmp_path / f"GEN/fullset/{kind.replace('/', '-')}/{id}.png", g)
            kept[f"{kind.replace('/', '-')}/{id}"] = (
                s, g, t, "a dog", row["tgt_img_caption"] or None)
        rows.append(row)
    replies = {id: f'Sure: {{"Score": {n}}}' for id, n in zip(kept, (33, 33.005, 34, 80, 1000))}
    file = write_replies(tmp_path / "r.jsonl", replies)
    lines = [*map(json.dumps, rows), "no json", json.dumps(rows[0] | {"src_img": 4})]
    (tmp_path / "B/rows.jsonl").write_text("\n".join(lines))
    asked, feature = [], Reference(clip, stretch_by_hand)
    monkeypatch.setattr(judge.Recorded, "__call__", spy(judge.Recorded.__call__, asked))
    argv = ["--data", tmp_path / "B", "--generated", tmp_path / "GEN", "--embedder", clip]
    results = [run(bytemorph, tmp_path, *argv, "--replies", file, "--no-judge-copy")]
    assert [text for text, *_ in asked] == [
        f"EDIT TEXT: {z}" for z in ("rewritten", "plain", "rewritten", "plain", "rewritten")
    ]
    assert all(how["jpeg"] and "0 to 100" in how["system"] for *_, how in asked)
    assert all(
        (images[i] == known[i]).all()
        for (_, images, _), known in zip(asked, kept.values())
        for i in (0, 1)
    )
    assert results[0]["n"] == 5 and results[0]["n_missing"] == 3
    for group, judged in {
        "camera-zoom": 33.34,
        "human motion": 80,
        "all": (33 + 33.005 + 34 + 80) / 4,
    }.items():
        assert results[0]["scores"][group]["model"]["judge"] == (
            judged if group != "all" else pytest.approx(judged, abs=1e-9)
        )
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    image = lambda row, key: {
        key: {"bytes": (tmp_path / "B" / row[key]).read_bytes(), "path": None}
    }
    table = [
        r | {"image_id": str(r["image_id"])} | image(r, "src_img") | image(r, "tgt_img")
        for r in rows
    ]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "test.parquet")
    results += [run(bytemorph, tmp_path, "--data", tmp_path / "test.parquet", *argv[2:])]
    for result in results:
        for group in ("camera-zoom", "human motion", "all"):
            items = [v for k, v in kept.items() if group in (k.split("/")[0], "all")]
            agrees(
                result["scores"][group], "model", [bytemorph_reference(feature, *v) for v in items]
            )
            agrees(
                result["scores"][group],
                "copy_x",
                [bytemorph_reference(feature, s, s, *rest) for s, _, *rest in items],
            )
        row = result["scores"]["all"]
        assert row["counts"]["clip_dir_img"] == 4 and row["copy_x"][
            "clip_sim_img"
        ] == pytest.approx(1)
    # A_1 and b_1 are looked for as 1.png
    assert run(bytemorph, tmp_path, *argv, "--released")["n"] == 3


def test_a_broken_parquet_file_is_refused(tmp_path):
    pytest.importorskip("pyarrow.parquet")
    (tmp_path / "test.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(SystemExit):
        bytemorph.main(
            ["--data", str(tmp_path / "test.parquet"), "--generated", "x", "--embedder", "pixels"]
        )


def test_bytemorph_side_by_side(clip, tmp_path):
    items, feature = [], Reference(clip, stretch_by_hand)
    for i in range(3):
        s, t, s2, g = (
            picture(24, 20), picture(24, 21), picture(30, 26),
            picture(30, 26) if i else picture(24, 21))
        s2 = s2 if i else picture(24, 20)
        # of 41 pixels the left half is 20
        save(tmp_path / f"D/zoom/{i}.png", np.concatenate([s, t], 1))
        save(tmp_path / f"GEN/zoom/{i}.png", np.concatenate([s2, g], 1))
        (tmp_path / f"D/zoom/{i}.json").write_text(
            json.dumps({"input": "a dog", "output": "a cat", "edit": "zoom in"})
        )
        fitted = np.asarray(PIL.fromarray(g).resize((21, 24), PIL.Resampling.LANCZOS))
        captions = dict(c_s="a dog", c_t="a cat")
        items.append(bytemorph_reference(feature, s2, g, t, **captions, g_at_t=fitted, s_at_t=s))
    save(tmp_path / "D/zoom/no_sidecar.png")
    argv = [
        "--layout", "bm", "--data", tmp_path / "D", "--generated", tmp_path / "GEN", "--embedder",
        clip]
    result = run(bytemorph, tmp_path, *argv)
    agrees(result["scores"]["zoom"], "model", items)
    assert (result["n"], result["n_missing"], result["layout"]) == (3, 1, "bm")


# ---- WorldPrediction -----------------------------------------------------------------------------

def make_worldprediction(tmp_path, base=1):
    """Three samples of 3, 2, 3 steps in two data sets. Frames of segments lie in frames/ by three
    names, or in the map."""
    whole, frames, made = {"COIN": {}, "IKEA": {}}, {}, {}
    for n, (dataset, steps) in enumerate([("COIN", 3), ("COIN", 2), ("IKEA", 3)]):
        uids, truth = [f"v{n}|{k}" for k in range(steps)], (1, 0, 2)[n]
        for k, uid in enumerate(uids):
            # the latter by the map alone
            flat = f"images/{uid.replace('|', '_')}" + (".png" if n == 1 else ".jpg.png")
            name = (f"frames/{uid}.png", flat, f"frames/{uid.replace('|', '/')}.png")[k % 3]
            frames[uid] = save(tmp_path / "F" / name)
        if n == 2:
            frames[f"{uids[-1]}@end"] = save(tmp_path / f"F/frames/{uids[-1]}@end.png")
        order = [uids[::-1], uids[1:] + uids[:1], uids[1:] + uids[:1]]
        order.insert(truth, uids)
        whole[dataset][f"key{n}"] = {
            "states": {"segment_uid": f"s{n}"}, "ground_truth": truth + base, "candidates": order,
            "action_segments": {u: {"action_label": f"do {u}", "video": "v"} for u in uids},
            "original_segments": [{"segment_uid": u} for u in uids]}
        entries = []
        for c in range(4):
            paths = [f"OUT/s{n}/candidate_{c:02d}/step_{k + 1:02d}.png" for k in range(steps)]
            for k, path in enumerate(paths):
                made[n, c, k] = save(tmp_path / path)
            entries.append(
                {
                    "index": c,
                    "generated_paths": [str(tmp_path / p) if n else "/gone/" + p for p in paths],
                }
            )
        (tmp_path / f"OUT/s{n}/metadata.json").write_text(
            json.dumps({"candidates": entries[::-1], "ground_truth_index": 0})
        )
    (tmp_path / "map.json").write_text(
        json.dumps({u: f"images/{u.replace('|', '_')}.jpg.png" for u in frames})
    )
    (tmp_path / "wp.json").write_text(json.dumps(whole))
    return (
        [
            "--data",
            tmp_path / "wp.json",
            "--frames",
            tmp_path / "F",
            "--frame-map",
            tmp_path / "map.json",
            "--generated",
            tmp_path / "OUT",
        ],
        whole,
        frames,
        made,
    )


def test_worldprediction_is_its_definition(clip, tmp_path):
    argv, _, frames, made = make_worldprediction(tmp_path)
    for name, feature in embedders(clip).items():
        for mode in ("aligned", "released"):
            expected, copied = {}, {}
            for n, (dataset, steps, truth) in enumerate(
                [("COIN", 3, 1), ("COIN", 2, 0), ("IKEA", 3, 2)]
            ):
                for k in range(steps):
                    after = (
                        [f"v{n}|{k + 1}", f"v{n}|{k}@end"] if mode == "aligned" else [f"v{n}|{k}"]
                    )
                    reference = next((frames[u] for u in after if u in frames), None)
                    for group in (
                        (f"T={k + 1}", dataset, f"{dataset}, T={k + 1}", "all")
                        if reference is not None
                        else ()
                    ):
                        expected.setdefault(group, []).append(
                            cos(feature(made[n, truth, k]), feature(reference))
                        )
                        copied.setdefault(group, []).append(
                            cos(feature(frames[f"v{n}|0"]), feature(reference))
                        )
            result = run(worldprediction, tmp_path, *argv, "--embedder", name, "--mode", mode)
            assert (
                set(expected) <= set(result["scores"])
                and result["mode"] == mode
                and result["n_missing"] == 0
            )
            for group, numbers in expected.items():
                row = result["scores"][group]
                assert (
                    row["model"]["clip"] == mean(numbers)
                    and row["copy_x"]["clip"] == mean(copied[group])
                    and row["n"] == len(numbers)
                )
            assert result["steps without reference"] == (2 if mode == "aligned" else 0)
            assert (result["scores"]["T=1"]["copy_x"]["clip"] == pytest.approx(1)) is (
                mode == "released"
            )
    assert (
        run(worldprediction, tmp_path, *argv, "--embedder", "pixels", "--released")["mode"]
        == "released"
    )


def test_worldprediction_counts_judged_steps(tmp_path, monkeypatch):
    (argv, _, frames, made), asked = make_worldprediction(tmp_path), []
    monkeypatch.setattr(judge.Recorded, "__call__", spy(judge.Recorded.__call__, asked))
    argv += ["--embedder", "pixels"]
    replies = {
        "COIN/s0/step_01": '{"score": 4}', "COIN/s0/step_02": '{"score": NaN}',
        "COIN/s1/step_01": '{"score": "6"}',
        "IKEA/s2/step_01": 'Well {"score": 9, "explanation": "{}"}',
        "IKEA/s2/step_03": '{"score": 1}'}
    argv += ["--replies", write_replies(tmp_path / "r.jsonl", replies), "--no-judge-copy"]
    scores = run(worldprediction, tmp_path, *argv)["scores"]
    text, (reference, image), how = asked[0]
    assert all(
        part in text for part in ("COIN", "s0", "do v0|0; do v0|1; do v0|2", "step 1 of 3")
    ) and how == {"detail": "high"}
    assert (reference == frames["v0|1"]).all() and (image == made[0, 1, 0]).all()
    assert [scores[g]["model"]["judge"] for g in ("T=1", "T=2", "T=3", "COIN", "all")] == [
        6.5,
        None,
        1,
        4,
        pytest.approx(14 / 3),
    ]
    assert [scores[g]["counts"]["judge"] for g in ("T=1", "T=2", "T=3", "COIN", "all")] == [
        2,
        0,
        1,
        1,
        3,
    ]
    result = run(worldprediction, tmp_path, *argv, "--released", "--mode", "aligned")
    assert result["scores"]["T=1"]["model"]["judge"] == pytest.approx(19 / 3)


def test_worldprediction_counts_broken_samples(tmp_path):
    argv, whole, _, _ = make_worldprediction(tmp_path)
    argv += ["--embedder", "pixels"]
    (tmp_path / "OUT/s0/metadata.json").write_text('{"candidates": [3]}')
    (tmp_path / "OUT/s1/candidate_00/step_01.png").unlink()
    whole["IKEA"] |= {"bad": {"states": {}}, "worse": None}
    (tmp_path / "wp.json").write_text(json.dumps(whole))
    result = run(worldprediction, tmp_path, *argv)
    assert (result["n"], result["n_missing"], result["scores"]["T=1"]["n_missing"]) == (3, 5, 2)


def test_worldprediction_finds_the_ground_truth_base(tmp_path):
    argv, _, frames, made = make_worldprediction(tmp_path, base=0)
    argv += ["--embedder", "pixels"]
    result, feature = run(worldprediction, tmp_path, *argv), Reference(None)
    numbers = [cos(feature(made[2, c, 0]), feature(frames["v2|1"])) for c in range(4)]
    assert result["ground_truth from"] == 0 and result["scores"]["IKEA, T=1"]["model"][
        "clip"
    ] == mean([numbers[2]])
    moved = run(worldprediction, tmp_path, *argv, "--released", "--mode", "aligned")
    assert moved["scores"]["IKEA, T=1"]["model"]["clip"] == mean([numbers[1]])


def test_worldprediction_reads_samples_in_any_shape(tmp_path):
    argv, whole, _, _ = make_worldprediction(tmp_path, base=0)
    argv += ["--embedder", "pixels"]
    scores = lambda: run(worldprediction, tmp_path, *argv)["scores"]["all"]["model"]
    first, flat = scores(), [*whole["COIN"].values(), *whole["IKEA"].values()]
    for shape in (flat, {f"k{i}": s for i, s in enumerate(flat)}):
        (tmp_path / "wp.json").write_text(json.dumps(shape))
        assert scores() == first


# ---- The command line ----------------------------------------------------------------------------

def test_a_bad_embedder_is_refused(clip, tmp_path, capsys, monkeypatch):
    argv, _ = make_aurora(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "--embedder pixels" in refused(aurora, capsys, *argv, "--embedder", str(tmp_path))
    half = CLIPModel.from_pretrained(clip)
    del half.visual_projection
    half.save_pretrained(tmp_path / "half")
    CLIPTokenizer.from_pretrained(clip).save_pretrained(tmp_path / "half")
    assert "1 of its weights" in refused(aurora, capsys, *argv, "--embedder", tmp_path / "half")


def test_a_judge_without_key_or_replies_is_refused(tmp_path, capsys, monkeypatch):
    argv, _ = make_aurora(tmp_path)
    argv += ["--embedder", "pixels"]
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert "OPENAI_API_KEY" in refused(
        aurora, capsys, *argv, "--judge", "m", "--replies", tmp_path / "r"
    )
    assert "--replies" in refused(aurora, capsys, *argv, "--judge", "m")
    assert "no such file" in refused(aurora, capsys, *argv, "--replies", tmp_path / "nowhere")


def test_bad_files_are_refused_in_one_line(tmp_path, capsys):
    argv, _ = make_aurora(tmp_path)
    argv += ["--embedder", "pixels"]
    assert "--data" in refused(aurora, capsys, *argv, "--disc-edit", "x")
    assert "no scorer wrote" in refused(aurora, capsys, *argv, "--json", tmp_path / "test.json")
    assert "nothing can be scored" in refused(
        aurora, capsys, *argv[:2], "--generated", tmp_path / "nowhere", "--embedder", "pixels"
    )
    for scorer, more in ((bytemorph, []), (worldprediction, ["--frames", tmp_path])):
        assert "nowhere" in refused(
            scorer,
            capsys,
            "--data",
            tmp_path / "nowhere.json",
            "--generated",
            tmp_path,
            "--embedder",
            "pixels",
            *more,
        )


def spoiled(value, ways):
    """Every copy of a JSON value in which one part, at any depth, is something else or is gone."""
    for key in (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    ):
        for other in [*ways, *spoiled(value[key], ways)]:
            copy = value.copy()
            copy[key] = other
            yield copy
        if isinstance(value, dict):
            yield {k: v for k, v in value.items() if k != key}


def test_no_field_of_no_file_crashes_a_scorer(tmp_path, capsys):
    ways = [None, 7, True, "", "\ud800", "\0", "x" * 300, [[]], {"a": 1}]
    save(tmp_path / "a.png")
    (
        save(tmp_path / "fullset/t/aurora_00000.png"),
        save(tmp_path / "fullset/t/i.png"),
        save(tmp_path / "u/candidate_00/step_01.png"),
    )
    row = {
        "task": "t", "input": "a.png", "output": "a.png", "instruction": "z", "edit_type": "t",
        "image_id": "i", "src_img": "a.png", "tgt_img": {"bytes": None, "path": "a.png"},
        "edit_prompt": "z", "src_img_caption": "c", "tgt_img_caption": "c"}
    meta = {"candidates": [{"index": 0, "generated_paths": [str(tmp_path / "a.png")]}]}
    sample = {
        "states": {"segment_uid": "u"}, "ground_truth": 1, "candidates": [["s"]],
        "original_segments": [{"segment_uid": "s"}],
        "action_segments": {"s": {"action_label": "z"}}}
    (tmp_path / "replies").write_text(
        '{"id": "aurora_00000", "reply": ""}\n[]\n{"id": 3}\n\0\n{"id": "t/i", "reply": "{"}'
    )
    common = ["--generated", tmp_path, "--embedder", "pixels", "--replies", tmp_path / "replies"]
    cases = [(aurora, [spoil], None, ["--tasks", "all"]) for spoil in spoiled(row, ways)]
    cases += [(bytemorph, [spoil], None, []) for spoil in spoiled(row, ways)]
    cases += [
        (aurora, [spoil], "disc", [])
        for spoil in spoiled({"pos": "p", "neg": "q", "input": "a.png", "prompt": "q"}, ways)
    ]
    frames = ["--frames", tmp_path, "--frame-map", tmp_path / "map", "--mode", "released"]
    cases += [
        (worldprediction, {"d": {"u": spoil}}, meta, frames) for spoil in spoiled(sample, ways)
    ]
    cases += [
        (worldprediction, {"d": {"u": sample}}, spoil, frames) for spoil in spoiled(meta, ways)
    ]
    (tmp_path / "map").write_text(json.dumps({"s": "a.png", "t": 7}))
    codes = []
    for scorer, data, meta, more in cases:
        (tmp_path / "data.json").write_text(json.dumps(data))
        (tmp_path / "u/metadata.json").write_text(json.dumps(meta))
        argv = (
            ["--disc-edit", f"t={tmp_path}/data.json", "--samples", 1, "--generated", tmp_path]
            if meta == "disc"
            else common + more
        )
        try:
            codes.append(
                scorer.main(
                    list(map(str, argv + ["--data", tmp_path / "data.json"] * (meta != "disc")))
                )
            )
        except SystemExit as stop:
            codes.append(stop.code)
    assert set(codes) == {0, 2} and codes.count(0) > 50 and len(codes) > 300
    capsys.readouterr()


def test_commands_without_pillow_and_with_help():
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = "import sys; sys.modules['PIL'] = None; from evals import visual; visual.read_image('x')"
    failed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert "pip install Pillow" in failed.stderr
    helped = [
        subprocess.run(
            [sys.executable, "-m", f"evals.{n}", "--help"],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
        )
        for n in ("aurora", "bytemorph", "worldprediction")
    ]
    assert all(
        h.returncode == 0 and "Claim" in h.stdout and "--generated" in h.stdout for h in helped
    )
