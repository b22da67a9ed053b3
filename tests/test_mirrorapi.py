"""Claims of `envs/mirrorapi.py`: x, z, y are the row's own words, both modes' replies are read,
broken rows are counted."""

import ast
import json
from pathlib import Path

import pytest

from envs import mirrorapi, official, records
from envs.records import BadData

TEST = str(Path(__file__).parent / "data/mirrorapi.json")


def converted(tmp_path, *argv):
    out = tmp_path / "d.jsonl"
    mirrorapi.main(["--test", TEST, "--out", str(out), *argv])
    return {tr.episode: tr for tr in records.read(out)}


def test_rows_become_transitions(tmp_path, capsys):
    rows, got = json.load(open(TEST)), converted(tmp_path)
    assert list(got) == [f"test-mirrorapi-{n}" for n in (1, 2, 4, 8, 9)]  # 3, 5, 6, 7 are broken
    for episode, tr in got.items():
        row = rows[int(episode.rpartition("-")[2]) - 1]
        system, _, doc = tr.x.rpartition("\n\nAPI doc:\n")
        # Python itself reads the two dicts: neither lost a character, nor took one of the other
        assert (
            system == row["system"]
            and ast.literal_eval(doc)["tool_description"] == "Weather — 天気"
        )
        assert isinstance(ast.literal_eval(tr.z), dict) and tr.y == row["output"] and tr.t == 0
        assert row["instruction"] == f"API doc:\n{doc}\n\nRequest:\n{tr.z}"
    assert got["test-mirrorapi-2"].z == "{'city': '東京', 'note': 'Request: none'}"
    assert got["test-mirrorapi-8"].x.startswith("[CHAIN_OF_THOUGHT]")
    told = capsys.readouterr()
    assert (
        told.err
        == f'warning: 4 left out; the first: {TEST}:12, row 3: the key "instruction" is missing\n'
    )
    assert "outputs without a readable error and response, kept: 1\n" in told.out


def test_no_errors(tmp_path, capsys):
    assert list(converted(tmp_path, "--no-errors")) == [f"test-mirrorapi-{n}" for n in (1, 2, 8, 9)]
    assert "outputs that tell an error, left out: 1\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row, what",
    [
        ("text", "not a JSON object"),
        (None, "not a JSON object"),
        ({"instruction": 3}, '"instruction" is not a str'),
        (
            {"instruction": "API doc:\n{}\n\nRequest:\n", "system": "s", "output": "o"},
            '"z" is empty',
        ),
        (
            {"instruction": "API doc:\n{}\n\nRequest:\n{}", "system": "s", "output": " "},
            '"y" is empty',
        ),
        ({"instruction": "API doc:\n{}\n\nRequest:\n{}", "output": "o"}, '"system" is missing'),
        (
            {"instruction": "API doc:\n{}\n\nRequest:\n{}", "system": "s", "output": "\ud83d"},
            "surrogate",
        ),
        (
            {"instruction": "API doc: {} Request: {}", "system": "s", "output": "o"},
            'no line "Request:"',
        ),
    ],
)
def test_a_broken_row(row, what):
    with pytest.raises(BadData, match="^d.json:7, row 2: .*" + what):
        mirrorapi.transition(row, "e", "d.json:7, row 2")


def test_a_request_on_the_same_line():
    row = {"system": "s", "instruction": "API doc: {'a': 1}\n  Request: {'b': 2}", "output": "o\n"}
    tr = mirrorapi.transition(row, "e", "")
    assert (tr.x, tr.z, tr.y) == ("s\n\nAPI doc: {'a': 1}", "{'b': 2}", "o\n")


@pytest.mark.parametrize(
    "mechanism", [{}, {"mechanism_of_the_api": 'It says "error", then {looks} up.'}]
)
def test_reply_of_a_text_that_was_cut_anywhere(mechanism):
    response = "{'a': \"b\\c\", 'd': 'é😀\n'}"
    for error in ("", "no \"city\""):
        text = json.dumps({**mechanism, "error": error, "response": response})
        assert mirrorapi.reply(text) == (error, response)
        begin = text.index('"response": "') + len('"response": "')
        inside = lambda s: json.dumps(s)[1:-1]
        for end in range(len(text)):
            got = mirrorapi.reply(text[:end])
            if end < begin:
                assert got is None
            else:  # escapes stay; a backslash that was cut off is no quote
                assert (
                    got[0] == inside(error)
                    and inside(response).startswith(got[1])
                    and len(got[1]) >= end - begin - 2
                )


def test_reply_of_other_texts():
    assert mirrorapi.reply('{"error": null, "response": {"a": "é"}}') == ("null", '{"a": "é"}')
    assert mirrorapi.reply('Here: {"error":"","response":"fine" }\n') == ("", "fine")
    for text in ("", "[]", "7", '{"error": ""}', "Sorry.", "[" * 10**5):
        assert mirrorapi.reply(text) is None


def test_jsonl_and_list_agree(tmp_path):
    rows = json.load(open(TEST))
    (tmp_path / "mirrorapi.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = (
        [row for _, _, row in official.rows(str(p), [])]
        for p in (TEST, tmp_path / "mirrorapi.jsonl")
    )
    assert one == two == rows
