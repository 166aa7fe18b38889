"""Token shards: the format that fineweb.py writes and train_gpt2.py reads, in the order that order.py says.

A folder of 1-D .npy arrays, <prefix>_val_000000.npy, <prefix>_train_000001.npy, ..., uint16 (uint32 when the vocabulary
needs it), 100M tokens each by default. Every document starts with <|endoftext|> and runs on into the next shard where
one ends. meta.json says what is in them: dataset, subset, seed, tokenizer, vocab_size, dtype, `complete`, and for each
shard its file, split, tokens, documents (those that start in it) and UTF-8 bytes. A folder without meta.json, as
build-nanogpt writes it, holds GPT-2 tokens.
"""

import collections
from concurrent.futures import ThreadPoolExecutor
import functools
import json
import os
import re
import shlex
import sys
import time
import zlib

from tokenizer import load_tokenizer, token_byte_lengths, tokenizer_state

import filelock  # comes with torch and datasets
import numpy as np
import requests
from tqdm import tqdm

NONE_YET = "no shard is whole yet: wait for fineweb.py, or start it again if it has ended"


# -- files --------------------------------------------------------------------------
def write_whole(path, write):
    """write(file) under a temporary name, then rename: the file at path is always a whole one."""
    try:
        with open(path + ".tmp", "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except BaseException:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise


def lock_folder(folder):
    """Make the folder and hold it until this process ends, however it does; exits if another one holds it.

    Returns the lock, which the caller keeps.
    """
    os.makedirs(folder, exist_ok=True)
    lock = filelock.FileLock(os.path.join(folder, ".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        sys.exit(f"{folder}/ is in use by another process that writes to it: wait for it, or choose another")
    except NotImplementedError:
        print(f"warning: the file system of {folder}/ has no locks: nothing else may write to it")
    return lock


def download(url, path, timeout=30, tries=3):
    """Fetch url to path with a progress bar, whole or not at all; raises requests' exceptions.

    What may be a hiccup of the network or the server is tried again, after 1, 2, 4, ... seconds.
    """

    def fetch(f):
        with requests.get(url, stream=True, timeout=timeout) as r:
            r.raise_for_status()
            total = int(r.headers.get("content-length", 0)) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=path) as bar:
                for chunk in r.iter_content(1 << 20):
                    bar.update(f.write(chunk))

    for failures in range(tries):
        try:
            return write_whole(path, fetch)
        except requests.RequestException as e:
            refused = e.response is not None and e.response.status_code < 500
            if refused or failures == tries - 1:
                raise
            time.sleep(2**failures)


# -- writing ------------------------------------------------------------------------
def token_dtype(enc):
    """The smallest type of NumPy that shards of this vocabulary fit."""
    return np.uint16 if enc.n_vocab <= 1 << 16 else np.uint32


class ShardWriter:
    """Cuts a stream of tokens into shards of shard_size in out_dir; close() ends the set.

    The first shard is for validation, as in build-nanogpt's fineweb.py, or, if val_tokens says so, a smaller or larger
    one; without val_tokens, of less than two shards the last tenth is. Files are renamed into place when whole.

    Two positions in the stream say where the writer is: the first `written` tokens are in shards, the last of which is
    perhaps still on its way to the disk, and those from there up to `taken` are held, in arrays. Where out_dir holds
    the beginning of the same set, that is continued: the stream is then to be taken up again at `taken`, where `state`,
    as add() got it, says how. `taken` is then less than `written`; up to there the tokens are compared with what the
    shards end with. Exits if they differ, or what is there was made with other settings, which `about` holds
    for meta.json.
    """

    def __init__(self, out_dir, prefix, enc, shard_size, about, val_tokens=0):
        self.out_dir, self.prefix, self.enc, self.shard_size = out_dir, prefix, enc, shard_size
        self.val_tokens, self.first_size = val_tokens, val_tokens or shard_size
        about = about | ({"val_tokens": val_tokens} if val_tokens else {})
        self.byte_lengths = np.array(token_byte_lengths(enc), dtype=np.uint16)
        try:
            np.empty(self.first_size + shard_size, token_dtype(enc))
        except MemoryError:
            sys.exit(f"--shard_size={shard_size}: two such shards do not fit in memory")
        self.tokenizer = tokenizer_state(enc)
        self.meta = {
            **about,
            "shard_size": shard_size,
            "tokenizer": self.tokenizer if isinstance(self.tokenizer, str) else "tokenizer.json",
            "vocab_size": enc.n_vocab,
            "dtype": np.dtype(token_dtype(enc)).name,
            "complete": False,
            "shards": [],
        }
        self.written = self.taken = 0
        self.held = collections.deque()  # the tokens behind `written`, in arrays
        self.writing = None  # the shard that is on its way: one thread writes it, two count
        self.pool = ThreadPoolExecutor(3)
        self.state = None  # where the stream's source stands at `taken`
        self.alive_at = 0.0  # when meta.json was last touched
        if has_shards(out_dir):
            self._continue()

    def _continue(self):
        other = "choose another --out_dir"
        old = read_meta(self.out_dir)
        if not old:
            sys.exit(f"{self.out_dir} holds shards already: {other}, or delete it to start over")
        for key, value in self.meta.items():
            if key not in ("complete", "shards") and old.get(key) != value:
                what = f"{key}={old.get(key)}, not {value}"
                sys.exit(f"{self.out_dir} holds shards made with {what}: {other}, or delete it to start over")
        if not isinstance(self.tokenizer, str):
            there = tokenizer_state(load_tokenizer(os.path.join(self.out_dir, "tokenizer.json")))
            if there != self.tokenizer:
                sys.exit(f"{self.out_dir} holds shards made with another tokenizer.json: {other}")
        if not old["complete"] and (len(old["shards"]) < 2 or old["shards"][0]["tokens"] < self.first_size):
            return  # the first two belong together, and so do those of a small corpus: they are written again
        self.meta = old
        self.written = self.taken = sum(shard["tokens"] for shard in old["shards"])
        if not old["complete"]:
            self.state, self.taken = old["position"]["state"], old["position"]["tokens"]

    def add(self, tokens, state=None):
        """Take the stream's next tokens; state (plain JSON values) is where its source is behind them.

        The array is kept, and not copied where its type is the shards': leave it as it is.
        """
        if self.writing and self.writing.done():
            self._finish()  # a disk that is full is told of at once
        self.meta["position"] = {"state": self.state, "tokens": self.taken}  # the start of these tokens
        if self.taken < self.written:
            self._compare(tokens)
        new = tokens[max(0, self.written - self.taken) :]
        self.state, self.taken = state, self.taken + len(tokens)
        if len(new):
            self.held.append(np.ascontiguousarray(new, self.meta["dtype"]))
        while self.taken - self.written >= self.shard_size + (0 if self.written else self.first_size):
            self._write_shard(self._take(self.shard_size if self.written else self.first_size))
        if self.meta["shards"] and time.monotonic() - self.alive_at > 10:
            os.utime(os.path.join(self.out_dir, "meta.json"))  # a sign of life for a trainer that waits
            self.alive_at = time.monotonic()

    def _compare(self, tokens):
        """Exit if tokens, which start at `taken`, differ from the last shard, where they overlap with it."""
        last = open_shard(os.path.join(self.out_dir, self.meta["shards"][-1]["file"]))
        begin = self.written - len(last)  # its place in the stream
        start, end = max(self.taken, begin), min(self.taken + len(tokens), self.written)
        new, old = tokens[start - self.taken : end - self.taken], last[start - begin : end - begin]
        if start < end and not np.array_equal(new, old):
            sys.exit(f"{self.out_dir} holds the beginning of another text than this: choose another --out_dir")

    def close(self):
        """Write what is left; returns the dict of meta.json. Exits if there never was a token."""
        rest = self.taken - self.written
        if rest < 0:
            sys.exit(f"{self.out_dir} holds the beginning of a longer text than this: choose another --out_dir")
        if not self.written:
            if not rest:
                sys.exit("the dataset is empty: it has no document with text")
            if self.val_tokens >= rest:
                sys.exit(f"--val_tokens={self.val_tokens}: all that there is are {rest} tokens")
            # The last tenth, from the start of a document if one is near, is for validation.
            cut, places = rest * 9 // 10, np.cumsum([0, *map(len, self.held)])
            starts = [np.flatnonzero(part == self.enc.eot_token) for part in self.held]
            starts = np.concatenate([place + x for place, x in zip(places, starts, strict=False)])
            nearest = starts[np.abs(starts - cut).argmin()] if len(starts) else cut
            if abs(nearest - cut) <= (rest - cut) // 2:
                cut = int(nearest)
            train = [] if self.val_tokens else self._take(cut)
            self._write_shard(self._take(self.val_tokens or rest - cut))
            self.held.extend(train)
        while self.taken > self.written:
            self._write_shard(self._take(min(self.shard_size, self.taken - self.written)))
        self._finish()
        self.meta["complete"] = True
        self.meta.pop("position", None)
        self._write_meta()
        return self.meta

    def _take(self, count):
        """The first `count` of the held tokens, as a list of arrays; they are held no longer."""
        parts = []
        while count:
            part = self.held.popleft()
            if count < len(part):
                self.held.appendleft(part[count:])
            parts.append(part[:count])
            count -= len(parts[-1])
        return parts

    def _write_shard(self, parts):
        """Begin to write the arrays as a shard, and to count what is in them, when the one before is on the disk."""
        self._finish()
        if not self.written:
            os.makedirs(self.out_dir, exist_ok=True)
            if not isinstance(self.tokenizer, str):
                write_whole(f"{self.out_dir}/tokenizer.json", lambda f: f.write(json.dumps(self.tokenizer).encode()))
            self._write_meta()  # first: a folder without meta.json passes for one of build-nanogpt's
        size, i = sum(map(len, parts)), len(self.meta["shards"])
        self.written, split = self.written + size, "train" if i else "val"
        shard = {"file": f"{self.prefix}_{split}_{i:06d}.npy", "split": split, "tokens": size}
        header = {"descr": np.dtype(self.meta["dtype"]).str, "fortran_order": False, "shape": (size,)}

        def write(f):
            np.lib.format.write_array_header_1_0(f, header)
            f.writelines(parts)

        file = self.pool.submit(write_whole, os.path.join(self.out_dir, shard["file"]), write)
        counts = self.pool.map(self._count, parts)
        self.writing = self.pool.submit(self._enter, shard, file, counts, self.meta.get("position"))

    def _finish(self):
        """Wait until the shard that is on its way is on the disk; raises the OSError of a disk that is full."""
        if self.writing:
            self.writing.result()
            self.writing = None

    def _enter(self, shard, file, counts, position):
        """Enter a shard into meta.json, as soon as its file is whole."""
        file.result()
        documents, text_bytes = map(sum, zip(*counts, strict=True))
        self.meta["shards"].append(shard | {"documents": documents, "bytes": text_bytes})
        self._write_meta(position=position)

    def _count(self, tokens):
        """(documents that start, UTF-8 bytes) in an array."""
        parts = np.split(tokens, range(1 << 16, len(tokens), 1 << 16))  # that fit a cache
        documents = sum(int(np.count_nonzero(part == self.enc.eot_token)) for part in parts)
        lengths = (self.byte_lengths.take(part, mode="clip") for part in parts)  # no check: all are in the vocabulary
        return documents, sum(int(length.sum(dtype=np.uint32)) for length in lengths)

    def _write_meta(self, **now):
        path = os.path.join(self.out_dir, "meta.json")
        write_whole(path, lambda f: f.write(json.dumps(self.meta | now, indent=1).encode()))


# -- reading ------------------------------------------------------------------------
def has_shards(data_dir):
    """Whether the folder is there and holds a .npy file; exits if it may not be read."""
    try:
        return os.path.isdir(data_dir) and any(name.endswith(".npy") for name in os.listdir(data_dir))
    except OSError as e:
        sys.exit(f"{data_dir}: cannot be read ({e.strerror})")


def open_shard(path):
    """A shard, memory-mapped: a 1-D array of uint16 or uint32. Exits if it is not one."""
    try:
        tokens = np.load(path, mmap_mode="r")
    except PermissionError:
        sys.exit(f"{path}: may not be read by you")
    except (OSError, ValueError, EOFError) as e:
        sys.exit(f"{path}: corrupt or missing shard ({e}); make it again with python fineweb.py")
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        sys.exit(f"{path}: expected a 1-D array of uint16 or uint32, found {tokens.ndim}-D {tokens.dtype}")
    return tokens


def read_meta(data_dir):
    """The dict of a folder's meta.json, None if it has none. Exits if it is damaged."""
    path = os.path.join(data_dir, "meta.json")
    if not os.path.exists(path):
        return None
    try:
        with open(path) as f:
            meta = json.load(f)
        [(shard["file"], shard["split"]) for shard in meta["shards"]], meta["complete"], meta["tokenizer"]
    except PermissionError:
        sys.exit(f"{path}: may not be read by you")
    except (OSError, ValueError, KeyError, TypeError) as e:
        sys.exit(f"{path}: damaged ({type(e).__name__}: {e}); make the shards again with python fineweb.py")
    return meta


class Shards:
    """The shards of one folder.

    dataset is what they were made from, enc their tokenizer; train and val are lists of (path, number of tokens);
    complete is False while fineweb.py is still writing. Exits if the folder holds none or one is damaged.
    """

    def __init__(self, data_dir):
        self.data_dir = data_dir
        self._open = functools.lru_cache(maxsize=2)(open_shard)  # however many there are, two are mapped
        self.identity = functools.cache(self._identity)
        if not has_shards(data_dir):
            where = shlex.quote(data_dir)
            if os.path.exists(os.path.join(data_dir, ".lock")):
                sys.exit(f"{data_dir}: {NONE_YET}")
            if os.path.isfile(data_dir) or (os.path.isdir(data_dir) and os.listdir(data_dir)):
                hint = f"python fineweb.py --dataset={where} --out_dir=my_shards"
                sys.exit(f"{data_dir}: holds no shards; make them with {hint}")
            sys.exit(f"no shards in {os.path.abspath(data_dir)}/: make them with python fineweb.py --out_dir={where}")
        meta = self.refresh()
        self.dataset, name = meta.get("dataset"), meta["tokenizer"]
        self.enc = load_tokenizer(os.path.join(data_dir, name) if name.endswith(".json") else name)
        if meta.get("vocab_size", self.enc.n_vocab) != self.enc.n_vocab:
            says = f"says {meta['vocab_size']} tokens, its tokenizer {name} has {self.enc.n_vocab}"
            sys.exit(f"{data_dir}/meta.json: {says}; make the shards again with python fineweb.py")

    def check_tokenizer(self, name, enc):
        """Exit if the tokenizer enc of `name` is not that of these shards."""
        if tokenizer_state(enc) != tokenizer_state(self.enc):
            there, here = (f"{e.name} ({e.n_vocab} tokens)" for e in (enc, self.enc))
            sys.exit(f"{name} has the tokenizer {there}, {self.data_dir} has {here}: make shards with the model's own")

    def refresh(self):
        """Read the folder again; returns the dict of meta.json."""
        meta = read_meta(self.data_dir)
        if not meta:
            meta = {"dataset": "fineweb-edu", "tokenizer": "gpt2", "complete": True, "shards": []}
            for name in sorted(os.listdir(self.data_dir)):
                split = re.search(r"(train|val)\D*\d*\.npy$", name)
                if split:
                    meta["shards"].append({"file": name, "split": split[1]})
            if not meta["shards"]:
                sys.exit(f"{self.data_dir}: shards are named *_train_000001.npy and *_val_000000.npy; none here is")
        if not meta["shards"]:
            sys.exit(f"{self.data_dir}: {NONE_YET}")
        self.complete = meta["complete"]
        self.train, self.val = [], []
        for shard in meta["shards"]:
            path = os.path.join(self.data_dir, shard["file"])
            size = len(self._open(path))
            if size != shard.get("tokens", size):
                sys.exit(f"{path}: holds {size} tokens, meta.json says {shard['tokens']}; make it again")
            (self.train if shard["split"] == "train" else self.val).append((path, size))
        return meta

    def _identity(self, path, size):
        """[file name, tokens, CRC-32 of eight slices] of a shard of so many tokens."""
        tokens, crc = self._open(path), 0
        for start in range(0, size, -(-size // 8)):
            crc = zlib.crc32(tokens[start : start + 4096].tobytes(), crc)
        return [os.path.basename(path), size, crc]

    def read(self, path, start, count):
        """`count` tokens of a shard from `start` on, int64. Exits if one is outside the vocabulary."""
        tokens = self._open(path)[start : start + count].astype(np.int64)
        if tokens.max(initial=0) >= self.enc.n_vocab:
            where = f"token {tokens.max()} at {start + tokens.argmax()} is outside the vocabulary of {self.enc.name}"
            sys.exit(f"{path}: {where} ({self.enc.n_vocab} tokens); the shard is corrupt or another tokenizer's")
        return tokens
