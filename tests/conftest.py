"""Shared by the tests: scripts run in this process or in their own, and GPT-2's vocabulary."""

import atexit
import json
import multiprocessing.forkserver
import os
from pathlib import Path
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time

from files import atomic_write
from model import GPTConfig
from script import UserError
from training.presets import MODERN

import pytest
import torch

# The models are tiny, and two busy processes on two cores slow each other down. This holds for the
# processes that the tests start too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# What --preset=modern makes of a GPTConfig.
MODERN_PARTS = {key: value for key, value in MODERN.items() if hasattr(GPTConfig, key)}
ROOT = Path(__file__).resolve().parent.parent
GPT2 = ["--pos=learned", "--norm=layernorm", "--mlp=gelu", "--qk_norm=False", "--bias=True"]
GPT2 += ["--embd_norm=False", "--softcap=0", "--zero_init=False", "--tie_embeddings=True"]
TEXT = "".join(
    f"Chapter {i}. The {a} {b} went over the {c} hill, and {i * 37 % 101} people saw it go.\n"
    for i, (a, b, c) in enumerate(
        (a, b, c)
        for a in ("old", "red", "slow", "quiet", "last")
        for b in ("train", "cart", "river", "king", "cloud", "dog")
        for c in ("green", "far", "low", "burning", "first", "northern")
    )
)  # some 12 kB

FORKS = multiprocessing.get_context("forkserver")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=1, help="SIGKILLs for each run of test_kill.py")


@pytest.fixture(scope="session")
def gpt2():
    """The gpt2 Encoding; skips where its vocabulary cannot be had."""
    from data.tokenizer import load_tokenizer

    shared = ROOT.parent / "shared" / "tiktoken_cache"
    if "TIKTOKEN_CACHE_DIR" not in os.environ and shared.is_dir():
        os.environ["TIKTOKEN_CACHE_DIR"] = str(shared)
    try:
        return load_tokenizer("gpt2")
    except UserError as e:
        pytest.skip(str(e))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("sample.py", "--seed=1"): run a script here, in tmp_path; returns its stdout.

    A SystemExit passes through, as it is what a user sees.
    """
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def call(script, *args):
        monkeypatch.setattr(sys, "argv", [script, *without_a_picture(script, args)])
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        return capsys.readouterr().out

    return call


def command(script, *args, nproc=1, options=()):
    """The command that starts a script in its own process, or with torchrun in nproc of them."""
    start = [sys.executable]
    if nproc > 1:
        start += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={nproc}",
            *options,
        ]
    return [*start, str(ROOT / script), *without_a_picture(script, args)]


def without_a_picture(script, args):
    """The arguments; for the trainer, without a picture unless they ask for one."""
    asked = script != "train_gpt2.py" or any(arg.startswith("--plot_every") for arg in args)
    return args if asked else ["--plot_every=0", *args]


@pytest.fixture(scope="session")
def forks():
    """Has the process from which others are forked import this file."""
    FORKS.set_forkserver_preload(["conftest"])
    with pytest.MonkeyPatch.context() as patch:
        # multiprocessing does not tell it ours
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        multiprocessing.forkserver.ensure_running()


@pytest.fixture
def spawn(tmp_path, forks):
    """spawn("train_gpt2.py", ..., nproc=2): run a script in its own processes, as torchrun would.

    They run in tmp_path. To act as another launcher, pass environs: the variables of each process.
    Returns subprocess.CompletedProcess, its stdout and stderr as text. The processes are forks of
    one that has only imported torch and the project, which would take each of them two seconds.
    """

    def call(script, *args, nproc=1, cwd=tmp_path, environs=None):
        args = without_a_picture(script, args)
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            processes = [
                FORKS.Process(target=play, args=(script, args, cwd, environ, out, err))
                for environ in environs or environments(nproc)
            ]
            for process in processes:
                process.start()
            end = time.monotonic() + 180
            while any(process.is_alive() for process in processes) and time.monotonic() < end:
                if any(process.exitcode for process in processes):
                    for process in processes:
                        process.terminate()
                    end = min(end, time.monotonic() + 5)
                time.sleep(0.02)
            for process in processes:
                process.kill()
                process.join()
            code = next((process.exitcode for process in processes if process.exitcode), 0)
            return subprocess.CompletedProcess(
                [script, *args], code, out.read_text(), err.read_text()
            )

    return call


def environments(nproc):
    """The variables of each of nproc processes, of which torchrun sets some if they are several."""
    if nproc == 1:
        return [dict(os.environ)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": nproc,
        "LOCAL_WORLD_SIZE": nproc,
    }
    each = ({**shared, "RANK": i, "LOCAL_RANK": i} for i in range(nproc))
    return [os.environ | {key: str(value) for key, value in of.items()} for of in each]


def play(script, args, cwd, environ, out, err):
    """What python script args does, in a process that is a fork."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = [script, *args]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()


@pytest.fixture
def shards(tmp_path):
    """A folder of byte shards: shard_size 2,000 tokens, one document a line of TEXT."""
    from data.tokenizer import load_tokenizer
    from fineweb import write_shards

    folder = tmp_path / "shards"
    texts = TEXT.splitlines(keepends=True)
    write_shards(
        texts, load_tokenizer("bytes"), str(folder), "toy", 2000, dataset="toy", subset=None, seed=0
    )
    return folder


@pytest.fixture
def at_step(monkeypatch):
    """at_step(k, action): call action when the trainer asks for the data of step k."""
    from training.micro_batch import BatchReader

    read = BatchReader.read

    def patch(k, action):
        def patched(self, first, count, B):
            if first == k * count:
                action()
            return read(self, first, count, B)

        monkeypatch.setattr(BatchReader, "read", patched)

    return patch


def read_log(folder, kind):
    """{step: value} of one kind of record in a log.txt."""
    lines = (Path(folder) / "log.txt").read_text().splitlines()
    return {int(step): float(value) for step, k, value in map(str.split, lines) if k == kind}


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def dies_at(monkeypatch):
    """dies_at(n, after=False): writing shard n fails, once, before or after its file is whole."""

    def patch(n, after=False):
        def patched(path, *args):
            if dies := path.endswith(f"_{n:06d}.npy"):
                monkeypatch.setattr("data.shard_writer.atomic_write", atomic_write)
            if after or not dies:
                atomic_write(path, *args)
            if dies:
                raise ZeroDivisionError

        monkeypatch.setattr("data.shard_writer.atomic_write", patched)

    return patch
