"""What you do with a trained pair: walk in the learned world, predict, label, simulate.

    python play.py RUN                                          walk; type help there
    python play.py RUN --predict FILE --out FILE                x, z -> y, logp
    python play.py RUN --label FILE --out FILE                  x, y -> z, logq, refused
    python play.py RUN --simulate FILE --steps 6 --out FILE     x -> z, y

    run = open_run(RUN)                     from Python (import play; from support.opened ...)
    run.P.predict([x], [z])                 [y_hat], greedy
    run.Q.predict([x], [y])                 [z_hat], greedy, never a refusal
    play.simulate(run, [x], [[z1, z2]])     [[y_hat1, y_hat2]]: P reads its own output

FILE has one JSON object a line, plain or .gz; --out is plain. A row keeps its keys and gets
    y, logp             P's greedy next state and log P(y | x, z), in nats
    z, logq, refused    Q's best action but for a refusal, log Q(z | x, y) without refusals, in
                        nats, and whether Q would refuse
    z, y                lists: the actions and the states after them. A row may bring its own z;
                        others get --steps actions of the test transitions, drawn by --seed

1. All rows are checked before the first is written. --predict and --simulate write all or nothing.
   A killed --label goes on with the same command: a half-written last line is cut off, and rows
   meet the same batches, so that the output is the same byte for byte.
2. P writes no more tokens than the longest state in training, and a few. A longer y is cut.
"""
import argparse
import copy
import dataclasses
import itertools
import json
import os
import random
import sys
import time
from pathlib import Path

import envs
from envs import images, records
from envs.records import BadData
from models import pretrained
from models.text import shorten
from support.opened import open_run
from swirl_idm import line_diff

BATCH = 64          # rows at a time
EVERY = 10.0        # seconds between two lines of progress
ADDS = {"predict": ("y", "logp"), "label": ("z", "logq", "refused"), "simulate": ("z", "y")}
HELP = """  ACTION       what P predicts (lines that go and come), and what Q reads in it
               an empty line: the whole state
  undo         back by one action
  true         the state that the real world reaches by the same actions
  imagine T    T actions, drawn from the test transitions
  quit"""


# --- predict, label, simulate ----------------------------------------------------------------

def cut(run, states):
    """The states as the models read them (--max-state)."""
    longest = run.cfg.max_state
    return [shorten(run.P.tok, state, longest) for state in states] if longest else list(states)


def greedy(model, options, xs, others):
    """[(text, log-prob in nats)]: the likeliest y of each (x, z), or z of each (x, y)."""
    drawn = model.rollouts(xs, others, 1, dataclasses.replace(options, temperature=0))
    return [(model.read(row), round(sum(logps), 4)) for row, logps in zip(drawn.rows, drawn.logps)]


def simulate(run, xs, zs):
    """[[y_hat after each action]] of first states xs. zs: a list of actions for each x."""
    states, out = cut(run, xs), [[] for _ in xs]
    for t in range(max(map(len, zs), default=0)):
        going = [i for i in range(len(zs)) if t < len(zs[i])]
        ys = run.P.predict([states[i] for i in going], [zs[i][t] for i in going])
        for i, y, short in zip(going, ys, cut(run, ys)):
            out[i].append(y)
            states[i] = short
    return out


def fill(run, task, rows):
    """The rows with what the task adds."""
    xs, other = [row["x"] for row in rows], "y" if task == "label" else "z"
    others = [row[other] for row in rows]
    if task == "simulate":
        found = zip(others, simulate(run, xs, others))
    elif task == "predict":
        found = greedy(run.P, run.P.options, cut(run, xs), others)
    else:
        xs, ys = cut(run, xs), cut(run, others)
        best = greedy(run.Q, run.Q.no_refusal(), xs, ys)
        found = [(*some, refused) for some, refused in zip(best, run.Q.refuses(xs, ys))]
    return [row | dict(zip(ADDS[task], values)) for row, values in zip(rows, found)]


# --- rows of a file --------------------------------------------------------------------------

def read_rows(run, args):
    """Yields the rows of args.file as dicts, checked, each with its actions if they are to be
    drawn. BadData: file, line, what is wrong, what to do."""
    for number, raw in records.lines(args.file):
        if not raw.strip():
            continue
        try:
            row = records.from_json(raw)
            to_line(row)
        except (ValueError, RecursionError) as error:
            raise BadData(f"{args.file}:{number}: no JSON in UTF-8 ({error}); write one object "
                          "on each line") from None
        if args.task == "simulate" and args.steps and isinstance(row, dict) and "z" not in row:
            rng = random.Random(f"{args.seed} {number}")
            row["z"] = [rng.choice(run.test)[1] for _ in range(args.steps)]
        problem = wrong(run, args.task, row)
        if problem:
            raise BadData(f"{args.file}:{number}: {problem}")
        yield row


def wrong(run, task, row):
    """What is wrong with a row, and what to do; None if nothing is."""
    if not isinstance(row, dict):
        return 'no JSON object; write {"x": "..", ..}'
    for key in ADDS[task]:
        if key in row and (task, key) != ("simulate", "z"):
            return f'"{key}" is there already; rename it, as in "true_{key}"'
    states = [row.get(key) for key in ("x", "y") if key == "x" or task == "label"]
    zs = {"label": [], "predict": [row.get("z")], "simulate": row.get("z")}[task]
    if not isinstance(zs, list) or task == "simulate" and not zs:
        return '"z" is no list of actions; write ["..", ".."], or leave it out and give --steps'
    for key, text in [*zip("xy", states), *(("z", z) for z in zs)]:
        if not isinstance(text, str) or not text.strip():
            return f'"{key}" is missing, empty or no string; give it a text'
        if len(text) > records.MOST:
            return f'"{key}" has more than {records.MOST} characters; shorten it'
    size, known = len(images.patches(run.test[0][0]) or ""), run.P.tok.get_added_vocab
    for state in states if size else []:
        codes = images.patches(state) or []
        if len(codes) != size or not set(codes) <= set(known()):
            return f"a state is no image of {size} codes of this run; see its samples.jsonl"
    return too_long(run, cut(run, states), zs)


def too_long(run, states, zs):
    """What is wrong if (x, y), or (x,) and one of zs, leave the models no room; None if nothing
    is."""
    P, Q = run.P, run.Q
    if zs:
        around = max(len(P.prompt("", z)) for z in zs)
        needed = around + max(len(P.before(states[0])), P.longest) + P.longest
    else:
        needed = len(Q.prompt(*states)) + Q.longest
    most = pretrained.context(P.net)
    if needed > most:
        return f"{needed} tokens may be needed, and the model takes {most}; shorten the texts"


def to_line(row):
    """The bytes of a row in a file."""
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()


def batches(rows, done, total):
    """Yields lists of BATCH rows, and prints rows a second and the time left. done: rows before
    these."""
    begin = last = time.monotonic()
    first = done
    while batch := list(itertools.islice(rows, BATCH)):
        yield batch
        now, done = time.monotonic(), done + len(batch)
        if now - last >= EVERY or done == total:
            last, speed = now, (done - first) / max(now - begin, 1e-9)
            print(f"{done} of {total} rows, {speed:.1f} rows a second, "
                  f"{(total - done) / speed:.0f} s left", flush=True)


def convert(run, args):
    """--predict, --simulate and --label."""
    total = sum(1 for _ in read_rows(run, args))
    if not total:
        raise BadData(f"{args.file}: the file holds no rows; write one JSON object a line")
    if args.task == "label":
        return label(run, args, total)
    with records.whole(args.out) as file:
        for rows in batches(read_rows(run, args), 0, total):
            file.writelines(map(to_line, fill(run, args.task, rows)))


def label(run, args, total):
    """Goes on where the output ends. Its last batch is labelled again: so batches are those of a
    run without a break, and labels of another run are noticed."""
    n, size, old = written(run, args)
    at, end = n - len(old), None
    rows = itertools.islice(read_rows(run, args), at, None)
    with open(args.out, "ab") as file:
        for batch in batches(rows, at, total):
            labelled = fill(run, "label", batch)
            if [row["z"] for row in labelled[:len(old)]] != old:
                raise BadData(f"--out {args.out}: its labels are of another run; give that RUN, or "
                              "another --out")
            if end not in (None, file.seek(0, os.SEEK_END)):
                raise BadData(f"--out {args.out}: another process writes there, too; leave one")
            lines = b"".join(map(to_line, labelled[len(old):]))
            file.truncate(size)                             # a half-written line
            file.write(lines)
            file.flush()
            size = end = size + len(lines)
            old = []


def written(run, args):
    """(number of whole lines in the output, their bytes, [z] of its last batch). BadData unless it
    holds the first rows of args.file with their labels, and perhaps a part of the next one."""
    n, size, zs = 0, 0, []
    if not os.path.exists(args.out):
        return n, size, zs
    rows = read_rows(run, args)
    with open(args.out, "rb") as file:
        for raw in file:
            begin = to_line(next(rows, "no row"))[:-2]      # without its brace
            try:
                if not raw.endswith(b"\n") and begin.startswith(raw[:len(begin)]):
                    break
                z = json.loads(raw)["z"] if raw.startswith(begin + b", ") else None
            except (ValueError, KeyError, RecursionError):
                z = None
            if z is None:
                raise BadData(f"{args.out}:{n + 1}: no label of that row of {args.file}; give "
                              "another --out")
            zs = zs + [z] if n % BATCH else [z]
            n, size = n + 1, size + len(raw)
    return n, size, zs


# --- the walk --------------------------------------------------------------------------------

def walk(run, start, seed):
    """Reads commands from standard input until `quit` or its end."""
    if not 0 <= start < len(run.test):
        raise BadData(f"--start {start}: give 0 to {len(run.test) - 1}")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    rng, states, zs = random.Random(seed), [run.test[start][0]], []
    print(f"test state {start}; type an action, such as {rng.choice(run.test)[1]}, or help")
    print(whole_state(states[0]))
    while (line := typed()) != "quit":
        word, _, rest = line.partition(" ")
        if line == "help":
            print(HELP)
        elif line == "true":
            print(compare(run, start, zs, states[-1]))
        elif line == "undo" and not zs:
            print("  nothing to undo")
        elif line in ("", "undo"):
            if line:
                zs.pop()
                states.pop()
            print(whole_state(states[-1]))
        elif word == "imagine" and rest.isdecimal() and len(rest) < 5:
            for _ in range(int(rest)):
                z = rng.choice(run.test)[1]
                print(f"> {z}")
                take(run, z, states, zs)
        else:
            take(run, line, states, zs)


def typed():
    """A line of standard input, also printed where no terminal shows it; "quit" at its end."""
    try:
        line = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        line = "quit"
    if not sys.stdin.isatty():
        print(line)
    return line


def take(run, z, states, zs):
    """One action: prints what P predicts and what Q reads in it, and adds both to the walk."""
    x, = cut(run, states[-1:])
    problem = too_long(run, [x], [z])
    if problem:
        print("  " + problem)
        return
    y_hat, = run.P.predict([x], [z])
    y, = cut(run, [y_hat])
    z_hat, = run.Q.predict([x], [y])
    logp, logq = run.P.logp([x], [z], [y_hat]).item(), run.Q.logp([x], [z], [y]).item()
    refused, = run.Q.refuses([x], [y])
    print(difference(x, y_hat))
    print(f"  Q reads {z_hat}" + ", but would rather refuse" * refused)
    print(f"  log P(y_hat | x, z) = {logp:.2f}   log Q(z | x, y_hat) = {logq:.2f}")
    states.append(y_hat)
    zs.append(z)


def compare(run, start, zs, state):
    """How the real world differs after the same actions, or why it cannot tell."""
    try:
        y, = cut(run, [truth(run, start, zs)])
    except ValueError as error:                             # BadData is one, too
        return f"  the real world cannot tell: {error}"
    if y == state:
        return "  the real world is in the same state"
    return f"  in the real world instead\n{difference(state, y)}"


def truth(run, start, zs):
    """The state that the real world reaches from test state `start` by the actions zs. ValueError
    if it has no such action; BadData if the run is on a file or on images."""
    cfg = run.cfg
    World = getattr(envs.WORLDS[cfg.env], "World", None)
    if cfg.data or not World:
        raise BadData("only built-in worlds of text can")
    episodes = envs.episodes(cfg, "test")
    i, t = next((i, t) for i, steps in enumerate(episodes)
                for t, step in enumerate(steps) if step == run.uncut[start])
    # The test episodes begin with these worlds
    world = copy.deepcopy(envs.draw(World, cfg.seed, "test", len(episodes))[i])
    for z in [z for _, z, _ in episodes[i][:t]] + zs:
        world.step(z)
    return world.text()


def whole_state(state):
    """The lines of a state; the size of an image."""
    codes = images.patches(state)
    return f"  an image of {len(codes)} patches" if codes else "  " + state.replace("\n", "\n  ")


def difference(x, y):
    """The lines that differ, in colour on a terminal. For images, a map of the patches that do."""
    before, after = images.codes(x), images.codes(y)
    if x == y:
        return "  nothing changes, so that Q can only guess"
    if before is not None and after is not None and before.shape == after.shape:
        return "\n".join("  " + "".join(".#"[n] for n in row) for row in (before != after).tolist())
    colours, end = {"-": "\033[31m", "+": "\033[32m"}, "\033[0m"
    if not sys.stdout.isatty():
        colours, end = {"-": "", "+": ""}, ""
    return "\n".join(colours[line[0]] + line + end for line in line_diff(x, y))


# --- the command -----------------------------------------------------------------------------

def check_flags(args):
    """BadData if the input cannot be read, or the output is no new file and none of --label's."""
    if bool(args.task) != bool(args.out):
        raise BadData("--out belongs to --predict, --label and --simulate; give both or none")
    if not args.task:
        return
    next(records.lines(args.file), None)
    out = Path(args.out)
    if out.suffix == ".gz":
        raise BadData(f"--out {out}: is written plain, so that it can be resumed; drop .gz")
    if not out.absolute().parent.is_dir():
        raise BadData(f"--out {out}: there is no such folder; make it first")
    if out.exists() and (args.task != "label" or not out.is_file() or out.samefile(args.file)):
        raise BadData(f"--out {out}: is there already; name a new file")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="folder that train.py wrote")
    parser.add_argument("--start", type=int, default=0, help="walk from this test state [0]")
    parser.add_argument("--seed", type=int, default=0, help="of drawn actions [0]")
    tasks = parser.add_mutually_exclusive_group()
    for task in ADDS:
        tasks.add_argument(f"--{task}", metavar="FILE")
    parser.add_argument("--steps", type=int, default=0, help="actions to draw, for --simulate")
    parser.add_argument("--out", metavar="FILE")
    parser.error = records.fail
    args = parser.parse_args(argv)
    records.show_anything()
    args.task = next((task for task in ADDS if getattr(args, task)), None)
    args.file = args.task and getattr(args, args.task)
    try:
        check_flags(args)
        run = open_run(args.run)
        if args.task:
            convert(run, args)
        else:
            walk(run, args.start, args.seed)
    except BadData as error:
        records.fail(error)
    except OSError as error:
        records.fail(f"--out {args.out}: cannot write it ({error.strerror}); give another file")
    except KeyboardInterrupt:
        print("\nstopped" + "; the same command goes on" * (args.task == "label"))
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
