"""The trainer: against a plain loop, stopped and resumed, in several processes, given nonsense."""

import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

from conftest import GPT2, ROOT, TEXT, environments, read_jsonl, read_log
from data.loader import MixtureLoader, ShardLoader
from data.shards import Shards
from data.tokenizer import load_tokenizer
import device
import fineweb
from fineweb import write_shards
from model import GPT, GPTConfig, load_model
from script import UserError
from training import checkpoint, evals
from training.micro_batch import fit_memory
from training.optimizers import AdamW
from weights import find_checkpoint, load_checkpoint

import numpy as np
from PIL import Image
import pytest
import requests
import torch

SMALL = [
    "--preset=tiny", "--data_dir=shards", "--n_layer=2", "--n_head=2", "--n_embd=32", "--T=32",
    "--B=4", "--total_batch_size=512", "--max_steps=8", "--warmup_steps=2", "--max_lr=1e-2",
    "--min_lr=1e-3", "--beta1=0.9", "--beta2=0.95", "--dtype=float32", "--eval_every=3",
    "--sample_every=0", "--save_every=3", *GPT2, "--optimizer=adamw", "--schedule=cosine",
]  # fmt: skip


def weights(folder, step=8):
    return load_checkpoint(str(folder / f"model_{step:05d}.pt"))["model"]


def assert_same_run(a, b, step=8):
    """Bit for bit: log.txt, the metrics but for the time they took, weights and optimizer state."""
    assert (a / "log.txt").read_text() == (b / "log.txt").read_text()
    timeless = [
        [
            {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")}
            for r in read_jsonl(x / "metrics.jsonl")
        ]
        for x in (a, b)
    ]
    assert timeless[0] == timeless[1]
    models = [load_checkpoint(str(x / f"model_{step:05d}.pt")) for x in (a, b)]
    assert models[0]["val_loss"] == models[1]["val_loss"] is not None
    for name, value in models[0]["model"].items():
        assert torch.equal(value, models[1]["model"][name]), name
    saved = [load_checkpoint(str(x / "resume.pt")) for x in (a, b)]
    for one, other in zip(*(s["optimizers"] for s in saved), strict=True):
        assert one["state"].keys() == other["state"].keys()
        for i, state in one["state"].items():
            for key, value in state.items():
                assert torch.equal(value, other["state"][i][key])


def test_a_run_and_its_files(run, shards, tmp_path):
    out = run(
        "train_gpt2.py",
        *SMALL,
        "--max_steps=60",
        "--eval_every=20",
        "--sample_every=30",
        "--save_every=30",
    )
    lines = (tmp_path / "log" / "log.txt").read_text().splitlines()
    assert all(re.fullmatch(r"\d+ (train \d+\.\d{6}|val \d+\.\d{4})", line) for line in lines)
    train, val = read_log(tmp_path / "log", "train"), read_log(tmp_path / "log", "val")
    assert list(train) == list(range(60)) and list(val) == [0, 20, 40, 60]
    assert train[0] == pytest.approx(math.log(257), abs=0.15)
    assert train[59] < 3.2 and val[60] < val[40] < val[20] < val[0] - 1

    records = read_jsonl(tmp_path / "log" / "metrics.jsonl")
    record = next(r for r in records if r["kind"] == "train" and r["step"] == 5)
    assert record["loss"] == pytest.approx(train[5], abs=1e-6)
    assert (
        record["tokens"] == 6 * 512
        and record["lr"] > 0
        and record["grad_norm"] > 0
        and record["seconds"] > 0
    )
    assert [r["step"] for r in records if r["kind"] == "sample"] == [30, 60]
    assert re.search(
        r"step +59 \| loss [\d.]+ \| lr [\d.e-]+ \| norm [\d.]+ \| \d+ms "
        r"\| [\d,]+ tok/s \| eta 0:00:0\d\n",
        out,
    )

    assert sorted(p.name for p in (tmp_path / "log").glob("*.pt")) == [
        "model_00030.pt",
        "model_00060.pt",
        "resume.pt",
        "resume_00030.pt",
        "resume_00060.pt",
    ]
    state = load_checkpoint(str(tmp_path / "log" / "model_00060.pt"))
    assert state.keys() == {"model", "config", "step", "val_loss", "settings", "tokenizer"}
    assert (state["step"], state["tokenizer"], state["settings"]["max_steps"]) == (60, "bytes", 60)
    assert state["val_loss"] == pytest.approx(val[60], abs=1e-4)
    assert state["config"] == vars(
        GPTConfig(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=32)
    )

    # the loss of the checkpoint, by the trainer and token by token
    printed = run(
        "train_gpt2.py",
        "--eval_only=True",
        "--data_dir=shards",
        "--dtype=float32",
        "--T=32",
        "--B=3",
    )
    result = dict(part.split(" ") for part in printed.splitlines()[-1].split(" | "))
    model, enc = load_model("latest")
    tokens = torch.from_numpy(np.load(shards / "toy_val_000000.npy").astype(np.int64))
    nats, right = 0.0, 0
    for start in range(0, len(tokens) - 1, 32):
        x, y = tokens[start : start + 32], tokens[start + 1 : start + 33]
        logits = model(x[None, : len(y)])[0]
        nats -= logits.log_softmax(-1)[range(len(y)), y].sum().item()
        right += (logits.argmax(-1) == y).sum().item()
    size = len(enc.decode(tokens[1:].tolist()).replace("<|endoftext|>", "").encode())
    assert float(result["loss"]) == pytest.approx(nats / (len(tokens) - 1), abs=1e-4)
    assert float(result["perplexity"]) == pytest.approx(
        math.exp(nats / (len(tokens) - 1)), rel=1e-3
    )
    assert float(result["bpb"]) == pytest.approx(nats / math.log(2) / size, abs=1e-4)
    assert result["tokens"] == f"{len(tokens) - 1:,}"
    assert float(result["accuracy"]) == pytest.approx(right / (len(tokens) - 1), abs=1e-4)
    accuracy = {r["step"]: r["accuracy"] for r in records if r["kind"] == "val"}
    assert 0.1 < accuracy[60] == pytest.approx(float(result["accuracy"]), abs=1e-4)
    assert f"| accuracy {accuracy[60]:.2%} |" in out
    assert val[60] == pytest.approx(float(result["loss"]), abs=1e-4)


def test_steps_equal_a_plain_loop(run, shards, tmp_path):
    """Schedule, accumulation, clipping and AdamW, written out for whole batches."""
    run("train_gpt2.py", *SMALL, "--grad_clip=0.5")
    torch.manual_seed(1337)
    model = GPT(GPTConfig(32, 257, 2, 2, 32))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}],
        betas=(0.9, 0.95), eps=1e-8, foreach=False,
    )  # fmt: skip
    loader = MixtureLoader([ShardLoader(Shards("shards"), 32, 1337)], [1])
    expected = {}
    for step in range(8):
        lr = (
            1e-2 * (step + 1) / 2
            if step < 2
            else 1e-3 + 9e-3 * (1 + math.cos(math.pi * (step - 2) / 6)) / 2
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        (rows,) = loader.batches(16 * step, 16, 16)
        rows = torch.from_numpy(rows)
        logits = model(rows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        expected[step] = loss.item()
    assert read_log(tmp_path / "log", "train") == pytest.approx(expected, abs=1e-4)
    for name, value in weights(tmp_path / "log").items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-4, rtol=1e-3)


def test_lines_on_the_terminal(run, shards, tmp_path):
    """Every so many steps and the last one; the log has them all."""
    out = run("train_gpt2.py", *SMALL, "--print_every=3")
    assert re.findall(r"step +(\d+) \| loss", out) == ["0", "3", "6", "7"]
    assert all(
        re.search(r" \| eta \d:\d\d:\d\d$", line) for line in out.splitlines() if "| loss" in line
    )
    assert list(read_log(tmp_path / "log", "train")) == list(range(8))
    out = run("train_gpt2.py", *SMALL, "--print_every=0", "--log_dir=quiet")
    assert "| loss" not in out and "| val loss" in out


def test_estimate_eta():
    """After step 9 of 25: 15 updates, validations at 10, 20 and 25, checkpoints at 20 and 25."""
    every = {"val": 10, "hella": 0, "save": 20}
    seconds = {
        "train": [90.0, 1.0, 1.0],
        "val": [4.0],
        "save": [7.0],
    }  # the first one was slow to start
    assert evals.estimate_eta(9, 25, every, seconds) == 15 * 1 + 3 * 4 + 2 * 7
    assert evals.estimate_eta(9, 25, every, {"train": []} | {"save": [7.0]}) is None


def test_the_run_draws_itself(run, shards, tmp_path, monkeypatch):
    run("train_gpt2.py", *SMALL, "--plot_every=-1")
    assert np.asarray(Image.open(tmp_path / "log" / "plot.png").convert("L")).std() > 10
    run("train_gpt2.py", *SMALL, "--log_dir=never")
    assert not (tmp_path / "never" / "plot.png").exists()
    # nothing that goes wrong with it is the run's concern
    (tmp_path / "blocked" / "plot.png").mkdir(parents=True)
    assert "done; generate text" in run(
        "train_gpt2.py", *SMALL, "--plot_every=4", "--log_dir=blocked"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    out = run("train_gpt2.py", *SMALL, "--plot_every=-1", "--log_dir=absent")
    assert not (tmp_path / "absent" / "plot.png").exists() and "matplotlib" not in out


@pytest.mark.parametrize("args", [["--B=16"], ["--B=1"]])
def test_micro_batch_does_not_change_the_run(run, shards, tmp_path, args):
    run("train_gpt2.py", *SMALL)
    run("train_gpt2.py", *SMALL, *args, "--log_dir=other")
    for kind in ("train", "val"):
        assert read_log(tmp_path / "other", kind) == pytest.approx(
            read_log(tmp_path / "log", kind), abs=1e-4
        )


def test_the_micro_batch_gives_way(run, shards, tmp_path):
    """The preset's 16 sequences do not go into 20: B is lowered, unless it was asked for."""
    out = run(
        "train_gpt2.py",
        *[arg for arg in SMALL if arg[:4] not in ("--B=", "--wa")],
        "--max_steps=1",
        "--total_batch_size=640",
    )
    assert "--B=10, which divides the 640 tokens of a step evenly" in out
    assert load_checkpoint(str(tmp_path / "log" / "model_00001.pt"))["settings"]["B"] == 10


def test_processes_do_not_change_the_run(run, spawn, shards, tmp_path):
    run("train_gpt2.py", *SMALL, "--sample_every=4", "--exposure_every=4")
    two = spawn(
        "train_gpt2.py", *SMALL, "--sample_every=4", "--exposure_every=4", "--log_dir=two", nproc=2
    )
    assert two.returncode == 0, two.stderr
    for kind in ("train", "val"):
        assert read_log(tmp_path / "two", kind) == pytest.approx(
            read_log(tmp_path / "log", kind), abs=5e-5
        )
    assert (tmp_path / "two" / "exposure.jsonl").read_text() == (
        tmp_path / "log" / "exposure.jsonl"
    ).read_text()
    assert len(re.findall("val loss", two.stdout)) == 4, "only rank 0 prints"


@pytest.mark.parametrize(("dtype", "steps"), [("float32", range(8)), ("bfloat16", (0, 4, 7))])
def test_stopped_after_any_step_and_resumed(run, shards, tmp_path, at_step, dtype, steps):
    args = [*SMALL, f"--dtype={dtype}", "--sample_every=4", "--exposure_every=3"]
    run("train_gpt2.py", *args)
    for k in steps:
        at_step(k, lambda: os.kill(os.getpid(), signal.SIGINT))
        out = run("train_gpt2.py", *args, f"--log_dir=stopped{k}")
        assert f"saved stopped{k}/model_{k + 1:05d}.pt" in out
        assert f"resume with: python train_gpt2.py --resume --log_dir=stopped{k}" in out
        at_step(-1, None)
        run("train_gpt2.py", "--resume", f"--log_dir=stopped{k}")  # with the settings of the run
        assert_same_run(tmp_path / "log", tmp_path / f"stopped{k}")
        exposure = [
            (tmp_path / folder / "exposure.jsonl").read_text() for folder in ("log", f"stopped{k}")
        ]
        assert exposure[0] == exposure[1]


def test_died_and_resumed(run, shards, tmp_path, at_step):
    """What was logged behind the last checkpoint is dropped, and written again."""
    run("train_gpt2.py", *SMALL)
    for k in (2, 3, 5, 6):
        at_step(k, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("train_gpt2.py", *SMALL, f"--log_dir=died{k}")
        at_step(-1, None)
        run("train_gpt2.py", *SMALL, "--resume", f"--log_dir=died{k}")
        assert_same_run(tmp_path / "log", tmp_path / f"died{k}")


def test_resume_under_other_conditions(run, shards, tmp_path, at_step):
    """Another dtype, an incomplete last line in the log, other settings; but never other data."""
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT))
    run("train_gpt2.py", *SMALL)
    at_step(-1, None)
    with open(tmp_path / "log" / "log.txt", "a") as f:
        f.write("5 tr")
    with open(tmp_path / "log" / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "ki')
    with pytest.raises(SystemExit, match=r"--n_layer=5: the run to resume has 2; leave it out"):
        run("train_gpt2.py", "--resume", "--n_layer=5")
    out = run("train_gpt2.py", "--resume", "--dtype=float16", "--weight_decay=0.5", "--beta2=0.9")
    assert (
        "resuming log at step 5 with weight_decay=0.5 instead of 0.1, beta2=0.9 instead of 0.95, "
        "dtype=float16 instead of float32\n" in out
    )
    assert list(read_log(tmp_path / "log", "train")) == list(range(8))
    state = load_checkpoint(str(tmp_path / "log" / "resume.pt"))
    decayed, other = state["optimizers"][0]["param_groups"]
    assert (decayed["weight_decay"], other["weight_decay"], decayed["betas"]) == (
        0.5,
        0.0,
        (0.9, 0.9),
    )
    assert "nothing to do: the run is at step 8" in run(
        "train_gpt2.py", "--resume", "--max_steps=7"
    )
    path = next(shards.glob("*train_000002.npy"))
    meta = json.loads((shards / "meta.json").read_text())
    np.save(path, np.load(path)[:-5])
    meta["shards"][2]["tokens"] -= 5
    (shards / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(
        SystemExit,
        match=r"shards: not the same shards: the run in log needs those that it has read",
    ):
        run("train_gpt2.py", "--resume", "--max_steps=10")


def test_stopped_while_waiting_for_shards(run, shards, tmp_path, monkeypatch):
    """A folder that fineweb.py does not continue: Ctrl-C saves; --resume continues with more."""
    run("train_gpt2.py", *SMALL)
    meta = json.loads((shards / "meta.json").read_text())
    part = meta | {
        "complete": False,
        "shards": meta["shards"][:3],
    }  # 4,000 tokens: enough for 7 steps
    (shards / "meta.json").write_text(json.dumps(part))
    sleeps = []

    def sleep(seconds):
        sleeps.append(seconds)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(time, "sleep", sleep)
    out = run("train_gpt2.py", *SMALL, "--log_dir=part")
    assert (
        len(sleeps) == 1
        and "waiting for fineweb.py to write the next training shard: there are 2 in " in out
    )
    assert "saved part/model_00007.pt" in out and "resume with: python" in out
    (shards / "meta.json").write_text(json.dumps(meta))
    run("train_gpt2.py", "--resume", "--log_dir=part")
    assert read_log(tmp_path / "part", "train") == read_log(tmp_path / "log", "train")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_stops_the_run(run, shards, tmp_path, at_step, signum):
    """One signal, or several, as schedulers send before SIGKILL: the step is finished and saved."""

    def send():
        for _ in range(3):
            os.kill(os.getpid(), signum)

    at_step(4, send)
    out = run("train_gpt2.py", *SMALL)
    assert "saved log/model_00005.pt\nstopped; resume with: python train_gpt2.py --resume\n" in out


def test_a_second_interrupt_stops_at_once(shards, tmp_path):
    args = [*SMALL, "--max_steps=100000", "--save_every=50", "--eval_every=0"]
    code = "from data.loader import ShardLoader\nimport runpy, sys, time\n"
    code += "ShardLoader.locate = lambda self, n: time.sleep(0 if n < 960 else 5) or (0, 0, 0)\n"
    code += f"sys.argv = {['train_gpt2.py', *args]}\n"
    code += f"runpy.run_path('{ROOT}/train_gpt2.py', run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    while not (tmp_path / "log" / "resume.pt").exists() or 59 not in read_log(
        tmp_path / "log", "train"
    ):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None, "the first waits for step 60, which takes 80 seconds here"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT
    assert load_checkpoint(str(tmp_path / "log" / "resume.pt"))["step"] == 50


def test_stopped_during_evaluation(run, shards, tmp_path, monkeypatch):
    """What was being evaluated is evaluated again, and logged once."""
    run("train_gpt2.py", *SMALL)
    real = evals.val_windows
    for step in (0, 3, 8):
        calls = []

        def stop(*args, at=step // 3 if step < 8 else 3, calls=calls):
            calls.append(1)
            if len(calls) == at + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args)

        monkeypatch.setattr(evals, "val_windows", stop)
        out = run("train_gpt2.py", *SMALL, f"--log_dir=stopped{step}")
        assert f"saved stopped{step}/model_{step:05d}.pt\nstopped; resume with" in out
        monkeypatch.setattr(evals, "val_windows", real)
        run("train_gpt2.py", "--resume", f"--log_dir=stopped{step}")
        assert_same_run(tmp_path / "log", tmp_path / f"stopped{step}")


@pytest.mark.parametrize("step", [3, 8])
def test_killed_during_evaluation(run, shards, tmp_path, monkeypatch, step):
    """A checkpoint is saved before the evaluations of its step, also at the end of the run."""
    run("train_gpt2.py", *SMALL)
    real = evals.val_windows
    calls = []

    def kill(*args):
        calls.append(1)
        if len(calls) == {3: 2, 8: 4}[step]:
            raise ZeroDivisionError
        return real(*args)

    monkeypatch.setattr(evals, "val_windows", kill)
    with pytest.raises(ZeroDivisionError):
        run("train_gpt2.py", *SMALL, "--log_dir=killed")
    monkeypatch.setattr(evals, "val_windows", real)
    assert load_checkpoint(str(tmp_path / "killed" / "resume.pt"))["step"] == step
    gc.collect()  # the lock of the log folder
    run("train_gpt2.py", "--resume", "--log_dir=killed")
    assert_same_run(tmp_path / "log", tmp_path / "killed")


@pytest.mark.parametrize(("nproc", "part"), [(1, "read_windows"), (2, "encode")])
def test_a_signal_ends_an_evaluation_at_once(shards, tmp_path, nproc, part):
    """Validation or HellaSwag: a scheduler may kill the run some seconds after its signal."""
    item = {"ctx": "a", "ctx_a": "a", "ctx_b": "b", "activity_label": "c", "label": 1}
    (tmp_path / "hellaswag").mkdir()
    with open(tmp_path / "hellaswag" / "hellaswag_val.jsonl", "w") as f:
        for _ in range(4):
            f.write(json.dumps({**item, "endings": list("abcd")}) + "\n")
    module = "training.evals" if part == "read_windows" else "hellaswag"
    args = ["train_gpt2.py", *SMALL, "--hellaswag_every=3", "--plot_every=0"]
    code = f"import runpy, sys, time\nimport {module} as module\n"
    code += f"real = module.{part}\n"
    code += "def slow(*args):\n    print('evaluating', flush=True)\n"
    code += "    [time.sleep(0.1) for _ in range(600)]\n    return real(*args)\n"
    code += f"module.{part} = slow\n"
    code += f"sys.argv = {args}\n"
    code += f"runpy.run_path('{ROOT}/train_gpt2.py', run_name='__main__')"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
            env={**environ, "PYTHONPATH": str(ROOT)},
        )
        for environ in environments(nproc)
    ]
    for process in processes:
        while "evaluating" not in process.stdout.readline():
            assert process.poll() is None
    start = time.monotonic()
    for process in processes:
        process.send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert time.monotonic() - start < 10
    assert [process.returncode for process in processes] == [0] * nproc
    assert "stopped; resume with: " in outputs[0]
    assert load_checkpoint(str(tmp_path / "log" / "resume.pt"))["step"] == 0


def test_save_every_minutes(run, shards, tmp_path):
    run("train_gpt2.py", *SMALL, "--save_every=0", "--save_every_minutes=1e-9")
    steps = sorted(int(path.stem[6:]) for path in (tmp_path / "log").glob("model_*.pt"))
    assert steps == list(range(1, 9))


def test_keep_checkpoints(run, shards, tmp_path):
    """The newest two and the best stay, also over a resumption; the best is not the newest here."""
    args = [*SMALL, "--eval_every=1", "--save_every=1", "--keep_checkpoints=2", "--max_steps=30"]
    run("train_gpt2.py", *args, "--max_steps=17")
    run("train_gpt2.py", *args, "--resume", "--max_steps=30", "--max_lr=2", "--min_lr=2")
    losses = read_log(tmp_path / "log", "val")
    del losses[0]  # of no checkpoint
    best = min(losses, key=losses.get)
    assert best < 29
    steps = sorted(int(path.stem[6:]) for path in (tmp_path / "log").glob("model_*.pt"))
    assert steps == [best, 29, 30]


@pytest.fixture
def poison(monkeypatch):
    """poison(first, last): the gradients of updates first .. last become nan or inf in a tensor."""
    clip = torch.nn.utils.clip_grad_norm_

    def patch(first, last):
        calls = []

        def patched(parameters, limit):
            parameters = list(parameters)
            calls.append(1)
            if first <= len(calls) - 1 <= last:
                parameters[len(calls) % 3].grad[0] = (math.nan, math.inf)[len(calls) % 2]
            return clip(parameters, limit)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", patched)

    return patch


def test_bad_steps_are_skipped(run, shards, tmp_path, poison, at_step):
    poison(3, 4)
    out = run("train_gpt2.py", *SMALL, "--max_bad_steps=3")
    assert re.search(
        r"step +3 \| not finite: no update, 1 in a row; the data: epoch 0 toy_train_\d+\.npy tok",
        out,
    )
    assert "step     4 | not finite: no update, 2 in a row" in out
    records = [r for r in read_jsonl(tmp_path / "log" / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in records if "skipped" in r] == [3, 4]
    assert records[3]["grad_norm"] is None and records[3]["loss"] > 0
    assert sum(end - start for r in records[3]["skipped"] for start, end in r["tokens"]) == 512
    assert all(value.isfinite().all() for value in weights(tmp_path / "log").values())
    # two bad steps in a row are remembered over a stop
    poison(3, 4)
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run("train_gpt2.py", *SMALL, "--max_bad_steps=3", "--log_dir=stopped")
    at_step(-1, None)
    poison(-1, -1)
    run("train_gpt2.py", "--resume", "--log_dir=stopped")
    assert_same_run(tmp_path / "log", tmp_path / "stopped")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_too_many_bad_steps_end_the_run(run, shards, tmp_path, poison, dtype):
    poison(4, 9)
    with pytest.raises(SystemExit) as e:
        run("train_gpt2.py", *SMALL, "--max_bad_steps=2", f"--dtype={dtype}")
    pattern = "step 5: 2 steps in a row were not finite, the last on epoch 0 "
    pattern += r"toy_train_\d+\.npy tokens \d+ to \d+"
    assert (
        re.match(pattern, e.value.code)
        and "the last good checkpoint is log/model_00003.pt" in e.value.code
    )
    del e  # its frames hold the lock of the log folder
    gc.collect()
    poison(-1, -1)
    assert "resuming log at step 3" in run("train_gpt2.py", "--resume")
    assert all(value.isfinite().all() for value in weights(tmp_path / "log").values())


def test_an_overflow_of_float16_is_not_bad_data(run, shards, tmp_path, monkeypatch):
    """A GradScaler that begins too high is lowered until it fits: those steps do not count."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda *a, **k: scaler(*a, init_scale=2.0**22, **k)
    )
    out = run("train_gpt2.py", *SMALL, "--dtype=float16", "--max_bad_steps=1")
    scales = [
        float(scale)
        for scale in re.findall(r"float16 overflow: no update, loss scale ([\d.e+]+) from now", out)
    ]
    assert scales and scales == pytest.approx(
        [2.0**21 / 2**i for i in range(len(scales))], rel=1e-4
    )
    assert "not finite" not in out
    records = [r for r in read_jsonl(tmp_path / "log" / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["loss_scale"] for r in records if "loss_scale" in r] == pytest.approx(
        scales, rel=1e-4
    ) and len(records) == 8


@pytest.mark.parametrize("kind", ["plain", "compiled"])
def test_out_of_memory_halves_B(capsys, kind):
    """More than 3 sequences are out of memory: in both modes, or only in the compiled model."""
    import train_gpt2

    tried = []

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, idx, targets):
            eager = torch._dynamo.eval_frame._stance.stance == "force_eager"
            tried.append((len(idx), "eager" if eager else "compiled"))
            if len(idx) > 3 and (kind == "plain" or not eager):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return self.weight.sum()

    batch = {"T": 8, "total_batch_size": 16 * 3 * 8 * 2, "dtype": "float32"}
    model = Small()
    adamw = AdamW(model.parameters())

    def setup(train_model, world_size):
        return train_gpt2.Setup(
            model, train_model, [adamw], None, None, None, "cpu", B=16, world_size=world_size
        )

    found = setup(model, 2)
    fit_memory(found, **batch)
    expected = {"plain": [(16, "eager"), (8, "eager"), (4, "eager"), (2, "eager"), (2, "compiled")]}
    expected["compiled"] = [
        (16, "eager"),
        (16, "compiled"),
        (8, "compiled"),
        (4, "compiled"),
        (2, "compiled"),
    ]
    assert tried == expected[kind] and found.B == 2 and model.weight.grad is None
    assert capsys.readouterr().out.startswith(
        "out of memory with --B=16: halving it; the result stays"
    )

    def broken(idx, targets):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        fit_memory(setup(broken, 1), **batch)


def test_a_process_alone_without_memory_halves_B_for_all(tmp_path):
    """As fit_memory asks: every process is told whether all have had enough."""
    (tmp_path / "two.py").write_text(
        "import os, torch\nfrom training import distributed\n"
        "from training.micro_batch import try_step\n"
        "rank, _, _ = distributed.init_distributed('cpu')\n"
        "model = torch.nn.Linear(1, 1)\n"
        "def work(fails):\n    if fails: raise RuntimeError('MPS backend out of memory')\n"
        "def loop():\n    a = try_step(lambda: work(rank == 1), model)\n"
        "    b = try_step(lambda: work(False), model)\n"
        "    os.write(1, f'{rank} {a} {b}\\n'.encode())\n"
        "with distributed.run_as_distributed_script():\n    loop()\n"
    )
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "two.py",
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        start, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=env
    )
    assert sorted(result.stdout.splitlines()) == ["0 False True", "1 False True"], result.stderr


def test_a_card_that_torch_cannot_use_is_told_of(monkeypatch, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine's card can be used")
    (tmp_path / "nvidia0").write_text("")
    monkeypatch.setattr(device, "NVIDIA_CARDS", f"{tmp_path}/nvidia[0-9]*")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device.pick_device("auto") in ("cpu", "mps")
    line = capsys.readouterr().out
    assert re.match(
        r"warning: running on the CPU, although there is an NVIDIA card: .+; update its driver, or",
        line,
    )
    assert line.count("\n") == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    device.pick_device("auto")
    (tmp_path / "nvidia0").unlink()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    device.pick_device("auto")
    assert capsys.readouterr().out == ""


def test_peak_flops(monkeypatch):
    names = {
        "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA A100-SXM4-40GB": 312,
        "NVIDIA L40S": 362, "NVIDIA L4": 121, "Tesla T4": 65, "AMD Instinct MI300X": 1307.4,
        "NVIDIA GeForce RTX 4090": 165.2, "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "NVIDIA GeForce RTX 4070": None, "NVIDIA RTX A6000": None, "NVIDIA A10G": None,
        "NVIDIA RTX 6000 Ada Generation": None, "NVIDIA Z100": None,
    }  # fmt: skip
    for name, tflops in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found = device.peak_flops("cuda", torch.bfloat16)
        assert found == (name, tflops and tflops * 1e12), name
        assert device.peak_flops("cuda", torch.float32) == (name, None)


def test_no_compiler(spawn, shards, tmp_path, monkeypatch):
    for key in ("CC", "CXX"):
        monkeypatch.setenv(key, "/nonexistent")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    result = spawn("train_gpt2.py", *SMALL, "--compile=True", "--eval_every=0")
    assert result.returncode == 1 and result.stderr.splitlines()[-1].endswith(
        "g++ and python3-dev, or --compile=False"
    )
    assert "Traceback" not in result.stderr


def test_broken_weights_are_never_saved(run, shards, tmp_path):
    with pytest.raises(
        SystemExit,
        match=r"step \d: the weights are no longer finite; nothing saved, there is no ch",
    ):
        run("train_gpt2.py", *SMALL, "--max_lr=1e38", "--save_every=1", "--max_bad_steps=100")
    assert not list((tmp_path / "log").glob("*.pt"))


def test_a_folder_in_use(run, spawn, shards, tmp_path):
    from files import lock_folder

    run("train_gpt2.py", *SMALL)
    before = {path: path.read_bytes() for path in (tmp_path / "log").iterdir()}
    lock = lock_folder(str(tmp_path / "log"))
    for more in ([], ["--resume", "--max_steps=9"]):
        with pytest.raises(SystemExit, match=r"^log/ is in use by another process"):
            run("train_gpt2.py", *SMALL, *more)
    result = spawn("train_gpt2.py", *SMALL, nproc=2)
    assert result.returncode != 0 and result.stderr.count("log/ is in use by another process") == 1
    lock.release()
    assert before == {path: path.read_bytes() for path in (tmp_path / "log").iterdir()}


@pytest.mark.parametrize("where", ["model_00006.pt.tmp", "resume.pt.tmp", "log.txt"])
def test_a_full_disk(run, shards, tmp_path, monkeypatch, where):
    """The run ends with one line; what was saved is whole, and --resume continues from it."""
    run("train_gpt2.py", *SMALL)
    real, full = os.fsync, []

    def fsync(fd):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        full.append(name == where)
        if sum(full) == (1 if name.startswith("model") else 2):
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(
        SystemExit, match=r"^full: No space left on device; earlier checkpoints are complete"
    ):
        run("train_gpt2.py", *SMALL, "--log_dir=full")
    monkeypatch.setattr(os, "fsync", real)
    assert not list((tmp_path / "full").glob("*.tmp"))
    run("train_gpt2.py", "--resume", "--log_dir=full")
    assert_same_run(tmp_path / "log", tmp_path / "full")


def test_a_state_of_another_context_and_errors_that_are_not_its_fault(monkeypatch):
    models = [
        GPT(GPTConfig(block_size=n, vocab_size=257, n_layer=1, n_head=2, n_embd=16))
        for n in (8, 16)
    ]
    optimizers = [AdamW.configure(model, 0.1, 1e-3, (0.9, 0.95)) for model in models]
    models[0](torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)).backward()
    optimizers[0][0].step()
    _, states = checkpoint.full_state_dicts(models[0], optimizers[0])
    saved = {"settings": {}, "optimizers": states, "scaler": {}}
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(UserError, match=r"log/resume\.pt: does not belong to the model next to it"):
        checkpoint.restore("log", models[1], optimizers[1], scaler, saved)
    for error in (torch.OutOfMemoryError("out of memory"), torch.distributed.DistError("lost")):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr(checkpoint, "restore_optimizer", fail)
        with pytest.raises(type(error)):
            checkpoint.restore("log", models[0], optimizers[0], scaler, saved)


def test_files_of_other_programs_and_of_former_versions(run, shards, tmp_path):
    torch.save({"data": None, "optimizers": {"a": 1}}, tmp_path / "theirs.pt")
    with pytest.raises(UserError, match=r"theirs\.pt: not a complete checkpoint file"):
        load_checkpoint(str(tmp_path / "theirs.pt"))
    run("train_gpt2.py", *SMALL)
    out = run("train_gpt2.py", "--resume", "--preset=auto", "--max_steps=9")
    assert "resuming log at step 8 with max_steps=9 instead of 8\n" in out
    # a name that this trainer would not choose
    (tmp_path / "log" / "model_00009.pt").rename(tmp_path / "log" / "model_9.pt")
    assert find_checkpoint("latest", str(tmp_path / "log")) == str(tmp_path / "log" / "model_9.pt")
    (tmp_path / "log" / "model_9.pt").rename(tmp_path / "log" / "model_00009.pt")
    saved = torch.load(tmp_path / "log" / "resume.pt")
    saved["settings"]["optimizer"] = "muon1"
    torch.save(saved, tmp_path / "log" / "resume.pt")
    with pytest.raises(SystemExit, match=r"--optimizer=muon1: choose adamw or muon"):
        run("train_gpt2.py", "--resume", "--max_steps=10")


class Malice:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda log: cut(log / "resume.pt"), r"log/resume\.pt: not a complete checkpoint file"),
        (
            lambda log: cut(log / "model_00008.pt"),
            r"log/model_00008\.pt: not a complete checkpoint file",
        ),
        (
            lambda log: (log / "model_00008.pt").unlink(),
            r"log/resume\.pt: belongs to log/model_00008\.pt, which is missing",
        ),
        (
            lambda log: torch.save({"step": 8}, log / "resume.pt"),
            r"log/resume\.pt: not written by this trainer: it has no compute_dtype, d",
        ),
        (
            lambda log: torch.save(Malice(), log / "resume.pt"),
            r"log/resume\.pt: refused, it holds something other",
        ),
        (
            lambda log: torch.save({"model": Malice()}, log / "model_00008.pt"),
            r"log/model_00008\.pt: refused, it holds something other",
        ),
        (
            lambda log: shutil.copy(log.parent / "other" / "resume.pt", log),
            r"log/resume\.pt: does not belong to the model next to it",
        ),
    ],
)
def test_damaged_checkpoints(run, shards, tmp_path, damage, message):
    run("train_gpt2.py", *SMALL)
    run("train_gpt2.py", *SMALL, "--log_dir=other", "--n_embd=64", "--eval_every=0")
    damage(tmp_path / "log")
    before = {path: path.read_bytes() for path in (tmp_path / "log").iterdir()}
    with pytest.raises(SystemExit, match=message) as e:
        run("train_gpt2.py", "--resume", "--max_steps=9")
    assert "\n" not in e.value.code
    assert before == {path: path.read_bytes() for path in (tmp_path / "log").iterdir()}
    assert not (tmp_path / "pwned").exists()


def test_what_a_resumed_run_may_change(run, shards, tmp_path, monkeypatch, at_step):
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    run("train_gpt2.py", *SMALL, "--dtype=auto")
    at_step(-1, None)
    # the file's own default changed: refused, unless the command line says which
    script = (ROOT / "train_gpt2.py").read_text()
    assert "weight_decay = 0.1 " in script
    (tmp_path / "edited").mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path / "edited")
    edited = tmp_path / "edited" / "train_gpt2.py"
    edited.write_text(script.replace("weight_decay = 0.1 ", "weight_decay = 0.3 "))
    with pytest.raises(SystemExit) as e:
        run(edited, "--resume")
    assert e.value.code == (
        "the defaults in train_gpt2.py have changed: pass --weight_decay=0.3, "
        "or --weight_decay=0.1 to keep the run's"
    )
    with pytest.raises(
        SystemExit, match=r"--preset=gpt2: the run to resume has tiny; leave it out"
    ):
        run("train_gpt2.py", "--resume", "--preset=gpt2")
    # another machine, whose dtype=auto is another
    other = (
        "float32"
        if "bfloat16" in load_checkpoint(str(tmp_path / "log" / "resume.pt"))["compute_dtype"]
        else "bfloat16"
    )
    monkeypatch.setattr(
        "device.pick_dtype", lambda dtype, where, real=device.pick_dtype: real(other, where)
    )
    with pytest.raises(
        SystemExit,
        match=rf"computes in b?float\d\d, --dtype=auto is {other} here: choose with --dtype=",
    ):
        run("train_gpt2.py", "--resume")
    out = run(edited, "--resume", "--weight_decay=0.1", f"--dtype={other}")
    assert f"resuming log at step 4 with dtype={other} instead of auto\n" in out


def test_a_run_of_an_older_version(run, shards, tmp_path, at_step):
    """What its resume.pt lacks has its default: a counter, and a setting that there was not."""
    run("train_gpt2.py", *SMALL)
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT))
    run("train_gpt2.py", *SMALL, "--log_dir=older")
    at_step(-1, None)
    path = tmp_path / "older" / "resume.pt"
    saved = load_checkpoint(str(path))
    del saved["bad_steps"], saved["exposed_tokens"]
    for settings in (saved["settings"], saved["defaults"]):
        del settings["print_every"], settings["max_bad_steps"]
    torch.save(saved, path)
    out = run("train_gpt2.py", "--resume", "--log_dir=older")
    assert re.findall(r"step +(\d+) \| loss", out) == ["7"], (
        "every 25 steps and the last: the preset's, not the file's"
    )
    assert (tmp_path / "older" / "log.txt").read_text() == (
        tmp_path / "log" / "log.txt"
    ).read_text()


def test_preset_auto_is_what_it_says(run, shards, tmp_path):
    run("train_gpt2.py", *SMALL[1:], "--preset=auto", "--optimizer=adamw", "--sample_every=0",
        "--eval_every=0", "--hellaswag_every=0", "--ewok_every=0")  # fmt: skip
    assert load_checkpoint(str(tmp_path / "log" / "model_00008.pt"))["settings"]["preset"] == "gpt2"


def test_any_setting_is_kept(run, shards, tmp_path, at_step):
    """Not only the model's: what the command line said holds after --resume; changes are named."""
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT))
    run("train_gpt2.py", *SMALL, "--eval_every=2")
    at_step(-1, None)
    out = run("train_gpt2.py", "--resume", "--save_every=2")
    assert "resuming log at step 5 with save_every=2 instead of 3\n" in out
    assert list(read_log(tmp_path / "log", "val")) == [0, 2, 4, 6, 8]


def test_another_batch_size_neither_repeats_nor_skips(run, shards, tmp_path, at_step):
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT))
    run("train_gpt2.py", *SMALL, "--exposure_every=1")
    at_step(-1, None)
    run("train_gpt2.py", "--resume", "--total_batch_size=256", "--max_steps=11")
    records = read_jsonl(tmp_path / "log" / "exposure.jsonl")
    seen = {}
    for r in records:
        for start, end in r["tokens"]:
            for token in range(start, end):
                seen[r["shard"], token] = seen.get((r["shard"], token), 0) + 1
    assert set(seen.values()) == {1} and len(seen) == 5 * 512 + 6 * 256
    assert {r["epoch"] for r in records} == {0}


def test_resumed_by_other_numbers_of_processes(run, spawn, shards, tmp_path):
    args = [
        *SMALL,
        "--max_steps=12",
        "--exposure_every=1",
        "--min_lr=1e-2",
    ]  # a constant rate: no schedule
    run("train_gpt2.py", *args)
    for stop, nproc in ((3, 1), (6, 2), (9, 4), (12, 1)):
        now = [*args, f"--max_steps={stop}", "--log_dir=chain", "--resume"]
        if nproc == 1:
            run("train_gpt2.py", *now)
        else:
            result = spawn("train_gpt2.py", *now, nproc=nproc)
            assert result.returncode == 0, result.stderr
    for kind in ("train", "val"):
        assert read_log(tmp_path / "chain", kind) == pytest.approx(
            read_log(tmp_path / "log", kind), abs=2e-4
        )
    exposure = [(tmp_path / name / "exposure.jsonl").read_text() for name in ("log", "chain")]
    assert exposure[0] == exposure[1], "the very same tokens a step"


def test_the_writer_is_gone(run, shards, tmp_path, monkeypatch):
    meta = json.loads((shards / "meta.json").read_text())
    (shards / "meta.json").write_text(
        json.dumps(meta | {"complete": False, "shards": meta["shards"][:3]})
    )
    clock = [0.0]
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + 60))
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with pytest.raises(
        SystemExit, match=r"shards: no sign of fineweb\.py for 5 minutes; the run is saved: start"
    ) as e:
        run("train_gpt2.py", *SMALL, "--data_timeout=5")
    assert e.value.code.endswith("then python train_gpt2.py --resume")
    del e  # its frames hold the lock of the log folder
    gc.collect()
    assert 300 <= clock[0] <= 420 and (tmp_path / "log" / "model_00007.pt").exists()
    (shards / "meta.json").write_text(json.dumps(meta))
    run("train_gpt2.py", "--resume")
    assert list(read_log(tmp_path / "log", "train")) == list(range(8))


def test_resume_starts_afresh_where_there_is_nothing(run, shards, tmp_path):
    run("train_gpt2.py", *SMALL, "--resume")
    assert list(read_log(tmp_path / "log", "train")) == list(range(8))
    run("train_gpt2.py", "--resume", "--max_steps=10")
    assert list(read_log(tmp_path / "log", "train")) == list(range(10))


def test_a_fresh_start_loses_nothing(run, shards, tmp_path):
    run("train_gpt2.py", *SMALL)
    first = (tmp_path / "log" / "log.txt").read_text()
    out = run("train_gpt2.py", *SMALL, "--max_steps=2", "--seed=2")
    assert "log/ held an earlier run: moved to log/old_1/" in out
    assert (tmp_path / "log" / "old_1" / "log.txt").read_text() == first
    assert (tmp_path / "log" / "old_1" / "model_00008.pt").exists()
    assert [p.name for p in (tmp_path / "log").glob("model_*")] == ["model_00002.pt"]


def test_init_from(run, shards, tmp_path):
    run("train_gpt2.py", *SMALL)
    last = read_log(tmp_path / "log", "val")[8]
    tuning = [
        "--init_from=log/model_00008.pt",
        "--log_dir=tuned",
        "--max_lr=1e-3",
        "--sample_every=8",
    ]
    run("train_gpt2.py", *SMALL, *tuning)
    assert read_log(tmp_path / "tuned", "val")[0] == last
    records = read_jsonl(tmp_path / "tuned" / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "sample"] == [0, 8]
    assert load_checkpoint(str(tmp_path / "tuned" / "model_00008.pt"))["config"]["n_layer"] == 2
    with pytest.raises(
        SystemExit, match=r"--T=64 is more than log/model_00008\.pt's context: use --T=32"
    ):
        run("train_gpt2.py", *SMALL, "--init_from=log/model_00008.pt", "--log_dir=tuned", "--T=64")
    texts = TEXT.splitlines(keepends=True)
    mine = {"name": "mine", "pat_str": r"\S+|\s+", "special_tokens": {"<|endoftext|>": 256}}
    mine["tokens"] = json.loads(
        json.dumps([__import__("base64").b64encode(bytes([255 - i])).decode() for i in range(256)])
    )
    write_shards(texts, load_tokenizer(mine), str(tmp_path / "mine"), "toy", dataset="toy")
    with pytest.raises(
        SystemExit,
        match=r"has the tokenizer bytes \(257 tokens\), mine has bpe-257-\w{8} \(257 tokens\)",
    ):
        run("train_gpt2.py", *SMALL, "--init_from=log/model_00008.pt", "--data_dir=mine")


def test_exposure(run, shards, tmp_path):
    run("train_gpt2.py", *SMALL, "--exposure_every=5")
    records = read_jsonl(tmp_path / "log" / "exposure.jsonl")
    assert {r["step"] for r in records} == {5, 8}
    assert sum(end - start for r in records for start, end in r["tokens"]) == 8 * 512
    meta = json.loads((shards / "meta.json").read_text())
    assert {r["shard"] for r in records} <= {
        s["file"] for s in meta["shards"] if s["split"] == "train"
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_learns_the_same(run, shards, tmp_path, dtype):
    run("train_gpt2.py", *SMALL)
    run("train_gpt2.py", *SMALL, f"--dtype={dtype}", "--log_dir=low")
    low, full = read_log(tmp_path / "low", "train"), read_log(tmp_path / "log", "train")
    assert low == pytest.approx(full, abs=0.05) and low != full


def test_compiled_equals_eager(run, shards, tmp_path):
    args = [*SMALL, "--n_layer=1", "--max_steps=4"]
    run("train_gpt2.py", *args)
    out = run("train_gpt2.py", *args, "--compile=True", "--log_dir=compiled")
    assert "compile on" in out
    for kind in ("train", "val"):
        assert read_log(tmp_path / "compiled", kind) == pytest.approx(
            read_log(tmp_path / "log", kind), abs=1e-3
        )


# -- the demo -----------------------------------------------------------------------


def test_demo_on_input_txt(spawn, tmp_path):
    """As a newcomer types it, in a process of its own, but for the number of steps."""
    (tmp_path / "input.txt").write_text(TEXT * 3)
    result = spawn("train_gpt2.py", "--max_steps=20")
    assert result.returncode == 0, result.stderr
    assert "there are no shards in edu_fineweb10B/ (python fineweb.py makes them)" in result.stdout
    train = read_log(tmp_path / "log", "train")
    assert len(train) == 20 and train[19] < train[0] - 1
    result = spawn("sample.py", "--max_new_tokens=50")
    assert result.returncode == 0 and result.stdout.startswith("\n") and len(result.stdout) > 2
    result = spawn("train_gpt2.py", "--resume", "--max_steps=21")
    assert result.returncode == 0 and list(read_log(tmp_path / "log", "train")) == list(range(21))


def test_demo_without_a_network(run, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise requests.ConnectionError

    monkeypatch.setattr(fineweb, "download", offline)
    run("train_gpt2.py", "--max_steps=2", "--B=2", "--total_batch_size=1024", "--val_tokens=1000")
    meta = json.loads((tmp_path / "demo_data" / "meta.json").read_text())
    assert meta["dataset"] == "the source of Python's standard library"
    assert sum(shard["tokens"] for shard in meta["shards"]) == 2_000_000
    tokens = np.load(tmp_path / "demo_data" / "demo_train_000001.npy")
    assert "import" in load_tokenizer("bytes").decode(tokens[:20_000].tolist())


def test_demo_downloads_tiny_shakespeare(run, tmp_path, monkeypatch):
    def download(url, path, timeout, tries):
        assert url.endswith("tinyshakespeare/input.txt") and (timeout, tries) == (5, 1)
        (tmp_path / path).write_text(TEXT)

    monkeypatch.setattr(fineweb, "download", download)
    run("train_gpt2.py", "--max_steps=1", "--B=2", "--total_batch_size=1024")
    assert (tmp_path / "input.txt").read_text() == TEXT


# -- mistakes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max_step=5"], r"there is no setting 'max_step'; did you mean max_steps\?"),
        (["--max_steps=soon"], r"--max_steps=soon: expected a whole number"),
        (["--preset=huge"], r"--preset=huge: choose auto, tiny, modern, gpt2, "),
        (
            ["--data_dir=gone"],
            r"no shards in /.*/gone/: make them with python fineweb\.py --out_dir=gone",
        ),
        (["--preset=gpt2"], r"no shards in /.*/edu_fineweb10B/: make them with python fineweb\.py"),
        ([*SMALL, "--B=3"], r"not a multiple of B x T x processes = 3 x 32 x 1 = 96; try --B=2"),
        (
            [*SMALL, "--total_batch_size=500"],
            r"--total_batch_size=500 is not a multiple of .*--total_batch_size=512",
        ),
        (
            [*SMALL, "--T=5000", "--total_batch_size=20000"],
            r"no training shard has the 5001 tokens",
        ),
        ([*SMALL, "--n_head=3"], r"n_embd=32 must be a multiple of n_head=3"),
        ([*SMALL, "--compile=perhaps"], r"--compile=perhaps: choose auto, true or false"),
        ([*SMALL, "--dtype=int4"], r"--dtype=int4: choose auto, "),
        ([*SMALL, "--device=cuda:99"], r"--device=cuda:99: not on this machine"),
        ([*SMALL, "--init_from=gone.pt"], r"gone\.pt: no such checkpoint"),
        ([*SMALL, "--eval_only=True"], r"no checkpoint in log/"),
        ([*SMALL, "--B=0"], r"--B=0: must be at least 1"),
        ([*SMALL, "--seed=-1"], r"--seed=-1: must be at least 0"),
        ([*SMALL, "--min_lr=-1"], r"--min_lr=-1\.0: must be at least 0"),
        (
            [*SMALL, "--max_lr=1e-4"],
            r"--min_lr=0\.001 is more than --max_lr=0\.0001; use --min_lr=1e-05",
        ),
        ([*SMALL, "--beta2=1"], r"--beta1=0\.9 --beta2=1\.0: must be less than 1"),
        (
            [*SMALL, "--log_dir=shards/meta.json"],
            r"--log_dir=shards/meta\.json: cannot write there",
        ),
        (
            ["--data_dir=shards", "--eval_only=True", "--ckpt=gone.pt"],
            r"gone\.pt: no such checkpoint",
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(run, shards, tmp_path, args, message):
    with pytest.raises(SystemExit, match=message) as e:
        run("train_gpt2.py", *args)
    assert "\n" not in e.value.code
    assert not (tmp_path / "log").exists()


def test_a_mistake_is_one_line_on_stderr(spawn):
    result = spawn("train_gpt2.py", "--max_step=5")
    assert result.returncode == 1 and result.stdout == ""
    assert (
        result.stderr == "--max_step=5: there is no setting 'max_step'; did you mean max_steps?\n"
    )
