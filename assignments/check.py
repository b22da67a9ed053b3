"""python -m assignments.check N: try what you wrote for problem N. Without N: all problems.

It runs your tree as it stands, so a problem may fail since an earlier one is wrong.
"""
import argparse
import sys
from pathlib import Path

import torch

from assignments import claims, problems
from assignments.student import Failed, Server, Student

ROOT = Path(__file__).parents[1]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", type=int, nargs="*", metavar="N", help="1 to 16 [all]")
    wanted = parser.parse_args(argv).problem or list(problems.TITLES)
    if not set(wanted) <= set(problems.TITLES):
        parser.error(f"there are problems 1 to {len(problems.TITLES)}")
    torch.set_num_threads(1)
    failed = 0
    with Server() as server:
        for problem in wanted:
            with Student(server, ROOT) as student:
                for name, _ in problems.graded(problem):
                    if hasattr(claims, name):
                        why = reason(student, name)
                        failed += why is not None
                        print(f"{problem:2} {name:20} {why or 'ok'}", flush=True)
    return 1 if failed else 0


def reason(student, name):
    """The first claim that does not hold, or None."""
    try:
        getattr(claims, name)(student, torch.Generator().manual_seed(0))
    except Failed as error:
        return str(error)
    except Exception as error:
        return f"what comes back has another form ({error})"
    return None


if __name__ == "__main__":
    sys.exit(main())
