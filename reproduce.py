"""The paper's tables in miniature, with every rival.

    python reproduce.py                              # all methods, three text worlds, three seeds
    python reproduce.py --quick                      # the same, small: ten minutes
    python reproduce.py --tables sizes groups        # ablations, in the world physics
    python reproduce.py --tune                       # choose each method's rate and length again

A row of a table is one command of train.py. All rows of a world and a seed start from the same SFT
models (--start). Two rows run side by side, one thread each. A killed run goes on: what is in
results/TABLE.json is not run again. When all is done, the tables are printed as Markdown, means and
ranges over seeds, and drawn.

Every method gets about the seconds of SWIRL. Its rate and its length were chosen by --tune: the
same four tries for each, in physics with seed 7, by the chance of y on the validation transitions.
"""
import argparse
import concurrent.futures
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from envs import WORLDS, records
from methods import METHODS
from support import charts

HERE = Path(__file__).parent
TEXT_WORLDS = ["tools", "physics", "web"]
SEEDS = [40, 41, 42]        # nothing was chosen on these
TUNING_SEED = 7

# About the seconds of SWIRL, two times Phase I and Phase II. Phase I takes nine tenths of them.
SWIRL = {"phase1-steps": 35, "phase2-steps": 25}
STEPS = {
    "sft": {},
    "phase1": {"phase1-steps": 39},
    "share": {**SWIRL, "warmup-steps": 600},
    "swirl": SWIRL,
    "em": {"bootstrap-steps": 300, "phase2-steps": 25},
    "em+swirl": {"bootstrap-steps": 150, "phase1-steps": 17, "phase2-steps": 25},
    "bootstrap+swirl": {"bootstrap-steps": 190, "phase1-steps": 17, "phase2-steps": 12},
}
LIKELIHOOD = {"bootstrap-steps": 375}           # of every other method
RATES = {"warmup-lr": 3e-3, "lr-fwm": 1e-4, "lr-idm": 5e-5}
QUICK = ["--episodes", "80", "--eval-size", "60", "--validation-size", "30"]
QUICK_STEPS = {"warmup-steps": 80, "warmup-steps-idm": 40, "bootstrap-steps": 24, "phase1-steps": 4,
               "phase2-steps": 3}


# --- the tables: {label: (flags of the row, flags of its SFT models)} --------------------------

def methods_table(tuned):
    return {method: (method_flags(method, tuned), {}) for method in METHODS if method != "sft"}


def sizes_table(tuned):
    """RL against likelihood as the state-only half grows."""
    rows = {}
    for n in (210, 420, 840, 1680):
        for method in ("sft-continue", "sft-merge", "bootstrap", "swirl"):
            flags = method_flags(method, tuned) | {"state-only": n}
            rows[f"{method}, {n} pairs"] = flags, {}
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
    for busy in (0.0, 0.33, 0.67, 1.0):
        for n in (105, 420, 1680):
            for method in ("bootstrap", "swirl"):
                flags = method_flags(method, tuned) | {"state-only": n}
                rows[f"{method}, busy {busy}, {n} pairs"] = flags, {"busy": busy}
    return rows


def labelled_table(tuned):
    """How many transitions have labels."""
    rows = {}
    for n in (80, 160, 400, 800):
        for method in ("sft", "bootstrap", "swirl", "bootstrap+swirl"):
            rows[f"{method}, {n} labels"] = method_flags(method, tuned), {"labelled": n}
    return rows


def departures_table(tuned):
    """Our departures from the paper taken back, one by one and together."""
    flags = method_flags("swirl", tuned)
    sums = {"reward-form": "mean", "floor": 10}
    kl = {"kl": "loss", "beta-fwm": 0.04}
    return {
        "as it is": (flags, {}),
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
          "departures": departures_table}


def method_flags(method, tuned):
    """A method with its steps, and with the rates and steps that were chosen for it."""
    flags = {"method": method} | STEPS.get(method, LIKELIHOOD)
    return flags | tuned.get(method, {})


def grid(method):
    """The four tries of --tune: a third of the rate, the rate, three times it; half the steps."""
    steps = STEPS.get(method, LIKELIHOOD)
    rows = {}
    for label, times in (("rate / 3", 1 / 3), ("rate", 1), ("rate x 3", 3)):
        rates = {name: float(f"{rate * times:.2g}") for name, rate in RATES.items()}
        rows[f"{method}, {label}"] = {"method": method} | steps | rates, {}
    half = {name: max(1, n // 2) for name, n in steps.items()}
    rows[f"{method}, half the steps"] = {"method": method} | half | RATES, {}
    return rows


# --- rows -------------------------------------------------------------------------------------

class Results:
    """results/TABLE.json: {row: what train.py found}, written whole after each row."""

    def __init__(self, folder):
        self.folder, self.lock = folder, threading.Lock()

    def load(self, table):
        path = self.folder / f"{table}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def add(self, table, key, row):
        with self.lock:
            rows = self.load(table) | {key: row}
            self.folder.mkdir(parents=True, exist_ok=True)
            with records.whole(self.folder / f"{table}.json") as file:
                file.write((json.dumps(rows, indent=1) + "\n").encode())


def words(flags):
    """Flags as arguments; an empty value is a switch."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value)) if word]


def run(argv):
    """One command of train.py on one thread, in results.json's terms. RuntimeError if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "train.py", *argv], cwd=HERE, env=environment,
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"train.py {' '.join(argv)}: {done.stderr.strip()[-300:]}")
    out = Path(argv[argv.index("--out") + 1])
    return json.loads((HERE / out / "results.json").read_text())


def sft_of(world, seed, data, args):
    """(folder, results) of the SFT models of a world, a seed and flags of the data; made if need
    be."""
    name = "-".join(["sft", *map(str, data.values())])
    out = f"{args.runs}/{world}-{seed}/{name}"
    if (HERE / out / "results.json").exists():
        return out, json.loads((HERE / out / "results.json").read_text())
    quick = QUICK + words(QUICK_STEPS) if args.quick else []
    flags = words({"env": world, "seed": seed, "method": "sft", "threads": 1, **data, "out": out})
    return out, run([*flags, *quick])


def one_row(table, world, seed, label, args):
    """Run a row and keep what it found."""
    flags, data = args.rows[table][label]
    key = f"{world}, seed {seed}, {label}"
    if key in args.results.load(table):
        return
    with args.locks.setdefault((world, seed, str(data)), threading.Lock()):
        start, sft = sft_of(world, seed, data, args)
    found, argv = sft, []
    if flags["method"] != "sft":
        name = re.sub(r"[^\w.]+", "-", f"{table} {label}")
        out = f"{args.runs}/{world}-{seed}/{name}"
        quick = QUICK + words(QUICK_STEPS) if args.quick else []
        argv = words({"env": world, "seed": seed, "threads": 1, **flags, **data})
        argv += ["--no-rivals", "--start", start, *quick, "--out", out]
        found = run(argv)
    args.results.add(table, key, {
        "world": world, "seed": seed, "label": label, "command": " ".join(["train.py", *argv]),
        "sft": sft["stages"][0], "stages": found["stages"], "validation": found["validation"],
        "collapse": found["collapse"], "splits": found["splits"], "hardware": found["hardware"]})


def run_all(jobs, args):
    """All rows, two at a time; says how far it is."""
    begin, done = time.monotonic(), 0
    with concurrent.futures.ThreadPoolExecutor(args.processes) as pool:
        waiting = {pool.submit(one_row, *job, args): job for job in jobs}
        for future in concurrent.futures.as_completed(waiting):
            try:
                future.result()
            except RuntimeError as error:
                pool.shutdown(cancel_futures=True)
                records.fail(error)
            done += 1
            passed = time.monotonic() - begin
            left = passed / done * (len(jobs) - done)
            table, world, seed, label = waiting[future]
            print(f"{done} of {len(jobs)} rows, {passed / 60:.0f} min, about {left / 60:.0f} left: "
                  f"{table}, {world}, seed {seed}, {label}", flush=True)


# --- what is printed ----------------------------------------------------------------------------

def last(row):
    """The final stage of a row, with the seconds of all stages after SFT."""
    stages = row["stages"][1:-1]
    return row["stages"][-1] | {"seconds": sum(stage["seconds"] for stage in stages)}


def spread(values, scale=100):
    """Mean and range, as text."""
    values = [scale * (value or 0) for value in values]
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def markdown(table, rows):
    """A table for each world: a line a label, mean and range over seeds."""
    lines = []
    for world in dict.fromkeys(row["world"] for row in rows.values()):
        here = [row for row in rows.values() if row["world"] == world]
        by_label = {"SFT": [row["sft"] for row in unique_sft(here)]}
        for row in here:
            by_label.setdefault(row["label"], []).append(last(row))
        lines += [f"\n{table}, {world}, {len(by_label['SFT'])} seeds\n",
                  "| | changed | sampled | IDM exact | seconds |",
                  "| --- | --- | --- | --- | --- |"]
        for label, stages in by_label.items():
            cells = [
                spread([stage["fwm"]["exact_changed"] for stage in stages]),
                spread([stage["fwm"]["sampled"] for stage in stages]),
                spread([stage["idm"]["exact"] for stage in stages]),
                spread([stage["seconds"] for stage in stages], scale=1),
            ]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(table, rows, folder):
    """TABLE.png and TABLE-curves.png, if matplotlib is there."""
    shares, points = {}, {}
    for row in rows.values():
        labels = shares.setdefault(row["world"], {})
        labels.setdefault(row["label"], []).append(last(row)["fwm"]["sampled"])
        path = points.setdefault(row["world"], {}).setdefault(row["label"], [])
        path.append(progress(row))
    means = {world: {label: mean_curve(paths) for label, paths in labels.items()}
             for world, labels in points.items()}
    try:
        charts.dots(folder / f"{table}.png", table, shares)
        charts.curves(folder / f"{table}-curves.png", table, means)
        if table == "map":
            charts.heat(folder / "who-wins.png", *who_wins(rows))
    except ImportError:
        print("no pictures: pip install matplotlib")


def who_wins(rows):
    """(busy values, pair numbers, SWIRL minus Bootstrap in points, sampled) of the map."""
    cells = {}
    for row in rows.values():
        method, busy, pairs = row["label"].split(", ")
        cell = cells.setdefault((float(busy.split()[1]), int(pairs.split()[0])), {})
        cell.setdefault(method, []).append(100 * last(row)["fwm"]["sampled"])
    gains = {key: statistics.mean(cell["swirl"]) - statistics.mean(cell["bootstrap"])
             for key, cell in cells.items() if len(cell) == 2}
    across, up = sorted({busy for busy, _ in gains}), sorted({n for _, n in gains})
    return across, up, [[gains.get((busy, n)) for busy in across] for n in up]


def progress(row):
    """[(seconds after SFT, sampled)] at the end of each stage."""
    seconds, points = 0.0, [(0.0, row["sft"]["fwm"]["sampled"])]
    for stage in row["stages"][1:-1]:
        seconds += stage["seconds"]
        points.append((seconds, stage["fwm"]["sampled"]))
    return points


def mean_curve(paths):
    """The mean over seeds of curves with as many points."""
    return [tuple(map(statistics.mean, zip(*points))) for points in zip(*paths)]


def unique_sft(rows):
    """One row for each seed, whose SFT models have the world's own data."""
    seen = {}
    for row in rows:
        seen.setdefault((row["seed"], row["sft"]["fwm"]["logp"]), row)
    return list(seen.values())


def tuned(folder):
    """{method: the flags that --tune chose}, {} before it ran."""
    path = folder / "tuned.json"
    return json.loads(path.read_text()) if path.exists() else {}


def tune(args):
    """Run the grid of every method; keep the flags with the best chance of y on validation."""
    args.rows = {"grid": {}}
    for method in METHODS:
        if method != "sft":
            args.rows["grid"] |= grid(method)
    run_all([("grid", "physics", TUNING_SEED, label) for label in args.rows["grid"]], args)
    rows, best = args.results.load("grid"), {}
    for method in METHODS:
        tries = [row for row in rows.values() if row["label"].startswith(method + ", ")]
        if tries:
            chosen = max(tries, key=lambda row: row["validation"]["sampled"])["label"]
            flags = args.rows["grid"][chosen][0]
            best[method] = {name: value for name, value in flags.items() if name != "method"}
            print(f"{method}: {chosen.partition(', ')[2]}")
    with records.whole(args.results.folder / "tuned.json") as file:
        file.write((json.dumps(best, indent=1) + "\n").encode())


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), help="[tools physics web]")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=["methods"])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="[40 41 42]")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: ten minutes")
    parser.add_argument("--tune", action="store_true", help="choose rates and lengths again")
    parser.add_argument("--processes", type=int, default=2, help="rows side by side [2]")
    parser.add_argument("--results", default="results", help="folder of the tables [results]")
    parser.add_argument("--runs", default="runs/reproduce", help="folder of the runs")
    parser.error = records.fail
    args = parser.parse_args(argv)
    folder = HERE / args.results
    if args.quick:
        folder, args.runs, args.seeds = folder / "quick", args.runs + "/quick", args.seeds[:1]
    args.results, args.locks = Results(folder), {}
    if args.tune:
        tune(args)
        return 0
    chosen = tuned(HERE / "results")
    args.rows = {table: TABLES[table](chosen) for table in args.tables}
    jobs = []
    for table in args.tables:
        worlds = args.worlds or (TEXT_WORLDS if table == "methods" else ["physics"])
        # Side by side stand rows of different worlds: none waits for the other's SFT models
        jobs += [(table, world, seed, label)
                 for seed in args.seeds for label in args.rows[table] for world in worlds]
    run_all(jobs, args)
    for table in args.tables:
        rows = args.results.load(table)
        print(markdown(table, rows))
        draw(table, rows, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
