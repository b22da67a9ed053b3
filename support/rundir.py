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
import shutil
import subprocess
import time
from pathlib import Path

import torch
import transformers

from envs import records
from models import parallel, pretrained
from support import progress

OURS = {
    "config.json", "metrics.jsonl", "samples.jsonl", "results.json", "progress.json", "fwm", "idm",
    "sft", "rivals", "checkpoint-a", "checkpoint-b", "rollout.png", "rollout.gif", "codebook.npz"}
OURS |= {name + ".new" for name in OURS}
FOLDERS = {"fwm", "idm", "adapter", "sft", "rivals", "checkpoint-a", "checkpoint-b"}
PICTURE = re.compile(r"picture-(sft|bootstrap|iteration\d+-phase[12])\.png")
MODEL_FILE = re.compile(
    r"(adapter_)?(config|model|generation_config|tokenizer|tokenizer_config|special_tokens_map|"
    r"added_tokens|vocab|chat_template)[\w.-]*\.(json|safetensors|jinja|model)|merges\.txt|"
    r"README\.md"
)


def fail(message):
    """`records.fail`; under torchrun it says on which rank."""
    records.fail(f"rank {parallel.rank()}: {message}" if parallel.world() > 1 else message)


class Run:
    """The files of a run (contract: config.json, metrics.jsonl, samples.jsonl, results.json, fwm/,
    idm/) and its clock."""

    def __init__(self, cfg, started, label=""):
        # label: before the names of stages in what is printed
        self.dir, self.label = Path(cfg.out), label
        config = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("out", "fresh")}
        try:
            if parallel.rank() == 0:
                self.prepare(cfg, config)
        except OSError as e:
            fail(f"--out {cfg.out}: {e.strerror or e}; give a folder that can be written")
        # the others read when the folder is ready
        parallel.agree(None)
        self.progress = self.load("progress.json") or {
            "stages": [],
            "seconds": {},
            "baselines": {},
            "folder": None,
            "elapsed": 0.0,
            "eval_seconds": 0.0,
            "bytes": {},
        }
        self.begin = started - self.progress["elapsed"]
        # forget the lines of a stage that was cut
        for name in ("metrics.jsonl", "samples.jsonl"):
            path, size = self.dir / name, self.progress["bytes"].get(name, 0)
            if parallel.rank() == 0 and path.exists() and path.stat().st_size > size:
                os.truncate(path, size)

    def prepare(self, cfg, config):
        found = {p.name for p in self.dir.iterdir()} if self.dir.exists() else set()
        data = records.sha256(cfg.data)
        try:
            before = self.load("config.json") if "config.json" in found else {"settings": {}}
            old = before["settings"]
        except (KeyError, TypeError):
            fail(f"--out {cfg.out} holds a config.json that no run wrote; give another folder")
        if found - {"config.json.new"} and not old:
            fail(f"--out {cfg.out} holds files that no run wrote; give another folder")
        if cfg.fresh and found:
            # one that is damaged is no run's, perhaps
            self.load("progress.json")
            foreign = self.foreign(self.dir)
            if foreign:
                fail(
                    f"--fresh: {cfg.out} holds {foreign[0].relative_to(self.dir)}, which no run "
                    "wrote; move it away first"
                )
            shutil.rmtree(self.dir)
            old = {}
        for k in config:
            if k not in ("tokens", "preset") and old and old.get(k) != config[k]:
                fail(
                    f"--out {cfg.out} holds a run with {k}={old.get(k)}, this one has "
                    f"{k}={config[k]}; "
                    "give another --out, or --fresh to start over"
                )
        if old and before.get("data_sha256") != data:
            fail(
                f"{cfg.data} has changed since the run in {cfg.out} began; give back the old file, "
                "or --fresh to start over"
            )
        self.dir.mkdir(parents=True, exist_ok=True)
        if not old:
            git = (
                subprocess.run(
                    ["git", "rev-parse", "HEAD"],
                    capture_output=True,
                    text=True,
                    cwd=Path(__file__).parent,
                ).stdout.strip()
                if shutil.which("git")
                else None
            )
            self.write(
                "config.json",
                {
                    "settings": config,
                    "data_sha256": data,
                    "git": git or None,
                    "versions": {
                        "python": platform.python_version(),
                        "torch": torch.__version__,
                        "transformers": transformers.__version__,
                    },
                },
            )

    def foreign(self, folder):
        """Files in a run's folder that no run wrote."""
        out = []
        for path in sorted(folder.iterdir()):
            if path.is_dir() and path.name in FOLDERS:
                out += self.foreign(path)
            elif not (path.name in OURS or PICTURE.fullmatch(path.name) or
                      folder.name in ("fwm", "idm", "adapter") and MODEL_FILE.fullmatch(path.name)):
                out.append(path)
        return out

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
        self.progress["seconds"][what] = (
            self.progress["seconds"].get(what, 0.0) + time.monotonic() - since
        )

    def done(self, stage):
        return any(s["name"] == stage for s in self.progress["stages"])

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
        self.progress["bytes"] = {p.name: p.stat().st_size for p in self.dir.glob("*.jsonl")}
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
