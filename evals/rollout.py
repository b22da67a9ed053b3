"""Several steps ahead: P reads its own output. How long does a simulation stay true?

    python -m evals.rollout --run DIR                  with the true actions
    python -m evals.rollout --run DIR --actions idm    with those that Q reads in the true states

Claim: y_hat_1 = P(x_0, z_1), y_hat_t = P(y_hat_{t-1}, z_t), greedily, without a return to the
truth; each is scored against the true state of its step. T = 1 is the ordinary score of these
transitions.

Notes
1. A score is ROUGE-L for texts and the share of right patches for images, in [0, 100]. Much of a
   state does not change, so the copy of the first state scores high, too; the table shows it.
   `exact` is the share of states that are right as a whole. `changed`, for images, is the share of
   right patches among those that differ from the first frame.
2. One window an episode: its first T steps, each of which begins where the last one ended. Shorter
   episodes are left out. (Where train.py wants more windows, it also takes overlapping ones that
   begin at later steps.)
"""

import argparse
import sys

from envs import records
from evals import common
from support.rollouts import rollout, score, windows


def show(rows):
    """The table of {name: score()}."""
    T = max(map(len, rows.values()))
    lines = ["".join([f"{'T':28}", *(f"{t:8d}" for t in range(1, T + 1))])]
    for name, steps in rows.items():
        for key, scale in (("score", 1), ("exact", 100), ("changed", 100)):
            if steps[0][key] is not None:
                lines.append(
                    f"{name + ', ' + key:28}"
                    + "".join(
                        f"{step[key] * scale:8.2f}" if step[key] is not None else "       -"
                        for step in steps
                    )
                )
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", required=True, help="folder that train.py wrote")
    parser.add_argument(
        "--actions",
        choices=("true", "idm"),
        default="true",
        help="the true ones, or those that Q reads",
    )
    parser.add_argument("--steps", type=int, default=6, help="T [6]")
    parser.add_argument("--json", help="write the scores there")
    parser.error = records.fail
    args = parser.parse_args(argv)
    if args.steps < 1:
        records.fail(f"--steps cannot be {args.steps}; give at least 1")
    try:
        common.check_json(args.json)
        from support.opened import open_run
        run = open_run(args.run)
        steps = windows(run.episodes, args.steps)
        if not steps:
            raise records.BadData(
                f"{args.run}: no test episode has {args.steps} steps; give fewer --steps"
            )
        if args.actions == "idm":
            steps = [
                [
                    (x, z, y)
                    for (x, _, y), z in zip(
                        window, run.Q.predict([x for x, _, _ in window], [y for _, _, y in window])
                    )
                ]
                for window in steps
            ]
        rows = {"P": score(rollout(run.P.predict, steps, args.steps), steps),
                "copy x": score(rollout(lambda xs, zs: xs, steps, args.steps), steps)}
        print(f"{len(steps)} episodes, actions: {args.actions}\n{show(rows)}")
        if args.json:
            common.write_json(
                args.json,
                {"benchmark": "rollout", "n": len(steps), "actions": args.actions, "scores": rows},
            )
    except records.BadData as e:
        records.fail(e)
    return 0


if __name__ == "__main__":
    sys.exit(main())
