"""A student's code, from the side of whoever judges it: `student("grpo.k1", a, b)` is what their
function returns. See `server.py` for what it may do."""
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from assignments import problems
from assignments.server import decode, encode

LONGEST = 1 << 26       # characters of an answer


class Failed(Exception):
    """A claim does not hold; the text says which, in words."""


class Server:
    """The process that forks one for each problem."""

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.address = os.path.join(self.folder.name, "door")
        command = [sys.executable, "-E", Path(__file__).with_name("server.py"), self.address]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        cwd=self.folder.name, start_new_session=True)
        assert self.process.stdout.readline() == b"ready\n", "the server does not start"
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()


class Student:
    """One process with the project in `folder`, until its time is up."""

    def __init__(self, server, folder):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(server.address)
        self.lines = self.socket.makefile("rw")
        order = {"folder": str(Path(folder).resolve()), "seconds": problems.SECONDS,
                 "memory": problems.MEMORY}
        print(json.dumps(order), file=self.lines, flush=True)
        self.pid = int(self.lines.readline())
        self.late = threading.Event()
        self.timer = threading.Timer(problems.WALL, self.stop)
        self.timer.start()

    def stop(self):
        self.late.set()
        self.kill()

    def kill(self):
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.timer.cancel()
        self.kill()
        try:
            self.lines.close()
        except OSError:
            pass
        self.socket.close()

    def __call__(self, name, *args, **options):
        """The value of name(*args, **options) in the student's process. Failed if it raises."""
        answer = self.ask(name, *args, **options)
        if "error" in answer:
            raise Failed(f"{name}: {answer['error']}"[:300])
        return answer["value"]

    def ask(self, name, *args, **options):
        """{"value": ..} or {"error": "ValueError: .."}. Failed if the process is gone."""
        where = "assignments." if name.startswith("probes.") else ""
        try:
            call = [where + name, encode(args), encode(options)]
            print(json.dumps(call), file=self.lines, flush=True)
            answer = json.loads(self.lines.readline(LONGEST))
            return {key: decode(value) for key, value in answer.items()}
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError):
            why = (f"it takes more than {problems.WALL} seconds" if self.late.is_set() else
                   "the process ended: it exits, or takes too much time or memory")
            raise Failed(f"{name}: {why}") from None


def claim(holds, words):
    """Failed(words) unless it holds."""
    if not holds:
        raise Failed(words)
