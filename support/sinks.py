"""--tensorboard and --wandb: the numbers of metrics.jsonl, sent on while a run goes on.

Claim: a sink gets the numbers of the file and no others. No result depends on it.

1. A run that is resumed sends the whole file again, so that no cut stage is shown: TensorBoard's
   folder, DIR/tensorboard, is written anew, and wandb gets a new run.
2. Only the first process sends. Of the rivals it sends finished stages.
3. A sink that fails is dropped with a line, and the run goes on.
"""
import dataclasses
import importlib
import json
from collections import Counter
from pathlib import Path

from envs import records

NEEDS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb.sdk"}


class Tail:
    """The lines of metrics.jsonl of a run and of its rivals, each once."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.at = {"": 0, "rivals/": 0}                    # bytes that were read

    def new(self):
        """[("" or "rivals/", line)] that have come since the last call."""
        found = []
        for part, at in self.at.items():
            path = self.folder / part / "metrics.jsonl"
            if not path.exists():
                continue
            with open(path, "rb") as file:
                file.seek(at)
                text = file.read()
            if part:
                text = text[:max(0, finished_bytes(self.folder / part) - at)]
            text = text[:text.rfind(b"\n") + 1]            # whole lines
            self.at[part] += len(text)
            found += [(part, json.loads(line)) for line in text.splitlines()]
        return found


def finished_bytes(folder):
    """Bytes of metrics.jsonl that finished stages wrote."""
    path = folder / "progress.json"
    progress = json.loads(path.read_text()) if path.exists() else {"bytes": {}}
    return progress["bytes"].get("metrics.jsonl", 0)


def check(cfg):
    """Fails in one line if a sink is asked for and its package is missing."""
    for name, module in NEEDS.items():
        try:
            if getattr(cfg, name):
                importlib.import_module(module)
        except ImportError:
            records.fail(f"--{name} needs the package {name}: pip install {name}")


def start(cfg):
    """The sinks that the flags ask for; None without any."""
    opened = {"tensorboard": TensorBoard, "wandb": Wandb}
    try:
        found = [kind(cfg) for name, kind in opened.items() if getattr(cfg, name)]
    except Exception as error:      # whatever a package makes of no login or no space
        records.fail(f"--tensorboard, --wandb: {error}; leave it out, or mend that first")
    return Sinks(cfg.out, found) if found else None


class Sinks:
    """`send` after each line of metrics.jsonl, `close` at the end of the run."""

    def __init__(self, folder, sinks):
        self.tail, self.sinks = Tail(folder), sinks
        self.evaluations = Counter()

    def send(self):
        for part, line in self.tail.new():
            name, step = self.place(part, line)
            values = numbers(line)
            for sink in list(self.sinks):
                self.attempt(sink, sink.write, name, step, values)

    def place(self, part, line):
        """(what a line is about, its step). The step of an evaluation is its number."""
        if line["phase"] == "eval":
            self.evaluations[part] += 1
            return part + "held-out", self.evaluations[part]
        stage = f"iteration{line['iteration']}/{line['phase']}"
        return part + line.get("model", stage), line["step"]

    def attempt(self, sink, act, *args):
        try:
            act(*args)
        except Exception as error:
            print(f"warning: {type(sink).__name__} is left out from here on: {error}", flush=True)
            self.sinks.remove(sink)

    def close(self):
        self.send()
        for sink in list(self.sinks):
            self.attempt(sink, sink.close)


def numbers(line, before=""):
    """{name: number} of a line; "fwm/exact" of what lies deeper."""
    found = {}
    for key, value in line.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{before}{key}/")
        elif isinstance(value, (int, float)) and key not in ("step", "iteration"):
            found[before + key] = value
    return found


class TensorBoard:
    """tensorboard --logdir DIR"""

    def __init__(self, cfg):
        from torch.utils.tensorboard import SummaryWriter
        folder = Path(cfg.out) / "tensorboard"
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.writer = SummaryWriter(str(folder), flush_secs=10)

    def write(self, name, step, values):
        for key, value in values.items():
            self.writer.add_scalar(f"{name}/{key}", value, step)

    def close(self):
        self.writer.close()


class Wandb:
    """A run of the project "swirl"; wandb keeps its files in ./wandb."""

    def __init__(self, cfg):
        import wandb
        settings = dataclasses.asdict(cfg)
        self.run = wandb.init(project="swirl", name=Path(cfg.out).name, config=settings)
        self.known = set()

    def write(self, name, step, values):
        axis = f"{name}/step"
        if name not in self.known:
            self.known.add(name)
            self.run.define_metric(f"{name}/*", step_metric=axis)
        self.run.log({axis: step} | {f"{name}/{key}": value for key, value in values.items()})

    def close(self):
        self.run.finish()
