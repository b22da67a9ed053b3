"""A run's folder and its clock: what `train.py` writes.

DIR/config.json, metrics.jsonl, samples.jsonl, results.json, fwm/, idm/. A stage that ends is saved
whole in checkpoint-a/ or -b/ (both models and the record), then progress.json names it; the stage
before stays. Inside a stage `support/checkpoint.py` saves. Of several processes only rank 0 writes.
"""
import dataclasses
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

from envs import records
from models import parallel, pretrained
from support import checkpoint, disk, progress, sinks

# Settings that may differ when a run resumes
FREE = ("tokens", "preset", "save_every", "tensorboard", "wandb")
SKIPS = 10      # so many steps in a row without a finite gradient end the run


def fail(message):
    """`records.fail`; under torchrun it says on which rank."""
    if parallel.world() > 1:
        message = f"rank {parallel.rank()}: {message}"
    records.fail(message)


class Run:
    """The files of a run (contract: config.json, metrics.jsonl, samples.jsonl, results.json, fwm/,
    idm/) and its clock."""

    def __init__(self, cfg, started, label=""):
        # label: before the names of stages in what is printed
        self.dir, self.label = Path(cfg.out), label
        self.save_every = 60 * cfg.save_every
        self.lines = []         # (file, line): what the stage has logged
        self.skipped = 0        # steps in a row
        self.earlier = 0.0      # seconds that cut processes have spent on the stage
        record = None
        try:
            if parallel.rank() == 0:
                config = self.prepare(cfg)
                record = self.last_record(config)
        except OSError as e:
            fail(f"--out {cfg.out}: {e.strerror or e}; give a folder that can be written")
        # The others go on when the folder is ready
        self.progress = parallel.agree(record)
        self.begin = started - self.progress["elapsed"]
        self.sinks = None                                  # of --tensorboard and --wandb
        if parallel.rank() == 0 and not self.finished:
            self.forget_cut_stage()
            self.sinks = None if label else sinks.start(cfg)

    def __getstate__(self):
        """What a second process gets: it sends nothing."""
        return self.__dict__ | {"sinks": None}

    def prepare(self, cfg):
        """Make the folder, with its config.json; or check that it holds the same run. Returns what
        config.json holds."""
        settings = dataclasses.asdict(cfg)
        del settings["out"], settings["fresh"], settings["dry_run"]
        data = records.sha256(cfg.data)
        old = self.read_config(cfg.out)                    # fails before anything is written
        self.finished = not cfg.fresh and (self.dir / "results.json").is_file()
        if not self.finished:
            self.dir.mkdir(parents=True, exist_ok=True)
            disk.lock(self.dir)
            old = self.read_config(cfg.out)                # another process may have been here
        if old and cfg.fresh:
            self.clear(cfg, old["settings"])
            old = None
        if old:
            check_settings(old["settings"], settings, cfg.out)
            check_data(old.get("data_sha256"), data, cfg)
            return old
        config = {
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "settings": settings,
            "data_sha256": data,
            **code_now(),
        }
        self.write("config.json", config)
        return config

    def read_config(self, out):
        """config.json of the run that is in the folder; None if the folder is new or empty."""
        found = os.listdir(self.dir) if self.dir.exists() else []
        if set(found) <= {"config.json.new", "lock"}:      # of a run that was cut as it began
            return None
        if "config.json" not in found:
            fail(f"--out {out} holds files that no run wrote; give another folder")
        config = self.load("config.json")
        if not isinstance(config, dict) or not config.get("settings"):
            fail(f"--out {out} holds a config.json that no run wrote; give another folder")
        return config

    def clear(self, cfg, settings):
        """Delete the earlier run; fails if the folder holds a file that no run wrote."""
        # Fails if it is damaged: then it may be somebody else's
        self.load("progress.json")
        others = disk.foreign(self.dir, "run")
        if settings.get("data") or settings.get("env") != "pixels":
            others += self.dir.glob("codebook.npz")        # only a run on images writes one
        if others:
            fail(
                f"--fresh: {cfg.out} holds {others[0].relative_to(self.dir)}, which no run "
                "wrote; move it away first"
            )
        for path in self.dir.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
        cfg.fresh = False

    def last_record(self, config):
        """progress.json; or, if the checkpoint that it names is damaged, the record of the other
        one."""
        record = self.load("progress.json") or new_record(config)
        folder = record["folder"]
        if self.finished:
            return record
        if folder and not self.is_whole(folder):
            other = other_of(folder)
            before = self.load(f"{other}/progress.json") if self.is_whole(other) else None
            print(f"{self.dir / folder} is damaged; the run goes on from "
                  f"{other if before else 'its begin'}")
            record = before or new_record(config)
        note_code(record, silent=bool(self.label))         # the rivals' run is said with its own
        return record

    def is_whole(self, folder):
        """Whether a checkpoint is as it was saved. One of earlier code has no sums."""
        sums, models = self.dir / folder / "sums.json", self.dir / folder / "fwm"
        return disk.is_whole(self.dir / folder) if sums.exists() else models.exists()

    def forget_cut_stage(self):
        """Delete the lines that an unfinished stage has logged; its checkpoint holds them, too."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path, size = self.dir / name, self.progress["bytes"].get(name, 0)
            if path.exists() and path.stat().st_size > size:
                os.truncate(path, size)

    def load(self, name):
        path = self.dir / name
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except ValueError:
            fail(f"{path} is not the JSON that a run wrote; give another --out")

    def write(self, name, value):
        """Whole or not at all."""
        if parallel.rank():
            return
        new = self.dir / (name + ".new")
        with disk.told(self.dir / name):
            new.write_text(json.dumps(finite(value), indent=1))
            records.sync(new)
            os.replace(new, self.dir / name)
            records.sync(self.dir)

    def log(self, name, **line):
        """A line more in a file. Numbers that are not finite become null. Ten skipped steps in a
        row end the run."""
        if parallel.rank():
            return
        line = finite(line)
        self.lines.append((name, line))
        with disk.told(self.dir / name), open(self.dir / name, "a") as f:
            f.write(json.dumps(line) + "\n")
        if self.sinks:
            self.sinks.send()
        if "skipped" in line:
            self.skipped = self.skipped + 1 if line["skipped"] else 0
        if self.skipped == SKIPS:
            fail(f"{SKIPS} steps in a row had no finite reward or gradient; lower the rates "
                 "(--warmup-lr, --lr-fwm, --lr-idm) or give --dtype float32")

    def logged(self, name):
        """The lines of a file that this stage has logged, before and after a cut."""
        return [line for file, line in self.lines if file == name]

    def in_order(self):
        """Sort what the two warm-ups have logged: P's lines, then Q's. Which was written first is a
        matter of the clock."""
        path, begin = self.dir / "metrics.jsonl", self.progress["bytes"].get("metrics.jsonl", 0)
        if parallel.rank() or not path.exists():
            return
        if self.sinks:
            self.sinks.send()
        with disk.told(path), open(path, "r+b") as file:
            file.seek(begin)
            lines = sorted(file.readlines(), key=lambda line: json.loads(line)["model"])
            file.seek(begin)
            file.writelines(lines)

    def picture(self, draw, name, rows):
        """DIR/name by a function of `pictures`."""
        if parallel.rank():
            return
        try:
            draw(rows, self.dir / name)
        except ImportError:
            print(f"  {name} is not drawn: pip install pillow")

    def save_codebook(self, book):
        """codebook.npz: which patches the codes of images stand for."""
        if book and parallel.rank() == 0:
            with disk.told(self.dir), records.whole(self.dir / "codebook.npz") as file:
                book.save(file)

    def bar(self, name, steps):
        """The progress of a stage, on rank 0."""
        return progress.Bar(name, steps, silent=parallel.rank() > 0)

    def steps(self, name, n, tally, moving):
        """Yields t = 1 .. n, from where a cut run stands; see `checkpoint.steps`."""
        return checkpoint.steps(self, name, n, tally, moving)

    def elapsed(self):
        return time.monotonic() - self.begin

    def go_on(self, elapsed):
        """Set the clock to what it showed when a cut process saved."""
        self.begin = min(self.begin, time.monotonic() - elapsed)
        self.earlier = elapsed - self.progress["elapsed"]

    def spend(self, what, since):
        """Add the seconds since `since` to those of `what`."""
        seconds = self.progress["seconds"]
        seconds[what] = seconds.get(what, 0.0) + time.monotonic() - since

    def done(self, stage):
        return any(row["name"] == stage for row in self.progress["stages"])

    def check_room(self, P, Q, runs):
        """Fails if the disk has no room for what so many runs hold: three pairs of models (sft and
        two checkpoints) and seven states (two of each warm-up, three of a phase as it saves)."""
        if parallel.rank():
            return
        pair = checkpoint.size(P.net) + checkpoint.size(Q.net)
        moving = max(checkpoint.size_of_state(model.net) for model in (P, Q))
        held = sum(path.stat().st_size for path in self.dir.rglob("*") if path.is_file())
        disk.room(self.dir, runs * (3 * pair + 7 * moving) - held)

    def keep(self, name, P, Q, record=None):
        """Both models in DIR/name, to stay; and the record of a checkpoint."""
        if parallel.rank():
            return
        size = checkpoint.size(P.net) + checkpoint.size(Q.net)
        with disk.whole_folder(self.dir / name, size, name) as folder:
            pretrained.save(P.net, P.tok, folder / "fwm")
            pretrained.save(Q.net, Q.tok, folder / "idm")
            if record:
                (folder / "progress.json").write_text(json.dumps(finite(record), indent=1))

    def finish_stage(self, stage, P, Q):
        """Save both models beside the last ones, then name them in progress.json: a cut loses
        nothing, and damage one stage."""
        folder = other_of(self.progress["folder"])
        self.progress["stages"].append(stage)
        self.progress["folder"] = folder
        self.measure()
        self.keep(folder, P, Q, self.progress)
        self.write("progress.json", self.progress)
        self.lines, self.earlier = [], 0.0
        if parallel.rank() == 0 and (self.dir / other_of(folder)).exists():
            disk.remove(self.dir / "steps", "steps")

    def save_progress(self):
        self.measure()
        self.write("progress.json", self.progress)

    def measure(self):
        """The clock and the sizes of the logs, as they stand on the disk."""
        self.progress["elapsed"] = self.elapsed()
        if parallel.rank() == 0:
            logs = list(self.dir.glob("*.jsonl"))
            for path in logs:
                records.sync(path)
            self.progress["bytes"] = {path.name: path.stat().st_size for path in logs}

    def finish(self, results):
        """Move the last models to fwm/ and idm/, then write results.json: the run is complete when
        that is there."""
        with disk.told(self.dir):
            for side in ("fwm", "idm"):
                source = self.dir / self.progress["folder"] / side
                if source.exists():
                    disk.remove(self.dir / side, side)
                    os.replace(source, self.dir / side)
        self.write("results.json", results)
        for rest in ("checkpoint-a", "checkpoint-b", "steps"):
            if (self.dir / rest).exists() and not disk.foreign(self.dir / rest, rest):
                shutil.rmtree(self.dir / rest)


def new_record(config):
    """What progress.json holds before the first stage. code: what computed, in its order."""
    return {
        "stages": [],
        "seconds": {},
        "baselines": {},
        "folder": None,
        "elapsed": 0.0,
        "bytes": {},
        "code": [in_words(config)],
    }


def other_of(folder):
    return "checkpoint-b" if folder == "checkpoint-a" else "checkpoint-a"


def finite(value):
    """The same for JSON, with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- checks of a folder -----------------------------------------------------------------------

def check_settings(old, new, out):
    """Fails if the run in the folder `out` has other settings."""
    for name in ("minutes", *new):                         # these set others
        value = new[name]
        if name not in FREE and old.get(name) != value:
            fail(
                f"--out {out} holds a run with {name}={old.get(name)}, this one has "
                f"{name}={value}; give another --out, or --fresh to start over"
            )


def check_data(old, new, cfg):
    """Fails if the transitions file is not the one that the run began with; by its SHA-256."""
    if old != new:
        fail(
            f"{cfg.data} has changed since the run in {cfg.out} began; give back the old file, "
            "or --fresh to start over"
        )


def note_code(record, silent):
    """Say if another version of the code goes on with the run; results.json names all of them."""
    now, seen = in_words(code_now()), record.setdefault("code", [])
    if seen and seen[-1] != now and not silent:
        print(f"note: this run has come so far with {seen[-1]}, and goes on with {now}; one "
              "version might have found other numbers")
    if now not in seen[-1:]:
        seen.append(now)


def code_now():
    """The commit and the versions that compute, as config.json holds them."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"git": git_revision(), "versions": versions}


def in_words(code):
    """The same as one text."""
    packages = [f"{name} {version}" for name, version in code["versions"].items()]
    return ", ".join([f"commit {(code['git'] or 'unknown')[:7]}", *packages])


def git_revision():
    """The commit of this code; None without git."""
    if not shutil.which("git"):
        return None
    command = ["git", "rev-parse", "HEAD"]
    here = Path(__file__).parent
    said = subprocess.run(command, capture_output=True, text=True, cwd=here)
    return said.stdout.strip() or None
