"""Two things at once on a CPU: a function in a second process, beside this one.

A tiny model is hardly faster on two threads than on one, so what is independent runs side by side
instead: the two warm-ups, and the rivals beside Algorithm 1. No number depends on it: `--threads 1`
runs the same calls one after the other.
"""
import concurrent.futures
import multiprocessing
import os
import signal
import threading
import time

import torch

from models import parallel


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
    pool = concurrent.futures.ProcessPoolExecutor(1, spawn, begin, (os.getpid(),))
    future = pool.submit(f, *args)
    pool.shutdown(wait=False)
    return future


def begin(parent):
    """In the second process: its threads; ^C ends it without a word, and so does the end of the
    first process."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
