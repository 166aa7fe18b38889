"""How every script starts and ends: errors in one line, quiet Ctrl-C, safe pipes.

    if __name__ == "__main__":
        check_command_line(__file__)  # before slow imports

    if __name__ == "__main__":        # at the end of the file
        with run_as_script():
            configure(globals())
            main()

Functions raise UserError for a mistake of the user's and never exit by themselves, so that they can
be called from a notebook. Nothing here imports torch.
"""

import contextlib
import errno
import os
import re
import signal
import sys
import time

DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO,
    errno.EACCES, errno.EPERM, errno.EISDIR, errno.EEXIST, errno.EFBIG,
    errno.ENOTCONN, errno.ESTALE,  # a mounted folder has gone: Colab's Drive, sshfs, NFS
}  # fmt: skip


class UserError(Exception):
    """A mistake of the user's, in one line: what is wrong, and what to type instead."""

    def __init__(self, message):
        super().__init__(message)
        # In a notebook, show only this line, not the exception that led to it, as `from None`
        # would do.
        self.__suppress_context__ = True


def hide_interrupt(kind, error, traceback):
    """sys.excepthook: end without a traceback after Ctrl-C."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


# Set on import, so that Ctrl-C is quiet while a script still imports torch.
sys.excepthook = hide_interrupt


# -- the environment ----------------------------------------------------------------
def env_int(name, default):
    """The integer in an environment variable that torchrun sets; `default` if unset or empty."""
    return int(os.environ.get(name) or default)


def is_rank_0():
    """Whether this is the process that prints and writes."""
    return env_int("RANK", 0) == 0


def print0(*args):
    """print(), on rank 0 only."""
    if is_rank_0():
        print(*args)


def num_cpus():
    """The number of cores this process may use, by its affinity and its container's quota."""
    # taskset and Slurm restrict the affinity, containers the quota.
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/cpu.max") as f:
        quota, period = map(int, f.read().split())  # "max 100000" means no quota: ValueError
        count = min(count, max(1, round(quota / period)))
    return count


# -- output -------------------------------------------------------------------------
class BrokenPipeSafeStream:
    """stdout or stderr. If its reader is gone (| head, a closed terminal), output is dropped."""

    def __init__(self, stream):
        if stream is None:  # it was closed before Python started
            stream = open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            # Show "?" for what a terminal cannot display; flush each line, in a pipe too.
            stream.reconfigure(errors="replace", line_buffering=True)
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self._try(self.stream.write, text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, function, *args):
        try:
            return function(*args)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


# -- errors -------------------------------------------------------------------------
def is_out_of_memory(error):
    """Whether an exception says that a device, or the machine, has no memory left."""
    # CUDA, the CPU's allocator, and MPS say it in their own words.
    pattern = "out of memory|can't allocate|not enough memory"
    return isinstance(error, RuntimeError) and re.search(pattern, str(error)) is not None


def explain_error(error):
    """One line for an error that any script can meet and that is not a bug; None for others."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory: try a smaller batch, or a smaller model"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return None


@contextlib.contextmanager
def run_as_script(explain=explain_error):
    """Turn errors into one line on stderr and exit status 1.

    explain: a function from an exception to that line, or to None for a bug, which gets a
    traceback.
    """
    # In a notebook or a test this may happen more than once.
    if not isinstance(sys.stdout, BrokenPipeSafeStream):
        sys.stdout = BrokenPipeSafeStream(sys.stdout)
        sys.stderr = BrokenPipeSafeStream(sys.stderr)
    try:
        yield
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        if not is_rank_0():
            # Rank 0 most likely prints the same line, and then torchrun ends this process.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        sys.exit(message)
