"""Claims of `envs/mind2web.py`: x knows nothing of the next page, a cut keeps the target and tells
what it left out, faults are counted."""

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from envs import mind2web, records
from envs.records import BadData

TASKS = str(Path(__file__).parent / "data/mind2web.json")
MARK = re.compile(r"<!-- (\d+) characters left out -->")


def page(rng, n=40):
    """A random page of about n tags with ids from 1 on, as cleaned_html spells them."""
    parts = ["<html backend_node_id=\"0\">"]
    for i in range(1, n):
        parts.append(
            rng.choice(
                [
                    f'<div class="a b" backend_node_id="{i}"> ',
                    f'<text backend_node_id="{i}">wörd {i}</text>',
                    " </div> ",
                    f'<a title="5 &gt; 4" backend_node_id="{i}" data_backend_node_id="{i + 1}"/>',
                    "plain 😀 text ",
                ]
            )
        )
    return "".join(parts) + "</html>"


class Starts(HTMLParser):
    """The oracle: where the standard library sees each element begin, by backend_node_id (the pages
    have one line)."""
    def __init__(self, html):
        super().__init__()
        self.at = {}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.at.setdefault(dict(attrs).get("backend_node_id"), self.getpos()[1])


@pytest.mark.parametrize("seed", range(20))
def test_find_sees_what_an_html_parser_sees(seed):
    html = page(random.Random(seed))
    starts = Starts(html).at
    for i in map(str, range(42)):
        assert (
            mind2web.find(html, [i]) == starts.get(i) == mind2web.find(html, ["none", i, "0"][:2])
        )
    assert mind2web.find(html, []) is None and mind2web.find(html, ["none", "0"]) == 0


@pytest.mark.parametrize("seed", range(30))
def test_cut_keeps_the_target_whole_tags_and_the_count(seed):
    rng = random.Random(seed)
    html = page(rng)
    for node, at in Starts(html).at.items():
        for budget in (160, 200, 333, len(html) - 1, len(html), 10**6):
            text = mind2web.cut(html, at, budget)
            kept = MARK.sub("", text)
            assert len(kept) <= budget and kept in html
            assert len(kept) + sum(map(int, MARK.findall(text))) == len(html)
            assert html[at:html.index(">", at) + 1] in kept  # the target's tag is whole
            if kept != html:  # no half tags, and no more than one tag or text lost at each end
                assert kept.count("<") == kept.count(">") and len(kept) > budget - 2 * 80
                assert text.startswith("<!--") or kept == html[:len(kept)]
                assert text.endswith("-->") or kept == html[-len(kept):]
            else:
                assert text == html


def test_a_cut_where_there_is_no_tag_to_stop_at():
    assert (
        mind2web.cut("a" * 100, 50, 10)
        == "<!-- 45 characters left out -->" + "a" * 10 + "<!-- 45 characters left out -->"
    )
    assert mind2web.cut("<a " + "b" * 100 + ">", 0, 7) == "<a bbbb<!-- 97 characters left out -->"
    for html in ("a" * 100 + "<b>", "<b>" + "a" * 100):  # the one tag is out of the stretch
        assert (
            mind2web.cut(html, 50, 10)
            == f"<!-- 45 characters left out -->{'a' * 10}<!-- 48 characters left out -->"
        )
    assert (
        mind2web.cut("", 0, 7) == ""
        and mind2web.cut("ab", 2, 1) == "<!-- 1 characters left out -->b"
    )


def test_x_knows_nothing_of_the_next_page():
    rng = random.Random(0)
    h = page(rng)
    for keep_ids in (False, True):
        x = {
            mind2web.pair(h, other, ["7", "5"], budget=200, keep_ids=keep_ids)[0]
            for other in ["<html></html>", h, *(page(rng) for _ in range(20))]
        }
        assert len(x) == 1
    # and y is cut by the same function: as an x it would look the same
    for other in (page(rng) for _ in range(20)):
        assert (
            mind2web.pair(h, other, ["5"], budget=200)[1]
            == mind2web.pair(other, h, ["5"], budget=200)[0]
        )
    assert len({mind2web.pair(h, other, ["5"], budget=200, around="change")[0] for other in
                [h.replace(f"wörd {i}<", "news<") for i in range(40)]}) > 1  # the flag's price


def test_around_change_shows_the_change_of_a_long_page():
    h = "<p>same</p>" * 200 + '<a backend_node_id="3">old</a>' + "<p>same</p>" * 200
    x, y = mind2web.pair(h, h.replace("old", "new"), [], budget=100, around="change")
    assert "old" in x and "new" in y and x.replace("old", "new") == y
    x, y = mind2web.pair(h, h.replace("old", "new"), [], budget=100)
    assert x == y and x.startswith("<p>same</p>")


def test_ids_go_before_the_budget_is_spent():
    h = (
        "<p>same</p>" * 99
        + '<a\n backend_node_id="3" href="/x">go</a>'
        + '<p backend_node_id="4">z</p>' * 99
    )
    at = h.index("<a")
    html, moved = mind2web.without_ids(h, at)
    assert html == "<p>same</p>" * 99 + '<a href="/x">go</a>' + "<p>z</p>" * 99 and html[
        moved:
    ].startswith("<a href")


def test_targets():
    some = [
        {"backend_node_id": 4, "is_original_target": False}, "odd", {},
        {"backend_node_id": "5", "is_original_target": True}]
    assert mind2web.targets(some) == ["5", "4"] and mind2web.targets([]) == []


def test_the_official_file(tmp_path, capsys):
    rows, out = json.load(open(TASKS)), tmp_path / "d.jsonl"
    mind2web.main(["--test", TASKS, "--out", str(out), "--keep-ids", "--budget", "1000000"])
    got = records.read(out)
    assert [(tr.episode, tr.t) for tr in got] == [
        ("test-mind2web-aaaa-1", 0),
        ("test-mind2web-aaaa-1", 1),
        ("test-mind2web-aaaa-5", 0),
    ]
    for tr in got:  # whole pages: the benchmark's own words
        row = next(row for row in rows if tr.episode.endswith(row["annotation_id"]))
        assert (tr.x, tr.z, tr.y) == (
            row["actions"][tr.t]["cleaned_html"],
            row["action_reprs"][tr.t],
            row["actions"][tr.t + 1]["cleaned_html"],
        )
    told = capsys.readouterr()
    # the task without a second action_repr, without a page, seen before, without action_reprs
    assert (
        told.err
        == f"warning: 4 left out; the first: {TASKS}:107, row 3: 2 actions, but 1 action_reprs\n"
    )
    assert "pages cut, x and y apart: 0\n" in told.out and "no next page: 1\n" in told.out


def test_the_budget_on_the_official_file(tmp_path, capsys):
    out = tmp_path / "d.jsonl"
    mind2web.main(["--test", TASKS, "--out", str(out), "--budget", "200"])
    got, told = records.read(out), capsys.readouterr().out
    cut = [text for tr in got for text in (tr.x, tr.y) if MARK.search(text)]
    assert f"pages cut, x and y apart: {len(cut)}\n" in told and len(cut) == 4
    assert (
        f"characters left out of them: {sum(int(n) for text in cut for n in MARK.findall(text))}\n"
        in told
    )
    assert "pick crêpe" in got[0].x and "pick tea" in got[1].x
    assert "backend_node_id" not in got[0].x
    assert (
        "targets that are not on the page x: 1\n" in told
        and got[2].x == "<html> <body> <text>Danke</text> </body> </html>"
    )
    # the one change of the first transition, a line at the page's end, is out of reach
    assert (
        "(y = x but for the marks): 1\n" in told
        and MARK.sub("", got[0].x) == MARK.sub("", got[0].y)
        and got[0].x != got[0].y
    )


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda row: row.pop("actions"), '"actions" is missing'),
        (lambda row: row.update(action_reprs="a"), '"action_reprs" is not a list'),
        (lambda row: row["actions"][1].pop("cleaned_html"), 'action 2: .*"cleaned_html"'),
        (
            lambda row: row["actions"][0].update(pos_candidates=None),
            'action 1: .*"pos_candidates" is not a list',
        ),
        (lambda row: row["actions"][2].update(cleaned_html=" "), "action 2: .*is empty"),
        (lambda row: row["action_reprs"].pop(), "3 actions, but 2"),
        (lambda row: row["action_reprs"].__setitem__(1, None), 'action 2: "z"'),
        (lambda row: row["actions"].__setitem__(0, "click"), "action 1: not a JSON object"),
        (lambda row: row.pop("annotation_id"), "annotation_id"),
    ],
)
def test_a_broken_task(change, what):
    row = json.load(open(TASKS))[0]
    assert len(mind2web.task(row, "test", "f", "F:1, row 1")) == 2
    change(row)
    with pytest.raises(BadData, match="^F:1, row 1.*" + what):
        mind2web.task(row, "test", "f", "F:1, row 1")


def test_a_budget_of_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        mind2web.main(["--test", TASKS, "--out", str(tmp_path / "d.jsonl"), "--budget", "0"])
    assert capsys.readouterr().err == "error: --budget cannot be 0; give characters, as in 4000\n"
