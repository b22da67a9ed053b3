"""Claim: whatever a judge replies gives numbers within the scale or a counted miss; a question is
asked once, and a cut run goes on."""

import base64
import http.server
import io
import json
import math
import random
import re
import threading
import time

import numpy as np
import pytest
from test_visual import PIL, make_aurora, refused, run, save

from evals import aurora, judge

PARSERS = {
    judge.aurora_scores: ("[", 10), judge.bytemorph_score: ("Score", 100),
    judge.worldprediction_score: ("score", 10)}


# ---- Replies -------------------------------------------------------------------------------------

# reply, ours, with --released
BY_HAND = {
    judge.aurora_scores: [
        ("[7, 8]", (7, 8), (7, 8)),
        ('{"score": [0, 10.0], "reasoning": "[1]"}', (0, 10), (0, 10)),
        ("[7.9, .5]", (7.9, 0.5), (7, 0)),
        ("[7,\n8]", (7, 8), None),
        ("[1]\n[2, 3]", None, None),
        ("[11, 3]", None, (11, 3)),
        ("[-1, 3]", None, (-1, 3)),
        ("[True, 3]", None, (1, 3)),
        ("['a', 7, 8]", None, (7, 8)),
        ("[7, 8, 9]", (7, 8), (7, 8)),
        ("[7]", None, None),
        ("", None, None),
        ("][3, 4", None, None),
        ("[\u0667, 8]", None, None),
        ("[1e1, 2]", None, (10, 2)),
        ("[{{}: 1}, 2]", None, None),
        ("[1e999, 2]", None, None),
    ],
    judge.bytemorph_score: [
        ('{"Score": 85}', 85, 85),
        ('a {"Score": 0.5} {"Score": 9}', 0.5, 0.5),
        ('{"Score": "85"}', None, None),
        ('{"score": 85}', None, None),
        ('{"Score": 101}', None, 101),
        ('{"Score": true}', None, 1),
        ('{"Score": NaN}', None, None),
        ('{} {"Score": 3}', None, None),
        ('{"a": {"Score": 3}}', None, None),
        ('{"Score": 1' + "0" * 400 + "}", None, None),
        ('} {"Score": 3}', 3, 3),
    ],
    judge.worldprediction_score: [
        ('{"score": 7}', 7, 7),
        ('x {"score": 7, "explanation": "a } b"} y', 7, 7),
        ('{"score": 7} {"score": 8}', None, None),
        ('{"score": "7"}', None, 7),
        ('{"score": "x"}', None, None),
        ('{"score": 10.5}', None, 10.5),
        ('{"score": false}', None, 0),
        ('{"score": null}', None, None),
        ('{"score": Infinity}', None, None),
        ('{"score": [7]}', None, None),
    ],
}


@pytest.mark.parametrize("parse", PARSERS)
def test_replies_by_hand(parse):
    for reply, ours, released in BY_HAND[parse]:
        assert (parse(reply), parse(reply, released=True)) == (ours, released), reply


def hostile():
    """1,000 replies: well-formed ones, and ones whose numbers are anything."""
    pick, numbers = (
        random.Random(0),
        [
            "7",
            "8",
            "7.9",
            "0",
            "10",
            "1e1",
            "-1",
            "11",
            "101",
            "1e999",
            "NaN",
            "true",
            "True",
            '"8"',
            "\u0667",
        ],
    )
    others = [
        "{", "}", "[", "]", '"Score"', '"score"', "'score'", ":", ",", "-Infinity", "null",
        "\uff17", "\ud800", "\n", " ", "()", "a", "1_0", "0x7", "9" * 400, "'", "\\", "\0", "1+1j",
        "not "]
    shapes = [
        "%s", "[%s, %s]", '{"Score": %s}', '{"score": %s}',
        '{"score": [%s, %s], "reasoning": "%s"}', 'So: {"Score": %s} {"score": %s}']
    for i in range(1000):
        values = [
            "".join(pick.choices(numbers + others, k=pick.randrange(9)))
            if pick.random() < 0.4
            else pick.choice(numbers)
            for _ in "123"
        ]
        yield shapes[i % 6] % tuple(values[:shapes[i % 6].count("%s")])


def by_regex(parse, reply):
    """The number where the benchmark says it is, by other means: regular expressions that
    backtrack, and strict JSON."""
    key, top = PARSERS[parse]
    found = re.search(
        {"[": r"\[(.*?)\]", "Score": r"(\{[^}]*\})", "score": r"(\{.*\})"}[key], reply, re.DOTALL
    )
    try:
        numbers = (
            [json.loads(found[1])[key]]
            if key != "["
            else [
                float(part) if re.fullmatch(r"\s*-?[0-9.]+\s*", part) else None
                for part in found[1].split(",")[:2]
            ]
        )
    except (TypeError, ValueError, KeyError):
        return None
    if len(numbers) != (2 if key == "[" else 1) or not all(
        type(n) in (int, float) and 0 <= n <= top for n in numbers
    ):
        return None
    return tuple(numbers) if key == "[" else numbers[0]


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("parse", PARSERS)
def test_no_reply_gives_a_number_that_it_does_not_hold(parse):
    told = 0
    for reply in hostile():
        assert parse(reply) == by_regex(parse, reply), reply
        told += parse(reply) is not None
        found = parse(reply, released=True)
        assert found is None or all(
            map(math.isfinite, found if isinstance(found, tuple) else [found])
        )
    assert 10 < told < 300


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("parse", PARSERS)
def test_no_reply_stalls_or_crashes_a_parser(parse):
    start = time.time()
    for bomb in (
        "[" * 200000,
        "{" * 200000,
        "[" * 90 + "]",
        "[" + "-" * 200000 + "1, 2]",
        "[" * 200000 + "]" * 200000,
        "]" * 200000 + "[",
        '{"score":' * 50000 + "}" * 50000,
        '{"Score": ' + "[" * 100000 + "}",
        "[" + "1+" * 900 + "1, 2]",
        "\n[" * 100000,
        '{"score": ' + "9" * 5000 + "}",
        '{"Score": ' + "9" * 5000 + "}",
    ):
        assert parse(bomb) is None and parse(bomb, released=True) is None
    assert time.time() - start < 2


# ---- Over the network ----------------------------------------------------------------------------

class Server(http.server.BaseHTTPRequestHandler):
    """Answers with what `script` holds, a status or the content of a reply, then with [7, 8]. Keeps
    what was asked."""
    script, seen = [], []

    def do_POST(self):
        Server.seen.append(
            (
                self.path,
                self.headers["Authorization"],
                json.loads(self.rfile.read(int(self.headers["Content-Length"]))),
            )
        )
        step = Server.script.pop(0) if Server.script else "[7, 8]"
        self.send_response(step if isinstance(step, int) else 200)
        self.end_headers()
        self.wfile.write(
            b"{"
            if step == 202
            else json.dumps({"choices": [{"message": {"content": step}}]}).encode()
        )

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    Server.script, Server.seen = [], []
    httpd = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=httpd.serve_forever, args=(.01,), daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{httpd.server_port}/v1/")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    yield
    httpd.shutdown()
    httpd.server_close()


def ask(tmp_path):
    """(arguments, {id: images}, the file of replies, the result) of a run that asked the judge: the
    first, its copy (no content), two that fail."""
    argv, kept = make_aurora(tmp_path)
    file = tmp_path / "r.jsonl"
    argv += ["--embedder", "pixels", "--replies", file]
    Server.script = [500, 202, "[1, 2]", 429, None, 400, 503, 503, 503, 503]
    return argv, kept, file, run(aurora, tmp_path, *argv, "--judge", "m")


def test_a_request_holds_key_text_and_images(server, tmp_path):
    _, kept, _, _ = ask(tmp_path)
    path, key, body = Server.seen[0]
    text, *parts = body["messages"][0]["content"]
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert "turn left" in text["text"]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 512)
    images = [
        PIL.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1])))
        for part in parts
    ]
    assert [
        (np.asarray(image) == kept["aurora_00001"][i]).all() for image, i in zip(images, (1, 3))
    ] == [True, True]


def test_a_failed_reply_is_counted_and_asked_again(server, tmp_path):
    argv, _, file, result = ask(tmp_path)
    assert len(result["judge_missing"]) == 3 and result["judge"] == "m"
    assert len(file.read_text().splitlines()) == 12
    # cut inside the last line
    file.write_text(file.read_text()[:-20])
    Server.seen.clear()
    result = run(aurora, tmp_path, *argv, "--judge", "m")
    # asked: what failed, what was cut; a broken line
    assert len(Server.seen) == 3 and len(result["judge_missing"]) == 2


def test_recorded_replies_give_the_same_scores(server, tmp_path):
    argv, _, _, result = ask(tmp_path)
    Server.seen.clear()
    again = run(aurora, tmp_path, *argv)
    assert again["scores"] == result["scores"] and again["judge"] == "m (recorded)"
    assert not Server.seen


def test_a_reply_to_another_image_does_not_count(server, tmp_path):
    argv, _, _, result = ask(tmp_path)
    Server.seen.clear()
    save(tmp_path / "GEN/fullset/ag/aurora_00006.png")
    missing = run(aurora, tmp_path, *argv)["judge_missing"]
    assert len(missing) == len(result["judge_missing"]) + 1 and not Server.seen


def test_replies_of_another_judge_are_refused(server, tmp_path, capsys):
    argv, _, _, _ = ask(tmp_path)
    assert "another judge" in refused(aurora, capsys, *argv, "--judge", "other")


def test_a_refused_key_is_told_but_not_shown(server, tmp_path, capsys):
    argv, _ = make_aurora(tmp_path)
    argv += ["--embedder", "pixels", "--replies", tmp_path / "new.jsonl", "--judge", "m"]
    Server.script = [401]
    err = refused(aurora, capsys, *argv)
    assert "HTTP 401" in err and "secret" not in err and not (tmp_path / "new.jsonl").exists()


@pytest.mark.parametrize("jpeg", [False, True])
def test_messages_hold_the_images(jpeg):
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    system, user = judge.question(
        "how?", [image, 255 - image], system="be strict", jpeg=jpeg, detail="high"
    )
    assert system == {"role": "system", "content": "be strict"} and user["content"][0] == {
        "type": "text",
        "text": "how?",
    }
    for part, expected in zip(user["content"][1:], (image, 255 - image), strict=True):
        head, data = part["image_url"]["url"].split(",")
        read = np.asarray(PIL.open(io.BytesIO(base64.b64decode(data)))).astype(int)
        assert (
            head == f"data:image/{'jpeg' if jpeg else 'png'};base64"
            and part["image_url"]["detail"] == "high"
        )
        assert np.abs(read - expected).max() <= (30 if jpeg else 0)
    assert len(judge.question("how?", [])) == 1
