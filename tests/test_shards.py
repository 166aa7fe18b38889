"""The shard format and the order of the data, against brute force."""

from fractions import Fraction
import itertools
import json
import os
import subprocess
import sys
import time

from conftest import ROOT
from data import shard_writer
from data.loader import MixtureLoader, ShardLoader, read_windows, val_windows
from data.shard_writer import ShardWriter
from data.shards import Shards
from data.tokenizer import load_tokenizer
from files import lock_folder
from script import UserError

import numpy as np
import pytest

ENC = load_tokenizer("bytes")


def write(folder, streams, shard_size):
    writer = ShardWriter(str(folder), "x", ENC, shard_size, {"dataset": "x"})
    for tokens in streams:
        writer.add(np.array(tokens))
    return writer.close()


def read(folder, split):
    meta = json.loads((folder / "meta.json").read_text())
    return [np.load(folder / shard["file"]) for shard in meta["shards"] if shard["split"] == split]


def documents(count, size, rng):
    return [
        np.concatenate(([256], rng.integers(0, 256, rng.integers(1, size)))) for _ in range(count)
    ]


@pytest.mark.parametrize("shard_size", [10, 97, 100, 640, 1000, 5000])
def test_no_token_is_lost_or_repeated(tmp_path, shard_size):
    docs = documents(30, 60, np.random.default_rng(0))
    stream = np.concatenate(docs)
    meta = write(tmp_path, docs, shard_size)
    val, train = read(tmp_path, "val"), read(tmp_path, "train")
    assert len(val) == 1 and train
    if len(stream) >= 2 * shard_size:
        assert len(val[0]) == shard_size
        joined = np.concatenate(val + train)
    else:  # too small for a whole shard of validation: the last tenth, cut where a document starts
        assert abs(len(val[0]) / len(stream) - 0.1) < 0.05 and val[0][0] == 256
        joined = np.concatenate(train + val)
    assert np.array_equal(joined, stream)
    assert all(len(shard) == shard_size for shard in train[:-1])
    assert meta["complete"] and meta["dtype"] == "uint16" and meta["vocab_size"] == 257
    for shard, tokens in zip(meta["shards"], val + train, strict=True):
        assert shard["tokens"] == len(tokens)
        assert shard["documents"] == list(tokens).count(256)
        assert shard["bytes"] == len(tokens) - shard["documents"]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("val_tokens", [0, 37, 100, 250])
def test_a_shard_is_written_while_the_next_one_fills(tmp_path, monkeypatch, val_tokens):
    """On a slow disk."""
    write_at_once = shard_writer.atomic_write

    def write_slowly(*args):
        time.sleep(0.005)
        write_at_once(*args)

    monkeypatch.setattr(shard_writer, "atomic_write", write_slowly)
    stream = np.random.default_rng(0).integers(0, 257, 1440).astype(np.uint16)
    writer = ShardWriter(str(tmp_path), "x", ENC, 100, {"dataset": "x"}, val_tokens)
    overlaps = 0
    for start in range(0, len(stream), 13):
        writer.add(stream[start : start + 13])
        overlaps += writer.writing is not None and not writer.writing.done()
    assert overlaps > 10
    writer.close()
    val, train = read(tmp_path, "val"), read(tmp_path, "train")
    assert [len(x) for x in val] == [val_tokens or 100] and len(train) > 10
    assert np.array_equal(np.concatenate(val + train), stream)


def test_one_document_gives_its_last_tenth_to_validation(tmp_path):
    write(tmp_path, [[256, *range(99)]], 1000)
    assert len(read(tmp_path, "train")[0]) == 90 and read(tmp_path, "val")[0].tolist() == list(
        range(89, 99)
    )


def make_loader(folder, sizes, T, seed=0):
    """A ShardLoader over training shards of random bytes, with these numbers of tokens."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"x_train_{i:06d}.npy" for i in range(len(sizes))]
    for name, size in zip(names, sizes, strict=True):
        np.save(folder / name, rng.integers(0, 256, size, dtype=np.uint16))
    listed = [{"file": name, "split": "train"} for name in names]
    (folder / "meta.json").write_text(
        json.dumps({"tokenizer": "bytes", "complete": True, "shards": listed})
    )
    return ShardLoader(Shards(str(folder)), T, seed)


@pytest.mark.parametrize(
    ("sizes", "T"), [([100], 7), ([64, 129, 65], 64), ([33, 500, 17, 16, 90], 16)]
)
def test_an_epoch_holds_each_window_once(tmp_path, sizes, T):
    loader = make_loader(tmp_path / "s", sizes, T)
    windows = sum((size - 1) // T for size in sizes)
    assert loader.windows_per_epoch == windows
    seen_offsets = set()
    for epoch in range(5):
        places = [loader.locate(epoch * windows + n) for n in range(windows)]
        assert all(e == epoch for e, _, _ in places)
        assert len(set(places)) == windows
        for shard, size in enumerate(sizes):
            starts = sorted(start for _, s, start in places if s == shard)
            assert len(starts) == (size - 1) // T
            assert all(start + T + 1 <= size for start in starts)
            offset = max((start % T for start in starts), default=0)
            if epoch == 0:
                assert starts == list(range(0, (size - 1) // T * T, T))
            else:  # each token up to the last window is in one, the first perhaps in one at 0
                seen_offsets.add(offset)
                covered = {t for start in starts for t in range(start, start + T)}
                assert not starts or covered == set(range(min(starts), max(starts) + T))
        visited = [s for _, s, _ in places]
        runs = [s for i, s in enumerate(visited) if i == 0 or visited[i - 1] != s]
        assert len(runs) == len(set(runs)), "shards are read one after the other"
        if epoch == 0:
            assert runs == sorted(runs)
    assert len(seen_offsets) > 1


def test_order_changes_with_epoch_and_seed(tmp_path):
    loader = make_loader(tmp_path / "a", [10_000, 9_000, 8_000], 64)
    first = [loader.locate(n)[1:] for n in range(2 * loader.windows_per_epoch)]
    again = make_loader(tmp_path / "b", [10_000, 9_000, 8_000], 64)
    backwards = [again.locate(n)[1:] for n in reversed(range(2 * loader.windows_per_epoch))][::-1]
    assert first == backwards, "a pure function of n"
    assert first[: loader.windows_per_epoch] != first[loader.windows_per_epoch :]
    other = make_loader(tmp_path / "c", [10_000, 9_000, 8_000], 64, seed=1)
    assert first != [other.locate(n)[1:] for n in range(2 * loader.windows_per_epoch)]
    assert first[:3] == FIRST_THREE, "the same on every machine, and from one version to the next"


FIRST_THREE = [(0, 3904), (0, 8640), (0, 7360)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("B", [1, 2, 4])
def test_a_step_is_the_same_for_any_number_of_processes(tmp_path, world_size, B):
    loader = make_loader(tmp_path / "s", [900, 1000], 16)
    mixture = MixtureLoader([loader], [Fraction(1)])
    tokens = [np.load(path) for path, _ in loader.shards.train]
    sequences = 16
    for step in range(20):  # two epochs and more
        rows = []
        for rank in range(world_size):
            batches = list(mixture.batches(step * sequences, sequences, B, rank, world_size))
            assert len(batches) == sequences // (B * world_size)
            for batch in batches:
                assert batch.shape == (B, 17)
                rows += batch.tolist()
        places = [loader.locate(n)[1:] for n in range(step * sequences, (step + 1) * sequences)]
        assert sorted(rows) == sorted(
            tokens[shard][start : start + 17].tolist() for shard, start in places
        )


def test_exposure_is_what_was_read(tmp_path):
    loader = make_loader(tmp_path / "s", [300, 200], 16)
    seen = {
        (r["epoch"], r["shard"]): r["tokens"]
        for r in loader.exposure(0, loader.windows_per_epoch + 5)
    }
    assert seen[0, "x_train_000000.npy"] == [[0, 288]]  # all 18 windows, joined
    assert seen[0, "x_train_000001.npy"] == [[0, 192]]
    assert (
        sum(end - start for (epoch, _), spans in seen.items() if epoch == 1 for start, end in spans)
        == 80
    )


def test_validation_covers_each_token_once(tmp_path):
    rng = np.random.default_rng(1)
    write(tmp_path, documents(40, 60, rng), 300)
    shards = Shards(str(tmp_path))
    tokens = read(tmp_path, "val")[0]
    for limit in (10**9, 100):
        windows = val_windows(shards, 16, limit)
        got = []
        for i in range(0, len(windows), 4):
            x, y = read_windows(shards, windows[i : i + 4], 4, 16)
            assert x.shape == y.shape == (4, 16)
            assert np.array_equal(x[:, 1:][y[:, 1:] >= 0], y[:, :-1][y[:, 1:] >= 0])
            got += y[y >= 0].tolist()
        assert got == tokens[1:limit].tolist()


def test_waits_for_a_writer(tmp_path):
    """A folder that is not complete: the order continues after the next shard, unchanged."""
    stream = np.arange(1000) % 256
    write(tmp_path / "whole", [stream], 200)
    loader = ShardLoader(Shards(str(tmp_path / "whole")), 16, 3)
    expected = [loader.locate(n) for n in range(loader.windows_per_epoch)]

    writer = ShardWriter(str(tmp_path / "part"), "x", ENC, 200, {})
    writer.add(stream[:400])
    writer.writing.result()
    loader = ShardLoader(Shards(str(tmp_path / "part")), 16, 3)
    assert loader.is_available(loader.windows_per_epoch - 1) and not loader.is_available(
        loader.windows_per_epoch
    )
    assert [loader.locate(n) for n in range(loader.windows_per_epoch)] == expected[
        : loader.windows_per_epoch
    ]
    writer.add(stream[400:])
    writer.close()
    assert loader.is_available(len(expected)), "complete: there is a next epoch"
    assert [loader.locate(n) for n in range(len(expected))] == expected


def test_a_writer_that_goes_silent(tmp_path, monkeypatch):
    write(tmp_path, [np.arange(1000) % 256], 200)
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    loader = ShardLoader(Shards(str(tmp_path)), 16, 0)
    loader.seconds_since_update()
    clock[0] = 50
    assert loader.seconds_since_update() == 50
    os.utime(tmp_path / "meta.json")
    assert loader.seconds_since_update() == 0
    clock[0] = 70
    assert loader.seconds_since_update() == 20


def test_a_small_corpus_that_died_while_its_last_shards_were_written(tmp_path, dies_at):
    """Between one and two shards, validation is the end of the text and is written first."""
    stream = [256, *range(189)]
    write(tmp_path / "whole", [stream], 100)
    for n, after in itertools.product((0, 1, 2), (False, True)):
        dies_at(n, after)
        with pytest.raises(ZeroDivisionError):
            write(tmp_path / f"died{n}{after}", [stream], 100)
        write(tmp_path / f"died{n}{after}", [stream], 100)
        for path in (tmp_path / "whole").iterdir():
            assert path.read_bytes() == (tmp_path / f"died{n}{after}" / path.name).read_bytes()


def test_memory_does_not_grow_with_the_shards(tmp_path):
    """Peak memory of new processes that read all of 2 MB of shards, and all of 80 MB."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from fractions import Fraction\n"
    code += "from data.loader import MixtureLoader, ShardLoader; from data.shards import Shards\n"
    code += "loader = ShardLoader(Shards(sys.argv[1]), 1000, 0)\n"
    code += "count = loader.windows_per_epoch // 3 * 3\n"
    code += "batches = MixtureLoader([loader], [Fraction(1)]).batches(0, count, 3)\n"
    code += "assert sum(len(x) for x in batches) > 990\n"
    code += "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    peaks = []
    for count in (1, 40):
        folder = tmp_path / str(count)
        folder.mkdir()
        names = [f"x_train_{i}.npy" for i in range(count)]
        listed = [{"file": name, "split": "train"} for name in names]
        (folder / "meta.json").write_text(
            json.dumps({"tokenizer": "bytes", "complete": True, "shards": listed})
        )
        for i, name in enumerate(names):
            np.save(folder / name, np.full(1_000_000, i, dtype=np.uint16))
        out = subprocess.run(
            [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
        )
        peaks.append(int(out.stdout))
    assert peaks[1] - peaks[0] < 10_000, f"{peaks} kB"


def test_plain_build_nanogpt_folder(tmp_path, gpt2):
    np.save(tmp_path / "edufineweb_val_000000.npy", np.arange(100, dtype=np.uint16))
    np.save(tmp_path / "edufineweb_train_000001.npy", np.arange(50_157, 50_257, dtype=np.uint16))
    shards = Shards(str(tmp_path))
    assert shards.enc.name == "gpt2" and shards.complete
    assert [size for _, size in shards.train] == [100] and [size for _, size in shards.val] == [100]
    (batch,) = MixtureLoader([ShardLoader(shards, 99, 0)], [Fraction(1)]).batches(0, 1, 1)
    assert batch.tolist() == [list(range(50_157, 50_257))]


def test_a_folder_whose_first_shards_are_on_their_way(tmp_path):
    lock = lock_folder(str(tmp_path))
    (tmp_path / ".cache").mkdir()
    with pytest.raises(UserError, match="no shard is complete yet: wait for fineweb"):
        Shards(str(tmp_path))
    lock.release()


def break_meta(folder):
    (folder / "meta.json").write_text("{")


def cut_short(folder):
    path = next(folder.glob("*train_000001.npy"))
    path.write_bytes(path.read_bytes()[:-10])


def replace_with(array):
    return lambda folder: np.save(next(folder.glob("*train_000001.npy")), array)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: [p.unlink() for p in folder.iterdir()],
            r"no shards in .*: make them with python fineweb",
        ),
        (break_meta, r"meta\.json: damaged"),
        (cut_short, r"x_train_000001\.npy: corrupt or missing shard"),
        (
            lambda folder: next(folder.glob("*train_000001.npy")).unlink(),
            r"x_train_000001\.npy: missing shard",
        ),
        (replace_with(np.zeros(7, dtype=np.uint16)), r"holds 7 tokens, meta\.json says 200"),
        (
            replace_with(np.zeros((2, 100), dtype=np.uint16)),
            r"expected a 1-D array of uint16 or uint32, found 2-D",
        ),
        (
            replace_with(np.zeros(200)),
            r"expected a 1-D array of uint16 or uint32, found 1-D float64",
        ),
        (replace_with(np.array(["a"], dtype=object)), r"corrupt or missing shard"),
    ],
)
def test_damaged_folders(tmp_path, damage, message):
    write(tmp_path, [np.arange(1000) % 256], 200)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        Shards(str(tmp_path)).read(f"{tmp_path}/x_train_000001.npy", 0, 10)


def test_a_token_outside_the_vocabulary(tmp_path):
    write(tmp_path, [np.arange(1000) % 256], 200)
    replace_with(np.full(200, 300, dtype=np.uint16))(tmp_path)
    loader = ShardLoader(Shards(str(tmp_path)), 16, 0)
    with pytest.raises(
        UserError,
        match=r"x_train_000001\.npy: token 300 at \d+ is outside the vocabulary of bytes",
    ):
        list(MixtureLoader([loader], [Fraction(1)]).batches(0, 1, 1))


def test_shards_too_short_for_the_context(tmp_path):
    write(tmp_path, [[256, *range(100)]], 1000)
    with pytest.raises(
        UserError, match=r"no training shard has the 1025 tokens that --T=1024 needs"
    ):
        ShardLoader(Shards(str(tmp_path)), 1024, 0)
