"""The paper's tables in miniature, with every rival.

    python reproduce.py                              # all methods, three text worlds, three seeds
    python reproduce.py --quick                      # one world, one seed, few steps: ten minutes
    python reproduce.py --tables sizes groups        # ablations, in the world physics
    python reproduce.py --tune                       # choose each method's rate and length again

A row of a table is one command of train.py; best of 8 is one of evals.verify. All rows of a world
and a seed start from the same SFT models (--start). Two rows run side by side, one thread each. A
killed run goes on: a row whose command is in results/TABLE.json is not run again, and a row that
two tables share runs once. At the end all tables are written to results/RESULTS.md, means and
ranges over seeds, and drawn.

Every method gets about the seconds of SWIRL after SFT, but for two that begin again from the
pretrained model: sft-merge and share. Rates and lengths were chosen by --tune: the same four tries
for each method, and three more where likelihood and phases have a rate each. It ran in physics with
seed 7, and took the best chance of y on the validation transitions. For pixels every method has
the settings of that world.
"""
import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import methods
import settings
from envs import WORLDS, records
from support import comparison, disk, rundir
from support.comparison import BEST_OF_8

HERE = Path(__file__).parent
TEXT_WORLDS = ["tools", "physics", "web"]
SEEDS = [40, 41, 42]        # nothing was chosen on these
TUNING_SEED = 7
ALL = 0                     # of --state-only and --labelled
AFTER_SFT = [method for method in methods.METHODS if method != "sft"]

# About the seconds of SWIRL, two times Phase I and Phase II. Phase I takes nine tenths of them.
SWIRL = {"phase1-steps": 35, "phase2-steps": 25}
STEPS = {
    "sft": {},
    "phase1": {"iterations": 1, "phase1-steps": 78},       # the paper's IDM to FWM
    "share": {**SWIRL, "warmup-steps": 600},
    "swirl": SWIRL,
    "em": {"bootstrap-steps": 300, "phase2-steps": 25},
    "em+swirl": {"bootstrap-steps": 150, "phase1-steps": 17, "phase2-steps": 25},
    "bootstrap+swirl": {"bootstrap-steps": 190, "phase1-steps": 17, "phase2-steps": 12},
}
LIKELIHOOD = {"bootstrap-steps": 375}           # of every other method
RATES = {"warmup-lr": 3e-3, "lr-fwm": 1e-4, "lr-idm": 5e-5}
QUICK = ["--episodes", "80", "--eval-size", "40", "--validation-size", "14", "--iterations", "1"]
QUICK_STEPS = {"warmup-steps": 80, "warmup-steps-idm": 40, "bootstrap-steps": 24, "phase1-steps": 4,
               "phase2-steps": 3}


# --- the tables: {label: (flags of the row, flags of its SFT models)} --------------------------

def methods_table(tuned):
    """Every method from the same SFT models. Best of 8 is test-time verification of these, one draw
    a transition: it stands under changed and under sampled."""
    rows = {method: (method_flags(method, tuned), {}) for method in AFTER_SFT}
    return {BEST_OF_8: ({"method": BEST_OF_8}, {})} | rows


def sizes_table(tuned):
    """RL against likelihood as the state-only half grows."""
    rows = {}
    for n in (210, 420, 840, ALL):
        for method in ("sft-continue", "sft-merge", "bootstrap", "swirl"):
            flags = method_flags(method, tuned) | {"state-only": n}
            rows[f"{method}, {n or 'all'} pairs"] = flags, {}
    return rows


def groups_table(tuned):
    """Group size of Phase I."""
    flags = method_flags("phase1", tuned)
    return {f"G = {G}": (flags | {"group-size": G}, {}) for G in (4, 8, 16, 32, 64)}


def iterations_table(tuned):
    """Four iterations, with two models and with one."""
    return {method: (method_flags(method, tuned) | {"iterations": 4}, {})
            for method in ("swirl", "share")}


def map_table(tuned):
    """When does Eq. 3 beat likelihood on pseudo-labels? By how often somebody else acts as well,
    and by the number of state-only pairs."""
    rows = {}
    for busy in (0.0, 0.25, 0.5, 0.75, 1.0):
        for n in (105, 420, ALL):
            for method in ("bootstrap", "swirl"):
                flags = method_flags(method, tuned) | {"state-only": n}
                rows[f"{method}, busy {busy}, {n or 'all'} pairs"] = flags, {"busy": busy}
    return rows


def labelled_table(tuned):
    """How many transitions have labels."""
    rows = {}
    for n in (80, 200, 600, ALL):
        for method in ("sft", "bootstrap", "swirl", "bootstrap+swirl"):
            rows[f"{method}, {n or 'all'} labels"] = method_flags(method, tuned), {"labelled": n}
    return rows


def plateau_table(tuned):
    """How long SFT was: near its plateau more likelihood adds little."""
    rows = {}
    for steps in (600, 1200, 2400):
        for method in ("sft", "bootstrap", "swirl", "bootstrap+swirl"):
            rows[f"{method}, {steps} steps"] = method_flags(method, tuned), {"warmup-steps": steps}
    return rows


def departures_table(tuned):
    """Our departures from the paper taken back, one by one and together."""
    flags = method_flags("swirl", tuned)
    sums = {"reward-form": "mean", "floor": 10}
    kl = {"kl": "loss", "beta-fwm": 0.04}
    return {
        "default": (flags, {}),
        "advantage R - mean": (flags | {"scale": "mean"}, {}),
        "reward per token, floor": (flags | sums, {}),
        "KL in the loss": (flags | kl, {}),
        "pairs without change": (flags | {"no-skip-unchanged": ""}, {}),
        "temperature .75": (flags | {"temperature": 0.75}, {}),
        "Q reads x and y": (flags, {"view": "full"}),
        "Q refuses": (flags, {"spoiled": 1}),
        "all of the paper's": (flags | sums | kl | {"no-skip-unchanged": "", "temperature": 0.75},
                               {"view": "full"}),
    }


TABLES = {"methods": methods_table, "sizes": sizes_table, "groups": groups_table,
          "iterations": iterations_table, "map": map_table, "labelled": labelled_table,
          "plateau": plateau_table, "departures": departures_table}


def method_flags(method, tuned):
    """A method with its steps, and with the rates and steps that were chosen for it. tuned is None
    for a world whose own settings are taken."""
    if tuned is None:
        return {"method": method}
    return {"method": method} | STEPS.get(method, LIKELIHOOD) | tuned.get(method, {})


def grid(method):
    """The tries of --tune: a third of the rates, the rates, three times them; half the steps. What
    has likelihood and phases, too, may take a third for likelihood, three times for the phases."""
    steps = STEPS.get(method, LIKELIHOOD)
    changes = {"rate / 3": (1 / 3, 1 / 3), "rate": (1, 1), "rate x 3": (3, 3)}
    if is_mixed(method):
        changes |= {"likelihood / 3": (1 / 3, 1), "phases x 3": (1, 3), "both": (1 / 3, 3)}
    rows = {}
    for label, (likelihood, phases) in changes.items():
        times = {"warmup-lr": likelihood, "lr-fwm": phases, "lr-idm": phases}
        rates = {name: float(f"{rate * times[name]:.2g}") for name, rate in RATES.items()}
        rows[f"{method}, {label}"] = {"method": method} | steps | rates, {}
    fixed = ("warmup-steps", "iterations")
    half = {name: n if name in fixed else max(1, n // 2) for name, n in steps.items()}
    rows[f"{method}, half the steps"] = {"method": method} | half | RATES, {}
    return rows


def is_mixed(method):
    """Whether a method has stages of likelihood and of GRPO."""
    phases = {stage.kind in ("phase1", "phase2") for stage in methods.stages(method, 1)}
    return len(phases) == 2


# --- rows -------------------------------------------------------------------------------------

class Results:
    """FOLDER/TABLE.json: {row: what train.py found}, written whole after each row."""

    def __init__(self, folder):
        self.folder, self.lock = folder, threading.Lock()

    def load(self, table):
        path = self.folder / f"{table}.json"
        return load(path) if path.exists() else {}

    def add(self, table, key, row):
        with self.lock:
            self.write(f"{table}.json", json.dumps(self.load(table) | {key: row}, indent=1))

    def write(self, name, text):
        self.folder.mkdir(parents=True, exist_ok=True)
        with records.whole(self.folder / name) as file:
            file.write((text + "\n").encode())


def load(path):
    """The JSON object in a file; one line and exit code 2 if there is none."""
    try:
        found = records.from_json(path.read_bytes())
    except (OSError, ValueError) as error:
        records.fail(f"{path}: {error}; give it back, or remove it")
    if not isinstance(found, dict):
        records.fail(f"{path} holds no JSON object; give it back, or remove it")
    return found


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table."""
    table: str
    world: str
    seed: int
    label: str
    flags: dict             # of its method
    data: dict              # of its data, and so of its SFT models
    quick: bool
    runs: str               # folder of the runs

    @property
    def key(self):
        return f"{self.world}, seed {self.seed}, {self.label}"

    def sft_command(self):
        return self.train({"method": "sft"})

    def command(self):
        """Arguments of python: what makes the row from its SFT models."""
        sft = self.sft_command()[-1]
        if self.flags["method"] == BEST_OF_8:
            return ["-m", "evals.verify", "--run", sft, "--n", "8", "--tests", "1000",
                    "--json", f"{sft}/best-of-8.json"]
        if self.flags["method"] == "sft":
            return self.sft_command()
        return self.train(self.flags, ["--start", sft])

    def train(self, flags, more=()):
        """Arguments of train.py; the last one is the folder, another one for other flags."""
        given = self.not_default(flags | self.data)
        argv = ["train.py", "--env", self.world, "--seed", str(self.seed), "--threads", "1",
                "--no-rivals", *words(given), *more]
        if self.quick:
            argv += QUICK + words(QUICK_STEPS)
        digest = hashlib.sha256(" ".join(argv).encode()).hexdigest()[:6]
        folder = f"{self.runs}/{self.world}-{self.seed}/{flags['method']}-{digest}"
        return [*argv, "--out", folder]

    def not_default(self, flags):
        """The flags without those that say what holds anyway: equal rows have equal commands."""
        default = vars(settings.parse(["--env", self.world]))
        return {name: value for name, value in flags.items()
                if name == "method" or value != default.get(name.replace("-", "_"))}


def words(flags):
    """Flags as arguments; an empty value is a switch."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value)) if word]


def run(argv, path, locks):
    """One command on one thread, and what it left in a file: the command does not run again, if
    the file is there. RuntimeError if it fails."""
    path = HERE / path
    with locks.setdefault(path, threading.Lock()):
        if not path.exists():
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run([sys.executable, *argv], cwd=HERE, env=environment,
                                  capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"python {' '.join(argv)}: {done.stderr.strip()[-300:]}")
        return load(path)


def one_row(row, results, locks):
    """Run a row and keep what it found."""
    argv = row.command()
    command = " ".join(argv)
    if results.load(row.table).get(row.key, {}).get("command") == command:
        return
    folder = row.sft_command()[-1]
    sft = run(row.sft_command(), f"{folder}/results.json", locks)
    if row.flags["method"] == BEST_OF_8:
        best = run(argv, argv[-1], locks)["scores"]["8"]
        found = sft | {"stages": with_best(sft["stages"][0], best)}
    else:
        found = run(argv, f"{argv[-1]}/results.json", locks)
    results.add(row.table, row.key, {
        "world": row.world, "seed": row.seed, "label": row.label, "command": command,
        "flags": row.flags | row.data, "data": " ".join(words(row.not_default(row.data))),
        "sft": sft["stages"][0], "stages": found["stages"],
        "copy_x": found["baselines"]["copy_x"], "validation": found["validation"],
        "collapse": found["collapse"], "splits": found["splits"], "hardware": found["hardware"],
        "commit": (rundir.git_revision() or "unknown")[:7]})


def with_best(sft, best):
    """The stages of a row of best of 8, which trains nothing. It is a draw: its share of right y is
    `sampled`, too."""
    fwm = best["fwm"] | {"sampled": best["fwm"]["exact_changed"]}
    stage = {"name": BEST_OF_8, "fwm": fwm, "idm": best["idm"]}
    return [sft, stage, stage]


def run_all(rows, results, processes):
    """All rows, some side by side; says how far it is."""
    begin, done, locks = time.monotonic(), 0, {}
    pool = concurrent.futures.ThreadPoolExecutor(processes)
    waiting = {pool.submit(one_row, row, results, locks): row for row in rows}
    try:
        for future in concurrent.futures.as_completed(waiting):
            future.result()
            done += 1
            passed = time.monotonic() - begin
            left = passed / done * (len(rows) - done)
            print(f"{done} of {len(rows)} rows, {passed / 60:.0f} min, about {left / 60:.0f} left: "
                  f"{waiting[future].table}, {waiting[future].key}", flush=True)
    except RuntimeError as error:
        records.fail(error)
    finally:
        pool.shutdown(cancel_futures=True)


# --- the command --------------------------------------------------------------------------------

def labels_of(table, tuned, args):
    """{world: {label: (flags, flags of its data)}} of a table."""
    several = table == "methods" and not args.quick
    worlds = args.worlds or (TEXT_WORLDS if several else ["physics"])
    return {world: TABLES[table](None if world == "pixels" else tuned) for world in worlds}


def rows_of(table, labels, args):
    """The Rows of a table. Side by side stand different worlds: none waits for the other's SFT."""
    runs = args.runs + "/quick" * args.quick
    names = list(dict.fromkeys(label for of_world in labels.values() for label in of_world))
    return [Row(table, world, seed, label, *labels[world][label], args.quick, runs)
            for seed in args.seeds for label in names for world in labels]


def tune(results, args):
    """Run the grid of every method; keep the flags with the best chance of y on validation."""
    best = {}
    args.worlds, args.seeds = ["physics"], [TUNING_SEED]
    grids = {method: rows_of("grid", {"physics": grid(method)}, args) for method in AFTER_SFT}
    run_all([row for rows in grids.values() for row in rows], results, args.processes)
    found = results.load("grid")
    for method, rows in grids.items():
        chosen = max(rows, key=lambda row: found[row.key]["validation"]["sampled"])
        print(f"{method}: {chosen.label.partition(', ')[2]}")
        best[method] = {name: value for name, value in chosen.flags.items() if name != "method"}
    results.write("tuned.json", json.dumps(best, indent=1))


def report(results):
    """All tables that have been run, and how rates and lengths were chosen."""
    rows = {table: list(results.load(table).values()) for table in [*TABLES, "grid"]}
    about = {table: " ".join(make.__doc__.split()) for table, make in TABLES.items()}
    return comparison.report(rows, about)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), help="[tools physics web]")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=["methods"])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="[40 41 42]")
    parser.add_argument("--quick", action="store_true", help="one world, one seed, few steps")
    parser.add_argument("--tune", action="store_true", help="choose rates and lengths again")
    parser.add_argument("--processes", type=int, default=2, help="rows side by side [2]")
    parser.add_argument("--results", default="results", help="folder of the tables [results]")
    parser.add_argument("--runs", default="runs/reproduce", help="folder of the runs")
    parser.error = records.fail
    args = parser.parse_args(argv)
    if args.processes < 1:
        records.fail(f"--processes cannot be {args.processes}; give at least 1")
    folder = HERE / args.results
    chosen = folder / "tuned.json"
    tuned = load(chosen) if chosen.exists() else {}
    if args.quick:
        folder, args.seeds = folder / "quick", args.seeds[:1]
    with disk.told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        disk.lock(folder)                                  # another one would write the same rows
    results = Results(folder)
    if args.tune:
        tune(results, args)
        results.write("RESULTS.md", report(results))
        return 0
    rows = {table: rows_of(table, labels_of(table, tuned, args), args) for table in args.tables}
    run_all([row for of_table in rows.values() for row in of_table], results, args.processes)
    for table in args.tables:
        found = results.load(table)
        found = [found[row.key] for row in rows[table]]
        print(comparison.markdown(table, found))
        comparison.draw(table, found, folder)
    results.write("RESULTS.md", report(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
