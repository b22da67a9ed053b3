"""Each block of docs/PATCHES.md works as it stands: a small job runs with it, and it is used."""
import importlib
import json
import re
import sys
import types
from pathlib import Path

import pytest
from conftest import write_lamps
from test_train import SMALL

import envs
import train

TEXT = (Path(__file__).parents[1] / "docs" / "PATCHES.md").read_text()
BLOCKS = re.findall(r"```python\n# (\S+)\.py: (.+)\n((?:.|\n)*?)```", TEXT)


@pytest.fixture
def job(small_folder, tmp_path):
    """A small run; returns its exit code and its results.json."""
    def run(*argv):
        argv = [*SMALL, "--model", str(small_folder), *argv, "--out", str(tmp_path / "run")]
        return train.main(argv), json.loads((tmp_path / "run" / "results.json").read_text())
    return run


def test_all_six_blocks_are_found():
    assert len(BLOCKS) == 6


@pytest.mark.parametrize("module, name, code", [b for b in BLOCKS if b[1].isidentifier()])
def test_a_function_is_replaced(module, name, code, job, tmp_path, monkeypatch):
    module, calls = importlib.import_module(module), []
    monkeypatch.setattr(module, name, getattr(module, name))           # put back afterwards
    exec(code, vars(module))
    patched = getattr(module, name)

    def counted(*args, **kwargs):
        calls.append(1)
        return patched(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    code, results = job("--data", str(write_lamps(tmp_path / "lamps.jsonl")))
    assert code == 0 and calls and len(results["stages"]) == 4


@pytest.mark.parametrize("module, code", [(b[0], b[2]) for b in BLOCKS if not b[1].isidentifier()])
def test_a_file_is_a_new_world(module, code, job, monkeypatch):
    world = types.ModuleType(module.replace("/", "."))
    exec(code, vars(world))
    monkeypatch.setitem(sys.modules, world.__name__, world)
    monkeypatch.setitem(envs.WORLDS, "tools", world)       # under a name that --env knows
    code, results = job("--env", "tools", "--episodes", "12")
    assert code == 0 and results["splits"]["labelled"] > 6 and len(results["stages"]) == 4
