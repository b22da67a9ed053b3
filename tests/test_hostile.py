"""Bad and hostile input: nothing is lost silently, no reader takes long or much memory, no path
leads out of its folder."""
import ast
import gzip
import io
import json
import os
import sys
import time
import tracemalloc
import types

import numpy as np
import pytest
from test_house import FILES
from test_judge import Server, server  # noqa: F401 (a fixture)
from test_visual import PIL, clip, make_aurora, picture, refused, run, save  # noqa: F401

import play
import reproduce
import settings
from envs import convert, images, mind2web, mirrorapi, official, records
from envs.records import BadData
from evals import aurora, bytemorph, common, judge, scienceworld, visual, worldprediction
from evals import mind2web as pages
from models import parallel, pretrained, tiny
from support import check_file, loading, opened

TWICE = b'{"episode": "e", "t": 0, "x": "on", "x": "lost", "z": "go", "y": "off"}\n'


def seconds(call):
    """CPU seconds of a call."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def one_line(capsys, call):
    """The one line on standard error of a call that exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return said


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- JSON -----------------------------------------------------------------------------------------

def test_a_key_that_comes_twice_is_no_transition(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(TWICE)
    with pytest.raises(BadData, match="d.jsonl:1: .*a key comes twice"):
        records.read(tmp_path / "d.jsonl")


def test_a_key_that_comes_twice_is_no_pair_and_no_score(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prediction": "a", "prediction": "b", "reference": "b"}')
    pairs, missing = common.read_pairs(str(tmp_path / "p.jsonl"))
    assert pairs == [] and "a key comes twice" in missing[0].why
    assert judge.bytemorph_score('{"Score": 3, "Score": 9}') is None


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": 1, "a": 2}]', '{"a": 1}\n{"a": 1, "a": 2}\n'])
def test_a_key_that_comes_twice_is_told_of_official_rows(tmp_path, text):
    (tmp_path / "d.json").write_text(text)
    broken = []
    try:
        assert len(list(official.rows(str(tmp_path / "d.json"), broken))) == 1
    except BadData as error:
        broken.append(str(error))
    assert len(broken) == 1 and "row 2: not valid JSON (a key comes twice" in broken[0]


def test_deep_brackets_in_a_value_are_told(tmp_path):
    for depth in range(900, 1000, 7):
        (tmp_path / "d.jsonl").write_text('{"episode": %s}' % ("[" * depth + "]" * depth))
        with pytest.raises(BadData, match="d.jsonl:1: "):
            records.read(tmp_path / "d.jsonl")


# --- time and memory ------------------------------------------------------------------------------

@pytest.mark.parametrize("read", [records.read, lambda path: list(official.rows(path, []))])
@pytest.mark.parametrize("text", [b'{"a": "', b'["', b"\n"])
def test_a_small_gz_cannot_fill_the_memory(tmp_path, read, text):
    path = str(tmp_path / "d.jsonl.gz")
    with gzip.open(path, "wb", 1) as file:
        file.write(text + b"a" * 2**26)
    tracemalloc.start()
    with pytest.raises(BadData, match="unpacks to more than 100 times its size; "):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 120e6
    tracemalloc.stop()


def test_a_text_that_would_fill_the_memory_is_refused(tmp_path):
    row = {"episode": "train-a", "t": 0, "x": "a", "z": "go", "y": "b" * (records.MOST + 1)}
    with pytest.raises(BadData, match='d.jsonl:1: "y" has 1048577 characters'):
        records.read(write(tmp_path / "d.jsonl", [row]))


def test_a_packed_table_cannot_fill_the_memory(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([{"edit_type": "a" * 2**25}])
    parquet.write_table(table, tmp_path / "d.parquet", compression="gzip")
    with pytest.raises(BadData, match="unpacks to more than"):
        list(bytemorph.read(str(tmp_path / "d.parquet")))


def test_a_long_line_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(official, "CHUNK", 1000)
    (tmp_path / "d.jsonl").write_text('"' + "a" * 5_000_000 + '"\n7')
    assert seconds(lambda: list(official.rows(str(tmp_path / "d.jsonl"), []))) < 1


@pytest.mark.parametrize("call", [
    lambda: mind2web.without_ids("<a" + " " * 40_000 + "b>", 0),
    lambda: mind2web.find("<a>" * 300_000, list(map(str, range(20_000)))),
    lambda: mirrorapi.reply('{"error": "", "response": "a"' + " " * 40_000 + "b"),
    lambda: judge.aurora_scores("[" + "1" * 40_000 + "x, 2]"),
    lambda: check_file.diff_is_short("a\n" * 480, "a\nb\n" * 240),
    lambda: common.score([common.Pair("a", "b", None, str(i)) for i in range(8000)], [],
                         {"exact": common.Column(common.exact)}),
], ids=["blanks", "nodes", "end of a reply", "digits", "equal lines", "splits"])
def test_what_was_quadratic_takes_no_second(call):
    assert seconds(call) < 0.5


def test_many_kinds_of_images_take_linear_time(tmp_path):
    save(tmp_path / "0.png")
    save(tmp_path / "GEN/fullset/t0/aurora_00000.png")
    rows = [{"task": f"t{i}", "input": "0.png", "instruction": "go"} for i in range(5000)]
    argv = ["--data", write(tmp_path / "d.json", rows), "--generated", tmp_path / "GEN",
            "--tasks", "all", "--embedder", "pixels"]
    assert seconds(lambda: run(aurora, tmp_path, *argv)) < 2


# --- images ---------------------------------------------------------------------------------------

def test_a_16_bit_grey_keeps_its_greys(tmp_path):
    grey = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    PIL.fromarray(grey).save(tmp_path / "a.png")
    image = visual.read_image(tmp_path / "a.png")
    assert image.dtype == np.uint8 and (image == (grey // 257)[:, :, None]).all()


def test_an_image_that_unpacks_to_too_much_is_refused(tmp_path):
    PIL.new("1", (8000, 8000)).save(tmp_path / "a.png")
    with pytest.raises(BadData, match="8000 x 8000 pixels from"):
        visual.read_image(tmp_path / "a.png")
    with pytest.raises(BadData, match="8000 x 8000 pixels from"):
        visual.read_image((tmp_path / "a.png").read_bytes())


def test_a_program_that_is_called_an_image_is_not_run(tmp_path):
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(BadData, match="no readable image .UnidentifiedImageError"):
        visual.read_image(tmp_path / "a.png")


@pytest.fixture
def outside(tmp_path):
    """(data folder, image beside it)."""
    save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    return tmp_path / "data", tmp_path / "secret.png"


@pytest.mark.parametrize("absolute", [False, True])
def test_an_image_outside_the_folder_reaches_no_judge(outside, server, absolute):  # noqa: F811
    folder, image = outside
    path = str(image) if absolute else "../secret.png"
    rows = [{"task": "ag", "input": path, "output": "a.png", "instruction": "go"},
            {"task": "ag", "input": "a.png", "instruction": "go"}]
    save(folder / "a.png")
    for i in range(2):
        save(folder / f"GEN/fullset/ag/aurora_{i:05d}.png")
    argv = ["--data", write(folder / "d.json", rows), "--generated", folder / "GEN", "--embedder",
            "pixels", "--judge", "m", "--replies", folder / "r.jsonl", "--no-judge-copy"]
    result = run(aurora, folder, *argv)
    assert result["n"] == 1 and "leads out of its folder" in result["missing"][0]
    assert len(Server.seen) == 1
    assert run(aurora, folder, *argv, "--anywhere")["n"] == 2


def test_bytemorph_stays_in_its_folders(outside):
    folder, _ = outside
    save(folder / "a.png")
    save(folder / "GEN/fullset/zoom/a.png")
    row = {"edit_type": "zoom", "image_id": "a", "src_img": "a.png", "edit_prompt": "go"}
    rows = [row, row | {"src_img": "../secret.png"}, row | {"image_id": "../../../../secret"}]
    argv = ["--data", write(folder / "d.jsonl", rows), "--generated", folder / "GEN", "--embedder",
            "pixels"]
    assert [run(bytemorph, folder, *argv, *more)["n"] for more in ([], ["--anywhere"])] == [1, 3]


def test_worldprediction_stays_in_its_folders(outside):
    folder, image = outside
    row = {"states": {"segment_uid": "u"}, "ground_truth": 1, "candidates": [["a"]],
           "action_segments": {"a": {"action_label": "go"}},
           "original_segments": [{"segment_uid": "a"}, {"segment_uid": "b"}]}
    told = {"candidates": [{"index": 0, "generated_paths": [str(image)]}]}
    (folder / "GEN/u").mkdir(parents=True)
    write(folder / "GEN/u/metadata.json", [told])
    write(folder / "map.json", [{"a": str(image), "b": "../secret.png"}])
    argv = ["--data", write(folder / "d.json", [[row]]), "--frames", folder, "--frame-map",
            folder / "map.json", "--generated", folder / "GEN", "--embedder", "pixels"]
    assert run(worldprediction, folder, *argv, "--anywhere")["n"] == 1
    with pytest.raises(SystemExit):
        worldprediction.main(list(map(str, argv)))
    sample = worldprediction.Sample("d", "../..", 0, ["go"], ["a"])
    with pytest.raises(BadData, match="leads out of its folder"):
        worldprediction.generated_paths(str(folder / "GEN"), sample)


# --- a judge --------------------------------------------------------------------------------------

@pytest.mark.parametrize("parse, draft, last, score", [
    (judge.aurora_scores, "[2, 10]", '{"score": [8, 9]}', (8, 9)),
    (judge.bytemorph_score, '{"Score": 3}', '{"Score": 80}', 80),
    (judge.worldprediction_score, '{"score": 3}', '{"score": 8}', 8),
])
def test_only_what_follows_a_judge_s_thoughts_counts(parse, draft, last, score):
    for thoughts in ("<think>{}</think>", "{}</think>", "<THINKING>{}</THINKING>",
                     "◁think▷{}◁/think▷", "<think>a</think><think>{}</think>"):
        assert parse(thoughts.format(draft) + last) == score
    assert parse(f"<think>{draft}") is None and parse(f"</think>{last}<think>{draft}") is None
    assert parse(f"<think>{draft}</think>", released=True) is not None


def refusals(monkeypatch, *messages):
    """A server that refuses with these messages, then answers. Returns what it is asked."""
    answers, asked = list(messages), []

    def opened(request, timeout):
        asked.append(json.loads(request.data))
        if answers:
            body = json.dumps({"error": {"message": answers.pop(0)}}).encode()
            raise judge.urllib.error.HTTPError("http://x", 400, "Bad", {}, io.BytesIO(body))
        return io.BytesIO(b'{"choices": [{"message": {"content": "[7, 8]"}}]}')

    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    monkeypatch.setattr(judge.urllib.request, "urlopen", opened)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return asked


def test_a_newer_judge_is_asked_in_its_own_terms(monkeypatch, capsys):
    asked = refusals(monkeypatch, "'max_tokens' is not supported; use 'max_completion_tokens'",
                     "'temperature' does not support 0")
    ask = judge.OpenAIJudge("m", 99)
    assert ask([]) == ask([]) == "[7, 8]" and len(asked) == 4
    for body in asked[2:]:
        assert body["max_completion_tokens"] == 99 and not {"max_tokens", "temperature"} & set(body)
    assert capsys.readouterr().err.startswith("warning: m takes no temperature")


def test_a_first_refusal_is_told_in_the_server_s_words(monkeypatch, capsys):
    refusals(monkeypatch, "no model\nm for secret-key", "never")
    said = one_line(capsys, lambda: judge.OpenAIJudge("m")([]))
    assert "HTTP 400: no model m for ***" in said and "secret-key" not in said


def test_a_later_refusal_is_a_miss_of_one_image(monkeypatch):
    asked = refusals(monkeypatch)
    ask = judge.OpenAIJudge("m")
    ask([])
    refusals(monkeypatch, "this image is too large")
    with pytest.raises(BadData, match="this image is too large"):
        ask([])
    assert len(asked) == 1


# --- text scorers ---------------------------------------------------------------------------------

def test_what_hides_in_a_text_score_is_counted(tmp_path, capsys):
    pairs = [("a ", "a"), ("a", "a"), ("水", "水 "), ("b", "a")]
    rows = [{"prediction": p, "reference": r} for p, r in pairs]
    result = run(scienceworld, tmp_path, "--pairs", write(tmp_path / "p.jsonl", rows))
    said = capsys.readouterr().err
    assert result["differ_in_blanks"] == 2 and "2 of 4 predictions differ" in said
    assert result["without_rouge_tokens"] == 1 and "1 of 4 references have no token" in said


def test_every_file_of_mind2web_finds_its_split(tmp_path, monkeypatch):
    names = ["test_task_0", "test_task_12", "test_website", "test_domain_3", "other_1"]
    rows = [records.Transition(f"test-{name}-a{i}", 0, f"x{i}", "z", "y")
            for i, name in enumerate(names)]
    records.write(tmp_path / "d.jsonl", rows)
    triples = [(row.x, row.z, row.y) for row in rows]
    finished = types.SimpleNamespace(
        cfg=types.SimpleNamespace(data=str(tmp_path / "d.jsonl")), test=triples, uncut=triples,
        P=types.SimpleNamespace(predict=lambda xs, zs: xs))
    monkeypatch.setattr(opened, "open_run", lambda folder: finished)
    splits = [pair.split for pair in common.predict_run("DIR", pages.SPLITS)]
    assert splits == ["test_task", "test_task", "test_website", "test_domain", None]


def test_captions_that_are_cut_are_counted(clip, tmp_path, capsys):  # noqa: F811
    rows = [{"edit_type": "zoom", "image_id": "a", "src_img": "a.png", "edit_prompt": "go",
             "src_img_caption": "a cat", "tgt_img_caption": "many words " * 9}]
    save(tmp_path / "a.png")
    save(tmp_path / "GEN/fullset/zoom/a.png")
    argv = ["--data", write(tmp_path / "d.jsonl", rows), "--generated", tmp_path / "GEN",
            "--embedder", clip]
    assert run(bytemorph, tmp_path, *argv)["texts_cut"] == 1
    assert "1 texts are longer than the 8 tokens" in capsys.readouterr().err


def test_test_states_that_cannot_be_right_are_counted(capsys):
    net, tok = pretrained.load(tiny.FOLDER)
    short, long = ("on\n", "go", "off"), ("on", "go", "off " * 40)
    splits = [short] * 2, [short], [("on", "off")], [short, long, ("on", "go", "水")]
    loading.check_data(net, tok, splits, settings.parse(["--data", "d.jsonl"]))
    said = capsys.readouterr().out
    assert "1 of 3 test states y are longer than P may write" in said
    assert "1 of 3 test states y have no token for ROUGE-L" in said


# --- images as text -------------------------------------------------------------------------------

BEGINNINGS = ["<image>", "<image></image>", "<image> of a cat", "<image><c1000000000></image>",
              "<image><c1><c2></image>", "<image><c٣></image>", "<image><c" + "9" * 5000 + ">"]


@pytest.mark.parametrize("state", BEGINNINGS)
def test_a_text_may_begin_like_an_image(tmp_path, state):
    assert not images.is_image(state) and images.vocabulary([state]) == []
    rows = [{"episode": f"e{i}", "t": t, "x": f"{state} {i}", "z": "go", "y": f"{state} {t}"}
            for i in range(8) for t in (10, 11)]
    said = check_file.report(write(tmp_path / "d.jsonl", rows))
    assert "8 episodes, 16 transitions" in said[0]


def test_the_check_counts_an_image_as_the_tokenizer_does(tmp_path):
    _, tok = pretrained.load(tiny.FOLDER)
    image = images.spell([["0", "7"], ["2", "3"]])
    found = check_file.Found()
    check_file.add_state(found, tok, image)
    tok.add_tokens(images.vocabulary([image]))
    assert found.size == len(check_file.spell(tok, "\n" + image))


# --- folders, flags, surroundings -----------------------------------------------------------------

@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a pipe")
def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path, capsys):
    (tmp_path / "in/a").mkdir(parents=True)
    (tmp_path / "in/a/1.txt").write_text("on")
    os.mkfifo(tmp_path / "in/a/2.txt")
    argv = ["--from-folder", str(tmp_path / "in"), "--out", str(tmp_path / "o.jsonl")]
    assert "no plain file" in one_line(capsys, lambda: convert.main(argv))


@pytest.mark.parametrize("left", [
    {}, {"LOCAL_RANK": "0"}, {"LOCAL_RANK": "x"}, {"LOCAL_RANK": "0", "RANK": "0"},
    {"LOCAL_RANK": "0", "RANK": "x", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "b"},
])
def test_what_an_old_torchrun_left_is_told(monkeypatch, capsys, left):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "old")
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert "unset TORCHELASTIC_RUN_ID" in one_line(capsys, parallel.start)


def test_a_rank_without_torchrun_is_ignored(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    parallel.start()
    assert parallel.world() == 1 and parallel.rank() == 0


def test_a_terminal_obeys_no_message_of_a_file(capsys):
    said = one_line(capsys, lambda: records.fail("a \x1b[2J\n b \ud800"))
    assert said == "error: a ?[2J b ?\n"


def test_a_narrow_terminal_shows_what_it_can(tmp_path, monkeypatch):
    rows = [{"episode": f"e{i}", "t": t, "x": f"on {i}", "z": "水", "y": f"off {t}"}
            for i in range(8) for t in (0, 1)]
    narrow = io.TextIOWrapper(io.BytesIO(), "cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", narrow)
    assert convert.main([write(tmp_path / "d.jsonl", rows), "--check"]) == 0
    assert b"most frequent: ? (16)" in narrow.buffer.getvalue()


@pytest.mark.parametrize("argv", [["--iterations", "1000000000"], ["--threads", "99999999999"],
                                  ["--batch", "9" * 30], ["--lr-fwm", "nan"]])
def test_a_number_that_no_run_can_have_is_refused(capsys, argv):
    assert argv[0] in one_line(capsys, lambda: settings.parse(argv))


@pytest.mark.parametrize("name, value", [("data", 3), ("max_state", "x"), ("episodes", None),
                                         ("env", "moon"), ("lora", [1])])
def test_a_run_with_odd_settings_is_refused(tmp_path, name, value):
    cfg = vars(settings.parse(["--episodes", "4"])) | {name: value}
    config = {"settings": cfg, "data_sha256": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "results.json").write_text('{"splits": {"test": 4}}')
    with pytest.raises(BadData, match="cannot open the run"):
        opened.open_run(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "7", "[" * 9000, "\xff"])
def test_a_damaged_table_is_told(tmp_path, capsys, text):
    (tmp_path / "methods.json").write_text(text, "latin-1")
    assert "methods.json" in one_line(capsys, lambda: reproduce.Results(tmp_path).load("methods"))


def test_a_start_with_damaged_results_is_told(tmp_path, capsys):
    for side in ("fwm", "idm"):
        (tmp_path / "sft" / side).mkdir(parents=True)
    cfg = settings.parse(["--start", str(tmp_path), "--out", str(tmp_path / "new")])
    (tmp_path / "config.json").write_text(json.dumps({"settings": vars(cfg)}))
    for results in ("", "7", "{}", '{"stages": []}', "[]"):
        (tmp_path / "results.json").write_text(results)
        assert "no finished run" in one_line(capsys, lambda: loading.check_start(cfg))


def test_a_walk_takes_no_endless_number_of_steps(monkeypatch):
    taken = []
    monkeypatch.setattr("sys.stdin", io.StringIO(f"imagine {'9' * 5000}\nquit\n"))
    monkeypatch.setattr(play, "take", lambda run, z, states, zs: taken.append(z))
    play.walk(types.SimpleNamespace(test=[("on", "go", "off")]), 0, 0)
    assert taken == ["imagine " + "9" * 5000]


# --- the code -------------------------------------------------------------------------------------

NEWER = {"file_digest", "tomllib", "ExceptionGroup", "StrEnum", "UTC", "Self", "batched"}


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[-2] != "tests"],
                         ids=lambda path: path.name)
def test_the_code_needs_no_python_after_3_10(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 10))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not used & NEWER


def test_no_loader_runs_remote_code():
    calls = [node for path in FILES if path.parts[-2] != "tests"
             for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
             and node.func.attr == "from_pretrained" and ast.unparse(node.func).startswith("Auto")]
    given = [{word.arg: ast.unparse(word.value) for word in call.keywords} for call in calls]
    assert calls and all(words.get("trust_remote_code") == "False" for words in given)
