"""Malformed inputs over all commands and readers.

    python -m tests.fuzz                            10,000 inputs, on all targets
    python -m tests.fuzz --n 500 --only pairs       500 on one target
    python -m tests.fuzz --only pairs --first 17 --n 1     one input again

Claim: a command ends with 0, and says on standard error only lines that begin with "warning: "; or
with 2 and the one line "error: ..". It takes at most 2 CPU seconds and 64 MB more than 300 times
the input.

Input i of a target depends on nothing else (seed: "TARGET i"). Grammar: valid rows, of which keys
and values are exchanged for hostile ones. Bytes: some are changed, cut, doubled, put in; some files
are then gzipped, and some of these cut.
"""
import argparse
import collections
import contextlib
import functools
import gzip
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
import types
import urllib.error
import urllib.request
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers

import envs
import play
import pretrain
import reproduce
import settings
import train
from envs import cloud, convert, mind2web, mirrorapi, records, scienceworld
from evals import (
    aurora,
    bytemorph,
    export,
    judge,
    rollout,
    stabletoolbench,
    verify,
    visual,
    worldprediction,
)
from evals import mind2web as score_mind2web
from evals import scienceworld as score_scienceworld
from models import adapters, parallel, pretrained, tiny
from support import loading, opened

ROOT = Path(__file__).parents[1]
SECONDS, MEGABYTES, TIMES = 2.0, 64, 300
SIZE = 2**17                    # characters of a large input


# --- what inputs are made of ----------------------------------------------------------------------

DEEP = "[" * 960 + "]" * 960
HOSTILE = [
    "null", "true", "false", "0", "-1", "7", "0.5", "NaN", "-Infinity", "9" * 4000,
    '""', '" "', '"\\n"', '"\\ud800"', '"\\u0000"', '"\u2028"', '"\x1b[2J"', '"é水😀"',
    '"../../../etc/passwd"', '"/etc/passwd"', '"."', '"a/b"', "[]", "{}", "[1, 2]", "[[]]",
    '{"a": 1, "a": 2}', '{"bytes": "x", "path": null}', DEEP,
    '"<image>"', '"<image></image>"', '"<image><c1></image>"', '"<image><c1000000000></image>"',
    '"<image><c1><c2><c3><c4></image>"', '"test-a"', '"dev-b"', '"train-c"',
    '"' + "a" * 3000 + '"', '"' + "\\n" * 3000 + '"', '"' + "a b " * 800 + '"',
]
NO_JSON = ["1e999", "9" * 5000, "[" * 3000, '{"":' * 500, "'a'", '"\\x"', "01", "nul", ""]
WORDS = ["on", "off", "lamp is on\ndoor is shut", "turn off", "", " ", "\n", "0", "1", "-1", "nan",
         "1e9", "99999999999", "9" * 5000, "../x", "/dev/null", "\x00", "\x1b[0m", "é", "水", "😀",
         "<image>", "<image><c1></image>", "=", "a=b", "--", "-", "id_high", "all", "[1, 2]", '"',
         "',", "a,b", "\r", "\r\n", "\ufeff", "\u2028", "x" * 2000]


def json_of(rng, value, share):
    """The JSON of a value, in which each part is hostile with a chance of `share`."""
    if rng.random() < share:
        return rng.choice(HOSTILE if rng.random() < 0.9 else NO_JSON)
    if isinstance(value, list):
        return "[" + ", ".join(json_of(rng, item, share) for item in value) + "]"
    if not isinstance(value, dict):
        return json.dumps(value)
    pairs = []
    for key, item in value.items():
        name = json.dumps(key) if rng.random() > share / 2 else rng.choice(HOSTILE)
        if rng.random() > share / 2:
            times = 2 if rng.random() < share / 8 else 1
            pairs += [f"{name}: {json_of(rng, item, share)}"] * times
    return "{" + ", ".join(pairs) + "}"


def share_of(rng, value):
    """A share with which few parts of a value are hostile, or none."""
    return rng.choice([0, 0, 0.5, 1, 3]) / (1 + json.dumps(value).count(": "))


def broken(rng, data, most=4):
    """The bytes with a few changes."""
    data = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at, size = rng.randrange(len(data) + 1), min(len(data), 2 ** rng.randrange(8))
        way = rng.randrange(5)
        if way == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif way == 1:
            del data[at:at + size]
        elif way == 2:
            data[at:at] = data[at:at + size] * rng.randint(1, 3)
        elif way == 3:
            data[at:at] = rng.choice([b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b"{", b"]", b'"',
                                      b"\\", b",", b"\r", b"\xed\xa0\x80", rng.randbytes(size)])
        else:
            del data[at:]
    return bytes(data)


def put(rng, path, text, whole=0.8, packed=0.0):
    """Write the text, changed or (with a chance of `whole`) not, as FILE or, with a chance of
    `packed`, as FILE.gz. Returns the path."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if rng.random() > whole:
        data = broken(rng, data)
    if rng.random() < packed:
        path, data = f"{path}.gz", gzip.compress(data)
        data = broken(rng, data) if rng.random() < 0.3 else data
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data)
    return str(path)


def rows_of(rng, rows, path, as_list=False):
    """A file of rows, as a JSON list or line by line."""
    share = share_of(rng, rows)
    texts = [json_of(rng, row, share) for row in rows]
    if as_list:
        text = "[" + rng.choice([", ", ",\n", " , "]).join(texts) + "]"
    else:
        text = rng.choice(["\n", "\n", "\n\n", "\r\n"]).join(texts) + "\n"
    return put(rng, path, text, packed=0.15)


def transitions(rng):
    """[row] of a small transitions file, fit for all splits."""
    rows = []
    for episode in range(rng.choice([2, 7, 8, 9])):
        name = rng.choice(["", "", "train-", "dev-", "test-"]) + f"e{episode}"
        x = rng.choice(WORDS[:3])
        for t in range(rng.choice([2, 2, 3]) if rng.random() < 0.98 else 1):
            y = rng.choice([x, f"lamp is {rng.choice(['on', 'off'])}\ndoor {t} is shut"])
            rows.append({"episode": name, "t": t, "x": x, "z": rng.choice(WORDS[:4]), "y": y})
            x = y
    return rows


@functools.lru_cache(None)
def picture(kind="PNG", mode="RGB", size=(16, 16)):
    """The bytes of an image file."""
    from PIL import Image
    file, rng = io.BytesIO(), np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).convert(mode)
    image.save(file, kind)
    return file.getvalue()


def pictures(rng, folder, names):
    """Images under these names; a few are broken or not there."""
    for name in names:
        if rng.random() < 0.9:
            put(rng, folder / name, picture(), whole=0.9)


def word(rng, name):
    """A cell of a column: mostly one that fits."""
    if rng.random() < 0.1:
        return rng.choice(WORDS)
    return {"t": str(rng.randrange(99)), "episode": "e"}.get(name) or rng.choice(WORDS[:4])


def junk(rng):
    """A word of a command line: no NUL and no half character can be in one."""
    text = rng.choice(WORDS) if rng.random() < 0.7 else "".join(rng.choices(WORDS, k=3))
    return text.replace("\0", "")[:3000]


# --- targets: (rng, folder) -> what to call -------------------------------------------------------

TARGETS = {}


def target(share):
    """Register a target, which gets `share` of every hundred inputs."""
    def register(f):
        TARGETS[f.__name__.rstrip("_")] = f, share
        return f
    return register


def command(main, *argv):
    return lambda: main([str(word) for word in argv])


@functools.lru_cache(None)
def loaded(folder=tiny.FOLDER, dtype=torch.float32):
    return pretrained_load(folder, dtype)


pretrained_load = pretrained.load


def quickly(call):
    """The call with a model that is loaded once."""
    def called():
        with mock.patch.object(pretrained, "load", lambda *_: loaded()):
            return call()
    return called


@target(14)
def check(rng, folder):
    """python -m envs.records FILE --check"""
    file = rows_of(rng, transitions(rng), folder / "d.jsonl")
    return quickly(command(convert.main, file, "--check"))


@target(12)
def data(rng, folder):
    """train.py --data FILE, before its first step."""
    file = rows_of(rng, transitions(rng), folder / "d.jsonl")

    def called():
        try:
            net, tok = loaded()
            cfg = settings.parse(["--data", file, "--max-state", rng.choice(["0", "16", "40"])])
            splits = loading.shorten_all(tok, envs.load_splits(cfg), cfg.max_state)
            loading.check_data(net, tok, splits, cfg)
        except records.BadData as error:
            records.fail(error)
    return called


@target(6)
def csv_(rng, folder):
    """python -m envs.records --from-csv"""
    names = rng.choice([["x", "z", "y"], ["x", "y"], ["episode", "t", "x", "z", "y"]])
    rows = [names] + [[word(rng, name) for name in names] for _ in range(rng.randrange(6))]
    if rng.random() < 0.1:
        rng.choice(rows).append("more")
    cells = [['"' + cell.replace('"', '""') + '"' if rng.random() < 0.9 else cell for cell in row]
             for row in rows]
    file = put(rng, folder / "d.csv", "\n".join(map(",".join, cells)), packed=0.15)
    return command(convert.main, "--from-csv", file, "--out", folder / "o.jsonl")


@target(4)
def folder_(rng, folder):
    """python -m envs.records --from-folder"""
    names = ["1.txt", "2.txt", "10.txt", "actions.txt", ".hidden", "٣.txt",
             os.fsdecode(b"\xff.txt")]
    for i in range(rng.choice([0, 1, 2, 2])):
        for name in rng.choices(names, [9, 9, 9, 1, 1, 1, 1], k=4):
            put(rng, folder / "in" / f"e{i}" / name, word(rng, "x"), 0.9)
    if rng.random() < 0.1 and (folder / "in" / "e0").exists():
        os.mkfifo(folder / "in" / "e0" / "pipe")
    return command(convert.main, "--from-folder", folder / "in", "--out", folder / "o.jsonl.gz")


def official(name, main, rng, folder):
    rows = json.loads((ROOT / "tests" / "data" / name).read_text())
    listed = rng.random() < 0.6
    file = rows_of(rng, rng.choices(rows, k=rng.randrange(1, 4)), folder / name, listed)
    split = rng.choice(["--train", "--test"])
    return command(main, split, file, "--out", folder / "o.jsonl", "--force")


@target(6)
def mirror(rng, folder):
    """python -m envs.mirrorapi"""
    return official("mirrorapi.json", mirrorapi.main, rng, folder)


@target(6)
def pages(rng, folder):
    """python -m envs.mind2web"""
    return official("mind2web.json", mind2web.main, rng, folder)


@target(10)
def pairs(rng, folder):
    """The scorers of texts."""
    scorer = rng.choice([score_scienceworld, score_mind2web, stabletoolbench])
    rows = [{"prediction": rng.choice(WORDS[:6]), "reference": rng.choice(WORDS[:6]),
             "x": rng.choice(WORDS[:6]), "split": rng.choice(["id_high", "test_task", "a"])}
            for _ in range(rng.randrange(1, 6))]
    if rng.random() < 0.7:
        argv = ["--pairs", rows_of(rng, rows, folder / rng.choice(["ood.jsonl", "p.jsonl"]))]
    else:
        argv = [word for key in ("prediction", "reference") for word in (
            f"--{key}s", rows_of(rng, [row[key] for row in rows], folder / f"{key}.jsonl"))]
    if rng.random() < 0.2:
        (folder / "s.json").write_text(rng.choice(HOSTILE), errors="replace")
    return command(scorer.main, *argv, "--json", folder / "s.json")


def replies(rng, folder, ids):
    """Flags of a file of a judge's replies, or none."""
    if rng.random() < 0.3:
        return []
    rows = [{"id": id, "reply": reply(rng), "model": rng.choice(["m", "\ud800", "\n"])}
            for id in ids]
    return ["--replies", rows_of(rng, rows, folder / "r.jsonl")]


def visual_flags(rng, folder):
    """Flags that all visual scorers have."""
    more = [flag for flag in ("--released", "--anywhere", "--no-judge-copy") if rng.random() < 0.2]
    return ["--generated", folder / "GEN", "--embedder", "pixels", "--json", folder / "s.json",
            *more]


@target(5)
def edits(rng, folder):
    """python -m evals.aurora"""
    names, rows = [], []
    for i in range(rng.randrange(1, 4)):
        rows.append({"input": f"{i}.png", "output": f"{i}.png", "task": "ag", "instruction": "go"})
        names += [f"{i}.png", f"GEN/fullset/ag/aurora_{i:05d}.png"]
    pictures(rng, folder, names)
    file = rows_of(rng, rows, folder / "test.json", True)
    argv = replies(rng, folder, [f"aurora_{i:05d}" for i in range(3)])
    return command(aurora.main, "--data", file, "--tasks", "all", *visual_flags(rng, folder), *argv)


@target(3)
def disc(rng, folder):
    """python -m evals.aurora --disc-edit"""
    rows = [{"input": "0.png", "prompt": "p", "pos": "q", "neg": ""}] * rng.randrange(1, 4)
    pictures(rng, folder, ["0.png"] + [f"GEN/whatsup/{n:05d}/{side}_0.png" for n in range(3)
                                       for side in ("pos", "neg")])
    file = rows_of(rng, rows, folder / "v.json", True)
    samples = rng.choice([1, 2, 0])
    return command(aurora.main, "--disc-edit", f"whatsup={file}", "--samples", samples,
                   *visual_flags(rng, folder))


@target(6)
def motion(rng, folder):
    """python -m evals.bytemorph"""
    rows, names = [], []
    for i in range(rng.randrange(1, 4)):
        rows.append({"edit_type": "zoom", "image_id": f"a_{i}", "src_img": f"{i}.png",
                     "tgt_img": f"{i}.png", "edit_prompt": "go", "src_img_caption": "a"})
        names += [f"{i}.png", f"GEN/fullset/zoom/a_{i}.png", f"GEN/zoom/a_{i}.png"]
    layout = rng.choice(["sw", "sw", "parquet", "bm"])
    path = folder / "test.json"
    pictures(rng, folder, names)
    if layout == "bm":
        path = folder / "B"
        for i in range(3):
            pictures(rng, path, [f"zoom/a_{i}.png"])
            sidecar = json_of(rng, {"input": "a", "output": "b", "edit": "go"}, 0.05)
            put(rng, path / f"zoom/a_{i}.json", sidecar)
    elif layout == "parquet":
        path = put(rng, folder / "test.parquet", table(rng, rows))
    else:
        path = rows_of(rng, rows, path, rng.random() < 0.5)
    argv = replies(rng, folder, [f"zoom/a_{i}" for i in range(3)])
    return command(bytemorph.main, "--data", path, "--layout", "bm" if layout == "bm" else "sw",
                   *visual_flags(rng, folder), *argv)


def table(rng, rows):
    """The bytes of a parquet file; some columns are of another kind."""
    import pyarrow
    import pyarrow.parquet
    file = io.BytesIO()
    other = rng.choice([None, 7, b"\xff", {"bytes": picture(), "path": None}, [1], "", "../x.png"])
    key = rng.choice(list(rows[0]) + [""])
    rows = [row | {key: other} if key else row for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


@target(5)
def plans(rng, folder):
    """python -m evals.worldprediction"""
    uid, other = rng.choice([*8 * ["u"], "..", "../..", "/etc", "a|b"]), {}
    names = ["s1", "s2"]
    row = {"states": {"segment_uid": uid}, "ground_truth": 1, "candidates": [names],
           "action_segments": {name: {"action_label": "go"} for name in names},
           "original_segments": [{"segment_uid": name} for name in names]}
    told = {"candidates": [{"index": 0, "generated_paths": ["GEN/x.png", "/etc/passwd"]}]}
    pictures(rng, folder, [f"frames/{name}.png" for name in names])
    pictures(rng, folder, [f"GEN/u/candidate_00/step_0{k}.png" for k in (1, 2)])
    put(rng, folder / "GEN/u/metadata.json", json_of(rng, told, 0.05))
    if rng.random() < 0.3:
        other = {"--frame-map": put(rng, folder / "map.json", json_of(rng, {"s1": "../x"}, 0.1))}
    whole = rng.choice([{"pixels": {"a": row}}, [row], {"a": row}, {"a": {"a": row, "b": row}}])
    file = put(rng, folder / "pp.json", json_of(rng, whole, share_of(rng, whole)))
    argv = replies(rng, folder, ["pixels/u/step_01", "pixels/u/step_02"])
    return command(worldprediction.main, "--data", file, "--frames", folder,
                   *[word for pair in other.items() for word in pair],
                   *visual_flags(rng, folder), *argv)


@target(4)
def image(rng, folder):
    """An image file."""
    kind = rng.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
    mode = rng.choice(["RGB", "L", "P", "RGBA", "I;16", "1", "I", "F", "CMYK"])
    try:
        whole = picture(kind, mode)
    except (OSError, ValueError, KeyError):        # not every kind has every mode
        whole = picture(kind)
    file = put(rng, folder / "a.png", whole, 0.1)
    source = rng.choice([file, Path(file).read_bytes()])
    return lambda: refusing(lambda: visual.read_image(source))


def refusing(call):
    """What a call returns; BadData as a command ends with it."""
    try:
        call()
    except records.BadData as error:
        records.fail(error)


def reply(rng):
    """A judge's reply."""
    numbers = ["7", "8.5", "-1", "11", "1e999", "NaN", "true", "9" * 400, "9" * 5000, '"7"', "[1]"]
    a, b = rng.choice(numbers), rng.choice(numbers)
    shapes = [f"[{a}, {b}]", f'{{"score": [{a}, {b}]}}', f'{{"Score": {a}}}', f'{{"score": {a}}}',
              f'{{"score": {a}, "score": {b}}}', f"<think>[{a}, {b}]</think>[{b}, {a}]", "<think>",
              "[" * rng.randrange(500), "{" * rng.randrange(500), "-" * 2000 + a, rng.choice(WORDS)]
    return "".join(rng.choices(shapes, k=rng.choice([1, 1, 1, 2, 4])))


@target(5)
def reply_(rng, folder):
    """What the scorers read in a reply."""
    text = reply(rng) if rng.random() < 0.5 else broken(rng, reply(rng).encode()).decode("latin-1")

    def called():
        for parse in (judge.aurora_scores, judge.bytemorph_score, judge.worldprediction_score):
            for released in (False, True):
                parse(text, released)
        mirrorapi.reply(text)
    return called


@target(2)
def server(rng, folder):
    """A judge's server."""
    body = json_of(rng, {"choices": [{"message": {"content": "[1, 2]"}}]}, 0.1).encode("utf-8",
                                                                                       "replace")
    body = broken(rng, body) if rng.random() < 0.5 else body
    code = rng.choice([200, 200, 400, 401, 404, 422, 429, 500, 503])

    def opened(request, timeout):
        if code != 200:
            raise urllib.error.HTTPError(request.full_url, code, "no", {}, io.BytesIO(body))
        return io.BytesIO(body)

    def called():
        key = {"OPENAI_BASE_URL": rng.choice(["http://x/v1", "x", "ht!p://", "file:///etc"]),
               "OPENAI_API_KEY": rng.choice(["", "k", "secret\n", "é水"])}
        with mock.patch.dict(os.environ, key), mock.patch.object(time, "sleep"), \
                mock.patch.object(urllib.request, "urlopen", opened):
            refusing(lambda: judge.OpenAIJudge("m")([{"role": "user", "content": "a"}]))
    return called


@target(5)
def task(rng, folder):
    """play.py RUN --predict, --label, --simulate: their rows and what is written already."""
    kind = rng.choice(list(play.ADDS))
    rows = [{"x": "lamp is on", "y": "lamp is off", "z": "go"} for _ in range(3)]
    for row in rows:
        row.pop("y" if kind != "label" else "z")
        row["z"] = ["go"] if kind == "simulate" else row.get("z")
        if row["z"] is None:
            del row["z"]
    file = rows_of(rng, rows, folder / "d.jsonl")
    args = types.SimpleNamespace(file=file, out=str(folder / "o.jsonl"), task=kind, steps=2, seed=0)
    if kind == "label" and rng.random() < 0.7:
        done = "".join(json.dumps(row | {"z": "go"}) + "\n" for row in rows)
        (folder / "o.jsonl").write_bytes(broken(rng, done.encode(), 2))

    def called():
        with mock.patch.object(play, "fill", filled):
            refusing(lambda: play.convert(small_run(), args))
    return called


def filled(run, kind, rows):
    """`play.fill` without a model."""
    found = {"predict": ("y", 0.0), "label": ("go", 0.0, False), "simulate": (["go"], ["y"])}
    return [row | dict(zip(play.ADDS[kind], found[kind])) for row in rows]


@functools.lru_cache(None)
def small_run():
    """What `play` needs of a run to check its rows."""
    from swirl_fwm import FWM
    from swirl_idm import IDM
    net, tok = loaded()
    P, Q = FWM(net, tok, longest=4), IDM(net, tok, longest=4)
    cfg = types.SimpleNamespace(max_state=0)
    return types.SimpleNamespace(P=P, Q=Q, cfg=cfg, test=[("lamp is on", "go", "lamp is off")])


@target(2)
def run(rng, folder):
    """play.py on a damaged folder of a run."""
    cfg = settings.parse(["--episodes", "4", "--eval-size", "4", "--no-rivals"])
    config = {"settings": vars(cfg) | {"preset": {}}, "data_sha256": None}
    results = {"splits": {"test": 4}}
    put(rng, folder / "config.json", json_of(rng, config, share_of(rng, config)), 0.9)
    put(rng, folder / "results.json", json_of(rng, results, 0.05), 0.9)
    return quickly(lambda: refusing(lambda: opened.open_run(folder)))


@functools.lru_cache(None)
def small_model():
    """{name: bytes} of a model folder."""
    net, tok = loaded()
    with tempfile.TemporaryDirectory() as folder:
        pretrained.save(tiny.make_model(tok, width=32, layers=1), tok, folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@target(2)
def model(rng, folder):
    """train.py --model FOLDER"""
    files = small_model()
    name = rng.choice(list(files))
    for other, whole in files.items():
        if other == name and other.endswith(".json") and rng.random() < 0.5:
            whole = json_of(rng, json.loads(whole), 0.01).encode("utf-8", "replace")
        elif other == name:
            whole = broken(rng, whole)
        if other != name or rng.random() < 0.95:
            (folder / other).write_bytes(whole)
    return lambda: loading.load_nets(settings.parse(["--model", str(folder)]), [], None, False)


@target(1)
def gguf(rng, folder):
    """train.py --model FILE.gguf"""
    file = put(rng, folder / "m.gguf", small_gguf(), 0)
    return lambda: loading.load_nets(settings.parse(["--model", file]), [], None, False)


@functools.lru_cache(None)
def small_gguf():
    """The bytes of a GGUF file with a head and one tensor."""
    import gguf
    with tempfile.TemporaryDirectory() as folder:
        out = gguf.GGUFWriter(f"{folder}/m.gguf", "llama")
        for name in ("context_length", "embedding_length", "block_count", "feed_forward_length",
                     "head_count", "head_count_kv", "vocab_size"):
            getattr(out, f"add_{name}")(2)
        out.add_tokenizer_model("gpt2")
        out.add_token_list(["a", "b"])
        out.add_token_merges([])
        out.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        return Path(folder, "m.gguf").read_bytes()


@target(1)
def results(rng, folder):
    """reproduce.py: a table of earlier rows."""
    put(rng, folder / "methods.json", json_of(rng, {"a": {"command": "train.py"}}, 0.2), 0.3)
    return lambda: reproduce.Results(folder).load("methods")


# Commands that would run for long get a flag that does not exist
FLAGS = [
    (settings.parse, None, ()), (train.main, None, ("--nonsense",)),
    (pretrain.main, ["--out", "--steps", "--tokens", "--lr", "--threads"], ("--steps", "0")),
    (reproduce.main, ["--worlds", "--tables", "--seeds", "--results"], ("--processes", "0")),
    (play.main, ["--start", "--predict", "--label", "--out", "--steps"], ("nowhere",)),
    (convert.main, ["--check", "--from-csv", "--from-folder", "--out", "--force"], ()),
    (cloud.main, ["--episodes", "--seed"], ("--out", "nowhere/o.jsonl", "--episodes", "x")),
    (scienceworld.main, ["--tasks", "--episodes", "--slips"], ("--out", "o.txt")),
    (aurora.main, ["--data", "--disc-edit", "--root", "--tasks", "--samples"],
     ("--generated", "nowhere", "--embedder", "pixels")),
    (bytemorph.main, ["--data", "--layout", "--released"],
     ("--generated", "nowhere", "--embedder", "pixels")),
    (worldprediction.main, ["--data", "--frames", "--mode", "--base"], ("--embedder", "pixels")),
    (export.main, ["--run", "--out"], ()), (rollout.main, ["--run", "--steps", "--json"], ()),
    (verify.main, ["--run", "--n", "--tests"], ()), (adapters.main, ["--lora"], ("--lora", "0")),
]


@target(8)
def flags(rng, folder):
    """The flags of all commands."""
    main, names, last = rng.choice(FLAGS)
    names = names or [f"--{name.replace('_', '-')}" for name in vars(settings.Config())]
    argv = []
    for _ in range(rng.randrange(4)):
        argv += [rng.choice(names), *(junk(rng) for _ in range(rng.choice([0, 1, 1, 1, 2])))]
    return command(main, *argv, *last)


@target(1)
def environment(rng, folder):
    """Variables that an old torchrun left."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    left = {name: rng.choice(["0", "1", "x", "-1", "999"]) for name in names if rng.random() < 0.6}
    if rng.random() < 0.5:
        left = {name: value for name, value in left.items() if name != "MASTER_ADDR"}
        left["TORCHELASTIC_RUN_ID"] = "old"

    def called():
        with mock.patch.dict(os.environ, left):
            parallel.start()
            assert parallel.world() == 1 and parallel.rank() == 0
    return called


# --- inputs that are large ------------------------------------------------------------------------

def transition(**keys):
    return json.dumps({"episode": "train-a", "t": 0, "x": "a", "z": "go", "y": "b"} | keys)


def many(n, row):
    return "\n".join(row(i) for i in range(n))


BLANKS = " " * SIZE
PAGE = {"annotation_id": "a", "action_reprs": ["z", "z"]}


def page(html, nodes=()):
    """Mind2Web's file with one task."""
    nodes = [{"backend_node_id": str(node)} for node in nodes]
    action = {"cleaned_html": html, "pos_candidates": nodes}
    return json.dumps([PAGE | {"actions": [action, action]}])


# name of the target: texts that once took long or much
LARGE = {
    "check": [
        lambda: transition(x=BLANKS + "a"), lambda: transition(x="a" * SIZE),
        lambda: transition(x="<image>" + "<c1>" * (SIZE // 4)),
        lambda: transition(x="a\n" * (SIZE // 4), y="a\nb\n" * (SIZE // 8)),
        lambda: many(SIZE // 1000, lambda i: transition(t=i, x="a\n" * 230, y="a\nb\n" * 110)),
        lambda: many(SIZE // 150, lambda i: transition(t=i, x=f"<image><c{i}></image>")),
        lambda: many(SIZE // 100, lambda i: transition(t=i, x=f"s {i}")),
        lambda: "[" * SIZE, lambda: "\n" * SIZE, lambda: "9" * SIZE,
        lambda: transition(q=[[]] * (SIZE // 4)), lambda: transition(q=[{}] * (SIZE // 4)),
    ],
    "data": [lambda: transition(x=BLANKS + "a"), lambda: transition(x="a " * (SIZE // 2))],
    "csv": [
        lambda: "x,y\n" + "a,b\n" * (SIZE // 4), lambda: 'x,y\n"' + "a" * SIZE,
        lambda: "x,y\n" + '"' * SIZE, lambda: "," * SIZE, lambda: "x,y," + "z" * SIZE,
    ],
    "pages": [
        lambda: page("<a" + BLANKS + 'x backend_node_id="1">', [1]),
        lambda: page("<a>" * (SIZE // 8), range(SIZE // 60)),
        lambda: page(' backend_node_id="' * (SIZE // 18), ["x"]),
        lambda: BLANKS + page("<a>"), lambda: "\n" * SIZE + "[]", lambda: "[" + BLANKS + "1",
        lambda: '"' + "a" * 40 * SIZE, lambda: "[" + "[],\n" * (SIZE // 4),
    ],
    "mirror": [
        lambda: json.dumps([{"system": "", "instruction": "a\nRequest: b", "output":
                             '{"error": "", "response": "' + '"' + BLANKS + "x"}]),
        lambda: json.dumps([{"system": "", "instruction": "\n" * SIZE, "output": "a"}]),
    ],
    "pairs": [
        lambda: many(SIZE // 60, lambda i: json.dumps({"prediction": "a", "reference": "b",
                                                       "split": f"s{i}"})),
        lambda: json.dumps({"prediction": "a b " * (SIZE // 8), "reference": "b a " * (SIZE // 8)}),
    ],
    "edits": [
        lambda: many(SIZE // 80, lambda i: json.dumps(
            {"task": f"t{i}", "input": "0.png", "instruction": "go"})),
    ],
    "replies": [
        lambda: "[" + "1" * SIZE + "x, 2]", lambda: "[" + BLANKS + "x, 2]",
        lambda: '{"error": "", "response": "' + '"' + BLANKS + "x", lambda: "<think>" * (SIZE // 8),
        lambda: '"error":' * (SIZE // 8), lambda: '{"score":' * (SIZE // 9),
    ],
}


def large(kind, text, folder, packed):
    """The call of a command on a large text."""
    if kind == "replies":
        return lambda: [parse(text) for parse in (
            judge.aurora_scores, judge.bytemorph_score, judge.worldprediction_score,
            mirrorapi.reply)]
    file, out = folder / ("d.jsonl.gz" if packed else "d.jsonl"), folder / "o.jsonl"
    data = text.encode()
    file.write_bytes(gzip.compress(data) if packed else data)
    (folder / "0.png").write_bytes(picture())
    flags = visual_flags(random.Random(0), folder)
    calls = {
        "check": quickly(command(convert.main, file, "--check")),
        "csv": command(convert.main, "--from-csv", file, "--out", out),
        "pages": command(mind2web.main, "--test", file, "--out", out),
        "mirror": command(mirrorapi.main, "--test", file, "--out", out),
        "pairs": command(score_scienceworld.main, "--pairs", file),
        "edits": command(aurora.main, "--data", file, "--tasks", "all", *flags),
    }
    return calls.get(kind) or (lambda: refusing(lambda: records.read(file)))


@target(0)
def size(rng, folder):
    """Large inputs, plain and gzipped, in turn."""
    kinds = [(kind, text, packed) for packed in (False, True) for kind, texts in LARGE.items()
             for text in texts if not (packed and kind == "replies")]
    kind, text, packed = kinds[rng.number % len(kinds)]
    return large(kind, text(), folder, packed)


# --- real processes -------------------------------------------------------------------------------

PROCESSES = [
    ["train.py", "--data", "{}"], ["-m", "envs.records", "{}", "--check"],
    ["-m", "envs.mirrorapi", "--test", "{}", "--out", "o.jsonl"],
    ["-m", "evals.scienceworld", "--pairs", "{}"], ["play.py", "nowhere", "--label", "{}"],
    ["-m", "evals.bytemorph", "--data", "{}", "--generated", "GEN", "--embedder", "pixels"],
    ["train.py", "--seed", "x"], ["bench.py", "--cases", "x"], ["pretrain.py", "--steps", "x"],
    ["reproduce.py", "--seeds", "x"], ["train.py", "--model", "{}"],
]


@target(0)
def process(rng, folder):
    """A whole process, on a file that no command takes."""
    file = put(rng, folder / "d.jsonl", b"\xff\xfe" + rng.randbytes(99), 1)
    argv = [word.format(file) for word in PROCESSES[rng.number % len(PROCESSES)]]
    left = rng.choice([{}, {"RANK": "1", "WORLD_SIZE": "2"}, {"PYTHONIOENCODING": "cp1252"},
                       {"LC_ALL": "C", "PYTHONUTF8": "0"}])

    def called():
        done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True,
                              env=os.environ | left, timeout=120)
        sys.stderr.write(done.stderr)
        return done.returncode
    return called


# --- running --------------------------------------------------------------------------------------

def peak():
    """MB that the process held at most since `forget`; None where the system does not say."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def forget():
    """Let `peak` begin anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def attempt(call):
    """(exit code or None, standard error, traceback or "") of a call in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in "oe")
    err.reconfigure(errors="backslashreplace")
    code, why = 0, ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            result = call()
            code = result if isinstance(result, int) else 0
        except SystemExit as stop:
            code = stop.code or 0
        except KeyboardInterrupt:
            raise
        except BaseException:                      # a panic of Rust is no Exception
            why = traceback.format_exc()
    return code, err.buffer.getvalue().decode(), why


def fault(name, code, said, why):
    """What is wrong with how a call ended; "" if nothing is."""
    lines = said.splitlines()
    if why:
        return why
    if code == 2 and not (len(lines) == 1 and lines[0].startswith("error: ")):
        return f"exit 2 with {said!r}"
    if code == 0 and not all(line.startswith("warning: ") for line in lines):
        return f"exit 0 with {said!r}"
    return "" if code in (0, 2) else f"exit {code} with {said!r}"


class Number(random.Random):
    """A generator that knows the number of its input."""

    def __init__(self, name, i):
        super().__init__(f"{name} {i}")
        self.number = i


def one(name, i):
    """(exit code, fault or "", seconds, MB) of input i of a target."""
    make, _ = TARGETS[name]
    with tempfile.TemporaryDirectory() as folder:
        call = make(Number(name, i), Path(folder))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        forget()
        held, begin = peak(), time.process_time()
        code, said, why = attempt(call)
        seconds = time.process_time() - begin
        most = (peak() or 0) - (held or 0)
    problem = fault(name, code, said, why)
    if not problem and seconds > SECONDS:
        problem = f"{seconds:.1f} CPU seconds"
    if not problem and most > MEGABYTES + TIMES * size / 2**20:
        problem = f"{most:.0f} MB for {size} bytes"
    return code, problem, seconds, most


def shares(n):
    """{target: number of inputs}, n in all."""
    whole = sum(share for _, share in TARGETS.values())
    return {name: -(-n * share // whole) for name, (_, share) in TARGETS.items() if share}


def wanted(n):
    """{target: number of inputs}: n, and the large ones and whole processes."""
    large = 2 * sum(map(len, LARGE.values())) - len(LARGE["replies"])
    return shares(n) | {"size": large, "process": 2 * len(PROCESSES)}


def run_all(counts, first=0, show=print):
    """[(target, number, fault)] of the inputs; shows a line a target."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loaded()
    faults = []
    for name, n in counts.items():
        codes, slowest, largest, begin = collections.Counter(), 0.0, 0.0, time.monotonic()
        for i in range(first, first + n):
            code, problem, seconds, most = one(name, i)
            codes[code] += 1
            slowest, largest = max(slowest, seconds), max(largest, most)
            if problem:
                faults.append((name, i, problem))
        show(f"{name:12}{n:6} inputs: {codes[0]:5} read, {codes[2]:5} refused; at most "
             f"{slowest:.2f} s, {largest:.0f} MB; {time.monotonic() - begin:.0f} s in all")
    return faults


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10_000, help="inputs [10000]")
    parser.add_argument("--first", type=int, default=0, help="number of the first [0]")
    parser.add_argument("--only", choices=sorted(TARGETS), help="one target")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts = {args.only: args.n} if args.only else wanted(args.n)
    faults = run_all(counts, args.first)
    for name, i, problem in faults:
        print(f"\n--only {name} --first {i} --n 1\n{problem}")
    print(f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
