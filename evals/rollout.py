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

from envs import images, records
from evals import common, metrics


def windows(episodes, T, every=sys.maxsize):
    """T steps [(x, z, y)] of an episode, one state after the other: the first of each episode that
    has as many, then those that begin `every` so many steps later."""
    longest = max(map(len, episodes), default=0)
    whole = [
        steps[i : i + T]
        for i in range(0, longest - T + 1, every)
        for steps in episodes
        if len(steps) >= i + T
    ]
    return [steps for steps in whole if all(a[2] == b[0] for a, b in zip(steps, steps[1:]))]


def rollout(predict, steps, T=6):
    """[[y_hat of each window] for t = 1..T]; predict(xs, zs) -> ys, steps: [window of (x, z,
    y)]."""
    state, out = [window[0][0] for window in steps], []
    for t in range(T):
        state = predict(state, [window[t][1] for window in steps])
        out.append(state)
    return out


def score(y_hat, steps):
    """[{"score", "exact", "changed"}] for t = 1..T, means over windows; `changed` is None for
    texts."""
    return [
        step_score(
            [window[0][0] for window in steps], predicted, [window[t][2] for window in steps]
        )
        for t, predicted in enumerate(y_hat)
    ]


def step_score(firsts, predicted, truth):
    exact = metrics.exact(predicted, truth)
    if not images.is_image(truth[0]):
        return {"score": metrics.mean_rouge_l(predicted, truth), "exact": exact, "changed": None}
    return {"score": 100 * metrics.right_patches(predicted, truth), "exact": exact,
            "changed": metrics.right_patches(predicted, truth, firsts)}


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
