"""Steps that survive a cut: what they change is saved on the way, and a stop waits for their end.

Claim: a run that is cut at any instant and started again ends with the same weights, results.json
and metrics.jsonl, bit for bit (on a CPU; except for times).

The last two states of a stage stand in DIR/steps/NAME-STEP. Each holds the model that moves, its
optimizers, the generators of all processes, the step, and what the stage has logged. The batches
are drawn again, since they are a function of the seed. The clock says when to save (--save-every),
since no number depends on it; the last step of a stage is always saved, before it is scored.

SIGINT, SIGTERM and SIGUSR1 (batch systems) end the run after the step that is under way, which is
saved; a second ^C ends it at once. Outside of steps they end it at once: nothing is to be saved.
"""
import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import time
import typing

import torch

from envs import records
from models import parallel
from support import disk

NAMES = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


@dataclasses.dataclass
class Moving:
    """What a step changes."""
    net: typing.Any
    optimizers: list
    batches: typing.Any                 # iterator; if next() is dear, .drawn is the cheap one below
    generator: typing.Any = None        # torch.Generator of this process


def steps(run, name, n, tally, moving):
    """Yields t = 1 .. n; in a run that was cut, from the step after the last one that was saved.
    tally: Counter of the stage."""
    done = restore(run, name, tally, moving)
    until = time.monotonic() + run.save_every
    with signals.wait():
        for t in range(done + 1, n + 1):
            yield t
            stop, due = agree(t == n or time.monotonic() >= until)
            if stop or due:
                begin = time.monotonic()
                save(run, name, t, tally, moving)
                # Saving takes at most a tenth of the time; with 0 it comes after each step
                now = time.monotonic()
                until = now + (run.save_every and max(run.save_every, 9 * (now - begin)))
            if stop:
                raise KeyboardInterrupt(stop)


def agree(due):
    """(signal that came to any process or 0, whether the first one wants to save)."""
    asked = parallel.gather((signals.asked, due))
    return max(stop for stop, _ in asked), asked[0][1]


# --- save and restore -------------------------------------------------------------------------

def save(run, name, t, tally, moving):
    """Write the state after step t, and keep the one before."""
    generator = moving.generator
    drawn = None if generator is None else generator.get_state()
    with parallel.masters(moving.net):
        net = {key: parallel.whole(p) for key, p in learning(moving.net)}
        optimizers = [over(parallel.whole, o.state_dict()) for o in moving.optimizers]
    state = {
        "step": t,
        "place": place(moving.net),
        "elapsed": run.elapsed(),
        "tally": dict(tally),
        "lines": json.dumps(run.lines),
        "generators": parallel.gather(drawn),
        "net": net,
        "optimizers": optimizers,
    }
    if parallel.rank():
        return
    folder = run.dir / "steps" / f"{file_name(name)}-{t}"
    with disk.whole_folder(folder, size_of_state(moving.net), "step") as new:
        torch.save(state, new / "state.pt")
    for old in saved(run, name)[2:]:
        disk.remove(old, "step")


def restore(run, name, tally, moving):
    """Take up the last whole state of a stage. Returns its step; 0 without one."""
    run.lines = []
    tally.clear()
    folder = parallel.agree(last_whole(run, name) if parallel.rank() == 0 else None)
    if folder is None:
        return 0
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    if state["place"] != place(moving.net):
        records.fail(f"{folder} was saved by {state['place']}, this is {place(moving.net)}; "
                     "give the same, or delete it to begin the stage again")
    try:
        load(moving, state)
    except (KeyError, ValueError, RuntimeError) as error:
        records.fail(f"{folder} does not fit this code ({str(error).partition(chr(10))[0]}); "
                     "take the old code, or delete it to begin the stage again")
    for _ in range(state["step"]):
        next(getattr(moving.batches, "drawn", moving.batches))
    tally.update(state["tally"])
    for file, line in json.loads(state["lines"]):
        run.log(file, **line)
    run.go_on(state["elapsed"])
    print(f"  {run.label}{name} goes on after step {state['step']}")
    return state["step"]


def load(moving, state):
    """Set what moves to a state, in place."""
    with torch.no_grad(), parallel.masters(moving.net):
        for key, p in learning(moving.net):
            p.copy_(parallel.like(state["net"][key], p))
        for optimizer, held in zip(moving.optimizers, state["optimizers"]):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, values in held["state"].items():
                values |= {key: parallel.like(value, params[i]) for key, value in values.items()}
            optimizer.load_state_dict(held)
    if moving.generator is not None:
        moving.generator.set_state(state["generators"][parallel.rank()])


def last_whole(run, name):
    """The folder of the last state that is whole; None without one. Says which are not."""
    for folder in saved(run, name):
        if disk.is_whole(folder):
            return folder
        print(f"{folder} is damaged; the state before it is taken")
    return None


def saved(run, name):
    """The folders of a stage's states, the last one first."""
    found = (run.dir / "steps").glob(f"{file_name(name)}-*")
    found = [folder for folder in found if folder.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder):
    return int(folder.name.rpartition("-")[2])


def file_name(name):
    return name.replace("/", "-")


def learning(net):
    """[(name, parameter)] that a step moves."""
    return [(name, p) for name, p in net.named_parameters() if p.requires_grad]


def over(f, value):
    """f of each tensor within."""
    if isinstance(value, dict):
        return {key: over(f, part) for key, part in value.items()}
    return f(value) if torch.is_tensor(value) else value


def place(net):
    """What a state belongs to: its generators are of as many processes on such a device."""
    return f"{parallel.world()} process(es) on {net.device.type}"


def size(net):
    """Bytes of the weights that `pretrained.save` writes."""
    return sum(p.numel() * p.element_size() for p in getattr(net, "base", net).parameters())


def size_of_state(net):
    """Bytes of a state: the weights that learn, and two moments."""
    return 3 * sum(p.numel() * p.element_size() for _, p in learning(net))


# --- signals ----------------------------------------------------------------------------------

class Signals:
    """What SIGINT, SIGTERM and SIGUSR1 do."""
    asked = 0           # the signal that came while a step was under way
    stepping = False

    @contextlib.contextmanager
    def heard(self):
        """Within, this object hears them."""
        self.asked, self.stepping = 0, False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {name: signal.signal(getattr(signal, name), self.hear) for name in NAMES}
        try:
            yield
        finally:
            for name, f in old.items():
                signal.signal(getattr(signal, name), f)

    @contextlib.contextmanager
    def wait(self):
        """Within, they only leave a note."""
        self.stepping = True
        try:
            yield
        finally:
            self.stepping = False
        if self.asked:
            raise KeyboardInterrupt(self.asked)

    def hear(self, number, frame):
        # torchrun passes ^C on to processes that have heard it already
        twice = number == self.asked == signal.SIGINT and parallel.world() == 1
        if twice or not self.stepping:
            raise KeyboardInterrupt(number)
        self.asked = number
        if parallel.rank() == 0 and multiprocessing.parent_process() is None:
            # print() must not be called here: it may be what was interrupted
            os.write(2, b"\nstopping after this step; ^C once more: at once\n")


signals = Signals()
