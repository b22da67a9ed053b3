"""curves.png of a run: SFT, both phases and the held-out scores, from its metrics.jsonl and that of
its rivals. It is drawn anew at each evaluation. Needs matplotlib (optional).

Claim: the run does not depend on it. All is saved before, and what fails is told in one line.
"""
import functools
from pathlib import Path

from envs import records
from models import parallel
from support import sinks

# Panels in the order of the picture, and the unit of each
PANELS = {
    "SFT, loss": "nats a token",
    "SFT, right on validation": "%",
    "held-out": "%",
    "Phase I, reward": "nats",
    "Phase II, reward": "nats",
    "KL to the start of a phase": "nats",
}
# Shown at each evaluation: label, side, score
HELD_OUT = [("P, changed", "fwm", "exact_changed"), ("P, sampled", "fwm", "sampled"),
            ("Q, exact", "idm", "exact")]
AFTER = ", after Bootstrap"                                # the rivals: dashed
WINDOW = 10         # steps of a running mean


def update(run):
    """Draw curves.png of a run, or say why not."""
    if parallel.rank() or run.label:                       # the rivals stand in the run's own
        return
    try:
        draw(run.dir)
    except ImportError:
        say("curves.png is not drawn: pip install matplotlib")
    except Exception as error:
        say(f"curves.png is not drawn: {error}")


@functools.cache
def say(message):
    """Print it once."""
    print(f"  {message}", flush=True)


# --- what is drawn ----------------------------------------------------------------------------

def series(folder):
    """({panel: {label: [(x, y)]}}, names of the evaluations). x: the step, or at "held-out" the
    number of the evaluation, where the rivals come after all others."""
    found, stages = {name: {} for name in PANELS}, []

    def add(panel, label, x, y):
        if y is not None:
            found[panel].setdefault(label, []).append((x, y))

    lines = sinks.Tail(folder).new()
    for part, line in lines:
        after = AFTER if part else ""
        x, phase = line["step"], line["phase"]
        if phase == "warmup":
            add("SFT, loss", line["model"], x, line["loss"])
            add("SFT, right on validation", line["model"], x, percent(line["validation"]))
        elif phase == "eval":
            for label, side, key in HELD_OUT:
                add("held-out", label + after, len(stages), percent(line[side].get(key)))
            stages.append("+ " * bool(part) + line["stage"].replace("iteration", ""))
        else:
            name = "Phase I" if phase == "phase1" else "Phase II"
            label = f"iteration {line['iteration']}{after}"
            add(name + ", reward", label, x, line["reward"])
            add("KL to the start of a phase", f"{name}, {label}", x, line["kl"])
    return found, stages


def percent(share):
    return None if share is None else 100 * share


def running_mean(ys):
    """Mean of each y and those before it, at most WINDOW of them."""
    parts = [ys[max(0, i + 1 - WINDOW):i + 1] for i in range(len(ys))]
    return [sum(part) / len(part) for part in parts]


# --- the picture ------------------------------------------------------------------------------

def draw(folder):
    """Write curves.png into a run's folder, whole or not at all."""
    from matplotlib.figure import Figure
    found, stages = series(folder)
    figure = Figure(figsize=(14, 7))
    panels = figure.subplots(2, 3)
    for panel, (name, unit) in zip(panels.flat, PANELS.items()):
        plain = list(dict.fromkeys(label.removesuffix(AFTER) for label in found[name]))
        for label, points in found[name].items():
            i = plain.index(label.removesuffix(AFTER))
            style = "--" if label.endswith(AFTER) else "-"
            line(panel, name, points, label, dict(color=f"C{i % 10}", linestyle=style))
        panel.set_title(name, fontsize=10)
        panel.set_ylabel(unit)
        panel.set_xlabel("step")
        if found[name]:
            panel.legend(fontsize=7)
        else:
            panel.set_axis_off()                           # nothing yet
    held_out = panels[0][2]
    held_out.set_xlabel("after this stage")
    held_out.set_xticks(range(len(stages)), stages, rotation=30, ha="right", fontsize=7)
    if found["SFT, loss"]:
        panels[0][0].set_yscale("log")
    figure.suptitle(Path(folder).resolve().name)
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.08, hspace=0.5)
    with records.whole(Path(folder) / "curves.png") as file:
        figure.savefig(file, dpi=70, format="png")


def line(panel, name, points, label, style):
    """One line. Rewards and losses of single steps are pale, below their running mean."""
    xs, ys = zip(*points)
    if name.endswith(("reward", "loss")):
        panel.plot(xs, ys, color=style["color"], alpha=0.25)
        panel.plot(xs, running_mean(ys), label=label, **style)
    else:
        known = name == "held-out" and label.endswith(AFTER)           # the axis says it
        panel.plot(xs, ys, "o", label="" if known else label, markersize=3, **style)
