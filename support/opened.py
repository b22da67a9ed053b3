"""Open what `train.py` left: its models and its test transitions."""
import dataclasses
import json
import typing
from pathlib import Path

import torch
import transformers

from envs import codebook, images, load_splits, records, test_episodes
from models import pretrained
from settings import Config
from support import loading
from support.evaluate import affordable


class Opened(typing.NamedTuple):
    """A finished run of train.py."""
    cfg: typing.Any         # its settings
    test: list              # [(x, z, y)] that it scored
    uncut: list             # the same before --max-state
    episodes: list          # its test episodes [(x, z, y)]
    P: typing.Any           # FWM
    Q: typing.Any           # IDM


def open_run(folder, models=""):
    """Opened. models: "" for the last ones, "sft" for those after the warm-up. BadData if the
    folder holds no finished run, or its transitions file is gone or has changed."""
    try:
        return load_run(Path(folder), models)
    except records.BadData:
        raise
    except Exception as error:      # whatever a damaged folder makes the loaders raise
        reason = str(error).partition("\n")[0]
        raise records.BadData(f"{folder}: cannot open the run ({reason}); train it again with this "
                              "version, or give another folder") from None


def load_run(folder, models):
    """`open_run`, which raises whatever a damaged folder makes the loaders raise."""
    config, n = read_config(folder)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = Config(**config["settings"])
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if not isinstance(value, (float, int) if f.type is float else f.type):
            raise ValueError(f"its setting {f.name} is {value}")
    if config.get("data_sha256") != records.sha256(cfg.data):
        raise records.BadData(f"{folder}: {cfg.data} has changed since this run; give back the "
                              "old file, or train again")
    uncut = load_splits(cfg)
    net_P, tok = pretrained.load(folder / models / "fwm")
    net_Q, _ = pretrained.load(folder / models / "idm")
    check_codebook(codebook(cfg), folder)
    splits = loading.shorten_all(tok, uncut, cfg.max_state)
    longest = loading.check_data(net_P, tok, splits, cfg)
    test = affordable(tok, splits[3])
    if len(test) != n:
        raise records.BadData(
            f"{folder}: it was trained with {n} test transitions, and now there are "
            f"{len(test)}; give it back its data, or train it again"
        )
    half = loading.in_half(cfg, device)
    nets = net_P.to(device), net_Q.to(device)
    P, Q = loading.wrap(*nets, tok, cfg, half, longest, test[0][0])
    episodes = loading.shorten_all(tok, test_episodes(cfg), cfg.max_state)
    return Opened(cfg, test, uncut[3][:n], episodes, P, Q)


def read_config(folder):
    """(config.json, number of test transitions) of a finished run."""
    try:
        config = json.loads((folder / "config.json").read_text())
        config["settings"]
        finished = (folder / "results.json").is_file()
        results = json.loads((folder / "results.json").read_text()) if finished else None
        n = results["splits"]["test"] if finished else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise records.BadData(f"{folder}: no run's config.json is there, or it is damaged; give a "
                              "folder that train.py wrote") from None
    if not finished:
        raise records.BadData(
            f"{folder}: this run is not finished; the same train.py command again finishes it"
        )
    return config, n


def check_codebook(book, folder):
    """ValueError if codes stand for other patches today."""
    if book:
        saved = images.Codebook.load(folder / "codebook.npz")
        if book.centres.tolist() != saved.centres.tolist():
            raise ValueError("its codes stand for other patches than those of this version")
