"""python -m assignments.grade TREE [--json FILE]: the points of a student's tree, offline.
python -m assignments.grade --many FOLDER: those of each subfolder, in FOLDER/grades.csv.

From the tree the grader takes the functions of `problems.py`, helpers that are new in their files,
the mended function of problem 13, `envs/mine.py` and `hack.py`. It puts those of one problem into
our code, where earlier problems are solved and later ones are blank, so that a mistake
costs its own problem only. They run in a process of their own (`server.py`); what they return is
judged here (`claims.py`, `oracles.py`, `measured.py`).
"""
import argparse
import concurrent.futures
import csv
import json
import shutil
import stat
import sys
import tempfile
from pathlib import Path

import torch

from assignments import blank, bugs, claims, make, measured, oracles, problems
from assignments.student import Failed, Server, Student
from envs import records

LARGEST = 1 << 20       # bytes of a student's file
AT_ONCE = 2             # problems


# --- the code that is judged -----------------------------------------------------------------

class Tree:
    """A student's files. Failed where one is missing, a link, or no plain text."""

    def __init__(self, folder):
        self.folder = Path(folder).resolve()

    def read(self, name):
        path = self.folder / name
        try:
            info = path.lstat()
            plain = stat.S_ISREG(info.st_mode) and path.resolve() == path
            if plain and info.st_size <= LARGEST:
                return path.read_text()
        except OSError:
            raise Failed(f"{name} is missing") from None
        except ValueError:
            raise Failed(f"{name} is no text") from None
        raise Failed(f"{name} is too large, or a link")


def compose(tree, problem, folder):
    """Our code in `folder`, with the student's functions of one problem in it."""
    (folder / "assignments").mkdir(parents=True)
    make.copy_project(folder, ["envs", "evals", "models", "support"])
    for name in ("__init__.py", "probes.py"):
        shutil.copy(make.ROOT / "assignments" / name, folder / "assignments")
    make.blank_all(folder, keep=range(1, problem + 1))
    if problem == 13:
        theirs = bugs.PLACES
    else:
        theirs = [(f.file, f.name) for f in problems.functions(problem)]
    for file in sorted({file for file, _ in theirs}):
        names = [name for other, name in theirs if other == file]
        put(folder / file, tree.read(file), names)
    for name in measured.FILES.get(problem, ()):
        (folder / name).write_text(tree.read(name))


def put(path, source, names):
    try:
        path.write_text(blank.put(path.read_text(), source, names))
    except KeyError as error:
        raise Failed(f"{path.name} has no function {error.args[0]}") from None
    except Exception as error:              # whatever a strange file makes the parser raise
        raise Failed(f"{path.name} is no Python: {error}"[:200]) from None


# --- points ----------------------------------------------------------------------------------

def try_claims(student, name):
    """Failed with the first claim that does not hold for a function."""
    for module in (claims, oracles, measured):
        check = getattr(module, name, None)
        if check is not None:
            try:
                check(student, torch.Generator().manual_seed(len(name)))
            except Failed:
                raise
            except Exception as error:      # an answer of another kind than any claim expects
                raise Failed(f"what comes back has another form ({error})"[:200]) from None


def grade_problem(server, tree, problem):
    """{"name", "points", "of", "why", "by_hand"}"""
    title, by_hand = problems.TITLES[problem]
    parts = problems.graded(problem)
    points, why = 0, []
    try:
        with tempfile.TemporaryDirectory() as folder:
            compose(tree, problem, Path(folder, "code"))
            with Student(server, Path(folder, "code")) as student:
                for name, worth in parts:
                    try:
                        try_claims(student, name)
                        points += worth
                    except Failed as error:
                        why.append(f"{name}: {error}")
    except Failed as error:
        why.append(str(error))
    return {"name": f"{problem} {title}", "points": points, "of": sum(n for _, n in parts),
            "why": "; ".join(why), "by_hand": by_hand}


def grade(server, folder):
    """{"points", "of", "by_hand", "problems"} of a tree."""
    tree = Tree(folder)
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        rows = list(pool.map(lambda n: grade_problem(server, tree, n), problems.TITLES))
    total = {key: sum(row[key] for row in rows) for key in ("points", "of", "by_hand")}
    return total | {"problems": rows}


def subfolders(folder):
    """The folders in a folder, without links: one may lead to the solutions."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())


# --- what is printed -------------------------------------------------------------------------

def show(result):
    for row in result["problems"]:
        hand = f" (+{row['by_hand']} by hand)" if row["by_hand"] else ""
        print(f"{row['points']:3} of {row['of']:3}  {row['name']}{hand}")
        for why in filter(None, row["why"].split("; ")):
            print(f"            {why}")
    print(f"{result['points']:3} of {result['of']:3}  in all, "
          f"and up to {result['by_hand']} by hand (NOTES.md)")


def write_class(path, results):
    """A row for each tree: its points in each problem, and why some are missing."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["tree", "points", "of", *problems.TITLES, "why"])
        for name, result in results.items():
            rows = result["problems"]
            why = " | ".join(f"{row['name']}: {row['why']}" for row in rows if row["why"])
            points = [row["points"] for row in rows]
            writer.writerow([name, result["points"], result["of"], *points, why])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="a student's tree; with --many a folder of trees")
    parser.add_argument("--json", type=Path, help="write the points there, too")
    parser.add_argument("--many", action="store_true", help="grade each subfolder")
    parser.error = records.fail
    args = parser.parse_args(argv)
    if not args.tree.is_dir():
        records.fail(f"{args.tree} is no folder")
    torch.set_num_threads(1)
    trees = subfolders(args.tree) if args.many else [args.tree]
    results = {}
    with Server() as server:
        for tree in trees:
            results[tree.name] = result = grade(server, tree)
            if args.many:
                print(f"{result['points']:3} of {result['of']:3}  {tree.name}", flush=True)
            else:
                show(result)
    try:
        if args.many:
            write_class(args.tree / "grades.csv", results)
        if args.json:
            whole = results if args.many else result
            args.json.write_text(json.dumps(whole, indent=1) + "\n")
    except OSError as error:
        records.fail(f"{error.filename}: {error.strerror}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
