"""A run's folder and its clock: what `train.py` writes.

DIR/config.json, metrics.jsonl, samples.jsonl, results.json, fwm/, idm/. A stage that ends is saved
whole (both models, then progress.json, which names them), so that a cut loses one stage at most and
nothing half-written is ever read. Of several processes only rank 0 writes.
"""
import dataclasses
import json
import os
import platform
import re
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
from support import progress, sinks

OURS = {
    "config.json", "metrics.jsonl", "samples.jsonl", "results.json", "progress.json",
    "fwm", "idm", "sft", "rivals", "checkpoint-a", "checkpoint-b",
    "rollout.png", "rollout.gif", "codebook.npz", "curves.png", "report.html",
}
OURS |= {name + ".new" for name in OURS}
FOLDERS = {"fwm", "idm", "adapter", "sft", "rivals", "checkpoint-a", "checkpoint-b", "tensorboard"}
PICTURE = re.compile(r"picture-(iteration\d+-)?[a-z]+[12]?\.png")
MODEL_FILE = re.compile(
    r"(adapter_)?(config|model|generation_config|tokenizer|tokenizer_config|special_tokens_map|"
    r"added_tokens|vocab|chat_template)[\w.-]*\.(json|safetensors|jinja|model)|merges\.txt|"
    r"README\.md"
)
# Settings that may differ when a run resumes
FREE = ("tokens", "preset", "tensorboard", "wandb")


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
        try:
            if parallel.rank() == 0:
                self.prepare(cfg)
        except OSError as e:
            fail(f"--out {cfg.out}: {e.strerror or e}; give a folder that can be written")
        # The others read when the folder is ready
        parallel.agree(None)
        self.progress = self.load("progress.json") or {
            "stages": [],
            "seconds": {},
            "baselines": {},
            "folder": None,
            "elapsed": 0.0,
            "bytes": {},
        }
        self.begin = started - self.progress["elapsed"]
        self.sinks = None                                  # of --tensorboard and --wandb
        if parallel.rank() == 0:
            self.forget_cut_stage()
            self.sinks = None if label else sinks.start(cfg)

    def __getstate__(self):
        """What a second process gets: it sends nothing."""
        return self.__dict__ | {"sinks": None}

    def prepare(self, cfg):
        """Make the folder, with its config.json; or check that it holds the same run."""
        settings = dataclasses.asdict(cfg)
        del settings["out"], settings["fresh"]
        data = records.sha256(cfg.data)
        old = self.read_config(cfg.out)
        if old and cfg.fresh:
            self.clear(cfg.out)
            old = None
        if old:
            check_settings(old["settings"], settings, cfg.out)
            check_data(old.get("data_sha256"), data, cfg)
            return
        self.dir.mkdir(parents=True, exist_ok=True)
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        config = {
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "settings": settings,
            "data_sha256": data,
            "git": git_revision(),
            "versions": versions,
        }
        self.write("config.json", config)

    def read_config(self, out):
        """config.json of the run that is in the folder; None if the folder is new or empty."""
        found = os.listdir(self.dir) if self.dir.exists() else []
        if found in ([], ["config.json.new"]):      # the second: of a run that was cut as it began
            return None
        if "config.json" not in found:
            fail(f"--out {out} holds files that no run wrote; give another folder")
        config = self.load("config.json")
        if not isinstance(config, dict) or not config.get("settings"):
            fail(f"--out {out} holds a config.json that no run wrote; give another folder")
        return config

    def clear(self, out):
        """Delete the earlier run; fails if the folder holds a file that no run wrote."""
        # Fails if it is damaged: then it may be somebody else's
        self.load("progress.json")
        others = foreign(self.dir)
        if others:
            fail(
                f"--fresh: {out} holds {others[0].relative_to(self.dir)}, which no run "
                "wrote; move it away first"
            )
        shutil.rmtree(self.dir)

    def forget_cut_stage(self):
        """Delete the lines that an unfinished stage has logged."""
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
        new.write_text(json.dumps(value, indent=1))
        os.replace(new, self.dir / name)

    def log(self, name, **line):
        if parallel.rank():
            return
        with open(self.dir / name, "a") as f:
            f.write(json.dumps(line) + "\n")
        if self.sinks:
            self.sinks.send()

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
            with records.whole(self.dir / "codebook.npz") as file:
                book.save(file)

    def bar(self, name, steps):
        """The progress of a stage, on rank 0."""
        return progress.Bar(name, steps, silent=parallel.rank() > 0)

    def elapsed(self):
        return time.monotonic() - self.begin

    def spend(self, what, since):
        """Add the seconds since `since` to those of `what`."""
        seconds = self.progress["seconds"]
        seconds[what] = seconds.get(what, 0.0) + time.monotonic() - since

    def done(self, stage):
        return any(row["name"] == stage for row in self.progress["stages"])

    def keep(self, name, P, Q):
        """Both models in DIR/name, to stay."""
        if parallel.rank() == 0:
            pretrained.save(P.net, P.tok, self.dir / name / "fwm")
            pretrained.save(Q.net, Q.tok, self.dir / name / "idm")

    def finish_stage(self, stage, P, Q):
        """Save both models beside the last ones, then name them in progress.json: a cut loses one
        stage at most."""
        last = self.progress["folder"]
        folder = "checkpoint-b" if last == "checkpoint-a" else "checkpoint-a"
        if parallel.rank() == 0:
            shutil.rmtree(self.dir / folder, ignore_errors=True)
        self.keep(folder, P, Q)
        self.progress["stages"].append(stage)
        self.progress["folder"] = folder
        self.save_progress()

    def save_progress(self):
        self.progress["elapsed"] = self.elapsed()
        logs = self.dir.glob("*.jsonl")
        self.progress["bytes"] = {path.name: path.stat().st_size for path in logs}
        self.write("progress.json", self.progress)

    def finish(self, results):
        """Move the last models to fwm/ and idm/, then write results.json: the run is complete when
        that is there."""
        for side in ("fwm", "idm"):
            source = self.dir / self.progress["folder"] / side
            if source.exists():
                shutil.rmtree(self.dir / side, ignore_errors=True)
                os.replace(source, self.dir / side)
        self.write("results.json", results)
        for rest in ("checkpoint-a", "checkpoint-b"):
            shutil.rmtree(self.dir / rest, ignore_errors=True)


# --- checks of a folder -----------------------------------------------------------------------

def check_settings(old, new, out):
    """Fails if the run in the folder `out` has other settings."""
    for name, value in new.items():
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


def foreign(folder):
    """Files in a run's folder that no run wrote."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name in FOLDERS:
            found += foreign(path)
        elif not is_ours(path):
            found.append(path)
    return found


def is_ours(path):
    """Whether a run may have written this file, by its name."""
    if path.name in OURS or PICTURE.fullmatch(path.name):
        return True
    if path.parent.name == "tensorboard":
        return path.name.startswith("events.out.tfevents.")
    in_model = path.parent.name in ("fwm", "idm", "adapter")
    return in_model and MODEL_FILE.fullmatch(path.name) is not None


def git_revision():
    """The commit of this code; None without git."""
    if not shutil.which("git"):
        return None
    command = ["git", "rev-parse", "HEAD"]
    here = Path(__file__).parent
    said = subprocess.run(command, capture_output=True, text=True, cwd=here)
    return said.stdout.strip() or None
