"""Files that are complete or absent: atomic writes, locks, downloads, Git LFS pointers."""

import contextlib
import errno
import os
import time

from script import UserError

import filelock  # torch and datasets depend on it
import requests
from tqdm import tqdm

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# What flock reports on NFS, Lustre and other file systems without locks.
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


def atomic_write(path, write):
    """write(file) under a temporary name, then rename: the file at path is always complete."""
    try:
        with open(path + ".tmp", "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        # fsync comes first: after a power cut, a renamed file must not be empty.
        os.replace(path + ".tmp", path)
    except BaseException:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise


def acquire_lock(path, timeout):
    """Lock a file until the lock is released or this process ends; returns the lock.

    Waits `timeout` seconds (-1: forever) for another process that holds it, then raises
    filelock.Timeout. Warns and returns a lock that is not held if the file system has none.
    """
    # A lock of the operating system, which ends with the process, however that ends.
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except (OSError, NotImplementedError) as e:  # what filelock < 4 raises for ENOSYS
        if isinstance(e, OSError) and e.errno not in NO_LOCKS:
            raise
        folder = os.path.dirname(path) or "."
        print(f"warning: the file system of {folder}/ has no locks: nothing else may write to it")
    return lock


def lock_folder(folder):
    """Make the folder and lock it until this process ends. Returns the lock, which must be kept.

    Raises UserError if another process holds it.
    """
    os.makedirs(folder, exist_ok=True)
    try:
        return acquire_lock(f"{folder}/.lock", timeout=1)  # is_locked() may hold it for a moment
    except filelock.Timeout:
        raise UserError(
            f"{folder}/ is in use by another process that writes to it: wait, or choose another"
        )


def is_locked(folder):
    """Whether a process holds the lock of a folder. A .lock file alone is none."""
    # Whoever can take the lock knows that nobody has it.
    path = f"{folder}/.lock"
    if not os.path.exists(path):
        return False
    try:
        with filelock.FileLock(path, timeout=1):
            return False
    except filelock.Timeout:
        return True
    except (OSError, NotImplementedError):  # it cannot be locked at all
        return False


def download(url, path, timeout=30, tries=3):
    """Download url to path with a progress bar, completely or not at all, unless it is there.

    If another process is downloading it, this one waits. Errors of the network or the server are
    tried again, after 1, 2, 4, ... seconds. Raises requests' exceptions.
    """

    def fetch(f):
        with requests.get(url, stream=True, timeout=timeout) as r:
            r.raise_for_status()
            total = int(r.headers.get("content-length", 0)) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=path) as bar:
                for chunk in r.iter_content(1 << 20):
                    bar.update(f.write(chunk))

    if os.path.exists(path):
        return
    folder, name = os.path.split(path)
    lock = acquire_lock(os.path.join(folder, f".{name}.lock"), timeout=-1)
    try:
        # Another process may have downloaded it meanwhile.
        if os.path.exists(path):
            return
        # A refusal (404, 403) is final; anything else may work a moment later.
        for failures in range(tries):
            try:
                return atomic_write(path, fetch)
            except requests.RequestException as e:
                status = 500 if e.response is None else e.response.status_code
                refused = status < 500 and status != 429  # 429: too many requests
                if refused or failures == tries - 1:
                    raise
                time.sleep(2**failures)
    finally:
        lock.release()


def check_lfs_pointer(path):
    """Raise UserError if a file is only a pointer to one that Git LFS has not downloaded."""
    # A file that cannot be read is left to its reader's message.
    with contextlib.suppress(OSError), open(path, "rb") as f:
        if f.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{path}: is a Git LFS pointer, not the file itself; run git lfs pull there"
            )
