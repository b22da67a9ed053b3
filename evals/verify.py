"""Test-time verification of a finished run: draw N futures, keep the one in which Q reads z best.

    python -m evals.verify --run runs/tools-tiny-0
    python -m evals.verify --run runs/tools-tiny-0 --stage sft --n 1 8 32 --json scores.json

The same for actions: draw N, keep the one under which P expects y most. With N = 1 nothing is
chosen: that is a draw. All are drawn as in the paper: temperature .75, top-p .96. The first --tests
test transitions are scored.
"""
import argparse
import sys

from envs import records
from evals import common


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="folder that train.py wrote")
    parser.add_argument("--stage", choices=("last", "sft"), default="last", help="[last]")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 8], help="draws [1 8]")
    parser.add_argument("--tests", type=int, default=100, help="test transitions [100]")
    parser.add_argument("--json", help="write the scores there")
    parser.error = records.fail
    args = parser.parse_args(argv)
    if min(*args.n, args.tests) < 1:
        records.fail("--n and --tests must be at least 1")
    try:
        common.check_json(args.json)
        from support.evaluate import verify
        from support.opened import open_run
        run = open_run(args.run, "sft" if args.stage == "sft" else "")
        test = run.test[:args.tests]
        rows = {n: verify(run.P, run.Q, test, n, run.cfg.seed) for n in args.n}
    except records.BadData as e:
        records.fail(e)
    print(f"{len(test)} transitions\n{'N':>4}{'FWM exact':>12}{'changed':>12}{'IDM exact':>12}")
    for n, scores in rows.items():
        shares = [scores["fwm"]["exact"], scores["fwm"]["exact_changed"], scores["idm"]["exact"]]
        print(f"{n:4}" + "".join(f"{100 * (share or 0):12.2f}" for share in shares))
    if args.json:
        scores = {"benchmark": "verify", "stage": args.stage, "n": len(test), "scores": rows}
        common.write_json(args.json, scores)
    return 0


if __name__ == "__main__":
    sys.exit(main())
