"""The README and the layout hold what they promise."""
import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest

import settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FILES = sorted(path for path in ROOT.rglob("*.py")
               if not {".git", "runs", "venv", ".venv"} & set(path.relative_to(ROOT).parts))
CORE = ["train", "swirl_fwm", "swirl_idm", "grpo", "lm", "sft"]


def paper_table():
    """[(module, name)] of the table "The paper in the code"."""
    section = README.split("## The paper in the code")[1].split("\n## ")[0]
    found = []
    for row in section.splitlines():
        module = None
        for quoted in re.findall(r"`([^`]+)`", row.split("|")[-2] if row.count("|") > 2 else ""):
            if ".py: " in quoted:
                module, quoted = quoted.split(".py: ")
            found.append((module, quoted))
    return found


@pytest.mark.parametrize("module, name", paper_table())
def test_what_the_paper_table_names_exists(module, name):
    assert inspect.isfunction(getattr(importlib.import_module(module), name))


def test_the_paper_table_is_read():
    assert len(paper_table()) > 15


def commands(script):
    """The arguments of each call of `script` in the README."""
    return re.findall(rf"python {script}((?: [^#`\n]*)?)", README)


@pytest.mark.parametrize("argv", commands("train.py"))
def test_readme_training_commands_are_understood(argv):
    """`settings.parse` exits where a flag or value is unknown."""
    settings.parse(shlex.split(argv))


def test_training_commands_are_found_in_the_readme():
    assert len(commands("train.py")) > 1


def test_every_file_that_the_readme_names_exists():
    folders = r"(?:docs|envs|evals|models|support)"
    named = set(re.findall(rf"\b({folders}/\w+(?:\.\w+)?|\w+\.py)\b", README))
    missing = [name for name in named if not (ROOT / name).exists()
               and not (ROOT / f"{name}.py").exists() and not (ROOT / f"{name}.md").exists()]
    assert len(named) > 10 and not missing


def test_the_results_name_their_commits():
    results = (ROOT / "docs" / "RESULTS.md").read_text()
    for section in ("The default run", "Three worlds, three seeds", "Real ScienceWorld"):
        text = results.split(f"## {section}\n")[1].split("\n## ")[0]
        assert re.search(r"commit [0-9a-f]{7}\b", text) and "`python train.py" in text


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200 and len(README.split()) <= 2200


# --- the code -------------------------------------------------------------------------------------

def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports():
    """{module: the project's modules that it imports at its top}."""
    modules = {module_of(path): path for path in FILES if path.parts[-2] != "tests"}
    graph = {}
    for name, path in modules.items():
        used = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    used.add(whole if whole in modules else node.module)
        graph[name] = used & set(modules) - {name}
    return graph


def test_imports_run_one_way():
    """Modules that import nothing of the project are taken away until none is left, or a circle."""
    graph = imports()
    while True:
        free = {name for name, used in graph.items() if not used & set(graph)}
        if not free:
            break
        graph = {name: used for name, used in graph.items() if name not in free}
    assert not graph


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_is_longer_than_100_columns(path):
    assert [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100] == []


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[-2] != "tests"],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_takes_more_than_8_parameters(path):
    for node in ast.parse(path.read_text()).body:
        functions = node.body if isinstance(node, ast.ClassDef) else [node]
        for f in functions:
            if isinstance(f, ast.FunctionDef):
                names = [a.arg for a in f.args.args + f.args.kwonlyargs if a.arg != "self"]
                assert len(names) <= 8, f.name


@pytest.mark.parametrize("name, most", [("train", 200), ("lm", 220)])
def test_core_files_fit_on_a_few_screens(name, most):
    assert len((ROOT / f"{name}.py").read_text().splitlines()) <= most


def test_the_core_knows_no_pictures():
    for name in CORE:
        code = (ROOT / f"{name}.py").read_text().split('"""', 2)[2]
        assert "images" not in re.sub(r'"""(.|\n)*?"""|#.*', "", code), name
