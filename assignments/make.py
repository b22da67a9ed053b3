"""python -m assignments.make OUT [--seed N]: the tree that a student gets.

It is the project without the bodies of the functions in `problems.py`, with one bug (problem 13),
and without what would show a solution: the tests, some docs, the oracles, the notes. --seed chooses
the bug. --solved keeps the bodies, plants no bug and adds answers to problems 15 and 16: the grader
gives such a tree full points.
"""
import argparse
import shutil
import sys
from pathlib import Path

from assignments import blank, bugs, problems
from envs import records

ROOT = Path(__file__).parents[1]
FOLDERS = ["envs", "evals", "models", "support", "data"]
FILES = ["README.md", "LICENSE", "requirements.txt", "ruff.toml"]
HIDDEN = ["bench.py"]           # holds a loop that writes GRPO out
SHOWN = ["__init__.py", "README.md", "problems.py", "student.py", "server.py", "probes.py",
         "claims.py", "check.py"]


def copy_project(out, folders=FOLDERS):
    """The code of the project, as it is."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for folder in folders:
        shutil.copytree(ROOT / folder, out / folder, ignore=ignored)
    for path in ROOT.glob("*.py"):
        if path.name not in HIDDEN:
            shutil.copy(path, out)


def blank_all(folder, keep=()):
    """Blank the functions of all problems but `keep` in a copy of the project. Fails in one line if
    a function is gone."""
    for f in problems.FUNCTIONS:
        if f.problem in keep:
            continue
        path = folder / f.file
        reason = f"problem {f.problem}" if f.problem else "left out of the course"
        try:
            path.write_text(blank.blank(path.read_text(), f.name, reason))
        except (KeyError, FileNotFoundError):
            records.fail(f"problems.py: {f.file} has no function {f.name}")


def answers():
    """ANSWERS.md: a heading for each problem."""
    headings = [f"## {n} {title}\n\n" for n, (title, _) in problems.TITLES.items()]
    return "# Answers\n\nName:\n\n" + "\n".join(headings)


def make(out, seed=0, solved=False):
    """The student's tree in the folder `out`, which must be new or empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        records.fail(f"{out} holds something; give a new or empty folder")
    (out / "assignments").mkdir(parents=True, exist_ok=True)
    copy_project(out)
    for name in FILES:
        shutil.copy(ROOT / name, out)
    for name in SHOWN:
        shutil.copy(ROOT / "assignments" / name, out / "assignments")
    (out / "ANSWERS.md").write_text(answers())
    bugs.write_world(out / "data" / "lamps.jsonl")
    if solved:
        for name, text in bugs.ANSWERS.items():
            (out / name).write_text(text)
        return
    bugs.plant(out, seed)
    blank_all(out)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new or empty folder")
    parser.add_argument("--seed", type=int, default=0, help="which bug is planted [0]")
    parser.add_argument("--solved", action="store_true", help="with the solutions, for the teacher")
    parser.error = records.fail
    args = parser.parse_args(argv)
    try:
        make(args.out, args.seed, args.solved)
    except OSError as error:
        records.fail(f"{args.out}: {error.strerror or error}")
    print(f"{args.out}: start with assignments/README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
