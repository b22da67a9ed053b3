"""ScienceWorld as a frozen file: records episodes of the simulator, gold paths with a slip now and
then.

    pip install scienceworld                                  (it needs Java 8 or later)
    python -m envs.scienceworld --out scienceworld.jsonl.gz
    python train.py --data scienceworld.jsonl.gz

Claim: x, z, y is what the simulator showed before the command z, z, and what it showed after it:
nothing in between, no command left out without a count. A state is `look`, a line break and the
inventory, which cost the simulator no time; blanks at line ends and empty lines are cut. Splits are
the package's own, by task variation; the id is SPLIT-TASK-VARIATION.

Departures:
  1. The paper does not say what its states are. --observations takes the simulator's answers alone.
  2. The command is a gold one, or before it, with the probability --slips, one drawn from those
     that the simulator calls valid. A gold path then may not reach its goal; what happens instead
     is what a world model must know.
  3. Some of these "valid" commands the simulator does not understand, or asks back which object is
     meant. They are taken back, left out and counted; the next x is read afresh. A gold command
     that a slip made impossible is kept if the simulator answers it in any other way.
  4. A long path gives one window of --steps commands, at a random place. t is the true step.
  5. Most looking and focusing changes nothing. Of transitions with y = x, test ones too, only
     --unchanged stay.
  6. Half of the episodes are of train variations, two tenths of dev, three tenths of test ones
     (SHARES), so that few episodes already fill every split. No variation comes twice.

What is reproducible: the frozen file, by its sha256. A new recording is not, whatever the seed:
1.2.3 lists objects in another order after each load, and its plants differ. The seed fixes tasks,
variations and the places of slips.
"""

import argparse
import collections
import itertools
import random
import shutil
import types

import tqdm

from envs import official, records
from envs.records import BadData

SHARES = ("train", "test", "train", "dev", "train", "test", "train", "dev", "train", "test")
UNKNOWN = ("No known action", "Ambiguous request", "Unknown action")
EASY = (
    "easy,noElectricalAction,openContainers,openDoors,selfWateringFlowerPots,teleportAction".split(
        ","
    )
)


def tidy(text):
    """The text without blanks at line ends and without empty lines."""
    return "\n".join(line.rstrip() for line in text.split("\n") if line.strip())


def state(env):
    """What the agent sees and holds, without a step of the clock."""
    return tidy(env.server.freeActionLook() + "\n" + env.server.freeActionInventory())


# Of a recording; `--help` says what they mean
OPTIONS = dict(slips=0.15, steps=22, unchanged=0.2, simplifications="", observations=False)


def episode(env, task, variation, split, rng, counts=None, **options):
    """[Transition] of one window: at most `steps`, of those with y = x a share of `unchanged`.

    env: a ScienceWorldEnv, of which load, get_gold_action_sequence,
    get_valid_action_object_combinations and server.{step, freeActionLook, freeActionInventory} are
    used. counts: Counter of what was left out. Raises BadData if the simulator has no gold path.
    """
    counts = collections.Counter() if counts is None else counts
    how = types.SimpleNamespace(**OPTIONS | options)
    name = f"{split}-{task}-{variation:03d}"
    env.load(task, variation, how.simplifications, generateGoldPath=True)
    gold = list(env.get_gold_action_sequence())
    if not gold or gold[0].startswith("ERROR"):
        raise BadData(f"{name}: the simulator has no gold path")
    plan = []  # None: a slip
    for z in gold:
        plan += [None, z] if rng.random() < how.slips else [z]
    begin = rng.randint(0, max(0, len(plan) - how.steps))
    found, x = [], tidy(env.server.freeActionLook()) if how.observations else state(env)
    for t, z in enumerate(plan[:begin + how.steps]):
        if z is None:
            # sorted: the package's order differs from load to load
            z = rng.choice(sorted(env.get_valid_action_object_combinations()))
        # env.step would list all valid commands after each step, which takes longer than the step
        # itself
        answer = env.server.step(z)
        if answer.startswith(UNKNOWN):
            if answer.startswith("Ambiguous"):
                env.server.step("")  # no answer to its question: no action
            counts["commands that the simulator did not understand, left out"] += 1
            x = x if how.observations else state(env)
            continue
        # the window's first x must be true, what lies before it need not be looked at
        y = tidy(answer) if how.observations else state(env) if t >= begin - 1 else x
        if t >= begin and x == y and rng.random() >= how.unchanged:
            counts["transitions in which nothing changes, left out"] += 1
        elif t >= begin:
            found.append(
                records.check(
                    {"episode": name, "t": t, "x": x, "z": z, "y": y}, f"{name}, step {t}"
                )
            )
        x = y
    return found


def record(env, tasks, episodes, seed, broken, counts, bar=None, **options):
    """Yields the Transitions of `episodes` episodes, tasks in turn, splits as SHARES.

    options: as for `episode`; bar: a tqdm, or None. A variation without a gold path is told in
    `broken`, and no other takes its place.
    """
    rng, variations = random.Random(f"{seed} variations"), {}
    for task in tasks:
        env.load(task, 0, options.get("simplifications", ""))
        for split in official.SPLITS:
            those = list(getattr(env, f"get_variations_{split}")())
            rng.shuffle(those)
            variations[task, split] = those
    done = 0
    for i in itertools.count():
        if done == episodes:
            return
        if not any(variations.values()):
            counts["episodes fewer than asked for: no variation is left"] = episodes - done
            return
        task = tasks[i % len(tasks)]
        split = SHARES[(i % len(tasks) + i // len(tasks)) % len(SHARES)]
        if not variations[task, split]:
            continue
        variation = variations[task, split].pop()
        done += 1
        try:
            drawn = random.Random(f"{seed} {task} {variation}")
            yield from episode(env, task, variation, split, drawn, counts=counts, **options)
        except BadData as error:
            broken.append(str(error))
        if bar is not None:
            bar.update()


def start():
    """A ScienceWorldEnv, or BadData that says what to install."""
    try:
        from py4j.protocol import Py4JError
        from scienceworld import ScienceWorldEnv
    except ImportError as error:
        raise BadData(f"the package {error.name} is missing; pip install scienceworld") from None
    if shutil.which("java") is None:
        raise BadData(
            "there is no java on the PATH, and ScienceWorld's simulator needs it; install Java 8 "
            "or later"
        )
    try:
        return ScienceWorldEnv("", envStepLimit=10**9), Py4JError
    except Exception as error:  # py4j tells a Java that does not run in many ways
        raise BadData(
            f"the simulator did not start ({error}); see whether `java -version` shows 8 or later"
        ) from None


def make(args, broken, counts):
    env, Py4JError = start()
    try:
        known = list(env.get_task_names())
        for task in args.tasks:
            if task not in known:
                raise BadData(
                    f"--tasks {task}: there is no such task; the tasks are {', '.join(known)}"
                )
        tasks = args.tasks or known
        electric = [task for task in tasks if "power-component" in task or "conductivity" in task]
        if electric and {"easy", "noElectricalAction"} & set(args.simplifications):
            raise BadData(
                f"--simplifications: easy and noElectricalAction take away what {electric[0]} "
                "needs; leave them "
                "out, or name other --tasks"
            )

        with tqdm.tqdm(total=args.episodes, unit=" episodes") as bar:
            yield from record(
                env,
                tasks,
                args.episodes,
                args.seed,
                broken,
                counts,
                bar,
                slips=args.slips,
                steps=args.steps,
                unchanged=args.unchanged,
                simplifications=",".join(args.simplifications),
                observations=args.observations,
            )
    except (Py4JError, OSError) as error:
        raise BadData(
            f"the simulator stopped ({type(error).__name__}: {error}); start again"
        ) from None
    finally:
        env.close()


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m envs.scienceworld", description="Record ScienceWorld episodes."
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="task names, in turn (default: all 30)",
    )
    parser.add_argument("--episodes", type=int, default=450, help="episodes in all [450]")
    parser.add_argument(
        "--steps", type=int, default=22, help="commands of an episode, at most [22]"
    )
    parser.add_argument(
        "--slips",
        type=float,
        default=0.15,
        help="chance of a random command before a gold one [0.15]",
    )
    parser.add_argument(
        "--unchanged",
        type=float,
        default=0.2,
        help="chance that a transition with y = x is kept [0.2]",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of variations, windows, slips and what is kept [0]"
    )
    parser.add_argument(
        "--simplifications",
        nargs="+",
        default=[],
        choices=EASY,
        metavar="NAME",
        help=", ".join(EASY),
    )
    parser.add_argument(
        "--observations", action="store_true", help="x and y are the simulator's answers alone"
    )

    def checked(args, broken, counts):
        for name, fine in (
            ("episodes", args.episodes >= 1),
            ("steps", args.steps >= 1),
            ("slips", 0 <= args.slips <= 1),
            ("unchanged", 0 <= args.unchanged <= 1),
        ):
            if not fine:
                raise BadData(f"--{name} cannot be {getattr(args, name)}; see --help")
        return make(args, broken, counts)

    return official.main(parser, checked, argv)


if __name__ == "__main__":
    raise SystemExit(main())
