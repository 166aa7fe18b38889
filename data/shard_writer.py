"""Writing token shards; shards.py describes the format."""

import collections
from concurrent.futures import ThreadPoolExecutor
import json
import os
import time

from data.shards import has_shards, open_shard, read_meta
from data.tokenizer import load_tokenizer, token_byte_lengths, tokenizer_state
from files import atomic_write
from script import UserError

import numpy as np


def token_dtype(enc):
    """The smallest NumPy dtype that holds the ids of a vocabulary."""
    return np.uint16 if enc.n_vocab <= 1 << 16 else np.uint32


def count_documents(tokens, enc, byte_lengths):
    """(documents that start, UTF-8 bytes) in an array of tokens; byte_lengths: of each token id."""
    documents = 0
    num_bytes = 0
    for part in np.split(tokens, range(1 << 16, len(tokens), 1 << 16)):  # parts that fit a cache
        documents += int(np.count_nonzero(part == enc.eot_token))
        # No check of each token: all are in the vocabulary.
        num_bytes += int(byte_lengths.take(part, mode="clip").sum(dtype=np.uint32))
    return documents, num_bytes


def write_meta(folder, meta):
    content = json.dumps(meta, indent=1).encode()
    atomic_write(f"{folder}/meta.json", lambda f: f.write(content))


class ShardWriter:
    """Cuts a stream of tokens into shards of shard_size in out_dir; close() completes the set.

    The first val_tokens tokens are the validation split. By default that is one shard, as in
    build-nanogpt, or the last tenth if there are fewer than two shards. With about["val_files"], it
    is what comes before end_validation().

    Of the stream, tokens [0, flushed) are in shards (the last one may still be on its way to the
    disk), and tokens [flushed, received) are in `pending`. `state` is the position of the stream's
    source after `received` tokens. With shards of 100 tokens, after add() of 60, 60 and 60:

        received   60 120 180
        flushed     0 100 100        the first shard was full within the second add()

    If out_dir holds the start of the same set, it is continued: the caller continues the stream at
    `received`, with the source at `state`. A source can only continue where an add() started, so
    `received` can be less than `flushed`: 60 and 100, if the command above was killed at 120. The
    40 tokens that come twice are compared with the last shard. Raises UserError if they differ, or
    if the shards were made with other settings (`about`, which meta.json stores).
    """

    def __init__(self, out_dir, prefix, enc, shard_size, about, val_tokens=0):
        self.out_dir = out_dir
        self.prefix = prefix
        self.enc = enc
        self.shard_size = shard_size
        self.val_tokens = val_tokens
        self.first_size = val_tokens or shard_size
        self.byte_lengths = np.array(token_byte_lengths(enc), dtype=np.uint16)
        try:
            np.empty(self.first_size + shard_size, token_dtype(enc))
        except MemoryError:
            raise UserError(f"--shard_size={shard_size}: two such shards do not fit in memory")
        # The settings that decide the content of the shards are stored, so that they can be
        # compared when a later command continues.
        self.tokenizer = tokenizer_state(enc)
        if val_tokens:
            about = about | {"val_tokens": val_tokens}
        self.meta = {
            **about,
            "shard_size": shard_size,
            "tokenizer": self.tokenizer if isinstance(self.tokenizer, str) else "tokenizer.json",
            "vocab_size": enc.n_vocab,
            "dtype": np.dtype(token_dtype(enc)).name,
            "complete": False,
            "shards": [],
        }
        # Which split comes next: first validation, then training.
        self.has_val_files = about.get("val_files", False)
        self.split = "val"  # of the next shard
        self.flushed = 0
        self.received = 0
        self.pending = collections.deque()  # arrays
        self.state = None
        # Where the last add() started: a command that continues after a kill starts there.
        self.resume_point = None  # {"state", "tokens", "split"}
        self.writing = None  # the future of the shard on its way to the disk
        self.pool = ThreadPoolExecutor(1)  # its thread writes shards
        self.last_heartbeat = 0.0
        if has_shards(out_dir):
            self._continue()

    def _continue(self):
        """Take over what an earlier, interrupted command wrote with the same settings."""
        hint = "choose another --out_dir, or delete it to start over"
        old = read_meta(self.out_dir)
        if old is None:
            raise UserError(f"{self.out_dir} holds shards already: {hint}")
        # Shards of other settings, or of another tokenizer, must not be mixed with these.
        for key in self.meta | old:
            value = self.meta.get(key)
            if key not in ("complete", "shards", "position") and old.get(key) != value:
                raise UserError(
                    f"{self.out_dir} holds shards made with {key}={old.get(key)}, not {value}: "
                    f"{hint}"
                )
        if not isinstance(self.tokenizer, str):
            old_enc = load_tokenizer(f"{self.out_dir}/tokenizer.json")
            if tokenizer_state(old_enc) != self.tokenizer:
                raise UserError(
                    f"{self.out_dir} holds shards made with another tokenizer.json: {hint}"
                )
        # The val/train split is final when there are two shards: before that, start over.
        has_split = len(old["shards"]) >= 2 and old["shards"][0]["tokens"] >= self.first_size
        if self.has_val_files:
            has_split = old["shards"]
        if not old["complete"] and not has_split:
            return
        # Continue after the last shard, at the position that was stored with it.
        self.meta = old
        self.split = "train"
        self.flushed = sum(shard["tokens"] for shard in old["shards"])
        self.received = self.flushed
        if not old["complete"]:
            position = old.pop("position")
            self.state = position["state"]
            self.received = position["tokens"]
            if self.has_val_files:
                self.split = position["split"]

    def add(self, tokens, state=None):
        """Append tokens to the stream; state (plain JSON values): its source's position after them.

        The array is kept, without a copy if it has the dtype of the shards: do not change it.
        """
        if self.writing and self.writing.done():
            self._finish()  # raises the error of a full disk soon, not one shard later
        self.resume_point = {"state": self.state, "tokens": self.received, "split": self.split}
        overlap = self.flushed - self.received
        if overlap > 0:  # these tokens are in shards already
            self._verify_overlap(tokens)
            new = tokens[overlap:]
        else:
            new = tokens
        self.state = state
        self.received += len(tokens)
        if len(new):
            self.pending.append(np.ascontiguousarray(new, self.meta["dtype"]))

        # Write what fills a shard. Without validation files, the first one is for validation, and
        # waits for a second: see _split_small_corpus().
        has_two_shards = self.received >= self.first_size + self.shard_size
        if has_two_shards and self.split == "val" and not self.has_val_files:
            self._write_shard(self._take(self.first_size))
            self.split = "train"
        if self.split == "train" or self.has_val_files:
            while self.received - self.flushed >= self.shard_size:
                self._write_shard(self._take(self.shard_size))
        if self.meta["shards"] and time.monotonic() - self.last_heartbeat > 10:
            os.utime(f"{self.out_dir}/meta.json")  # for a trainer that waits
            self.last_heartbeat = time.monotonic()

    def _verify_overlap(self, tokens):
        """Raise UserError if the next tokens differ from the end of the last shard."""
        last = open_shard(os.path.join(self.out_dir, self.meta["shards"][-1]["file"]))
        shard_start = self.flushed - len(last)  # in the stream
        start = max(self.received, shard_start)
        end = min(self.received + len(tokens), self.flushed)
        if start < end:
            new = tokens[start - self.received : end - self.received]
            old = last[start - shard_start : end - shard_start]
            if not np.array_equal(new, old):
                raise UserError(
                    f"{self.out_dir} holds the start of another text: choose another --out_dir"
                )

    def end_validation(self):
        """Complete the validation split: what is added from now on is for training."""
        # The last shard may be a short one.
        self._write_pending()
        if not self.flushed:
            raise UserError("the validation files hold no text: take them out")
        self.split = "train"
        self.state = None

    def _write_pending(self):
        """Write all pending tokens."""
        if self.received < self.flushed:
            raise UserError(
                f"{self.out_dir} holds the start of a longer text: choose another --out_dir"
            )
        while self.received > self.flushed:
            self._write_shard(self._take(min(self.shard_size, self.received - self.flushed)))

    def close(self):
        """Write the pending tokens; returns the dict of meta.json. UserError if it is empty."""
        if self.split == "val":
            self._split_small_corpus(self.received)
        self._write_pending()
        self._finish()
        if self.meta["shards"][-1]["split"] != "train" and self.has_val_files:
            raise UserError(f"{self.out_dir} has validation shards only: there is no training text")
        self.meta["complete"] = True
        write_meta(self.out_dir, self.meta)
        return self.meta

    def _split_small_corpus(self, num_pending):
        """Write the validation shard of a corpus of fewer than two shards."""
        if not num_pending:
            raise UserError("the dataset is empty: it has no document with text")
        if self.val_tokens:
            if self.val_tokens >= num_pending:
                raise UserError(
                    f"--val_tokens={self.val_tokens}: there are only {num_pending} tokens"
                )
            self._write_shard(self._take(self.val_tokens))
            self.split = "train"
            return
        # The last tenth, from the start of a document if one starts near there.
        cut = num_pending * 9 // 10
        starts = []
        offset = 0
        for part in self.pending:
            starts.append(offset + np.flatnonzero(part == self.enc.eot_token))
            offset += len(part)
        starts = np.concatenate(starts)
        if len(starts):
            nearest = int(starts[np.abs(starts - cut).argmin()])
            if abs(nearest - cut) <= (num_pending - cut) // 2:
                cut = nearest
        train = self._take(cut)
        self._write_shard(self._take(num_pending - cut))
        self.split = "train"
        self.pending.extend(train)

    def _take(self, count):
        """Remove the first `count` pending tokens; returns them as a list of arrays."""
        # No array is copied: the last one is split into two views.
        parts = []
        while count:
            part = self.pending.popleft()
            if count < len(part):
                self.pending.appendleft(part[count:])
                part = part[:count]
            parts.append(part)
            count -= len(part)
        return parts

    def _write_shard(self, parts):
        """Start to write arrays as the next shard, once the one before is on the disk."""
        self._finish()
        if not self.flushed:
            os.makedirs(self.out_dir, exist_ok=True)
            if not isinstance(self.tokenizer, str):
                content = json.dumps(self.tokenizer).encode()
                atomic_write(f"{self.out_dir}/tokenizer.json", lambda f: f.write(content))
            # meta.json comes first: a folder without it is taken for build-nanogpt's.
            write_meta(self.out_dir, self.meta)
        size = sum(map(len, parts))
        self.flushed += size
        self.writing = self.pool.submit(self._save, parts, size, self.split, self.resume_point)

    def _finish(self):
        """Wait until the last shard is on the disk; raises the OSError of a full disk."""
        if self.writing:
            self.writing.result()
            self.writing = None

    def _save(self, parts, size, split, resume_point):
        """Write arrays as a shard, and add it to meta.json once its file is complete."""
        i = len(self.meta["shards"])
        name = f"{self.prefix}_{split}_{i:06d}.npy"
        # An .npy file is a short header and the bytes of the array.
        descr = np.dtype(self.meta["dtype"]).str
        header = {"descr": descr, "fortran_order": False, "shape": (size,)}

        def write(f):
            np.lib.format.write_array_header_1_0(f, header)
            f.writelines(parts)

        atomic_write(f"{self.out_dir}/{name}", write)
        counts = [count_documents(part, self.enc, self.byte_lengths) for part in parts]
        shard = {"file": name, "split": split, "tokens": size}
        shard["documents"] = sum(documents for documents, _ in counts)
        shard["bytes"] = sum(num_bytes for _, num_bytes in counts)
        self.meta["shards"].append(shard)
        write_meta(self.out_dir, self.meta | {"position": resume_point})
