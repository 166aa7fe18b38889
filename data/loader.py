"""The order of the data: which tokens are in which step, on which process.

A sequence is a window of T tokens (and one more, the last target). Sequence n of a run is a pure
function of (shards, T, seed, n): it depends neither on the number of processes nor on restarts. An
epoch has each window once: the windows are shuffled within each shard, and the shards follow one
another, shuffled from the second epoch on. From then on the windows also start at another offset.

A mixture of folders ("edu_fineweb10B:0.7,openwebtext:0.3") takes its sequences from them in a fixed
pattern of these proportions, each folder in its own order.

A step's batches come from BatchReader (micro_batch.py), which asks MixtureLoader for sequences.
That asks a ShardLoader for each folder, which reads from Shards (shards.py), the folder's files.
"""

import contextlib
import fractions
import functools
import math
import os
import time

from data.shards import Shards
from script import UserError

import numpy as np


def permutation(n, *key):
    """A random order of range(n), the same on every machine: sorts n raw draws of a PCG64(key).

    NumPy promises equal raw draws in all of its versions, but not equal permutations. The last
    number of a key keeps the random streams of this file apart.
    """
    return np.random.PCG64(key).random_raw(n).argsort(kind="stable")


class ShardLoader:
    """Sequences of T + 1 tokens of one folder, in the order described at the top of this file."""

    def __init__(self, shards, T, seed):
        self.shards = shards
        self.T = T
        self.seed = seed
        self._window_starts = functools.lru_cache(maxsize=2)(self._shuffle_windows)
        self._mtime = None
        self._changed_at = time.monotonic()
        self._count_windows()

    def _count_windows(self):
        """Count the windows of each shard."""
        # The last token of a shard is only a target.
        counts = [max(0, size - 1) // self.T for _, size in self.shards.train]
        self.windows_per_shard = np.array(counts, dtype=np.int64)
        self.windows_per_epoch = sum(counts)
        # Made anew, since the list of shards may have grown.
        self._shard_order = functools.lru_cache(maxsize=2)(self._shuffle_shards)
        if not self.windows_per_epoch and self.shards.complete:
            raise UserError(
                f"{self.shards.data_dir}: no training shard has the {self.T + 1} tokens that "
                f"--T={self.T} needs"
            )

    def _shuffle_windows(self, epoch, shard):
        """The starts of a shard's windows in the order of an epoch."""
        offset = 0
        if epoch:
            # From the second epoch on the windows start elsewhere, so that the model sees other
            # contexts and other last targets.
            key = [self.seed, epoch, shard, 1]
            offset = int(np.random.PCG64(key).random_raw() % self.T)
        starts = offset + self.T * permutation(
            self.windows_per_shard[shard], self.seed, epoch, shard, 2
        )
        # Shifted by the offset, the last window no longer fits: it starts at 0 instead, and covers
        # what the shift has left out.
        _, size = self.shards.train[shard]
        starts[starts + self.T + 1 > size] = 0
        return starts

    def _shuffle_shards(self, epoch):
        """(the shards in the order of an epoch, the number of windows up to the end of each)."""
        if epoch:
            # The first epoch keeps the order of the files, so that training can start while they
            # are still being written.
            order = permutation(len(self.windows_per_shard), self.seed, epoch, 3)
        else:
            order = np.arange(len(self.windows_per_shard))
        return order, self.windows_per_shard[order].cumsum()

    def is_written(self, n):
        """Whether sequence n had been written when meta.json was last read."""
        return self.shards.complete or n < self.windows_per_epoch

    def is_available(self, n):
        """Whether sequence n has been written; reads meta.json again if not."""
        if not self.is_written(n):
            self.shards.refresh()
            self._count_windows()
        return self.is_written(n)

    def seconds_since_update(self):
        """Seconds since meta.json was seen to change; fineweb.py touches it while it works."""
        path = f"{self.shards.data_dir}/meta.json"
        # If it has disappeared, is_available() says so.
        with contextlib.suppress(FileNotFoundError):
            mtime = os.stat(path).st_mtime_ns
            if mtime != self._mtime:
                self._mtime = mtime
                self._changed_at = time.monotonic()
        return time.monotonic() - self._changed_at

    def locate(self, n):
        """(epoch, shard, start): sequence n is tokens [start, start + T] of that shard.

        If the folder is not complete, call is_available(n) first.
        """
        # Which shard holds the n-th window of this epoch, and which of its windows is that?
        epoch, n = divmod(n, self.windows_per_epoch)
        order, ends = self._shard_order(epoch)
        i = int(np.searchsorted(ends, n, side="right"))
        shard = int(order[i])
        first = int(ends[i] - self.windows_per_shard[shard])
        start = self._window_starts(epoch, shard)[n - first]
        return epoch, shard, int(start)

    def shards_before(self, n):
        """The number of shards, in the order of the files, that sequences [0, n) read."""
        # From the second epoch on, all of them.
        if n >= self.windows_per_epoch:
            return len(self.windows_per_shard)
        _, ends = self._shard_order(0)
        return int(np.searchsorted(ends, n)) + (n > 0)

    def read(self, n):
        """The T + 1 tokens of sequence n, int64."""
        _, shard, start = self.locate(n)
        path, _ = self.shards.train[shard]
        return self.shards.read(path, start, self.T + 1)

    def epochs(self, n):
        """The number of epochs in n sequences; None while the folder is not complete."""
        return n / self.windows_per_epoch if self.shards.complete else None

    def exposure(self, start, end):
        """Yield the token ranges of sequences [start, end): {"epoch", "shard", "tokens"}.

        tokens are sorted [start, end) ranges of the shard's inputs; neighbors are joined.
        """
        starts_by_shard = {}
        for n in range(start, end):
            epoch, shard, window_start = self.locate(n)
            starts_by_shard.setdefault((epoch, shard), []).append(window_start)
        for (epoch, shard), starts in starts_by_shard.items():
            ranges = []
            for window_start in sorted(starts):
                if ranges and ranges[-1][1] == window_start:
                    ranges[-1][1] += self.T
                else:
                    ranges.append([window_start, window_start + self.T])
            path, _ = self.shards.train[shard]
            yield {"epoch": epoch, "shard": os.path.basename(path), "tokens": ranges}


# -- mixtures -----------------------------------------------------------------------
def parse_mixture(data_dir):
    """{folder: weight, a Fraction} of a data_dir: one folder, or "a:0.7,b:0.3"."""
    if "," not in data_dir:
        return {data_dir: fractions.Fraction(1)}
    # Fractions, so that the pattern of a mixture is exact.
    weights = {}
    for part in data_dir.split(","):
        folder, _, number = part.strip().rpartition(":")
        try:
            weight = fractions.Fraction(number)
        except (ValueError, ZeroDivisionError):
            weight = 0
        if not folder or weight <= 0:
            raise UserError(
                f"--data_dir={data_dir}: expected a mixture such as "
                "edu_fineweb10B:0.7,openwebtext:0.3"
            )
        if folder in weights:
            raise UserError(f"--data_dir={data_dir}: names a folder twice")
        weights[folder] = weight
    # The weights need not sum to 1.
    total = sum(weights.values())
    return {folder: weight / total for folder, weight in weights.items()}


def open_sources(data_dir):
    """{Shards: weight, a Fraction} of a data_dir. All folders must have the same tokenizer."""
    mixture = {Shards(folder): weight for folder, weight in parse_mixture(data_dir).items()}
    # One model reads them all.
    first, *others = mixture
    for shards in others:
        shards.check_tokenizer(first.data_dir, first.enc)
    return mixture


class MixtureLoader:
    """ShardLoaders of several folders, or one, in proportion to weights: Fractions that sum to 1.

    The pattern repeats: each sequence is taken from the source that is furthest below its share. So
    no source is ever off by more than a sequence or two, and its position is computed directly.
    """

    def __init__(self, loaders, weights):
        self.loaders = loaders
        self.weights = weights
        self.T = loaders[0].T
        self.enc = loaders[0].shards.enc
        self.data_complete = False  # known to be complete on every rank: no more waiting
        self.period = math.lcm(*(weight.denominator for weight in weights))
        if self.period > 10_000:
            raise UserError("--data_dir: the weights of a mixture may have four decimals")
        # In a period, each source has a whole number of sequences.
        shares = np.array([int(weight * self.period) for weight in weights])
        # source_counts[i]: how many of the first i sequences of a period are from each source
        self.source_counts = np.zeros((self.period + 1, len(loaders)), dtype=np.int64)
        for i in range(self.period):
            deficit = shares * (i + 1) - self.period * self.source_counts[i]
            self.source_counts[i + 1] = self.source_counts[i]
            self.source_counts[i + 1, np.argmax(deficit)] += 1

    def counts_before(self, n):
        """How many of the sequences before n are from each source."""
        periods, i = divmod(n, self.period)
        counts = periods * self.source_counts[-1] + self.source_counts[i]
        return [int(count) for count in counts]

    def read(self, n):
        """The T + 1 tokens of sequence n, int64."""
        # Sequence n belongs to the source whose count rises from n to n + 1.
        before = self.counts_before(n)
        after = self.counts_before(n + 1)
        for loader, start, end in zip(self.loaders, before, after, strict=True):
            if end > start:
                return loader.read(start)

    def batches(self, first, count, B, rank=0, world_size=1):
        """Yield one rank's micro-batches of sequences first .. first + count - 1.

        Ranks take turns of B sequences. Each batch is an int64 array (B, T + 1): the inputs are all
        but the last column, the targets all but the first.
        """
        for n in range(first + rank * B, first + count, world_size * B):
            yield np.stack([self.read(i) for i in range(n, n + B)])

    def fingerprint(self, n):
        """A fingerprint of the data of the sequences before n: a dict for each source.

        It has "weight", "dataset" and "shards": [file, tokens, checksum] of each training shard.
        The checksum of a shard that these sequences do not read is None.
        """
        sources = []
        counts = self.counts_before(n)
        for loader, weight, count in zip(self.loaders, self.weights, counts, strict=True):
            shards = loader.shards
            num_read = loader.shards_before(count)
            checksums = []
            for i, (path, size) in enumerate(shards.train):
                checksum = shards.checksum(path, size) if i < num_read else None
                checksums.append([os.path.basename(path), size, checksum])
            source = {"weight": str(weight), "shards": checksums, "dataset": shards.dataset}
            sources.append(source)
        return sources

    def incomplete(self):
        """The loaders whose folders are still being written."""
        return [loader for loader in self.loaders if not loader.shards.complete]

    def describe(self, sequences_per_step):
        """Yield lines that describe the data."""
        for loader, weight in zip(self.loaders, self.weights, strict=True):
            folder = loader.shards.data_dir
            steps = loader.windows_per_epoch / sequences_per_step / float(weight)
            line = f"{steps:,.1f} steps per epoch of {folder}"
            if len(self.loaders) > 1:
                line += f", {float(weight):.2%} of the tokens"
            yield line
            if not loader.shards.complete:
                count = len(loader.shards.train)
                yield f"{folder} is not complete: {count} training shards now, fineweb.py adds more"

    def is_written(self, n):
        """Whether the sequences up to n had been written when each meta.json was last read."""
        pairs = zip(self.loaders, self.counts_before(n + 1), strict=True)
        return all(loader.is_written(count - 1) for loader, count in pairs)

    def is_available(self, n):
        """Whether the sequences up to n have been written; reads meta.json again if not."""
        pairs = zip(self.loaders, self.counts_before(n + 1), strict=True)
        return all(loader.is_available(count - 1) for loader, count in pairs)

    def seconds_since_update(self):
        """Seconds since the incomplete folder that has been idle longest was seen to change."""
        return max((loader.seconds_since_update() for loader in self.incomplete()), default=0)

    def epochs(self, n):
        """The number of epochs in n sequences; with several folders, {folder: epochs}."""
        epochs = {}
        for loader, count in zip(self.loaders, self.counts_before(n), strict=True):
            epochs[loader.shards.data_dir] = loader.epochs(count)
        return epochs if len(epochs) > 1 else epochs.popitem()[1]

    def exposure(self, start, end):
        """Yield what ShardLoader.exposure does; with several folders, also "data_dir"."""
        starts = self.counts_before(start)
        ends = self.counts_before(end)
        for loader, first, last in zip(self.loaders, starts, ends, strict=True):
            for ranges in loader.exposure(first, last):
                if len(self.loaders) > 1:
                    ranges = {"data_dir": loader.shards.data_dir, **ranges}
                yield ranges


def format_ranges(exposure):
    """What exposure() yields, short enough for a line."""
    parts = []
    for ranges in exposure:
        tokens = ranges["tokens"]
        parts.append(
            f"epoch {ranges['epoch']} {ranges['shard']} tokens {tokens[0][0]} to {tokens[-1][1]} "
            f"({len(tokens)} ranges, in metrics.jsonl)"
        )
    return ", ".join(parts)


# -- validation ---------------------------------------------------------------------
def val_windows(shards, T, max_tokens):
    """(path, start, count) of windows that cover the first max_tokens validation tokens once."""
    # The last window of a shard can be shorter.
    windows = []
    for path, size in shards.val:
        size = min(size, max_tokens)
        max_tokens -= size
        for start in range(0, size - 1, T):
            windows.append((path, start, min(T + 1, size - start)))
    return windows


def read_windows(shards, windows, B, T):
    """(x, y), int64 arrays (B, T), of up to B windows; y is -1 where x is padding."""
    x = np.zeros((B, T), dtype=np.int64)
    y = np.full((B, T), -1)
    for row, (path, start, count) in enumerate(windows):
        tokens = shards.read(path, start, count)
        x[row, : count - 1] = tokens[:-1]
        y[row, : count - 1] = tokens[1:]
    return x, y
