"""Claim: the scorers of the text benchmarks give the packages' numbers, and count what they cannot
score."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_bertscore import roberta  # noqa: F401 (a fixture)
from test_metrics import BY_HAND, PAIRS

from evals import common, mind2web, scienceworld, stabletoolbench

ROOT, DATA = Path(__file__).parent.parent, Path(__file__).parent / "data"
SCORERS = {"stabletoolbench": stabletoolbench, "scienceworld": scienceworld, "mind2web": mind2web}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(scorer, tmp_path, *argv):
    """What the scorer writes with --json."""
    out = tmp_path / "scores.json"
    assert scorer.main([*argv, "--json", str(out)]) == 0
    return json.loads(out.read_text())


def refused(scorer, capsys, *argv):
    """The one line on standard error of a command that exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        scorer.main(list(argv))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err


# ---- Against the packages ------------------------------------------------------------------------

@pytest.mark.parametrize("preset", ["mirrorapi", "word"])
def test_stabletoolbench_is_nltk_with_its_rounding(preset, tmp_path):
    nltk_bleu = pytest.importorskip("nltk.translate.bleu_score")
    tokens, method3 = (
        {"mirrorapi": list, "word": str.split}[preset], nltk_bleu.SmoothingFunction().method3)
    splits = {s: PAIRS[i::5] for i, s in enumerate(stabletoolbench.SPLITS)}
    file = write(
        tmp_path / "pairs.jsonl",
        [dict(prediction=p, reference=r, split=s) for s in splits for p, r in splits[s]],
    )
    result = run(stabletoolbench, tmp_path, "--pairs", file, "--preset", preset)
    expected = {}
    for s, pairs in splits.items():
        each = [
            round(
                100 * nltk_bleu.sentence_bleu([tokens(r)], tokens(p), smoothing_function=method3), 4
            )
            for p, r in pairs
        ]
        expected[s] = round(sum(each) / len(each), 2)
        assert result["scores"][s]["model"]["bleu"] == expected[s] and result["scores"][s][
            "n"
        ] == len(pairs)
    assert result["scores"]["average"]["model"]["bleu"] == pytest.approx(
        sum(expected.values()) / 5, abs=1e-6
    )
    assert result["preset"] == preset and result["splits_absent"] == []
    assert list(result["scores"]) == [*splits, "average"]


@pytest.mark.parametrize("preset", ["mirrorapi", "word"])
def test_stabletoolbench_bleu_by_hand(preset, tmp_path):
    space = "" if preset == "mirrorapi" else " "
    pair = dict(prediction=space.join("abcd"), reference=space.join("abce"))
    file = write(tmp_path / "one.jsonl", [pair])
    one = run(stabletoolbench, tmp_path, "--preset", preset, "--pairs", file)
    # (3/4 2/3 1/2 1/2) ** 1/4
    assert one["scores"]["all"]["model"]["bleu"] == 59.46


@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_l_is_the_packages_for_every_subset(stemmer, tmp_path):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stemmer)
    rows = [(p, r, r if i % 3 else PAIRS[i - 1][1]) for i, (p, r) in enumerate(PAIRS)]
    file = write(
        tmp_path / "pairs.jsonl", [dict(prediction=p, reference=r, x=x) for p, r, x in rows]
    )
    mean = lambda pairs: (
        sum(100 * scorer.score(r, p)["rougeL"].fmeasure for p, r in pairs) / len(pairs)
    )
    changed = [row for row in rows if row[1] != row[2]]
    assert 100 < len(changed) < 500
    for scorer_module in (scienceworld, mind2web):
        result = run(scorer_module, tmp_path, "--pairs", file, *["--stemmer"] * stemmer)
        row = result["scores"]["all"]
        assert (row["n"], row["n_changed"], result["stemmer"]) == (
            len(PAIRS),
            len(changed),
            stemmer,
        )
        assert row["model"]["rouge_l"] == pytest.approx(
            mean([(p, r) for p, r, _ in rows]), abs=1e-6
        )
        assert row["changed"]["rouge_l"] == pytest.approx(
            mean([(p, r) for p, r, _ in changed]), abs=1e-6
        )
        assert row["copy_x"]["rouge_l"] == pytest.approx(
            mean([(x, r) for _, r, x in rows]), abs=1e-6
        )
        assert row["copy_x_changed"]["rouge_l"] == pytest.approx(
            mean([(x, r) for _, r, x in changed]), abs=1e-6
        )
        assert row["copy_x_changed"]["exact"] == 0 and row["copy_x"]["exact"] == pytest.approx(
            1 - len(changed) / len(rows)
        )
        assert row["model"]["exact"] == sum(p == r for p, r, _ in rows) / len(rows)


def test_bertscore_is_bert_scores(roberta, tmp_path, capsys):  # noqa: F811
    package = pytest.importorskip("bert_score")
    pairs = [(p, r) for p, r in BY_HAND if p.strip() and r.strip()]
    rows = [dict(prediction=p, reference=r, x=r if i % 2 else p) for i, (p, r) in enumerate(pairs)]
    file = write(tmp_path / "pairs.jsonl", rows)
    F = lambda key, some: (
        100
        * package.score(
            [row[key] for row in some],
            [row["reference"] for row in some],
            model_type=roberta,
            num_layers=2,
            batch_size=1,
        )[2]
        .mean()
        .item()
    )
    result = run(scienceworld, tmp_path, "--pairs", file, "--encoder", roberta, "--layer", "2")
    row, changed = result["scores"]["all"], [row for row in rows if row["x"] != row["reference"]]
    assert row["model"]["bertscore"] == pytest.approx(F("prediction", rows), abs=1e-3)
    assert row["copy_x"]["bertscore"] == pytest.approx(F("x", rows), abs=1e-3)
    assert row["changed"]["bertscore"] == pytest.approx(F("prediction", changed), abs=1e-3)
    assert (result["encoder"], result["layer"], result["rescaled"], result["texts"]) == (
        roberta,
        2,
        False,
        2 * len(pairs),
    )
    assert (
        f"{roberta}, layer 2, not rescaled; {result['texts_cut']} of {2 * len(pairs)}"
        in capsys.readouterr().out
    )
    assert 2 <= result["texts_cut"] < len(pairs)


# ---- By hand -------------------------------------------------------------------------------------

def test_average_is_over_splits_and_all_over_pairs(tmp_path, capsys):
    rows = [dict(prediction="a", reference="a", x="b", split="ood")] + \
           [dict(prediction="c", reference="d", x="d", split="id_low") for _ in range(3)]
    file = write(tmp_path / "pairs.jsonl", rows)
    result = run(stabletoolbench, tmp_path, "--pairs", file)
    assert (
        list(result["scores"]) == ["id_low", "ood", "average"]
        and result["scores"]["average"]["n"] == 4
    )
    assert result["scores"]["average"]["model"]["exact"] == .5
    assert result["scores"]["average"]["copy_x"]["exact"] == .5
    assert (
        result["scores"]["average"]["changed"] is None
        and result["scores"]["ood"]["changed"]["exact"] == 1
    )
    assert result["splits_absent"] == ["id_high", "id_medium", "ood_failure"]
    out, err = capsys.readouterr()
    assert (
        "2 of 5 splits" in err
        and "mirrorapi" in out
        and "no stemmer" in out
        and "changed only, copy x" in out
    )
    result = run(scienceworld, tmp_path, "--pairs", file)
    assert (
        list(result["scores"]) == ["id_low", "ood", "all"]
        and result["scores"]["all"]["model"]["exact"] == 0.25
    )


def test_split_without_a_good_row_is_not_averaged(tmp_path, capsys):
    good, bad = (
        dict(prediction=p, reference="abcd", split=s)
        for p, s in (("abcd", "ood"), (None, "id_low"))
    )
    result = run(stabletoolbench, tmp_path, "--pairs", write(tmp_path / "pairs.jsonl", [good, bad]))
    assert result["scores"]["average"]["model"] == {"bleu": 100, "rouge_l": 100, "exact": 1}
    assert (
        result["scores"]["id_low"]["model"] is None and result["scores"]["id_low"]["n_missing"] == 1
    )
    assert "id_low" in result["splits_absent"] and "id_low" in capsys.readouterr().err


def test_copy_x_needs_an_x_in_every_pair(tmp_path, capsys):
    file = write(tmp_path / "pairs.jsonl", [dict(prediction="a", reference="a", x="b", split="s"),
                                            dict(prediction="a", reference="b")])
    scores = run(
        mind2web,
        tmp_path,
        "--pairs",
        write(tmp_path / "b.jsonl", [dict(prediction="a", reference="a")]),
    )["scores"]
    assert scores["all"]["copy_x"] is scores["all"]["n_changed"] is scores["all"]["changed"] is None
    assert "no copy-x" in capsys.readouterr().out
    scores = run(scienceworld, tmp_path, "--pairs", file)["scores"]
    assert (
        list(scores) == ["s", "no split", "all"]
        and scores["s"]["copy_x"]["exact"] == 0
        and scores["all"]["copy_x"] is None
    )
    assert scores["no split"]["copy_x"] is None and scores["all"]["copy_x_changed"] is None


# ---- Official files, missing and broken rows -----------------------------------------------------

def test_llama_factorys_file_with_broken_rows(tmp_path, capsys):
    file = str(DATA / "generated_predictions.jsonl")
    result = run(stabletoolbench, tmp_path, "--pairs", f"ood={file}")
    assert (result["n"], result["n_missing"]) == (3, 3)
    row = result["scores"]["ood"]
    assert (row["n"], row["n_missing"], row["model"]["exact"], row["copy_x"]) == (
        3,
        3,
        pytest.approx(1 / 3),
        None,
    )
    assert result["first_missing"] == f"{file}:2: \"predict\" is null; give a string"
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("warning: 3 of 6 rows") and f"{file}:2:" in err[0] and len(err) == 2
    # the empty answer counts 0, the others not
    assert 0 < row["model"]["bleu"] < 100


def test_predictions_and_references_zip_by_line(tmp_path, capsys):
    files = [str(DATA / side / "id_high.jsonl") for side in ("predictions", "reference")]
    result = run(stabletoolbench, tmp_path, "--predictions", files[0], "--references", files[1])
    assert (result["n"], result["n_missing"], result["scores"]["id_high"]["n_missing"]) == (3, 3, 3)
    # lines 1, 2 and 5
    assert result["scores"]["id_high"]["model"]["exact"] == pytest.approx(2 / 3)
    assert result["first_missing"].startswith(f"{files[0]}:3: not valid JSON")
    pairs, missing = common.read_zipped(*files)
    assert [m.why.split(": ")[0] for m in missing] == [f"{files[0]}:{n}" for n in (3, 4, 6)]
    assert files[1] in missing[2].why and [p.reference for p in pairs][2] == '{"error": "late"}'
    err = refused(
        stabletoolbench, capsys, "--predictions", "ood=" + files[0], "--references", files[1]
    )
    assert "ood" in err and "id_high" in err
    err = refused(
        stabletoolbench, capsys, "--predictions", "odd=" + files[0], "--references", files[1]
    )
    assert "no split is called odd" in err


BROKEN = [
    '{"prediction": ', '[1]', '{"prediction": "a"}', '{"reference": "a"}',
    '{"prediction": 1, "reference": "a"}', '{"prediction": "\\ud800", "reference": "a"}',
    '{"prediction": "a", "reference": "a", "x": 1}',
    '{"prediction": "a", "reference": "a", "split": [1]}', "[" * 100000, "9" * 5000]


@pytest.mark.parametrize("name", SCORERS)
def test_a_broken_row_is_counted_and_never_scored(name, tmp_path, capsys):
    good, alone = "{\"prediction\": \"a b\", \"reference\": \"a b\"}\n", tmp_path / "broken.jsonl"
    for raw in [*BROKEN, "\xff"]:
        file = tmp_path / "pairs.jsonl"
        file.write_bytes((good + "\n" + raw + "\n" + good).encode("latin-1"))
        result = run(SCORERS[name], tmp_path, "--pairs", str(file))
        assert (result["n"], result["n_missing"]) == (2, 1) and result["first_missing"].startswith(
            f"{file}:3: "
        )
        err = capsys.readouterr().err
        assert err.startswith("warning: 1 of 3 rows") and err.count("\n") == 1 and len(err) < 400
        alone.write_bytes(raw.encode("latin-1"))
        assert f"{alone}:1: " in refused(
            SCORERS[name], capsys, "--pairs", str(alone), "--json", str(tmp_path / "none.json")
        )
    assert not (tmp_path / "none.json").exists()


def test_unknown_split_is_refused_if_splits_are_known(tmp_path, capsys):
    file = write(
        tmp_path / "pairs.jsonl",
        [dict(prediction="a", reference="a", split=s) for s in ("ood", "odd")],
    )
    result = run(stabletoolbench, tmp_path, "--pairs", file)
    assert (
        result["n_missing"] == 1
        and "odd" in result["first_missing"]
        and "ood_failure" in result["first_missing"]
    )
    assert "odd" in refused(stabletoolbench, capsys, "--pairs", f"odd={file}")
    assert run(scienceworld, tmp_path, "--pairs", f"odd={file}")["scores"]["odd"]["n"] == 2
    named = tmp_path / "ood_failure.jsonl"
    write(named, [dict(prediction="a", reference="a")])
    assert list(run(stabletoolbench, tmp_path, "--pairs", str(named))["scores"]) == [
        "ood_failure",
        "average",
    ]


# ---- The command line ----------------------------------------------------------------------------

@pytest.mark.parametrize("name", SCORERS)
def test_as_a_command(name, tmp_path):
    command = [sys.executable, "-m", f"evals.{name}"]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    helped = subprocess.run([*command, "--help"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (
        helped.returncode == 0
        and "--pairs" in helped.stdout
        and "Claim:" in helped.stdout
        and not helped.stderr
    )
    wrong = subprocess.run(
        [*command, "--pairs", "nowhere.jsonl"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert (
        wrong.returncode == 2
        and wrong.stderr == "error: nowhere.jsonl: there is no such file; check the path\n"
    )


def test_no_scorer_needs_torch_for_pairs(tmp_path):
    file = write(tmp_path / "pairs.jsonl", [dict(prediction="a", reference="a")])
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; from evals import "
        "scienceworld; "
        f"scienceworld.main(['--pairs', {file!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "100.00" in done.stdout


def test_wrong_arguments_are_one_line(tmp_path, capsys):
    file = write(tmp_path / "pairs.jsonl", [dict(prediction="a", reference="a")])
    empty = write(tmp_path / "empty.jsonl", [])
    for argv, words in (
        ([], "--pairs"),
        (["--pairs", file, "--run", "x"], "--run"),
        (["--predictions", file], "--references"),
        (["--predictions", file, file, "--references", file], "as many"),
        (["--pairs", empty], "no row"),
        (["--run", str(tmp_path)], "config.json"),
        (["--pairs", str(tmp_path)], "cannot read"),
        (["--pairs", file, "--layer", "3"], "--encoder"),
        (["--pairs", file, "--encoder", "./none"], "./none"),
        (["--pairs", file, "--encoder", "./none", "--layer", "3"], "./none"),
        (["--pairs", file, "--json", str(tmp_path / "no" / "x.json")], "no such folder"),
        (["--pairs", file, "--json", str(tmp_path)], "another name"),
    ):
        assert words in refused(scienceworld, capsys, *argv)
    assert "preset" in refused(stabletoolbench, capsys, "--pairs", file, "--preset", "nltk")


def test_an_unfinished_run_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"settings": {}}')
    assert "not finished" in refused(scienceworld, capsys, "--run", str(tmp_path))


def test_a_run_without_its_models_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"settings": {}}')
    (tmp_path / "results.json").write_text('{"splits": {"test": 6}}')
    assert "cannot open" in refused(scienceworld, capsys, "--run", str(tmp_path))


def test_json_replaces_only_what_a_scorer_wrote(tmp_path, capsys):
    file, out = (
        write(tmp_path / "pairs.jsonl", [dict(prediction="a", reference="a")]),
        tmp_path / "scores.json")
    for text in ("mine", '["benchmark"]', '{"version": 1}'):
        out.write_text(text)
        refused(scienceworld, capsys, "--pairs", file, "--json", str(out))
        assert out.read_text() == text
    out.unlink()
    run(scienceworld, tmp_path, "--pairs", file)
    assert run(mind2web, tmp_path, "--pairs", file)["benchmark"] == "mind2web"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs.jsonl", "scores.json"]
