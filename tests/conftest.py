"""Shared by the tests: scripts run in this process or in one of their own, and the GPT-2 vocabulary."""

import json
import os
from pathlib import Path
import runpy
import signal
import subprocess
import sys

from model import GPTConfig
from train_gpt2 import MODERN

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny, and two busy processes on two cores slow each other down

# What --preset=modern makes of a GPTConfig.
MODERN_PARTS = {key: value for key, value in MODERN.items() if hasattr(GPTConfig, key)}
ROOT = Path(__file__).resolve().parent.parent
GPT2 = ["--pos=learned", "--norm=layernorm", "--mlp=gelu", "--qk_norm=False", "--bias=True"]
GPT2 += ["--embd_norm=False", "--softcap=0", "--zero_init=False", "--tied=True"]
TEXT = "".join(
    f"Chapter {i}. The {a} {b} went over the {c} hill, and {i * 37 % 101} people saw it go.\n"
    for i, (a, b, c) in enumerate(
        (a, b, c)
        for a in ("old", "red", "slow", "quiet", "last")
        for b in ("train", "cart", "river", "king", "cloud", "dog")
        for c in ("green", "far", "low", "burning", "first", "northern")
    )
)  # some 12 kB


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=1, help="SIGKILLs for each run of test_kill.py")


@pytest.fixture(scope="session")
def gpt2():
    """The gpt2 Encoding; skips where its vocabulary cannot be had."""
    from tokenizer import load_tokenizer

    shared = ROOT.parent / "shared" / "tiktoken_cache"
    if "TIKTOKEN_CACHE_DIR" not in os.environ and shared.is_dir():
        os.environ["TIKTOKEN_CACHE_DIR"] = str(shared)
    try:
        return load_tokenizer("gpt2")
    except SystemExit as e:
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
    """What starts a script in a process of its own, or in nproc of torchrun, with torchrun's options."""
    start = [sys.executable]
    if nproc > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}", *options]
    return [*start, str(ROOT / script), *without_a_picture(script, args)]


def without_a_picture(script, args):
    """The arguments; for the trainer, which has matplotlib here, with no picture unless they say when."""
    asked = script != "train_gpt2.py" or any(arg.startswith("--plot_every") for arg in args)
    return args if asked else ["--plot_every=0", *args]


@pytest.fixture
def spawn(tmp_path):
    """spawn("train_gpt2.py", ..., nproc=2): run a script in processes of its own, in tmp_path.

    Returns subprocess.CompletedProcess, its stdout and stderr as text.
    """

    def call(script, *args, nproc=1, cwd=tmp_path):
        return subprocess.run(command(script, *args, nproc=nproc), cwd=cwd, capture_output=True, text=True, timeout=180)

    return call


@pytest.fixture
def shards(tmp_path):
    """A folder of byte shards: shard_size 2,000 tokens, one document a line of TEXT."""
    from fineweb import write_shards
    from tokenizer import load_tokenizer

    folder = tmp_path / "shards"
    texts = TEXT.splitlines(keepends=True)
    write_shards(texts, load_tokenizer("bytes"), str(folder), "toy", 2000, dataset="toy", subset=None, seed=0)
    return folder


@pytest.fixture
def at_step(monkeypatch):
    """at_step(k, action): call action when the trainer asks for the data of step k."""
    from order import Mixture, TrainOrder

    batches = TrainOrder.batches

    def patch(k, action):
        def patched(self, first, sequences, *args):
            if first == k * sequences:
                action()
            return batches(self, first, sequences, *args)

        monkeypatch.setattr(TrainOrder, "batches", patched)
        monkeypatch.setattr(Mixture, "batches", patched)

    return patch


def read_log(folder, kind):
    """{step: value} of one kind of record in a log.txt."""
    lines = (Path(folder) / "log.txt").read_text().splitlines()
    return {int(step): float(value) for step, k, value in map(str.split, lines) if k == kind}


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
