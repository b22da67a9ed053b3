"""curves.png and report.html show what the run's files hold, load nothing, and lose no run."""
import html.parser
import json
import sys

import pytest
import torch
from conftest import lamp_rows, without_times
from test_train import SMALL

import train
from envs import records
from models import tiny
from support import curves, report, rundir
from support.curves import draw  # conftest puts nothing in this one's place
from support.opened import open_run

EVIL = "<script>alert(1)</script>"
ARGV = [*SMALL, "--no-rivals"]


@pytest.fixture(scope="module", autouse=True)
def small_model(small_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "FOLDER", small_folder)
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Transitions whose texts are HTML."""
    path = tmp_path_factory.mktemp("report") / "evil.jsonl"
    rows = [(x + f"\n{EVIL}", z + " <b>now</b>", y + f"\n{EVIL}") for x, z, y in lamp_rows()]
    records.write(path, [records.Transition(f"e{i // 3}", i % 3, *row)
                         for i, row in enumerate(rows)])
    return path


@pytest.fixture(scope="module")
def out(file):
    """A finished run, and how many evaluations each picture had seen."""
    seen = []

    def count(folder):
        seen.append(sum(line["phase"] == "eval" for line in lines(folder / "metrics.jsonl")))
        draw(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "draw", count)
        folder = file.parent / "run"
        assert train.main([*ARGV, "--data", str(file), "--out", str(folder)]) == 0
    return folder, seen


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Page(html.parser.HTMLParser):
    """Tags with their attributes, texts by the class of the innermost tag, rows of tables."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.rows, self.open = [], [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "tr":
            self.rows.append([])
        if tag not in ("meta", "img"):
            self.open.append((tag, attributes.get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        kind = self.open[-1] if self.open else ("", None)
        self.texts.append((*kind, data))
        if kind[0] in ("td", "th"):
            self.rows[-1].append(data)


@pytest.fixture(scope="module")
def page(out):
    return Page(out[0] / "report.html")


# --- curves ---------------------------------------------------------------------------------------

def test_curves_are_drawn_at_each_evaluation(out):
    folder, seen = out
    assert seen == [1, 2, 3, 3] and (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_points_of_the_curves_are_those_of_the_file(out):
    found, stages = curves.series(out[0])
    logged = lines(out[0] / "metrics.jsonl")
    for phase, panel in (("phase1", "Phase I, reward"), ("phase2", "Phase II, reward")):
        wanted = [(line["step"], line["reward"]) for line in logged if line["phase"] == phase]
        assert found[panel] == {"iteration 1": [p for p in wanted if p[1] is not None]}
    scores = [line for line in logged if line["phase"] == "eval"]
    assert stages == ["sft", "1/phase1", "1/phase2"]
    assert found["held-out"]["P, sampled"] == [
        (i, 100 * line["fwm"]["sampled"]) for i, line in enumerate(scores)]
    fit = [line for line in logged if line.get("model") == "IDM"]
    assert found["SFT, loss"]["IDM"] == [(line["step"], line["loss"]) for line in fit]


def test_the_rivals_come_after_all_stages(tmp_path):
    for part, stages in (("", ["sft", "iteration1/phase1"]), ("rivals", ["bootstrap"])):
        run = rundir.Run(train.parse([*SMALL, "--out", str(tmp_path / part)]), 0.0, part)
        for stage in stages:
            run.log("metrics.jsonl", phase="eval", stage=stage, iteration=0, step=0,
                    fwm={"sampled": 0.5, "exact_changed": None}, idm={"exact": 0.5})
        run.save_progress()
    found, stages = curves.series(tmp_path)
    assert stages == ["sft", "1/phase1", "+ bootstrap"]
    assert found["held-out"]["P, sampled"] == [(0, 50.0), (1, 50.0)]
    assert found["held-out"]["P, sampled, after Bootstrap"] == [(2, 50.0)]
    assert "P, changed" not in found["held-out"]


def test_a_running_mean_is_that_of_the_last_steps(monkeypatch):
    monkeypatch.setattr(curves, "WINDOW", 3)
    assert curves.running_mean([3.0, 5.0, 1.0, 6.0]) == [3.0, 4.0, 3.0, 4.0]


def test_a_missing_matplotlib_is_told_once(out, monkeypatch, capsys):
    monkeypatch.setattr(curves, "draw", draw)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = rundir.Run(train.parse([*ARGV, "--out", str(out[0].parent / "other")]), 0.0)
    curves.say.cache_clear()
    curves.update(run)
    curves.update(run)
    assert capsys.readouterr().out.count("pip install matplotlib") == 1


def test_a_failing_picture_changes_no_result(file, out, tmp_path, monkeypatch, capsys):
    def fail(_):
        raise RuntimeError("no room")

    monkeypatch.setattr(curves, "draw", fail)
    monkeypatch.setattr(report, "write", fail)
    curves.say.cache_clear()
    assert train.main([*ARGV, "--data", str(file), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert said.count("curves.png is not drawn: no room") == 1 and "report.html is not" in said
    results = [json.loads((folder / "results.json").read_text())
               for folder in (out[0], tmp_path / "run")]
    assert without_times(results[0]) == without_times(results[1])


# --- the report -----------------------------------------------------------------------------------

def test_the_report_loads_nothing(page):
    assert {tag for tag, _ in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "ul", "li", "code",
        "table", "tr", "th", "td", "div", "b", "details", "summary", "pre", "img"}
    for tag, attributes in page.tags:
        assert set(attributes) <= {"lang", "charset", "http-equiv", "content", "class", "alt",
                                   "src"}
        assert attributes.get("src", "data:").startswith("data:")
    assert page.open == []


def test_texts_of_a_run_are_escaped(page):
    said = [data for _, _, data in page.texts]
    assert any(EVIL in data for data in said) and any("<b>now</b>" in data for data in said)


def test_the_table_holds_the_scores_of_the_results(out, page):
    results = json.loads((out[0] / "results.json").read_text())
    head, *rows = page.rows[:len(results["stages"]) + 1]
    for row, stage in zip(rows, results["stages"][:-1]):
        cells = dict(zip(head, row))
        assert cells["stage"] == stage["name"]
        assert float(cells["changed"]) == pytest.approx(
            100 * stage["fwm"]["exact_changed"], abs=0.006)
        assert float(cells["IDM: exact"]) == pytest.approx(100 * stage["idm"]["exact"], abs=0.006)
        assert int(cells["steps"]) == stage["steps"]
    assert rows[-1][0] == "copy x"


def test_coloured_lines_are_those_that_differ(out, page):
    """The lines of a state are all different, so sets tell."""
    colours = {kind: {data for _, found, data in page.texts if found == kind}
               for kind in ("less", "more")}
    wanted = {"less": set(), "more": set()}
    for row in lines(out[0] / "samples.jsonl"):
        if row["stage"] in ("sft", "iteration1/phase2") and "z_hat" in row and "y_hat" in row:
            x, y = set(row["x"].split("\n")), set(row["y"].split("\n"))
            wanted["less"] |= {"- " + line for line in x - y}
            wanted["more"] |= {"+ " + line for line in y - x}
    for kind in wanted:
        assert wanted[kind] and wanted[kind] <= colours[kind]
    assert "- same" not in colours["less"] and not any(EVIL in line for line in wanted["less"])


def test_log_q_of_a_sample_is_what_q_gives(out, page):
    run = open_run(out[0])
    rows = [row for row in lines(out[0] / "samples.jsonl")
            if row["stage"] == "iteration1/phase2" and "z_hat" in row and "y_hat" in row]
    xs, zs, ys, y_hats = ([row[key] for row in rows] for key in ("x", "z", "y", "y_hat"))
    for key, states in (("reward_of_y", ys), ("reward", y_hats)):
        found = torch.tensor([row[key] for row in rows])
        assert torch.allclose(found, run.Q.logp(xs, zs, states), atol=1e-4)
    said = "".join(data for _, _, data in page.texts)
    assert f"log Q {rows[0]['reward_of_y']:.2f}" in said


def test_the_report_names_command_commit_and_settings(out, page):
    config = json.loads((out[0] / "config.json").read_text())
    said = [data for _, _, data in page.texts]
    assert config["command"] in said and (config["git"] or config["command"]) in said
    assert ["warmup_steps_idm", "4"] in page.rows


def test_pictures_stand_in_the_file(tmp_path):
    for name in ("picture-sft.png", "picture-iteration1-phase1.png", "rollout.gif"):
        (tmp_path / name).write_bytes(name.encode())
    stages = [{"name": name} for name in ("sft", "iteration1/phase1", "iteration1/phase2", "swirl")]
    said = report.pictures(tmp_path, {"stages": stages})
    assert said.count("<img") == 3 and said.count("data:image/gif;base64,cm9sbG91dC5naWY=") == 1


def test_a_report_is_written_anew_by_a_command(out, capsys):
    before = (out[0] / "report.html").read_text()
    (out[0] / "report.html").unlink()
    assert report.main([str(out[0])]) == 0
    assert (out[0] / "report.html").read_text() == before


def test_a_folder_without_a_run_gets_no_report(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        report.main([str(tmp_path)])
    assert error.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_fresh_deletes_curves_and_report(tmp_path):
    begin = lambda *argv: rundir.Run(train.parse([*SMALL, *argv, "--out", str(tmp_path)]), 0.0)
    begin()
    for name in ("curves.png", "curves.png.7.unfinished", "report.html"):
        (tmp_path / name).write_text("")
    begin("--fresh")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "lock"}
