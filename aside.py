"""Two things at once on a CPU: a function in a second process, beside this one.

A tiny model is hardly faster on two threads than on one, so what is independent runs side by side instead: the two warm-ups,
and the rivals beside Algorithm 1. No number depends on it: `--no-aside` runs the same calls one after the other.
"""
import concurrent.futures
import multiprocessing
import os

import torch


class Now:
    """A call that has been made in this process: the same interface as a future's."""

    def __init__(self, f, args):
        self.value = f(*args)

    def result(self):
        return self.value


def possible(cfg):
    """One thread a process, and a second core to use."""
    return cfg.aside and cfg.device != "cuda" and cfg.threads == 1 and cores() > 1


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start(cfg, f, *args):
    """f(*args), beside this process if that is possible; .result() is its value."""
    if not possible(cfg):
        return Now(f, args)
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(1, spawn, torch.set_num_threads, (cfg.threads,))
    future = pool.submit(f, *args)
    pool.shutdown(wait=False)
    return future
