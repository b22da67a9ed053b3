"""The course: what the student's tree shows, what the grader pays for, and what it does not."""
import ast
import csv
import shutil
from pathlib import Path

import pytest

from assignments import blank, bugs, grade, make, mutate, oracles, problems
from assignments.student import Server

ROOT = make.ROOT
LAYOUTS = Path(__file__).with_name("layouts")
WRITTEN = [f for f in problems.FUNCTIONS if f.problem]
WITH_CODE = sorted({f.problem for f in WRITTEN})


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    out = tmp_path_factory.mktemp("course") / "untouched"
    make.make(out, seed=0)
    return out


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    out = tmp_path_factory.mktemp("course") / "solved"
    make.make(out, solved=True)
    return out


def points(server, folder, problem):
    return grade.grade_problem(server, grade.Tree(folder), problem)["points"]


def most(problem):
    return sum(n for _, n in problems.graded(problem))


# --- the student's tree -----------------------------------------------------------------------

@pytest.mark.parametrize("f", problems.FUNCTIONS, ids=lambda f: f.name)
def test_a_function_of_the_course_exists(f):
    blank.find((ROOT / f.file).read_text(), f.name)


@pytest.mark.parametrize("f", WRITTEN, ids=lambda f: f.name)
def test_a_function_of_the_course_has_an_oracle(f):
    assert callable(getattr(oracles, f.name))


def test_make_fails_if_a_named_function_is_gone(tmp_path, monkeypatch, capsys):
    gone = problems.Function("grpo.py", "no_such_function", 1, 1)
    monkeypatch.setattr(problems, "FUNCTIONS", [gone])
    with pytest.raises(SystemExit) as stopped:
        make.make(tmp_path / "out")
    assert stopped.value.code == 2 and "no_such_function" in capsys.readouterr().err


def test_make_refuses_a_folder_that_holds_anything(tmp_path):
    (tmp_path / "something").touch()
    with pytest.raises(SystemExit) as stopped:
        make.main([str(tmp_path)])
    assert stopped.value.code == 2


def test_a_blanked_function_keeps_its_face_and_its_equation():
    source = blank.blank((ROOT / "swirl_fwm.py").read_text(), "phase1_reward", "problem 10")
    ours, theirs = (blank.find(text, "phase1_reward")
                    for text in ((ROOT / "swirl_fwm.py").read_text(), source))
    assert ast.unparse(ours.args) == ast.unparse(theirs.args)
    assert ast.get_docstring(ours) == ast.get_docstring(theirs)
    assert "# Eq. 3: R = log Q(z | x, y_hat)\n    raise NotImplementedError(" in source


def statements(f):
    """The statements of a function's body that are long enough to be nobody else's."""
    node = blank.find((ROOT / f.file).read_text(), f.name)
    texts = [ast.unparse(part) for statement in node.body for part in ast.walk(statement)
             if isinstance(part, (ast.Assign, ast.Return, ast.AugAssign))]
    return [text for text in texts if len(text) >= 35 and text != GIVEN]


# A call in `lm.logprobs`, which the student's tree keeps
GIVEN = "scored = scored_mask(rows, n_scored, T, net.device)"


def test_the_student_s_tree_shows_no_solution(untouched):
    trees = [ast.parse(path.read_text()) for path in untouched.rglob("*.py")]
    shown = {ast.unparse(part) for tree in trees for part in ast.walk(tree)
             if isinstance(part, ast.stmt)}
    docs = " ".join(path.read_text() for path in untouched.rglob("*.md"))
    for f in problems.FUNCTIONS:
        for text in statements(f):
            assert text not in shown and text not in docs, (f.name, text)


def test_the_student_s_tree_has_no_tests_oracles_or_history(untouched):
    names = {path.name for path in untouched.rglob("*")}
    assert not names & {"tests", ".git", "oracles.py", "measured.py", "bugs.py", "NOTES.md",
                        "PATCHES.md", "make.py", "grade.py", "mutate.py", "bench.py"}
    assert {"check.py", "claims.py", "README.md", "ANSWERS.md", "lamps.jsonl"} <= names


def test_every_problem_stands_in_the_handout():
    text = (ROOT / "assignments" / "README.md").read_text()
    for number, (title, by_hand) in problems.TITLES.items():
        section = text.split(f"## {number} {title}\n")[1].split("\n## ")[0]
        assert f"{most(number)} points" in section and " minutes." in section
        assert not by_hand or f"and {by_hand} " in section
        for f in problems.functions(number):
            assert f"`{f.name}`" in section or f": {f.name}`" in section, f.name


# --- points -----------------------------------------------------------------------------------

@pytest.mark.parametrize("problem", problems.TITLES)
def test_an_untouched_problem_has_no_points(problem, server, untouched):
    assert points(server, untouched, problem) == 0


@pytest.mark.parametrize("problem", problems.TITLES)
def test_the_reference_has_all_points(problem, server, solved):
    result = grade.grade_problem(server, grade.Tree(solved), problem)
    assert result["points"] == result["of"] > 0 and not result["why"]


@pytest.mark.slow
@pytest.mark.parametrize("problem", WITH_CODE)
def test_another_layout_has_all_points(problem, server):
    result = grade.grade_problem(server, grade.Tree(LAYOUTS), problem)
    assert result["points"] == result["of"], result["why"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(len(bugs.BUGS)))
def test_each_planted_bug_costs_problem_13(seed, server, tmp_path):
    make.copy_project(tmp_path / "tree", make.FOLDERS[:-1])
    bugs.plant(tmp_path / "tree", seed)
    assert points(server, tmp_path / "tree", 13) == 0


def test_mutants_of_the_loss_are_killed(server):
    loss, = [f for f in WRITTEN if f.name == "loss_sum"]
    n, passed = mutate.survivors(server, loss)
    assert n > 8 and not passed


# --- hostile trees ----------------------------------------------------------------------------

SOLUTION = ROOT / "grpo.py"
HOSTILE = {
    "prints": 'print("4 of 4"); return None',
    "exits": "import sys; sys.exit(0)",
    "leaves": "import os; os._exit(0)",
    "loops": "while True: pass",
    "sleeps": "import time; time.sleep(1000)",
    "eats memory": "return [bytearray(1 << 28) for _ in range(10**6)]",
    "recurses": "return k1(logp_pi, logp_ref)",
    "kills its parent": "import os; os.kill(os.getppid(), 9)",
    "forks": "import os\n    while True: os.fork()",
    "floods": 'return "x" * 10**8',
    "answers with an object": 'return {"tensor": [], "shape": [], "dtype": "load"}',
    "reads the file": f"exec(open({str(SOLUTION)!r}).read(), globals()); "
                      "return globals()['k1'](logp_pi, logp_ref)",
    "imports the project": f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
                           "sys.modules.pop('grpo'); import grpo; "
                           "return grpo.k1(logp_pi, logp_ref)",
    "asks a shell": f"import subprocess; exec(subprocess.check_output(['cat', {str(SOLUTION)!r}]))",
    "maps the file": f"b = torch.UntypedStorage.from_file({str(SOLUTION)!r}, False, 9000); "
                     "exec(bytes(b).decode(), globals()); "
                     "return globals()['k1'](logp_pi, logp_ref)",
    "looks into the grader": "import sys; m = sys.modules['assignments.oracles']; return m",
    "patches the grader": "import assignments.student as s; s.claim = lambda *a: None",
}


def hostile_tree(folder, body):
    """The solved functions of other problems, and k1 and k3 with a body."""
    shutil.copytree(LAYOUTS, folder)
    text = (folder / "grpo.py").read_text()
    for name in ("k1", "k3"):
        text = blank.blank(text, name, "here").replace(
            'raise NotImplementedError("here")', body)
    (folder / "grpo.py").write_text(text)
    return folder


# These run into a limit of time or memory
LONG = {"loops", "sleeps", "eats memory", "imports the project"}
KINDS = [pytest.param(kind, marks=pytest.mark.slow) if kind in LONG else kind for kind in HOSTILE]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_function_has_no_points(kind, server, tmp_path, monkeypatch):
    monkeypatch.setattr(problems, "SECONDS", 1)
    monkeypatch.setattr(problems, "WALL", 5)
    tree = hostile_tree(tmp_path / "tree", HOSTILE[kind])
    assert points(server, tree, 4) == 0
    monkeypatch.undo()
    assert points(server, tree, 5) == most(5)


def test_a_link_to_the_solution_has_no_points(server, tmp_path):
    (tmp_path / "grpo.py").symlink_to(SOLUTION)
    assert points(server, tmp_path, 4) == 0
    (tmp_path / "models").symlink_to(ROOT / "models")
    assert points(server, tmp_path, 2) == 0


def test_a_tree_that_is_a_link_is_not_graded(tmp_path):
    (tmp_path / "eve").symlink_to(ROOT)
    (tmp_path / "ada").mkdir()
    assert grade.subfolders(tmp_path) == [tmp_path / "ada"]


@pytest.mark.parametrize("text", ["def k1(:", "\0", "(" * 10**5, "x = 1\n"])
def test_a_file_that_is_no_python_has_no_points(text, server, tmp_path):
    (tmp_path / "grpo.py").write_text(text)
    result = grade.grade_problem(server, grade.Tree(tmp_path), 4)
    assert result["points"] == 0 and "grpo.py" in result["why"]


# --- commands ---------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_class_is_graded_into_a_table(untouched, tmp_path):
    shutil.copytree(untouched, tmp_path / "ada")
    shutil.copytree(LAYOUTS, tmp_path / "bob")
    assert grade.main(["--many", str(tmp_path), "--json", str(tmp_path / "all.json")]) == 0
    rows = list(csv.DictReader(open(tmp_path / "grades.csv")))
    assert [row["tree"] for row in rows] == ["ada", "bob"] and rows[0]["points"] == "0"
    assert rows[1]["12"] == str(most(12))


@pytest.mark.slow
def test_mutants_of_all_functions_are_killed():
    assert mutate.main([]) == 0
