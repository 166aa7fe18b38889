"""Files that are complete or absent: atomic writes, locked folders, downloads."""

import os
import time

from script import UserError

import filelock  # torch and datasets depend on it
import requests
from tqdm import tqdm


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


def lock_folder(folder):
    """Make the folder and lock it until this process ends. Returns the lock, which must be kept.

    Raises UserError if another process holds it.
    """
    # A lock of the operating system, which ends with the process, however that ends.
    os.makedirs(folder, exist_ok=True)
    lock = filelock.FileLock(f"{folder}/.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(
            f"{folder}/ is in use by another process that writes to it: wait, or choose another"
        )
    except NotImplementedError:
        print(f"warning: the file system of {folder}/ has no locks: nothing else may write to it")
    return lock


def download(url, path, timeout=30, tries=3):
    """Download url to path with a progress bar, completely or not at all.

    Errors of the network or the server are tried again, after 1, 2, 4, ... seconds. Raises
    requests' exceptions.
    """

    def fetch(f):
        with requests.get(url, stream=True, timeout=timeout) as r:
            r.raise_for_status()
            total = int(r.headers.get("content-length", 0)) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=path) as bar:
                for chunk in r.iter_content(1 << 20):
                    bar.update(f.write(chunk))

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
