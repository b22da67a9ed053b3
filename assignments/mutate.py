"""python -m assignments.mutate [NAME ..]: does the grader grade?

Each function of the course is broken in many small ways (signs, comparisons, off by one, swapped
arguments, a dropped detach or mask, mean for sum, another axis). The grader must refuse each. A
mutant that it lets pass is a survivor. EQUIVALENT names those that compute the same.
"""
import argparse
import ast
import concurrent.futures
import copy
import sys
import tempfile
from pathlib import Path

import torch

from assignments import blank, grade, problems
from assignments.student import Failed, Server, Student
from envs import records

GOAL = 0.95             # killed, of the mutants that are not equivalent

OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
             ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.And: ast.Or, ast.Or: ast.And,
             ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.In: ast.NotIn, ast.NotIn: ast.In,
             ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
             ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
NAMES = {"mean": "sum", "sum": "mean", "minimum": "maximum", "maximum": "minimum", "amax": "amin",
         "amin": "amax", "argmax": "argmin", "std": "var", "log": "exp", "exp": "log",
         "zeros": "ones", "ones_like": "zeros_like", "full": "zeros", "any": "all", "all": "any"}
# Methods that a mutant leaves out: x.detach() becomes x
DROPPED = {"detach", "clamp", "masked_fill", "cumsum", "item", "cpu", "abs", "transpose", "any"}

# (function, part of "line  =>  mutant"): why it is no other function
EQUIVALENT = {
    ("run_whole", "check_mode(net)"): "refuses dropout, which no model here has",
    ("run_whole", "=>  out.logits.flatten(-2, 0)"): "the same two axes",
    ("run_whole", "use_cache=False, logits_to_keep=scored)  =>  True"): "a cache that is not used",
    ("run_shared", "=>  out.logits.flatten(-2, 0)"): "the same two axes",
    ("run_shared", "logits_to_keep=scored)  =>  False"): "a given cache is used all the same",
    ("sample_batch", "use_cache=True)  =>  False"): "a given cache is used all the same",
    ("sample_batch", "=>  torch.ones(N"): "what stands behind the end is cut off",
    ("sample_batch", "break  =>  pass"): "saves passes over no rows",
    ("sample_batch", "live, V = live[going], logp.shape[-1]  =>  1"): "of two axes the last is 1",
    ("sample_batch", "drawn = logp.argmax(-1)[at]  =>  1"): "of two axes the last is 1",
    ("sample_batch", "out.logits[:, -1], torch.tensor(t), options)"): "one token: last is first",
    ("k3", "clamp(max=20)"): "any bound between 10 and 80 keeps the promise",
    ("surrogate", "=>  torch.minimum(clipped * A, ratio * A)"): "min(a, b) = min(b, a)",
    ("backward", "gap = logp.detach().cpu() - drawn  =>"): "a CPU, no gradient; |a - b| = |b - a|",
    ("backward", "gaps.append(gap.abs().max().item())  =>  gap.abs().max()"): "of one number",
    ("true_posterior", "=>  posterior.transpose(-1, -2)"): "the same two axes",
    ("true_posterior", "p_zy / torch.where(p_y > 0, p_y, 1.0)"): "only where y is impossible",
    ("elbo", "=>  P.transpose(-1, -2)"): "the same two axes",
    ("phase1_rollouts", "columns(guessed, 3)  =>"): "the number is for a rank without rows",
    ("run_phase", "=>  map(torch.equal, weights(frozen), before)"): "a = b is b = a",
}
# Lines that are not graded: logs, what a cut run goes on from, the seed; in `bootstrap` the labels
# that are not made since no step would take them
UNGRADED = ("bar.", "bar = ", "tables.warn", "run.log(", "seconds=", "lab.tally", "in examples",
            "tokens_per_second", "some_ref =", "checkpoint.Moving(", "generator.manual_seed",
            "if share < 1", "rng = rng_of(", "rng.sample(")


def variants(node):
    """Other nodes in place of one, each with a small mistake."""
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in OPERATORS:
        yield changed(node, op=OPERATORS[type(node.op)]())
    if isinstance(node, ast.BinOp):
        yield node.left
        if isinstance(node.op, (ast.Sub, ast.Div, ast.MatMult)):
            yield changed(node, left=node.right, right=node.left)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        yield changed(node, ops=[OPERATORS[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
        yield node.operand
    if isinstance(node, ast.Constant):
        yield from constants(node)
    if isinstance(node, ast.Call):
        yield from calls(node)
    if isinstance(node, ast.IfExp):
        yield changed(node, body=node.orelse, orelse=node.body)
    if isinstance(node, (ast.If, ast.While)):
        yield changed(node, test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, (ast.Continue, ast.Break, ast.Expr, ast.AugAssign, ast.Assert)):
        yield ast.Pass()


def constants(node):
    value = node.value
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int):
        yield ast.Constant(value + 1)
        yield ast.Constant(value - 1)
    elif isinstance(value, float):
        yield ast.Constant(2 * value + 1)
    elif isinstance(value, str) and "->" in value:
        before, after = value.split("->")
        yield ast.Constant(f"{before}->{after[:-2]}{after[:-3:-1]}")


def calls(node):
    args = node.args
    if len(args) > 1 and not any(isinstance(arg, ast.Starred) for arg in args[:2]):
        yield changed(node, args=[args[1], args[0], *args[2:]])
    if len(args) > 2:
        yield changed(node, args=[args[0], args[2], args[1], *args[3:]])
    if isinstance(node.func, ast.Attribute):
        name = node.func.attr
        if name in NAMES:
            yield changed(node, func=changed(node.func, attr=NAMES[name]))
        if name in DROPPED:
            yield node.func.value


def changed(node, **fields):
    node = copy.copy(node)
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def mutants(source, name):
    """[(line, what it became, the whole source)] of a function."""
    tree = blank.parse(source)
    function = blank.find(source, name)
    before, out = source.split("\n"), []
    inside = [number for number in range(blank.body_start(function), function.end_lineno + 1)
              if not any(text in before[number - 1] for text in UNGRADED)]
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            for i, node in enumerate(value if isinstance(value, list) else [value]):
                if getattr(node, "lineno", 0) not in inside:
                    continue
                for other in variants(node):
                    out.append((node, *replaced(tree, parent, field, i, other)))
    return [(node.lineno, before[node.lineno - 1].strip(), became, whole)
            for node, became, whole in out]


def replaced(tree, parent, field, i, other):
    """(the new node as text, the whole source with it)"""
    value = getattr(parent, field)
    if isinstance(value, list):
        kept, value[i] = value[i], other
        text = ast.unparse(tree)
        value[i] = kept
    else:
        setattr(parent, field, other)
        text = ast.unparse(tree)
        setattr(parent, field, value)
    return " ".join(ast.unparse(other).split())[:60], text


def survivors(server, f):
    """(number of mutants, [(line, became)] of those that the grader lets pass)."""
    source = (grade.make.ROOT / f.file).read_text()
    found, passed = mutants(source, f.name), []
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder, "code")
        grade.compose(grade.Tree(grade.make.ROOT), f.problem, code)
        for number, line, became, whole in found:
            (code / f.file).write_text(whole)
            with Student(server, code) as student:
                try:
                    grade.try_claims(student, f.name)
                    passed.append((f"{f.file}:{number}", line, became))
                except Failed:
                    pass
    return len(found), passed


def is_equivalent(f, line, became):
    return any(name == f.name and part in f"{line}  =>  {became}" for name, part in EQUIVALENT)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="functions [all]")
    parser.error = records.fail
    args = parser.parse_args(argv)
    chosen = [f for f in problems.FUNCTIONS if f.problem and f.name in (args.names or f.name)]
    if not chosen:
        records.fail(f"problems.py names none of {args.names}")
    torch.set_num_threads(1)
    low = 0
    with Server() as server, concurrent.futures.ThreadPoolExecutor(grade.AT_ONCE) as pool:
        for f, (n, passed) in zip(chosen, pool.map(lambda f: survivors(server, f), chosen)):
            same = [row for row in passed if is_equivalent(f, *row[1:])]
            score = 1 - (len(passed) - len(same)) / max(1, n - len(same))
            low += score < GOAL
            print(f"{f.problem:2} {f.name:20} {n:3} mutants, {100 * score:5.1f}% killed, "
                  f"{len(same)} equivalent", flush=True)
            for place, line, became in passed:
                mark = "=" if (place, line, became) in same else "!"
                print(f"     {mark} {place}  {line}  =>  {became}")
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
