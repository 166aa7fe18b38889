"""The order of the data: which tokens of which shards are in which step, on which process.

Sequence n of a run is a pure function of (shards, T, seed, n), never of the number of processes or of restarts.
Sequences are windows of T tokens (and one more, the last target). An epoch holds each window once: shards one after the
other, shuffled from the second epoch on, and the windows of a shard shuffled within it. From the second epoch on the
windows start at another offset.

A mixture of folders ("edu_fineweb10B:0.7,openwebtext:0.3") takes its sequences from them in a fixed pattern of these
proportions, each folder in its own order.
"""

import fractions
import functools
import math
import os
import sys
import time

from parallel import all_agree, print0
from shards import Shards

import numpy as np


def permutation(n, *key):
    """A random order of range(n), the same on every machine: sorts n raw draws of a PCG64(key)."""
    return np.random.PCG64(key).random_raw(n).argsort(kind="stable")


class TrainOrder:
    """Which T tokens sequence n of a run is, and the sequences themselves. See the top of this file."""

    def __init__(self, shards, T, seed):
        self.shards, self.T, self.seed = shards, T, seed
        self._windows = functools.lru_cache(maxsize=2)(self._shuffle_windows)
        self._sign, self._heard_at = None, time.monotonic()
        self._count()

    def _count(self):
        self.counts = np.array([max(0, size - 1) // self.T for _, size in self.shards.train], dtype=np.int64)
        self.per_epoch = int(self.counts.sum())
        self._shard_ends = functools.lru_cache(maxsize=2)(self._shuffle_shards)
        if not self.per_epoch and self.shards.complete:
            sys.exit(f"{self.shards.data_dir}: no training shard has the {self.T + 1} tokens that --T={self.T} needs")

    def _shuffle_windows(self, epoch, shard):
        """The starts of a shard's windows in the order of an epoch."""
        offset = int(np.random.PCG64([self.seed, epoch, shard, 1]).random_raw() % self.T) if epoch else 0
        starts = offset + self.T * permutation(self.counts[shard], self.seed, epoch, shard, 2)
        # The offset pushes the last window over the end: let it hold the tokens before the offset.
        starts[starts + self.T + 1 > self.shards.train[shard][1]] = 0
        return starts

    def _shuffle_shards(self, epoch):
        """(the shards in the order of an epoch, the number of windows up to the end of each)."""
        order = permutation(len(self.counts), self.seed, epoch, 3) if epoch else np.arange(len(self.counts))
        return order, self.counts[order].cumsum()

    def has(self, n):
        """Whether sequence n has been written; looks into the folder again where it has not."""
        if not self.shards.complete and n >= self.per_epoch:
            self.shards.refresh()
            self._count()
        return self.shards.complete or n < self.per_epoch

    def silence(self):
        """Seconds since meta.json, which fineweb.py touches while it is at work, was last seen to change."""
        try:
            sign = os.stat(os.path.join(self.shards.data_dir, "meta.json")).st_mtime_ns
        except FileNotFoundError:  # gone: as silent as can be, so that the run is saved and ends
            return math.inf
        if sign != self._sign:
            self._sign, self._heard_at = sign, time.monotonic()
        return time.monotonic() - self._heard_at

    def locate(self, n):
        """(epoch, shard, start): sequence n of the run is tokens [start, start + T] of that shard.

        In a folder that is not complete, ask has(n) first.
        """
        epoch, n = divmod(n, self.per_epoch)
        order, ends = self._shard_ends(epoch)
        place = int(np.searchsorted(ends, n, side="right"))
        shard = int(order[place])
        return epoch, shard, int(self._windows(epoch, shard)[n - ends[place]])

    def batches(self, first, count, B, rank=0, world_size=1):
        """Yield one process's micro-batches of sequences first .. first + count - 1, in turns of B each.

        Each is an int64 array (B, T + 1): the inputs are all but the last column, the targets all but the first.
        """
        for n in range(first + rank * B, first + count, world_size * B):
            yield np.stack([self.read(i) for i in range(n, n + B)])

    def read(self, n):
        """The T + 1 tokens of sequence n, int64."""
        _, shard, start = self.locate(n)
        return self.shards.read(self.shards.train[shard][0], start, self.T + 1)

    def epochs(self, n):
        """How often the data has been read after n sequences; None while it is not complete."""
        return n / self.per_epoch if self.shards.complete else None

    def exposure(self, first, last):
        """Yield what sequences first .. last - 1 are, as {"epoch", "shard", "tokens"}.

        tokens are [start, end) ranges of the shard's inputs, in order, neighbours joined.
        """
        found = {}
        for n in range(first, last):
            epoch, shard, start = self.locate(n)
            found.setdefault((epoch, shard), []).append(start)
        for (epoch, shard), starts in found.items():
            ranges = []
            for start in sorted(starts):
                if ranges and ranges[-1][1] == start:
                    ranges[-1][1] += self.T
                else:
                    ranges.append([start, start + self.T])
            yield {"epoch": epoch, "shard": os.path.basename(self.shards.train[shard][0]), "tokens": ranges}


def parse_mixture(data_dir):
    """{folder: its share, a Fraction} of a data_dir: one folder, or "a:0.7,b:0.3". Exits if it is neither."""
    if "," not in data_dir:
        return {data_dir: fractions.Fraction(1)}
    found = {}
    for part in data_dir.split(","):
        folder, _, weight = part.strip().rpartition(":")
        try:
            found[folder] = fractions.Fraction(weight)
        except (ValueError, ZeroDivisionError):
            found[folder] = 0
        if not folder or found[folder] <= 0:
            sys.exit(f"--data_dir={data_dir}: expected a mixture such as edu_fineweb10B:0.7,openwebtext:0.3")
    if len(found) != len(data_dir.split(",")):
        sys.exit(f"--data_dir={data_dir}: names a folder twice")
    return {folder: weight / sum(found.values()) for folder, weight in found.items()}


class Mixture:
    """A TrainOrder over several, or one, in the proportions of their weights: Fractions that add up to 1.

    The pattern repeats: each sequence is of the source that is furthest behind its share. So no source is ever off by
    more than a sequence or two, and where one stands is known without counting from the start.
    """

    def __init__(self, orders, weights):
        self.orders, self.weights, self.T, self.enc = orders, weights, orders[0].T, orders[0].shards.enc
        self.settled = False  # whether the data is known to be complete for every process: none waits any more
        self.period = math.lcm(*(weight.denominator for weight in weights))
        if self.period > 10_000:
            sys.exit("--data_dir: the weights of a mixture may have four decimals")
        shares = np.array([int(weight * self.period) for weight in weights])
        self.counts = np.zeros((self.period + 1, len(orders)), dtype=np.int64)  # of each source, up to a place
        for place in range(self.period):
            self.counts[place + 1] = self.counts[place]
            self.counts[place + 1, np.argmax(shares * (place + 1) - self.period * self.counts[place])] += 1

    def before(self, n):
        """How many of the sequences before n are of each source."""
        cycles, place = divmod(n, self.period)
        return [int(count) for count in cycles * self.counts[-1] + self.counts[place]]

    def read(self, n):
        """The T + 1 tokens of sequence n, int64."""
        now, then = self.before(n), self.before(n + 1)
        source = next(i for i in range(len(now)) if now[i] != then[i])
        return self.orders[source].read(now[source])

    batches = TrainOrder.batches

    def contents(self):
        """[weight, [[file, tokens, checksum] of each training shard], dataset] of each source: what tells it apart."""
        return [
            [str(weight), [shards.identity(path, size) for path, size in shards.train], shards.dataset]
            for shards, weight in zip((order.shards for order in self.orders), self.weights, strict=True)
        ]

    def incomplete(self):
        """The orders whose folders are still being written."""
        return [order for order in self.orders if not order.shards.complete]

    def describe(self, sequences):
        """Yield lines on the data, as it is read by steps of so many sequences."""
        for order, weight in zip(self.orders, self.weights, strict=True):
            share = f", {float(weight):.2%} of the tokens" if len(self.orders) > 1 else ""
            folder, steps = order.shards.data_dir, order.per_epoch / sequences / float(weight)
            yield f"{steps:,.1f} steps an epoch of {folder}{share}"
            if not order.shards.complete:
                found = f"{len(order.shards.train)} training shards now, more as fineweb.py goes on"
                yield f"{folder} is not complete: {found}"

    def has(self, n):
        """Whether sequences up to n have been written."""
        return all(order.has(count - 1) for order, count in zip(self.orders, self.before(n + 1), strict=True))

    def silence(self):
        """Seconds since the quietest of the folders that are not complete was last seen to change."""
        return max((order.silence() for order in self.incomplete()), default=0)

    def epochs(self, n):
        """How often the data has been read after n sequences; of several, {folder: how often}."""
        counts = zip(self.orders, self.before(n), strict=True)
        found = {order.shards.data_dir: order.epochs(count) for order, count in counts}
        return found if len(found) > 1 else next(iter(found.values()))

    def exposure(self, first, last):
        """Yield what sequences first .. last - 1 are, as TrainOrder.exposure does; of several, with "data_dir"."""
        for order, start, end in zip(self.orders, self.before(first), self.before(last), strict=True):
            where = {"data_dir": order.shards.data_dir} if len(self.orders) > 1 else {}
            for read in order.exposure(start, end):
                yield where | read


def in_words(exposure):
    """What exposure() yields, short enough for a line."""
    return ", ".join(
        f"epoch {read['epoch']} {read['shard']} tokens {read['tokens'][0][0]} to {read['tokens'][-1][1]} "
        f"({len(read['tokens'])} ranges, in metrics.jsonl)"
        for read in exposure
    )


def open_mixture(data_dir):
    """{Shards: its share, a Fraction} of a data_dir; exits if a folder has none, or another tokenizer."""
    mixture = {Shards(folder): share for folder, share in parse_mixture(data_dir).items()}
    first, *others = mixture
    for shards in others:
        shards.check_tokenizer(first.data_dir, first.enc)
    return mixture


def micro_batch(B, fixed, T, total_batch_size, world_size):
    """The largest micro-batch up to B of which a step has a whole number; exits if that is not B and B is fixed."""
    unit = B * T * world_size
    if total_batch_size % unit == 0:
        return B
    fits = [b for b in range(1, B + 1) if total_batch_size % (b * T * world_size) == 0]
    if fits and not fixed:
        print0(f"--B={fits[-1]}, which divides the {total_batch_size} tokens of a step evenly")
        return fits[-1]
    hint = f"--B={fits[-1]}" if fits else f"--total_batch_size={max(1, round(total_batch_size / unit)) * unit}"
    shape = f"B x T x processes = {B} x {T} x {world_size}"
    sys.exit(f"--total_batch_size={total_batch_size} is not a multiple of {shape} = {unit}; try {hint}")


def wait_for(order, n, stop, minutes):
    """Return "" when sequence n is there for every process, "asked" or "silent" if it is not to be.

    Looks every 5 seconds, until a process has been asked to stop (see parallel.StopRequests) or fineweb.py has given no
    sign of life for so many minutes. All ranks call it: none waits alone.
    """
    told = False
    while not order.settled and not all_agree(order.has(n)):
        if not told:
            there = ", ".join(f"{len(o.shards.train)} in {o.shards.data_dir}" for o in order.incomplete())
            print0(f"waiting for fineweb.py to write the next training shard: there are {there}")
            told = True
        time.sleep(5)
        if stop.anywhere():
            return "asked"
        if not all_agree(order.silence() < 60 * minutes):
            return "silent"
    order.settled = order.settled or all_agree(not order.incomplete())
    return ""


def val_windows(shards, T, max_tokens):
    """(path, start, count) of the windows that cover the first max_tokens validation tokens, each once."""
    windows = []
    for path, size in shards.val:
        size = min(size, max_tokens)
        max_tokens -= size
        windows += [(path, start, min(T + 1, size - start)) for start in range(0, size - 1, T)]
    return windows


def read_windows(shards, windows, B, T):
    """(x, y), int64 arrays (B, T) of up to B windows; y is -1 where there is nothing to predict."""
    x, y = np.zeros((B, T), dtype=np.int64), np.full((B, T), -1)
    for row, (path, start, count) in enumerate(windows):
        tokens = shards.read(path, start, count)
        x[row, : count - 1], y[row, : count - 1] = tokens[:-1], tokens[1:]
    return x, y
