"""Shards that go wrong while a run reads them: it saves a checkpoint first, and can be resumed."""

import json
import os
import re
import shutil

from conftest import read_log
from test_train import SMALL, assert_same_run

import numpy as np
import pytest


def remove(folder):
    for path in folder.glob("*_train_*.npy"):
        path.unlink()


def cut_short(folder):
    for path in folder.glob("*_train_*.npy"):
        os.truncate(path, 200)


def spoil(folder):
    for path in folder.glob("*_train_*.npy"):
        tokens = np.load(path, mmap_mode="r+")
        tokens[:] = 300


def cut_validation_short(folder):
    os.truncate(next(folder.glob("*_val_*.npy")), 200)


@pytest.mark.parametrize(
    ("damage", "step", "message"),
    [
        (remove, 7, r"_train_\d+\.npy: corrupt or missing shard"),
        (cut_short, 6, r"_train_\d+\.npy: (has become shorter|corrupt or missing)"),
        (spoil, 6, r"_train_\d+\.npy: token 300 at \d+ is outside the vocabulary of bytes"),
        (cut_validation_short, 6, r"_val_000000\.npy: (has become shorter|corrupt or missing)"),
    ],
)
def test_a_lost_shard(run, shards, tmp_path, at_step, monkeypatch, damage, step, message):
    """One line, no lost step; with the shard repaired, the run continues as if nothing was.

    The damage is done while step 5 is about to start, whose data has been read already.
    """
    args = ["train_gpt2.py", *SMALL, "--save_every=0"]
    run(*args, "--log_dir=whole")
    shutil.copytree(shards, tmp_path / "good")
    at_step(5, lambda: damage(shards))
    with pytest.raises(SystemExit, match=message):
        run(*args, "--log_dir=parts")
    saved = [path.name for path in (tmp_path / "parts").glob("model_*.pt")]
    assert saved == [f"model_{step:05d}.pt"]
    assert len(read_log(tmp_path / "parts", "train")) == step
    shutil.rmtree(shards)
    shutil.copytree(tmp_path / "good", shards)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    run("train_gpt2.py", "--resume", "--log_dir=parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_one_of_two_processes_cannot_read_its_data(spawn, shards, tmp_path):
    """All of them end, and the checkpoint is complete."""
    args = ["train_gpt2.py", *SMALL, "--save_every=0"]
    assert spawn(*args, "--log_dir=whole", nproc=2).returncode == 0
    path = shards / "toy_train_000002.npy"
    good = np.load(path)
    bad = good.copy()
    bad[len(bad) // 2] = 999
    np.save(path, bad)
    out = spawn(*args, "--log_dir=parts", nproc=2)
    assert out.returncode == 1
    assert re.search(r"000002\.npy: token 999 at \d+ is outside the vocabulary", out.stderr)
    assert "Traceback" not in out.stderr
    steps = len(read_log(tmp_path / "parts", "train"))
    assert 3 < steps < 8
    assert [p.name for p in (tmp_path / "parts").glob("model_*")] == [f"model_{steps:05d}.pt"]
    np.save(path, good)
    assert spawn("train_gpt2.py", "--resume", "--log_dir=parts", nproc=2).returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("lost", ["meta.json", "."])
def test_a_folder_that_is_still_written_disappears(run, shards, tmp_path, at_step, lost):
    """A checkpoint is saved; the shards that are left are not taken for all there are."""
    path = shards / "meta.json"
    meta = json.loads(path.read_text())
    meta["complete"] = False
    meta["shards"] = meta["shards"][:3]
    path.write_text(json.dumps(meta))

    def lose():
        if lost == "meta.json":
            path.unlink()
        else:
            shutil.rmtree(shards)

    at_step(3, lose)
    with pytest.raises(SystemExit, match=r"shards/meta\.json: has disappeared|missing shard"):
        run("train_gpt2.py", *SMALL, "--save_every=0", "--max_steps=30")
    assert list((tmp_path / "log").glob("model_*.pt"))
