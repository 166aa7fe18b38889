"""The trainer and fineweb.py killed with SIGKILL at random moments: they write the same in the end.

A longer campaign: python -m pytest tests/test_kill.py --kills=15 -n 0 -s
"""

import contextlib
import filecmp
import json
import os
from pathlib import Path
import random
import shutil
import signal
import subprocess
import time

from conftest import TEXT, command, read_log
from test_train import assert_same_run
from weights import load_checkpoint

import pytest

RUN = [
    "--preset=tiny", "--data_dir=shards", "--n_layer=1", "--n_head=1", "--n_embd=16", "--T=16",
    "--B=8", "--total_batch_size=256", "--warmup_steps=2", "--eval_every=10", "--sample_every=20",
    "--save_every=7", "--exposure_every=9", "--keep_checkpoints=2", "--resume",
]  # fmt: skip


def children(pid):
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except OSError:
        return []


def kill_all(process):
    """SIGKILL to a process and all it started, as when a machine dies."""
    pids = [process.pid]
    for pid in pids:
        pids += children(pid)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def start(folder, *args, **kwargs):
    """Start a script, as conftest.command has it; its output goes to out.txt."""
    with open(folder / "out.txt", "a") as out:
        return subprocess.Popen(command(*args, **kwargs), cwd=folder, stdout=out, stderr=out)


def logged(log_dir):
    """How many steps a log.txt has."""
    try:
        return len(read_log(log_dir, "train"))
    except (OSError, ValueError):
        return 0


def pytest_generate_tests(metafunc):
    if "nproc" in metafunc.fixturenames:
        mix = "shards:0.7,more:0.3"
        runs = [
            (1, "bfloat16", "shards"),
            (2, "float32", mix),
            (1, "float32", mix),
            (2, "bfloat16", "shards"),
        ]
        few = metafunc.config.getoption("kills") == 1
        metafunc.parametrize(("nproc", "dtype", "data_dir"), runs[:2] if few else runs)


def test_trainer(request, spawn, shards, tmp_path, nproc, dtype, data_dir):
    kills = request.config.getoption("kills")
    shutil.copytree(shards, tmp_path / "more")
    args = [
        "train_gpt2.py",
        *RUN,
        f"--data_dir={data_dir}",
        f"--dtype={dtype}",
        f"--max_steps={120 * kills}",
    ]
    untouched = spawn(*args, "--log_dir=untouched", nproc=nproc)
    assert untouched.returncode == 0, untouched.stderr
    rng = random.Random(f"{nproc} {dtype}")
    killed = resumed = lost = 0
    for i in range(kills):
        before, process = max(7, logged(tmp_path / "log")), start(tmp_path, *args, nproc=nproc)
        if i == 0 or rng.random() < 0.8:  # in the midst of its steps; else perhaps while it starts
            while process.poll() is None and logged(tmp_path / "log") <= before:
                time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6))
        killed += process.poll() is None
        kill_all(process)
        if (tmp_path / "log" / "resume.pt").exists():
            resumed += 1
            saved = load_checkpoint(str(tmp_path / "log" / "resume.pt"))["step"]
            assert (tmp_path / "log" / f"model_{saved:05d}.pt").exists()
            lost = max(lost, logged(tmp_path / "log") - saved)
    last = spawn(*args, nproc=nproc)
    assert last.returncode == 0, last.stderr
    print(
        f"\n{nproc} x {dtype}, {data_dir}: {killed} kills, {resumed} resumed, "
        f"at most {lost} steps lost"
    )
    assert killed and resumed and lost <= 7
    assert_same_run(tmp_path / "untouched", tmp_path / "log", 120 * kills)
    for name in ("exposure.jsonl", "log.txt"):
        assert filecmp.cmp(tmp_path / "untouched" / name, tmp_path / "log" / name, shallow=False)


@pytest.mark.parametrize("options", [[], ["--streaming=False"]])
def test_fineweb(request, spawn, tmp_path, options):
    kills = request.config.getoption("kills")
    (tmp_path / "texts").mkdir()
    for i in range(4):
        lines = [json.dumps({"text": f"{i} {k} {TEXT[: 999 + 7 * k]}"}) for k in range(400)]
        (tmp_path / "texts" / f"{i}.jsonl").write_text("\n".join(lines))
    (tmp_path / "texts" / "end.txt").write_text("<|endoftext|>".join(TEXT[k:] for k in range(50)))
    args = ["fineweb.py", "--dataset=texts", "--tokenizer=bytes", "--shard_size=2e4", *options]
    assert spawn(*args, "--out_dir=untouched").returncode == 0
    rng = random.Random(str(options))
    killed, shards = 0, []
    for _ in range(kills):
        process, before = (
            start(tmp_path, *args, "--out_dir=out"),
            len(list(tmp_path.glob("out/*.npy"))),
        )
        while process.poll() is None and len(list(tmp_path.glob("out/*.npy"))) <= before:
            time.sleep(0.005)
        time.sleep(rng.expovariate(5 * kills))
        killed += process.poll() is None
        kill_all(process)
        shards.append(len(list(tmp_path.glob("out/*.npy"))))
    assert spawn(*args, "--out_dir=out").returncode == 0
    print(f"\nfineweb.py {options}: {killed} kills, with {shards} shards written")
    assert killed
    whole, found = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("untouched", "out")
    )
    assert len(found) > 100 and found == whole


def test_a_killed_rank_is_restarted(request, spawn, shards, tmp_path):
    """torchrun --max-restarts: one of two ranks is killed, then the other; the run is the same."""
    args, kills = (
        [*RUN, "--dtype=float32", "--max_steps=100"],
        min(2, request.config.getoption("kills")),
    )
    assert spawn("train_gpt2.py", *args, "--log_dir=untouched", nproc=2).returncode == 0
    process = start(tmp_path, "train_gpt2.py", *args, nproc=2, options=["--max-restarts=3"])
    for rank in (0, 1)[:kills]:
        before = logged(tmp_path / "log")
        deadline = time.monotonic() + 60
        while logged(tmp_path / "log") < before + 20:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        ranks = [
            pid
            for pid in children(process.pid)
            if b"train_gpt2" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(sorted(ranks)[rank], signal.SIGKILL)
        while set(ranks) & set(children(process.pid)):
            time.sleep(0.1)
    assert process.wait(timeout=120) == 0, (tmp_path / "out.txt").read_text()[-2000:]
    assert (tmp_path / "out.txt").read_text().count("resuming log at step") == kills
    assert_same_run(tmp_path / "untouched", tmp_path / "log", 100)
