"""report.html of a finished run: the table, the curves, samples in colour, pictures, settings.

    python -m support.report RUN        write it anew

One file that needs no server and loads nothing. It is made of what lies in the run's folder, so no
model is run. All text of a run is escaped.
"""
import argparse
import base64
import html
import json
import sys
from pathlib import Path

from envs import images, records
from models import parallel
from support import curves, tables
from swirl_idm import line_diff

KINDS = {".png": "png", ".gif": "gif"}
STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: .15em .6em; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left; white-space: pre }
img { max-width: 100% }
pre, .diff { font: 12px/1.4 monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.sample { border-top: 1px solid #aaa; margin-top: 1em }
.columns { display: flex; gap: 1em } .columns > div { flex: 1; min-width: 0 }
.less { background: #fdd } .more { background: #dfd }
.right { color: #070 } .wrong { color: #a00 }
"""
# No script, no request: whatever a state may spell
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def update(run):
    """The last curves and the report of a run, or a line that says why not. The run is complete."""
    if parallel.rank():
        return
    curves.update(run)
    try:
        write(run.dir)
        print(f"  {run.dir / 'report.html'}")
    except Exception as error:
        print(f"  report.html is not written: {error}", flush=True)


def write(folder):
    """report.html in a run's folder, whole or not at all. OSError, ValueError or LookupError if the
    folder holds no finished run."""
    folder = Path(folder)
    config, results = (json.loads((folder / name).read_text())
                       for name in ("config.json", "results.json"))
    with records.whole(folder / "report.html") as file:
        file.write(page(folder, config, results).encode())


def page(folder, config, results):
    """The whole file."""
    method = results["stages"][-1]["name"]
    title = f"{results['env']}, {method}, seed {results['seed']}"
    parts = [
        f"<h1>SWIRL: {text(title)}</h1>",
        facts(config, results),
        f"<h2>Held-out scores</h2><p>{text(tables.MEANING)}</p>",
        table(results),
        "<h2>Curves</h2>" + picture(folder / "curves.png"),
        pictures(folder, results),
        samples(folder, results),
        settings(config),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def text(value):
    """Anything, as text that is no HTML."""
    return html.escape(str(value))


# --- what was run -----------------------------------------------------------------------------

def facts(config, results):
    """What was run, with which code, on what."""
    seconds, splits = results["seconds"], results["splits"]
    parts = ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds.items())
    known = {
        "command": config.get("command"),
        "commit": config.get("git"),
        "model": f"{results['model']}, {results['sizes']['parameters']:,} parameters",
        "hardware": results["hardware"],
        "minutes": parts,
        "transitions": ", ".join(f"{name} {n}" for name, n in splits.items()),
    }
    rows = [f"<li>{name}: <code>{text(value)}</code></li>"
            for name, value in known.items() if value]
    return "<ul>" + "".join(rows) + "</ul>"


def settings(config):
    """All settings and versions, folded."""
    rows = [*config["settings"].items(), *config["versions"].items()]
    cells = "".join(f"<tr><td>{text(k)}</td><td>{text(v)}</td></tr>" for k, v in rows)
    return f"<h2>Settings</h2><details><summary>all</summary><table>{cells}</table></details>"


def table(results):
    """The final table of `tables.report`."""
    rows = tables.stages_and_rivals(results)
    columns = tables.columns_of(rows)
    out = "".join(f"<th>{text(column.head)}</th>" for column in columns)
    out = f"<tr><th>stage</th>{out}</tr>"
    for row in rows:
        cells = "".join(f"<td>{tables.cell(row, column).strip()}</td>" for column in columns)
        out += f"<tr><td>{text(row['name'])}</td>{cells}</tr>"
    return f"<table>{out}</table>"


# --- pictures ---------------------------------------------------------------------------------

def picture(path):
    """An image inside the file; a word if it is not there."""
    if not path.is_file():
        return f"<p>{text(path.name)} was not drawn.</p>"
    data = base64.b64encode(path.read_bytes()).decode()
    kind = KINDS[path.suffix]
    return f'<p><img alt="{text(path.name)}" src="data:image/{kind};base64,{data}"></p>'


def pictures(folder, results):
    """Predicted frames after the first and the last stage that has some, and rollouts."""
    names = [f"picture-{row['name'].replace('/', '-')}.png" for row in results["stages"]]
    there = [folder / name for name in names if (folder / name).is_file()]
    some = [*there[:1], *there[1:][-1:]]
    some += [folder / name for name in ("rollout.png", "rollout.gif") if (folder / name).is_file()]
    shown = "".join(f"<h3>{text(path.stem)}</h3>{picture(path)}" for path in some)
    return f"<h2>Pictures</h2>{shown}" if shown else ""


# --- samples ----------------------------------------------------------------------------------

def samples(folder, results):
    """Test transitions: the true change, and that which P predicts after the first and after the
    last stage, each with what Q thinks of it."""
    stages = [row["name"] for row in results["stages"][:-1]]
    shown = list(dict.fromkeys([stages[0], stages[-1]]))
    scored = {stage: [] for stage in shown}
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["stage"] in scored and "y_hat" in row and "z_hat" in row:
            scored[row["stage"]].append(row)
    parts = [sample(dict(zip(shown, rows))) for rows in zip(*scored.values())]
    return ("<h2>Samples</h2><p>Lines that x loses are red, lines that it gains are green. "
            "log Q is that of the true action z, in nats.</p>" + "".join(parts))


def sample(rows):
    """One transition. rows: {stage: line of samples.jsonl}, the last stage at the end."""
    last = list(rows.values())[-1]
    x, z, y = last["x"], last["z"], last["y"]
    said = "= z" if last["z_hat"] == z else text(last["z_hat"])
    columns = [column("y, true", "", x, y, last.get("reward_of_y"))]
    for stage, row in rows.items():
        right = '<b class="right">= y</b>' if row["y_hat"] == y else '<b class="wrong">not y</b>'
        columns.append(column(f"y_hat after {stage}", right, x, row["y_hat"], row["reward"]))
    return (
        f'<div class="sample"><p><b>z</b> <code>{text(z)}</code>; Q reads <code>{said}</code></p>'
        f'<div class="columns">{"".join(columns)}</div>'
        f"<details><summary>x</summary><pre>{text(x)}</pre></details></div>"
    )


def column(head, verdict, x, y, logq):
    """One state beside x."""
    score = "" if logq is None else f"log Q {logq:.2f}"
    return f"<div><b>{text(head)}</b> {verdict} {score}{diff(x, y)}</div>"


def diff(x, y):
    """What changes from x to y: lines in colour, or the number of patches of an image."""
    before, after = images.codes(x), images.codes(y)
    if before is not None and after is not None and before.shape == after.shape:
        return f"<p>{int((before != after).sum())} of {before.size} patches change</p>"
    colours = {"-": "less", "+": "more"}
    lines = [f'<div class="{colours[line[0]]}">{text(line)}</div>' for line in line_diff(x, y)]
    return f'<div class="diff">{"".join(lines) or "nothing changes"}</div>'


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write curves.png and report.html of a run anew.")
    parser.add_argument("run", metavar="RUN", help="folder of a finished run of train.py")
    parser.error = records.fail
    folder = Path(parser.parse_args(argv).run)
    try:
        write(folder)                                      # says whether it is a run
        curves.draw(folder)
        write(folder)                                      # with the new curves
    except ImportError:
        curves.say("curves.png is not drawn: pip install matplotlib")
    except (OSError, ValueError, LookupError) as error:
        records.fail(f"{folder}: no finished run is there ({error}); give one of train.py")
    print(folder / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
