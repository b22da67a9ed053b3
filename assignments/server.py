"""The process in which a student's code runs. `student.py` starts it and talks to it.

It only computes: it gets calls and answers with values. What is right is decided elsewhere, so
there is nothing to gain from printed lines, exit codes or patched modules. The libraries are loaded
once; each problem gets a fork, which

1. may take so much CPU time and memory, and no more;
2. may read the libraries and its own folder, and nothing else; may write nothing (`audit`; on Linux
   also Landlock, which holds for code that goes around Python);
3. may start, signal and connect to nothing.

This stops a student who looks for the solutions. It is no jail for code that attacks the machine:
grade strangers' trees in a container.
"""
import ctypes
import importlib
import json
import os
import resource
import signal
import socket
import struct
import sys
import sysconfig

# Events of sys.addaudithook that a problem has no need of
REFUSED = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "signal.", "tempfile.",
           "glob.", "fcntl.", "resource.", "sqlite3.", "webbrowser.", "urllib.", "http.")
HARMLESS = {"os.listdir", "os.scandir", "os.putenv", "os.unsetenv", "ctypes.cdata"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


# --- values as JSON --------------------------------------------------------------------------

def encode(value):
    """Numbers, texts, lists, dicts and tensors, as JSON can hold them."""
    import torch
    if isinstance(value, torch.Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return {"tensor": value.detach().cpu().tolist(), "shape": list(value.shape), "dtype": kind}
    if isinstance(value, dict):
        return {str(key): encode(v) for key, v in value.items()}
    if isinstance(value, (list, tuple, map, zip)):
        return [encode(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} came back")


def decode(value):
    """The inverse of `encode`; tuples come back as lists."""
    import torch
    if isinstance(value, dict) and "tensor" in value:
        dtype = getattr(torch, value["dtype"])
        return torch.tensor(value["tensor"], dtype=dtype).reshape(value["shape"])
    if isinstance(value, dict):
        return {key: decode(v) for key, v in value.items()}
    return [decode(v) for v in value] if isinstance(value, list) else value


# --- the limits of a problem -----------------------------------------------------------------

def limit(seconds, memory):
    """So many more seconds of CPU time and bytes of memory."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        pages = int(open("/proc/self/statm").read().split()[0])
        size = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def readable(folder):
    """The folders that a problem may read."""
    kinds = "stdlib", "platstdlib", "purelib", "platlib"
    libraries = [sysconfig.get_path(kind) for kind in kinds]
    libraries += [path for path in sys.path if "-packages" in path]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/dev/null",
              "/dev/urandom", "/sys", "/proc/self", "/proc/cpuinfo", "/proc/meminfo"]
    return [os.path.realpath(path) for path in [folder, *libraries, *system]
            if os.path.exists(path)]


def audit(folders):
    """Refuse, in this process and for good, what a problem has no need of."""
    def refuse(event, args):
        if event == "open":
            check(args[0], args[2])
        elif event in ("os.listdir", "os.scandir"):
            check(args[0] or ".", 0)
        elif event.startswith(REFUSED) and event not in HARMLESS:
            raise PermissionError(f"the grader refuses {event}")

    def check(path, flags):
        if isinstance(path, int):
            return
        real = os.path.realpath(os.fsdecode(path))
        inside = any(real == folder or real.startswith(folder + "/") for folder in folders)
        if not inside or flags & WRITING and real != "/dev/null":
            raise PermissionError("the grader refuses this file")

    sys.addaudithook(refuse)


def landlock(folders):
    """The same for files, by the kernel: Landlock, Linux 5.13 and later. Does nothing elsewhere."""
    if sys.platform != "linux":
        return
    call, every, reading = ctypes.CDLL(None).syscall, (1 << 13) - 1, 0b1100
    kinds = struct.pack("Q", every)
    rules = call(444, kinds, len(kinds), 0)
    if rules < 0:
        return
    for folder in folders:
        there = os.open(folder, os.O_PATH)
        rights = reading if os.path.isdir(folder) else 0b100
        call(445, rules, 1, struct.pack("=Qi", rights, there), 0)
        os.close(there)
    ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
    call(446, rules, 0)
    os.close(rules)


# --- calls -----------------------------------------------------------------------------------

def serve(connection):
    """Answer calls until the other side hangs up."""
    lines = connection.makefile("rw")
    order = json.loads(lines.readline())
    print(os.getpid(), file=lines, flush=True)
    folders = readable(order["folder"])
    os.chdir(order["folder"])
    sys.path.insert(0, order["folder"])
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    limit(order["seconds"], order["memory"])
    landlock(folders)
    audit(folders)
    for line in lines:
        name, args, options = json.loads(line)
        try:
            module, _, function = name.rpartition(".")
            function = getattr(importlib.import_module(module), function)
            answer = {"value": encode(function(*decode(args), **decode(options)))}
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=lines, flush=True)


def main(address):
    # Not the folder of this file: the project, with its solutions, is near it
    sys.path.pop(0)
    sys.dont_write_bytecode = True
    import tokenizers  # noqa: F401
    import torch
    import tqdm  # noqa: F401
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen()
        print("ready", flush=True)
        while True:
            connection, _ = door.accept()
            if os.fork() == 0:
                door.close()
                serve(connection)
                os._exit(0)
            connection.close()


if __name__ == "__main__":
    main(sys.argv[1])
