"""What --tensorboard and --wandb get is what metrics.jsonl holds, and a run never depends on it."""
import importlib
import json
import pickle
import sys
import types

import pytest
from test_train import SMALL

import train
from support import rundir, sinks

LINES = [
    dict(phase="warmup", model="FWM", iteration=0, step=1, seconds=0.5, loss=2.0, validation=None),
    dict(phase="warmup", model="FWM", iteration=0, step=2, seconds=0.7, loss=1.5, validation=0.25),
    dict(phase="eval", stage="sft", iteration=0, step=0, seconds=0.9, fwm={"exact": 0.5, "n": 6},
         idm={"exact": 0.75}),
    dict(phase="phase1", iteration=2, step=1, seconds=1.5, reward=-3.0, kl=None),
    dict(phase="eval", stage="iteration2/phase1", iteration=2, step=0, seconds=2.0,
         fwm={"exact": 0.6, "kinds": {"motion": {"exact": 0.1}}, "rollout": [1.0, 2.0]}, idm={}),
]
# (tag, step): value
SENT = {
    ("FWM/seconds", 1): 0.5, ("FWM/loss", 1): 2.0,
    ("FWM/seconds", 2): 0.7, ("FWM/loss", 2): 1.5, ("FWM/validation", 2): 0.25,
    ("held-out/seconds", 1): 0.9, ("held-out/fwm/exact", 1): 0.5, ("held-out/fwm/n", 1): 6,
    ("held-out/idm/exact", 1): 0.75,
    ("iteration2/phase1/seconds", 1): 1.5, ("iteration2/phase1/reward", 1): -3.0,
    ("held-out/seconds", 2): 2.0, ("held-out/fwm/exact", 2): 0.6,
    ("held-out/fwm/kinds/motion/exact", 2): 0.1,
}


class Writer:
    """Stands in for TensorBoard's."""
    opened = []

    def __init__(self, folder, **_):
        self.folder, self.sent, self.closed = folder, {}, False
        Writer.opened.append(self)

    def add_scalar(self, tag, value, step):
        assert (tag, step) not in self.sent
        self.sent[tag, step] = value

    def close(self):
        self.closed = True


class WandbRun:
    """Stands in for wandb's."""

    def __init__(self, **how):
        self.how, self.axes, self.rows, self.finished = how, {}, [], False

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished = True


@pytest.fixture
def tensorboard(monkeypatch):
    """The writers that were opened."""
    monkeypatch.setattr(Writer, "opened", [])
    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return Writer.opened


@pytest.fixture
def wandb(monkeypatch):
    """The runs that were begun."""
    begun = []

    def init(**how):
        begun.append(WandbRun(**how))
        return begun[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setitem(sys.modules, "wandb.sdk", types.ModuleType("wandb.sdk"))
    return begun


def begin(folder, *flags, label=""):
    return rundir.Run(train.parse([*SMALL, *flags, "--out", str(folder)]), 0.0, label)


def log(run, lines=LINES):
    for line in lines:
        run.log("metrics.jsonl", **line)


def test_tensorboard_gets_the_numbers_of_the_file(tensorboard, tmp_path):
    run = begin(tmp_path / "run", "--tensorboard")
    log(run)
    writer, = tensorboard
    assert writer.sent == SENT and writer.folder == str(tmp_path / "run" / "tensorboard")
    run.sinks.close()
    assert writer.closed and writer.sent == SENT


def test_wandb_gets_the_numbers_of_the_file(wandb, tmp_path):
    run = begin(tmp_path / "run", "--wandb")
    log(run)
    sent = {}
    for row in wandb[0].rows:
        (axis, step), *values = row.items()
        name = axis.removesuffix("/step")
        assert wandb[0].axes[f"{name}/*"] == axis
        sent |= {(key, step): value for key, value in values}
    assert sent == SENT and wandb[0].how["config"]["batch"] == 6
    run.sinks.close()
    assert wandb[0].finished


def test_without_a_flag_nothing_is_opened(tensorboard, wandb, tmp_path):
    run = begin(tmp_path / "run")
    log(run)
    assert run.sinks is None and not tensorboard and not wandb


def test_a_finished_run_opens_no_sink(tensorboard, tmp_path):
    log(begin(tmp_path, "--tensorboard"))
    (tmp_path / "results.json").write_text("{}")
    assert begin(tmp_path, "--tensorboard").sinks is None


def test_a_resumed_run_sends_no_cut_stage(tensorboard, tmp_path):
    run = begin(tmp_path / "run", "--tensorboard")
    log(run, LINES[:3])
    run.save_progress()
    log(run, LINES[3:4])                                   # of a stage that is cut
    assert ("iteration2/phase1/reward", 1) in tensorboard[0].sent
    events = tmp_path / "run" / "tensorboard" / "events.out.tfevents.1"
    events.parent.mkdir()
    events.write_text("of the first process")
    log(begin(tmp_path / "run", "--tensorboard"), LINES[4:])
    assert tensorboard[1].sent == {key: value for key, value in SENT.items()
                                   if not key[0].startswith("iteration2")}
    assert not events.exists()


def test_of_the_rivals_only_finished_stages_are_sent(tensorboard, tmp_path):
    run = begin(tmp_path / "run", "--tensorboard")
    rivals = begin(tmp_path / "run" / "rivals", "--tensorboard", label="bootstrap, ")
    log(rivals, LINES[:3])
    log(run, LINES[:1])
    assert len(tensorboard) == 1                           # that of the run
    assert not any(tag.startswith("rivals/") for tag, _ in tensorboard[0].sent)
    rivals.save_progress()
    log(rivals, LINES[3:])
    run.sinks.send()
    sent = {key for key, _ in tensorboard[0].sent if key.startswith("rivals/")}
    wanted = {tag for (tag, _), value in list(SENT.items())[:9]}
    assert sent == {"rivals/" + tag for tag in wanted}


def test_a_second_process_sends_nothing(tensorboard, tmp_path):
    run = begin(tmp_path / "run", "--tensorboard")
    twin = pickle.loads(pickle.dumps(run))
    log(twin, LINES[:2])
    assert twin.sinks is None and not tensorboard[0].sent
    log(run, LINES[2:3])                                   # the first sends both's lines
    assert tensorboard[0].sent == dict(list(SENT.items())[:9])


def test_a_sink_that_fails_is_dropped_and_told_once(tensorboard, wandb, tmp_path, capsys):
    run = begin(tmp_path / "run", "--tensorboard", "--wandb")
    tensorboard[0].add_scalar = None                       # TypeError
    log(run)
    run.sinks.close()
    assert capsys.readouterr().out.count("TensorBoard is left out") == 1
    assert len(wandb[0].rows) == len(LINES) and wandb[0].finished
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == len(LINES)


@pytest.mark.parametrize("name", sinks.NEEDS)
def test_a_missing_package_is_told_before_the_run(monkeypatch, tmp_path, capsys, name):
    monkeypatch.setitem(sys.modules, sinks.NEEDS[name], None)
    with pytest.raises(SystemExit) as error:
        train.main([*SMALL, f"--{name}", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.count("\n") == 1 and f"pip install {name}" in said
    assert not (tmp_path / "run").exists()


def test_a_run_may_resume_with_another_sink(tensorboard, tmp_path):
    begin(tmp_path / "run", "--tensorboard")
    begin(tmp_path / "run")
    begin(tmp_path / "run", "--tensorboard")
    assert len(tensorboard) == 2


def test_a_half_written_line_waits(tmp_path):
    path, tail = tmp_path / "metrics.jsonl", sinks.Tail(tmp_path)
    whole = json.dumps({"a": 1}) + "\n"
    path.write_text(whole + whole[:4])
    assert tail.new() == [("", {"a": 1})]
    path.write_text(whole + whole)
    assert tail.new() == [("", {"a": 1})] and tail.new() == []


def test_fresh_deletes_events_and_nothing_of_others(tmp_path, capsys):
    begin(tmp_path / "run")
    folder = tmp_path / "run" / "tensorboard"
    folder.mkdir()
    for name in ("events.out.tfevents.1.host.2.0", "notes.txt"):
        (folder / name).write_text("")
    with pytest.raises(SystemExit):
        begin(tmp_path / "run", "--fresh")
    assert "tensorboard/notes.txt" in capsys.readouterr().err
    (folder / "notes.txt").unlink()
    begin(tmp_path / "run", "--fresh")
    assert not folder.exists()


def test_tensorboard_itself_reads_the_numbers_back(tmp_path):
    pytest.importorskip("tensorboard")
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    run = begin(tmp_path / "run", "--tensorboard")
    log(run)
    run.sinks.close()
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    found = {(tag, event.step): event.value for tag in events.Tags()["scalars"]
             for event in events.Scalars(tag)}
    assert found == pytest.approx(SENT)
