"""Two things at once on a CPU: a function in a second process, beside this one.

A tiny model is hardly faster on two threads than on one, so what is independent runs side by side
instead: the two warm-ups, and the rivals beside Algorithm 1. No number depends on it: `--threads 1`
runs the same calls one after the other.
"""
import concurrent.futures
import concurrent.futures.process
import multiprocessing
import os
import signal
import threading
import time

import torch

from envs import records
from models import parallel
from support import checkpoint, disk


class Now:
    """A call that has been made in this process: the same interface as a future's."""

    def __init__(self, f, args):
        self.value = f(*args)

    def result(self):
        return self.value


def possible(cfg):
    """A CPU with a core to spare, one thread a process, and no torchrun."""
    tiny = cfg.model == "tiny" and cfg.threads == 0
    on_cpu = cfg.device == "cpu" or (cfg.device == "auto" and not torch.cuda.is_available())
    return on_cpu and tiny and cores() > 1 and parallel.world() == 1


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start(cfg, f, *args):
    """f(*args), beside this process if that is possible; .result() is its value."""
    if not possible(cfg):
        return Now(f, args)
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(1, spawn, begin, (os.getpid(), cfg.out))
    later = Later(pool.submit(call, f, *args))
    pool.shutdown(wait=False)
    return later


class Later:
    """A call in a second process."""

    def __init__(self, future):
        self.future = future

    def result(self):
        try:
            return self.future.result()
        except concurrent.futures.process.BrokenProcessPool:
            records.fail("the second process was killed, by somebody or for want of memory; the "
                         "same command goes on after its last checkpoint")


def stop():
    """Let second processes end after the step that is under way, which they save."""
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    try:
        for child in children:
            child.join()
    except KeyboardInterrupt:
        for child in children:
            child.kill()


def call(f, *args):
    """f(*args) in the second process, which hears signals as the first one does."""
    with checkpoint.signals.heard():
        return f(*args)


def begin(parent, folder):
    """In the second process: its threads. It holds the run's folder, and ends when the first
    process has ended."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    records.show_anything()
    disk.lock(folder, child=True)
    if os.getppid() != parent:
        os._exit(1)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
