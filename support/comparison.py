"""The tables of `reproduce.py` as text and pictures: means and ranges over seeds.

A row is what reproduce.py keeps of a run: world, seed, label, flags, the stage of SFT, the stages,
collapse. `sampled` and the other scores are those of results.json.
"""
import math
import statistics

from support import charts

BEST_OF_8 = "best of 8"     # test-time verification of SFT: no method of train.py
SCORES = ["exact", "changed", "sampled", "IDM exact", "examples", "tokens", "seconds"]
AHEAD = [f"T = {T}" for T in range(1, 7)]
COLLAPSE = ["unique", "in truth", "words", "in truth", "perplexity, % of the truth's"]


def last(row):
    """The final stage of a row, with the examples, tokens and seconds of all stages after SFT."""
    stages = row["stages"][1:-1]
    sums = {name: sum(stage.get(name, 0) for stage in stages)
            for name in ("examples", "tokens", "seconds")}
    return row["stages"][-1] | sums


def spread(values, scale=100):
    """Mean and range, as text."""
    values = [scale * value for value in values if value is not None]
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "-"
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def markdown(table, rows):
    """A table for each world: a line a label, mean and range over seeds. The methods also have how
    far ahead P is right, and whether the actions that Q reads collapse (`mi_bounds.collapse`)."""
    lines = []
    for world in dict.fromkeys(row["world"] for row in rows):
        here = [row for row in rows if row["world"] == world]
        labels, seeds = by_label(here), {row["seed"] for row in here}
        lines += [f"\n{table}, {world}, {len(seeds)} seeds\n", *as_table(SCORES, cells, labels)]
        if table == "methods":
            lines += [f"\n{world}: exact T steps ahead, where P reads its own output\n",
                      *as_table(AHEAD, horizon, labels)]
            lines += [f"\n{world}: the actions that Q draws\n",
                      *as_table(COLLAPSE, collapse, of_Q(here))]
    return "\n".join(lines)


def as_table(columns, cells, labels):
    """Lines of markdown: {label: what it holds} as cells(what it holds)."""
    rows = [["", *columns], ["---"] * (1 + len(columns))]
    rows += [[label, *cells(held)] for label, held in labels.items()]
    return ["| " + " | ".join(row) + " |" for row in rows]


def report(tables, about):
    """All tables that have been run, and how rates and lengths were chosen. tables: {name: rows};
    about: {name: what it shows}."""
    parts = ["# The tables of reproduce.py"]
    for table, text in about.items():
        rows = tables[table]
        if rows:
            parts += [title(table, text, rows), markdown(table, rows)]
    if tables["grid"]:
        parts += ["\n## The tries of --tune\n", *tries_table(tables["grid"])]
    return "\n".join(parts)


def title(table, about, rows):
    """The head of a table: what it shows, its command, minutes, hardware and commits."""
    minutes = sum(last(row)["seconds"] for row in rows) / 60
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return (f"\n## {table}\n\n{about}\n\n`python reproduce.py --tables {table}`: {len(rows)} rows, "
            f"{minutes:.0f} minutes after SFT, {rows[0]['hardware']}, commit {commits}. "
            f"{table}.json holds the command of each row.")


def tries_table(tries):
    """Lines: what each try of a method reached, sampled. Validation chose."""
    lines = {}
    for row in tries:
        chance, test = 100 * row["validation"]["sampled"], 100 * last(row)["fwm"]["sampled"]
        lines[row["label"]] = f"{chance:.1f}", f"{test:.1f}"
    return as_table(["validation", "test"], list, lines)


def by_label(rows):
    """{label: [its stage for each seed]} of one world: copy x, SFT of each kind of data, methods.
    Rows of one seed and the same data share one SFT."""
    labels = {"copy x": [{"fwm": rows[0]["copy_x"]}]}
    sfts = {(f"SFT {row['data']}".strip(), row["seed"]): row["sft"] for row in rows}
    for (label, _), stage in sfts.items():
        labels.setdefault(label, []).append(stage)
    for row in rows:
        for label, stage in stages_of(row):
            labels.setdefault(label, []).append(stage)
    return labels


def cells(stages):
    """The cells of a line of the table."""
    fwm = [stage["fwm"] for stage in stages]
    scores = [[one.get(name) for one in fwm] for name in ("exact", "exact_changed", "sampled")]
    scores.append([stage["idm"]["exact"] for stage in stages if "idm" in stage])
    costs = [[stage.get(name) for stage in stages] for name in ("examples", "tokens", "seconds")]
    return [*map(spread, scores), *map(mean, costs)]


def horizon(stages):
    """The cells of a line: T = 1..6."""
    exact = [stage["fwm"].get("rollout_exact") or [None] * 6 for stage in stages]
    return map(spread, zip(*exact))


def of_Q(rows):
    """{label: what `mi_bounds.collapse` found for each seed}: after SFT, and where Q learns on."""
    found = {}
    for row in rows:
        if row["label"] == BEST_OF_8:                      # which left SFT's models as they were
            found.setdefault("SFT", []).append(row["collapse"])
        elif "phase2" in row["stages"][-2]["name"]:
            found.setdefault(row["label"], []).append(row["collapse"])
    return found


def collapse(found):
    """The cells of a line of COLLAPSE."""
    shares = [("unique", 100), ("true_unique", 100), ("mean_length", 1), ("true_mean_length", 1),
              ("perplexity_ratio", 100)]
    return [spread([one[name] for one in found], scale) for name, scale in shares]


def stages_of(row):
    """[(label, stage)] that a row shows: its end; for several iterations the end of each."""
    if len(row["stages"]) < 3:                             # SFT has a line of its own
        return []
    ends = {}
    for stage in row["stages"][1:-1]:
        ends[stage["name"].rpartition("/")[0]] = stage
    if len(ends.keys() - {""}) < 3:
        return [(row["label"], last(row))]
    return [(f"{row['label']}, {name or 'start'}", stage) for name, stage in ends.items()]


def draw(table, rows, folder):
    """TABLE.png and TABLE-curves.png, if matplotlib is there."""
    shares, points = {}, {}
    for row in rows:
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
    for row in rows:
        flags = row["flags"]
        cell = cells.setdefault((flags["busy"], flags["state-only"]), {})
        cell.setdefault(flags["method"], []).append(100 * last(row)["fwm"]["sampled"])
    gains = {key: statistics.mean(cell["swirl"]) - statistics.mean(cell["bootstrap"])
             for key, cell in cells.items() if len(cell) == 2}
    across = sorted({busy for busy, _ in gains})
    up = sorted({n for _, n in gains}, key=lambda n: n or math.inf)        # ALL is the most
    return across, up, [[gains.get((busy, n)) for busy in across] for n in up]


def progress(row):
    """[(seconds after SFT, sampled)] at the end of each stage."""
    seconds, points = 0.0, [(0.0, row["sft"]["fwm"]["sampled"])]
    for stage in row["stages"][1:-1]:
        seconds += stage.get("seconds", 0)
        points.append((seconds, stage["fwm"]["sampled"]))
    return points


def mean_curve(paths):
    """The mean over seeds of curves with as many points."""
    return [tuple(map(statistics.mean, zip(*points))) for points in zip(*paths)]


def mean(values):
    """The mean of what is known, as text."""
    values = [value for value in values if value is not None]
    return f"{statistics.mean(values):,.0f}" if values else "-"
