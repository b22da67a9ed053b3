"""How a run ends early: by a signal, by bad data, by a full disk or memory. One line each.

Exit codes: 0 done; 2 something that the user can mend; 128 + n after signal n (^C 130, SIGTERM
143).
"""
import contextlib
import dataclasses
import gc
import signal
import sys

import torch

from envs import records
from models import parallel
from support import aside, checkpoint, disk, rundir


@dataclasses.dataclass
class End:
    """How a run ended that did not reach its end."""
    code: int = 2           # exit code
    again: bool = False     # whether it should be tried once more


@contextlib.contextmanager
def ending(cfg, last=False):
    """Within, a run is under way. Yields an End, which says how if it was cut. last: memory has run
    out before."""
    records.show_anything()
    end = End()
    with checkpoint.signals.heard():
        try:
            yield end
        except records.BadData as error:
            rundir.fail(error)
        except OSError as error:
            rundir.fail(f"{error.filename or cfg.out}: {error.strerror or error}; {disk.AGAIN}")
        except KeyboardInterrupt as stop:
            aside.stop()
            end.code = stopped(cfg, *stop.args)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            end.again = less_memory(cfg, last)
        finally:
            aside.stop()
            disk.release()
    gc.collect()            # what the traceback held
    if end.again:
        torch.cuda.empty_cache()


def stopped(cfg, number=signal.SIGINT):
    """Say how the run goes on after a signal; its exit code."""
    if parallel.rank() == 0:
        print(
            f"\nstopped by {signal.Signals(number).name}; what is done is saved in {cfg.out}: the "
            "same command (without --fresh) resumes there",
            file=sys.stderr,
        )
    return 128 + number


# --- memory -----------------------------------------------------------------------------------

def out_of_memory(error):
    kinds = torch.OutOfMemoryError, MemoryError
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def less_memory(cfg, last):
    """Halve the micro-batch, for a run that goes on from its last checkpoint; or end it in one line
    if that has been done. Several processes end at once, since they would wait for each other."""
    on_gpu = cfg.device != "cpu" and torch.cuda.is_available()
    tokens = cfg.tokens or (16384 if on_gpu else 1024)
    if last or parallel.world() > 1:
        rundir.fail(f"out of memory with --tokens {tokens}; give a smaller --tokens, --batch or "
                    "--group-size, --lora 32, or a smaller --model")
    cfg.tokens = max(1, tokens // 2)
    print(f"out of memory: micro-batches of {cfg.tokens} tokens from now on, as by --tokens "
          f"{cfg.tokens}")
    return True
