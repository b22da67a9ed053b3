"""How far a stage is: a bar on a terminal, and elsewhere a plain line every half a minute."""
import multiprocessing
import sys
import time

from tqdm import tqdm

EVERY = 30.0        # seconds between two lines


class Bar:
    """show(step, reward=.., ..) after each step; close() at the end. Numbers that are None keep
    their last value."""

    def __init__(self, name, steps, silent=False):
        self.name, self.steps = name, steps
        self.begin = self.last = time.monotonic()
        self.numbers, self.first = {}, None                # first: the step before it began
        terminal = sys.stdout.isatty() and not silent
        # one bar at a time
        self.silent = silent or (terminal and multiprocessing.parent_process() is not None)
        terminal = terminal and not self.silent
        self.tqdm = tqdm(total=steps, desc=name, leave=False) if terminal else None

    def show(self, step, **numbers):
        if self.first is None:                             # a resumed stage begins later
            self.first = step - 1
        self.numbers |= {key: value for key, value in numbers.items() if value is not None}
        now = time.monotonic()
        if self.tqdm is not None:
            self.tqdm.set_postfix(
                {key: f"{value:.3f}" for key, value in self.numbers.items()}, refresh=False
            )
            self.tqdm.update(step - self.tqdm.n)
        elif now - self.last >= EVERY and not self.silent:
            self.last = now
            left = (now - self.begin) / (step - self.first) * (self.steps - step)
            said = ", ".join(f"{key} {value:.3f}" for key, value in self.numbers.items())
            print(
                f"  {self.name}: step {step} of {self.steps}, {said}, {left:.0f} s left in this "
                "stage",
                flush=True,
            )

    def close(self):
        if self.tqdm is not None:
            self.tqdm.close()
