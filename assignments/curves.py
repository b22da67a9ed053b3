"""python -m assignments.curves OUT: what each planted bug of problem 13 does, as curves.

One run without a bug makes the warm-up. Each bug goes on from there, in a tree of its own. Every
ten steps of a phase P and Q are scored greedily on held-out transitions, which no bug touches.
Writes OUT/curves.json and OUT/curves.png (needs matplotlib), which NOTES.md shows.
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

EVERY = 10
FLAGS = ("--data data/lamps.jsonl --reward-form sum --floor 0 --warmup-steps 80 "
         "--warmup-steps-idm 60 --phase1-steps 40 --phase2-steps 40 --lr-fwm 3e-4 --lr-idm 2e-4 "
         "--iterations 1 --no-rivals --eval-size 150 --threads 1")


def main(argv=None):
    from assignments import bugs, make
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(len(bugs.BUGS))))
    args = parser.parse_args(argv)
    right = make_tree(make, args.out / "right")
    curves = {"right": run(right)}
    for seed in args.seeds:
        tree = make_tree(make, args.out / f"bug{seed}")
        bugs.plant(tree, seed)
        curves[f"seed {seed}"] = run(tree, f"--start {right.resolve() / 'runs/13'}")
        (args.out / "curves.json").write_text(json.dumps(curves, indent=1))
    draw(args.out / "curves.png", curves)
    return 0


def make_tree(make, out):
    make.make(out, solved=True)
    return out


def run(tree, more=""):
    """{"phase1": [(step, reward, share right)], "phase2": ..} of a run in a tree."""
    flags = shlex.split(f"{FLAGS} --out runs/13 {more}")
    command = [sys.executable, Path(__file__).resolve(), "--inside", *flags]
    env = os.environ | {"PYTHONPATH": str(tree.resolve())}
    subprocess.run(command, cwd=tree, env=env, check=True)
    return json.loads((tree / "curves.json").read_text())


# --- in a tree --------------------------------------------------------------------------------

def inside(argv):
    """train.py with a look at P and Q every ten steps; writes curves.json."""
    import envs
    import settings
    import swirl_fwm
    import swirl_idm
    import train
    from models.batches import columns
    test = envs.load_splits(settings.parse(argv))[3]
    P_rows, Q_rows = columns(test), columns([row for row in test if row[0] != row[2]])
    seen = {"phase1": [], "phase2": []}

    def watched(name, draw, x, asked, true):
        def also(policy, frozen, pairs, phase, generator):
            found, t = draw(policy, frozen, pairs, phase, generator), len(seen[name])
            right = None
            if t % EVERY == 0 or t == phase.steps - 1:
                said = policy.predict(x, asked)
                right = sum(a == b for a, b in zip(said, true)) / len(true)
            reward = None if found is None else found[1].mean().item()
            seen[name].append((t, reward, right))
            return found
        return also

    x, z, y = P_rows
    swirl_fwm.phase1_rollouts = watched("phase1", swirl_fwm.phase1_rollouts, x, z, y)
    x, z, y = Q_rows
    swirl_idm.phase2_rollouts = watched("phase2", swirl_idm.phase2_rollouts, x, y, z)
    code = train.main(argv)
    Path("curves.json").write_text(json.dumps(seen))
    return code


# --- the picture ------------------------------------------------------------------------------

def draw(path, curves):
    """Reward and held-out share of both phases, a colour a bug. No action can be read where
    nothing changes, so Q is scored on the other pairs."""
    from support import charts
    plt = charts.matplotlib()
    figure, panels = plt.subplots(2, 2, figsize=(10, 7))
    for column, phase in enumerate(("phase1", "phase2")):
        for name, curve in curves.items():
            line = dict(label=name, color="black" if name == "right" else None)
            rewards = [(t, reward) for t, reward, _ in curve[phase] if reward is not None]
            panels[0][column].plot(*zip(*smooth(rewards)), **line)
            shares = [(t, 100 * right) for t, _, right in curve[phase] if right is not None]
            panels[1][column].plot(*zip(*shares), marker="o", **line)
        panels[0][column].set_title({"phase1": "Phase I", "phase2": "Phase II"}[phase])
        panels[1][column].set_xlabel("step")
    panels[0][0].set_ylabel("reward, nats")
    panels[1][0].set_ylabel("held out, % right")
    panels[1][1].legend(fontsize="small")
    charts.finish(plt, figure, path, "Planted bugs: P in Phase I, Q in Phase II")


def smooth(points, width=8):
    """Means of `width` neighbours."""
    out = []
    for i, (t, _) in enumerate(points):
        near = [value for _, value in points[max(0, i - width + 1):i + 1]]
        out.append((t, sum(near) / len(near)))
    return out


if __name__ == "__main__":
    sys.exit(inside(sys.argv[2:]) if sys.argv[1:2] == ["--inside"] else main())
