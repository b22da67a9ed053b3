"""Files and folders that are whole or not there: written aside, synced, summed, renamed. Locks.

Claim: a cut at any instant, also a power cut, leaves the old state or the new one. Whatever the
disk does (full, read-only, gone) ends in one line and exit code 2. Nothing is deleted that no run
wrote.
"""
import contextlib
import json
import os
import re
import shutil
import socket
import time

from safetensors import SafetensorError

from envs import records

try:
    import fcntl
except ImportError:         # Windows: no lock
    fcntl = None

MODEL_FILE = re.compile(
    r"(adapter_)?(config|model|generation_config|tokenizer|tokenizer_config|special_tokens_map|"
    r"added_tokens|vocab|chat_template|spiece|tekken|sentencepiece)[\w.-]*"
    r"\.(json|safetensors|jinja|model|txt)|merges\.txt|"
    r"README\.md"
)
RUN_FILE = re.compile(
    r"((config|results|progress)\.json|(metrics|samples)\.jsonl|rollout\.(png|gif)|codebook\.npz|"
    r"curves\.png|report\.html)(\.new|\.\d+\.unfinished)?|lock|"
    r"picture-(iteration\d+-)?[a-z]+[12]?\.png"
)
TEMPLATES = "additional_chat_templates"                    # of a tokenizer that has several
SOME = re.compile(r"(progress|sums)\.json"), {"fwm", "idm"}
RUN = RUN_FILE, {
    "fwm", "idm", "sft", "rivals", "checkpoint-a", "checkpoint-b", "steps", "tensorboard"}
# What a run writes into a folder of a kind: its files, and folders whose name is their kind
KINDS = {
    "run": RUN, "rivals": RUN, "sft": SOME, "checkpoint-a": SOME, "checkpoint-b": SOME,
    "fwm": (MODEL_FILE, {"adapter", TEMPLATES}), "idm": (MODEL_FILE, {"adapter", TEMPLATES}),
    "adapter": (MODEL_FILE, {}), TEMPLATES: (re.compile(r".*\.jinja"), {}),
    "tensorboard": (re.compile(r"events\.out\.tfevents\..*"), {}),
    "steps": (re.compile("(?!)"), {}), "step": (re.compile(r"state\.pt|sums\.json"), {})}
HELD = {}       # path of a lock: its open file


# --- locks ------------------------------------------------------------------------------------

def lock(folder, child=False):
    """Hold the folder as long as this process lives: another process is refused in one line. Its
    second process (`child`) holds it, too. Without locks (Windows, some network disks) it does
    nothing."""
    path = os.path.abspath(os.path.join(folder, "lock"))
    if fcntl is None or path in HELD:
        return
    file = open(path, "a+")
    try:
        if not child:
            take(file, fcntl.LOCK_EX)
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        take(file, fcntl.LOCK_SH)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        records.fail(f"{owner} is at work in {folder}; wait for its end, or give another folder")
    except OSError:
        pass
    HELD[path] = file


def take(file, kind, seconds=3.0):
    """Lock a file. A second process outlives the first one, that was killed, by a moment."""
    until = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
        time.sleep(0.05)


def release():
    """Give up all locks of this process."""
    while HELD:
        HELD.popitem()[1].close()


# --- whole folders ----------------------------------------------------------------------------

@contextlib.contextmanager
def whole_folder(folder, size, kind):
    """A new folder to fill, that takes the place of `folder` when the block ends. size: bytes that
    it will take, for which there must be room."""
    new = folder.with_name(folder.name + ".new")
    with told(folder):
        remove(new, kind)
        new.mkdir(parents=True)
    room(new, size)
    with told(folder):
        yield new
        files = [path for path in new.rglob("*") if path.is_file()]
        sums = {path.relative_to(new).as_posix(): records.sha256(path) for path in files}
        (new / "sums.json").write_text(json.dumps(sums))
        for path in [*new.rglob("*"), new]:
            records.sync(path)
        remove(folder, kind)
        os.replace(new, folder)
        records.sync(folder.parent)


def is_whole(folder):
    """Whether all files of a folder are there as they were written. Models may have moved to the
    folder above, which is the last thing that a run does."""
    try:
        sums = json.loads((folder / "sums.json").read_text())
        return all(sha256 in sums_of(folder, name) for name, sha256 in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def sums_of(folder, name):
    """The SHA-256 of the file in the folder and in the one above."""
    places = folder / name, folder.parent / name
    return [records.sha256(path) for path in places if path.exists()]


@contextlib.contextmanager
def told(path):
    """What goes wrong with the disk within ends in one line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        records.fail(f"{path}: cannot be written ({reason}); {AGAIN}")


AGAIN = "what was saved before is whole: mend it, then the same command goes on from there"


def room(folder, size):
    """Fails if the disk has no room for `size` bytes."""
    with told(folder):
        free = shutil.disk_usage(folder).free
    if free < size:
        records.fail(f"{folder}: {size / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free;"
                     " make room, then the same command goes on")


# --- what no run wrote ------------------------------------------------------------------------

def foreign(folder, kind):
    """Files in a folder of a run that no run wrote. kind: a key of KINDS."""
    files, _ = KINDS[kind]
    found = []
    for path in sorted(folder.iterdir()):
        inside = kind_of(path, kind) if path.is_dir() else None
        if inside:
            found += foreign(path, inside)
        elif path.is_dir() or not files.fullmatch(path.name):
            found.append(path)
    return found


def kind_of(path, kind):
    """The kind of a folder that stands in one of this kind; None if no run wrote it."""
    name = path.name.removesuffix(".new")
    if kind == "steps":
        return "step" if re.fullmatch(r"[\w-]+-\d+", name) else None
    return name if name in KINDS[kind][1] else None


def remove(folder, kind):
    """Delete a folder that a run wrote; fails if it holds something else."""
    if not folder.exists():
        return
    others = foreign(folder, kind)
    if others:
        records.fail(f"{others[0]}: no run wrote this, so it is not deleted; move it away, then "
                     "the same command goes on")
    shutil.rmtree(folder)
