"""Kill a small run at random instants, again and again: what it ends with must not tell.

    python tests/kills.py                   100 kills -9, 20 SIGTERM, 10 kills -9 of two processes
    python tests/kills.py --kills 10 --terms 0 --two 0 --seed 5

Each process trains (the two warm-ups, SWIRL, the rivals) until it is killed; the next one goes on,
until a run is whole. It is then compared with one that nobody killed: weights, metrics.jsonl,
samples.jsonl and results.json, bit for bit except for times. Half of the kills come at a random
instant, the other half at a random call to the disk, that is inside a save.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from conftest import make_small, without_times, write_lamps  # noqa: E402

import train  # noqa: E402

FLAGS = ["--episodes", "8", "--warmup-steps", "12", "--warmup-steps-idm", "8", "--bootstrap-steps",
         "8", "--iterations", "1", "--phase1-steps", "6", "--phase2-steps", "5", "--group-size",
         "4", "--batch", "6", "--warmup-batch", "8", "--warmup-batch-idm", "4", "--eval-size", "6",
         "--validation-size", "6", "--threads", "1", "--muon", "--warmup-lr", "2e-3", "--lr-fwm",
         "4e-4", "--lr-idm", "4e-4"]
TIMES = {"seconds", "tokens_per_second"}
CALLS = [(os, "fsync"), (os, "replace"), (shutil, "rmtree"), (torch, "save"), (os, "mkdir")]


def forked(f, *args):
    """The number of a process that calls f and ends with its value."""
    sys.stdout.flush()
    number = os.fork()
    if number:
        return number
    code = 99
    try:
        code = f(*args) or 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(number):
    """The exit code of a process; -n after signal n."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def quiet_train(argv, log, die_at=0):
    """train.main in this process, which kills itself at its die_at-th call to the disk."""
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY), stream)
    count = [0]

    def deadly(f):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return f(*args, **kwargs)
        return call

    for place, name in CALLS if die_at else []:
        setattr(place, name, deadly(getattr(place, name)))
    return train.main(argv)


# --- what a run leaves ------------------------------------------------------------------------

def left(out):
    """{file: what must not depend on a kill}."""
    found = {"results.json": without_times(json.loads((out / "results.json").read_text()))}
    for path in sorted(out.rglob("*.safetensors")):
        found[str(path.relative_to(out))] = path.read_bytes()
    for path in sorted(out.rglob("*.jsonl")):
        lines = map(json.loads, path.read_text().splitlines())
        found[str(path.relative_to(out))] = [
            {key: value for key, value in line.items() if key not in TIMES} for line in lines]
    return found


def differences(a, b):
    """The files in which two runs differ."""
    one, two = left(a), left(b)
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def check(truth, out):
    wrong = differences(truth, out)
    if wrong:
        sys.exit(f"{out} differs from {truth} in {', '.join(wrong)}")
    shutil.rmtree(out)


# --- kills ------------------------------------------------------------------------------------

def kill(argv, folder, truth, kills, rng):
    """Kill -9 so many times. Returns {how: number}, and the number of whole runs."""
    begin = time.monotonic()
    assert ended(forked(quiet_train, [*argv, "--out", str(truth)], f"{truth}.log")) == 0
    seconds, log = time.monotonic() - begin, f"{folder}/killed.log"
    counts, runs = {"at an instant": 0, "inside a save": 0}, 0
    while sum(counts.values()) < kills:
        out = folder / f"killed-{runs}"
        while not (out / "results.json").exists():
            how = rng.choice(list(counts))
            if sum(counts.values()) == kills:
                how = None
            die_at = rng.randint(1, 150) if how == "inside a save" else 0
            number = forked(quiet_train, [*argv, "--out", str(out)], log, die_at)
            if how == "at an instant":
                time.sleep(rng.uniform(0, seconds))
                os.kill(number, signal.SIGKILL)
            code = ended(number)
            if code == -signal.SIGKILL:
                counts[how] += 1
            elif code:
                sys.exit(f"exit code {code}: {log}")
        check(truth, out)
        runs += 1
    return counts, runs


def terminate(argv, folder, truth, times, rng):
    """SIGTERM so many times. Returns the number of whole runs."""
    sent, runs, log = 0, 0, f"{folder}/terminated.log"
    begin = time.monotonic()
    assert ended(forked(quiet_train, [*argv, "--out", f"{folder}/timed"], log)) == 0
    seconds = time.monotonic() - begin
    argv = [*argv, "--save-every", "60"]                   # only the signal saves
    while sent < times:
        out = folder / f"terminated-{runs}"
        while not (out / "results.json").exists():
            number = forked(quiet_train, [*argv, "--out", str(out)], log)
            if sent < times:
                time.sleep(rng.uniform(0.2, seconds))
                os.kill(number, signal.SIGTERM)
            before = steps_logged(out)
            code = ended(number)
            if code not in (0, 143, -signal.SIGTERM):
                sys.exit(f"exit code {code}: {log}")
            sent += code == 143
            lost = steps_logged(out) - steps_saved(out)
            if code == 143 and lost:
                sys.exit(f"SIGTERM lost the steps {sorted(lost)} of {out}, {len(before)} before")
        check(truth, out)
        runs += 1
    return sent, runs


def steps_logged(out):
    """{(phase, model, iteration, step)} in metrics.jsonl."""
    found = set()
    for path in out.rglob("metrics.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            if line["phase"] != "eval":
                found.add((path.parent.name == "rivals", *step_of(line)))
    return found


def step_of(line):
    return line["phase"], line.get("model"), line["iteration"], line["step"]


def steps_saved(out):
    """The same in the states and in what finished stages have logged."""
    found = set()
    for path in out.rglob("state.pt"):
        rivals = "rivals" in path.parts
        for file, line in json.loads(torch.load(path)["lines"]):
            if file == "metrics.jsonl":
                found.add((rivals, *step_of(line)))
    for path in out.rglob("progress.json"):
        if path.parent.name.startswith("checkpoint"):
            continue
        size = json.loads(path.read_text())["bytes"].get("metrics.jsonl", 0)
        for line in (path.parent / "metrics.jsonl").read_bytes()[:size].splitlines():
            line = json.loads(line)
            if line["phase"] != "eval":
                found.add((path.parent.name == "rivals", *step_of(line)))
    return found


def kill_two(argv, folder, kills, rng):
    """Kill -9 all of torchrun's two gloo processes, or one of them, so many times."""
    done, runs, truth = 0, 0, folder / "two"

    def start(out):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node", "2", str(ROOT / "train.py"), *argv, "--out", str(out)]
        with open(folder / "two.log", "a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT,
                                    env=os.environ | {"OMP_NUM_THREADS": "1"})

    agent = start(truth)
    wait_for_a_line(truth, agent, 0)
    begin = time.monotonic()
    assert agent.wait() == 0
    seconds = time.monotonic() - begin
    while done < kills:
        out = folder / f"two-{runs}"
        while not (out / "results.json").exists():
            begin, agent = time.time(), start(out)
            if done < kills:
                wait_for_a_line(out, agent, begin)
                time.sleep(rng.uniform(0, seconds))
                workers = children(agent.pid)
                some = workers[:] if rng.random() < 0.5 else [rng.choice(workers or [0])]
                for number in some if workers and agent.poll() is None else []:
                    os.kill(number, signal.SIGKILL)
                    done += number == some[0]
            agent.wait()
        check(truth, out)
        runs += 1
    return done, runs


def wait_for_a_line(out, agent, since):
    """Until a process has logged a step."""
    path = out / "metrics.jsonl"
    while agent.poll() is None and not (path.exists() and path.stat().st_mtime > since):
        time.sleep(0.05)


def children(number):
    """The processes that a process has started (Linux)."""
    text = Path(f"/proc/{number}/task/{number}/children")
    return list(map(int, text.read_text().split())) if text.exists() else []


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--two", type=int, default=10, help="kills of two gloo processes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    write_lamps(folder / "lamps.jsonl")
    # In another process, since this one must not have computed anything before it forks
    assert ended(forked(lambda: make_small(folder / "model") and 0)) == 0
    flags = [*FLAGS, "--save-every", "0", "--data", str(folder / "lamps.jsonl"),
             "--model", str(folder / "model")]
    truth, begin = folder / "truth", time.monotonic()
    counts, runs = kill(flags, folder, truth, args.kills, rng)
    print(f"{counts} of {runs} runs, all as the one that nobody killed: "
          f"{time.monotonic() - begin:.0f} s", flush=True)
    if args.terms:
        sent, runs = terminate(flags, folder, truth, args.terms, rng)
        print(f"{sent} times SIGTERM in {runs} runs: no step lost, all as the first", flush=True)
    if args.two:
        done, runs = kill_two(flags, folder, args.two, rng)
        print(f"{done} kills of two processes in {runs} runs, all as the one that nobody killed")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
