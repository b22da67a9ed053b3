"""What `train.py` prints: what a run is about to do, the scores of a stage, the final table."""
import typing

import torch

import methods
from support import aside

# --- before and during a run ------------------------------------------------------------------


def introduce(P, lab):
    """Print in four lines what the run is about to do."""
    cfg = lab.cfg
    print(
        f"SWIRL on {cfg.data or cfg.env}: {len(lab.labelled)} labelled, "
        f"{len(lab.validation)} validation, {len(lab.state_only)} state-only, "
        f"{len(lab.test)} test transitions"
    )
    millions = P.net.num_parameters() / 1e6
    two = ", two processes where stages are independent" if aside.possible(cfg) else ""
    print(
        f"  {millions:.2f}M parameters a model; "
        f"{torch.get_num_threads()} thread(s) a process{two}; {cfg.out}"
    )
    names = [stage.name for stage in methods.stages(cfg.method, cfg.iterations)]
    rivals = "; beside these the rivals" if cfg.has_rivals() else ""
    print(f"  stages: {', '.join(['sft', *names])}{rivals}")
    print(
        f"  steps: warm-up {cfg.warmup_steps} (FWM) and {cfg.warmup_steps_idm} (IDM), "
        f"Phase I {cfg.phase1_steps}, Phase II {cfg.phase2_steps}, "
        f"other likelihood {cfg.bootstrap_steps}"
    )


def warn(name, logs):
    """Print one line if a phase could learn nothing, or lost most of its rewards to the floor.
    logs: its lines of metrics.jsonl."""
    logs = [log for log in logs if log["reward"] is not None]
    floored = sum(log["floored"] for log in logs) / max(1, len(logs))
    if all(log["zero_std_groups"] == 1 for log in logs):
        print(
            f"warning: {name} could learn nothing: "
            "in no step did the rollouts of a group differ in reward"
        )
    elif floored > 0.5:
        print(
            f"warning: {name}: {floored:.0%} of the rewards lie on the floor; "
            "give --reward-form mean or --floor 0"
        )


def show_scores(name, scores, minutes):
    """Print the scores of a stage in one line."""
    fwm, idm = scores["fwm"], scores["idm"]
    print(
        f"{name}: FWM exact {fwm['exact']:.3f}, of changed {fwm['exact_changed'] or 0:.3f}, "
        f"sampled {fwm['sampled'] or 0:.3f}, logp {fwm['logp']:.2f} | "
        f"IDM exact {idm['exact']:.3f}, logp {idm['logp']:.3f}, refused {idm['refused']:.3f}"
        f"  [{minutes:.1f} min]",
        flush=True,
    )


def show_sample(sample, changes):
    """Print a transition: what changed, what P predicts, what Q reads. changes: `IDM.changes`."""
    x, z, y = sample["x"], sample["z"], sample["y"]
    y_hat, z_hat = sample["y_hat"], sample["z_hat"]
    predicted = "= y" if y_hat == y else one_line(changes(x, y_hat))
    print(
        f"    z     {z}\n"
        f"    y     {one_line(changes(x, y))}\n"
        f"    y_hat {predicted}\n"
        f"    z_hat {'= z' if z_hat == z else z_hat}",
        flush=True,
    )


def one_line(changes):
    """Changed lines side by side, at most 400 characters of them."""
    text = " / ".join(changes) or "(nothing changes)"
    return text if len(text) <= 400 else text[:400] + " ..."


# --- the final table --------------------------------------------------------------------------

MEANING = ("exact: y_hat = y, greedily; changed: the same where y != x; "
           "sampled: the chance, where y != x, that a future drawn is y; in %")


class Column(typing.NamedTuple):
    """One column of the final table."""
    head: str
    path: str           # where its value stands in a stage of results.json
    scale: int = 1      # 100: a share, printed in %
    digits: int = 2


TEXT = [
    Column("BLEU", "fwm.bleu"),
    Column("ROUGE-L", "fwm.rouge_l"),
]

# Right patches among those that change; then images that are right as a whole, in transitions of
# motion and after six steps of a rollout
IMAGES = [
    Column("patches %", "fwm.patches_changed", 100),
    Column("motion %", "fwm.kinds.motion.exact_changed", 100),
    Column("T = 6 %", "fwm.rollout_exact", 100),
]


def columns_of(rows):
    """The columns of the final table: those in the middle differ between text and images."""
    is_image = "patches_changed" in rows[0]["fwm"]
    return [
        Column("FWM: exact", "fwm.exact", 100),
        Column("changed", "fwm.exact_changed", 100),
        Column("sampled", "fwm.sampled", 100),
        *(IMAGES if is_image else TEXT),
        Column("logp", "fwm.logp"),
        Column("IDM: exact", "idm.exact", 100),
        Column("logp", "idm.logp"),
        Column("refused", "idm.refused", 100),
        Column("steps", "steps", digits=0),
        Column("seconds", "seconds", digits=0),
    ]


def stages_and_rivals(results):
    """The rows of the final table, each as a stage of results.json. The rows of best of 8 have no
    steps, and Bootstrap and "copy x" no IDM."""
    rows = results["stages"][:-1]
    rivals = results["baselines"]
    if "bootstrap" in rivals:
        rows.append(rivals["bootstrap"] | {"name": "bootstrap"})
        for stage in rivals["bootstrap_swirl"]["stages"]:
            rows.append(stage | {"name": "  + " + stage["name"]})
        best = rivals["best_of_8"]
        rows.append(best["sft"] | {"name": f"sft, the first {best['fwm']['n']}"})
        rows.append(best | {"name": "  best of 8 of these"})
    rows.append({"name": "copy x", "fwm": rivals["copy_x"]})
    return rows


def cell(row, column):
    """The text of one cell: a number, or "-" if the row has none."""
    value = row
    for key in column.path.split("."):
        value = (value or {}).get(key)
    if isinstance(value, list):         # one value a step of a rollout
        value = value[-1]
    if value is None:
        return f"{'-':>11}"
    return f"{value * column.scale:11.{column.digits}f}"


def report(results):
    """Print the final table: a row a stage, FWM and IDM side by side."""
    rows = stages_and_rivals(results)
    columns = columns_of(rows)
    minutes = results["seconds"]["total"] / 60
    print(
        f"\n{results['env']}, seed {results['seed']}: {results['splits']['test']} held-out "
        f"transitions, {minutes:.1f} minutes on {results['hardware']}"
    )
    print(MEANING)
    print(" " * 22 + "".join(f"{column.head:>11}" for column in columns))
    for row in rows:
        cells = [cell(row, column) for column in columns]
        print(f"{row['name']:22}" + "".join(cells))
    return 0
