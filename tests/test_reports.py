"""Situations from users' bug reports: races, file systems, launchers, names of other projects."""

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
import threading
import time

from conftest import ROOT, TEXT, command, read_log
from files import acquire_lock, atomic_write, is_locked, lock_folder
from model import load_model
from script import UserError
from test_train import SMALL

import pytest

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 12345\n"
ITEM = {
    "ctx": "A man sits.", "ctx_a": "A man sits.", "ctx_b": "", "activity_label": "Sitting",
    "endings": ["He rises.", "It flies.", "She was.", "Two of."], "label": 0,
}  # fmt: skip


# -- started together ---------------------------------------------------------------
def test_downloads_started_together(tmp_path):
    """One downloads, the others wait for it; each finds the whole file."""
    import http.server

    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            time.sleep(0.3)
            self.send_response(200)
            self.send_header("Content-Length", "10000")
            self.end_headers()
            self.wfile.write(b"x" * 10000)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/a"
    code = f"from files import download; download({url!r}, 'a.txt'); print(open('a.txt').read(9))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    together = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(4)
    ]  # fmt: skip
    assert [process.communicate()[0] for process in together] == ["xxxxxxxxx\n"] * 4
    assert requests == ["/a"]
    server.shutdown()


def test_demos_started_together(tmp_path):
    """They share demo_data/: one makes it, and none takes it away from another."""
    (tmp_path / "input.txt").write_text(TEXT)
    args = ["--max_steps=2", "--n_layer=1", "--n_embd=16", "--n_head=1", "--sample_every=0"]
    processes = [
        subprocess.Popen(
            command("train_gpt2.py", *args, "--val_tokens=500", f"--log_dir=log{i}"),
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(3)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    logs = [read_log(tmp_path / f"log{i}", "train") for i in range(3)]
    assert logs[0] == logs[1] == logs[2]


def test_a_demo_whose_text_has_changed(run, tmp_path):
    args = ["--max_steps=1", "--n_layer=1", "--n_embd=16", "--n_head=1", "--sample_every=0"]
    args += ["--eval_every=0"]
    (tmp_path / "input.txt").write_text(TEXT)
    run("train_gpt2.py", *args)
    before = (tmp_path / "demo_data" / "meta.json").stat().st_mtime_ns
    run("train_gpt2.py", *args)
    assert (tmp_path / "demo_data" / "meta.json").stat().st_mtime_ns == before
    (tmp_path / "input.txt").write_text(TEXT[:5000])
    os.utime(tmp_path / "input.txt", ns=(before + 10**9, before + 10**9))
    run("train_gpt2.py", *args)
    meta = json.loads((tmp_path / "demo_data" / "meta.json").read_text())
    assert sum(shard["bytes"] for shard in meta["shards"]) == 5000


# -- file systems -------------------------------------------------------------------
@pytest.mark.parametrize("code", ["ENOLCK", "EOPNOTSUPP", "EINVAL", "ENOSYS"])
def test_file_systems_without_locks(tmp_path, monkeypatch, capsys, code):
    """NFS and Lustre: a warning, and everything runs."""

    def flock(fd, operation):
        raise OSError(getattr(errno, code), code)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = lock_folder(str(tmp_path))
    acquire_lock(str(tmp_path / "x.lock"), timeout=-1).release()
    assert not is_locked(str(tmp_path)) or code == "ENOSYS"  # filelock falls back to marker files
    lock.release()


def test_a_lock_is_one_only_while_it_is_held(tmp_path):
    lock = lock_folder(str(tmp_path))
    assert is_locked(str(tmp_path))
    with pytest.raises(UserError, match="in use by another process"):
        lock_folder(str(tmp_path))
    lock.release()
    assert (tmp_path / ".lock").exists()
    assert not is_locked(str(tmp_path))


@pytest.mark.parametrize("code", ["ENOTCONN", "ESTALE"])
def test_a_log_folder_whose_drive_is_gone(run, shards, monkeypatch, code):
    def broken(path, write):
        if path.endswith("model_00003.pt"):
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), path)
        atomic_write(path, write)

    monkeypatch.setattr("weights.atomic_write", broken)
    with pytest.raises(SystemExit, match=r"model_00003\.pt: .*; earlier checkpoints are complete"):
        run("train_gpt2.py", *SMALL)


def test_files_that_may_not_be_large(run, shards, tmp_path):
    """FAT32 or ulimit -f: one line from the trainer and from each export."""
    run("train_gpt2.py", *SMALL)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        for command_line in (
            ("train_gpt2.py", *SMALL, "--log_dir=other"),
            ("export.py", "--format=pt"),
            ("export.py",),
        ):
            with pytest.raises(SystemExit, match="File too large"):
                run(*command_line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("other/*.tmp"))


# -- pointers, paths and folders ----------------------------------------------------
def test_git_lfs_pointers_of_models(run, shards, tmp_path):
    (tmp_path / "m.pt").write_text(LFS)
    with pytest.raises(UserError, match=r"m\.pt: is a Git LFS pointer.*run git lfs pull"):
        load_model(str(tmp_path / "m.pt"))
    run("train_gpt2.py", *SMALL, "--max_steps=2")
    run("export.py")
    (tmp_path / "hf_model" / "model.safetensors").write_text(LFS)
    with pytest.raises(UserError, match=r"model\.safetensors: is a Git LFS pointer"):
        load_model(str(tmp_path / "hf_model"))


def test_a_log_folder_as_ckpt(run, shards, tmp_path):
    """It means the folder's latest model, in every script that takes --ckpt=."""
    run("train_gpt2.py", *SMALL, "--log_dir=runs/a")
    out = run("sample.py", "--ckpt=runs/a", "--max_new_tokens=5", "--seed=3")
    assert out == run("sample.py", "--log_dir=runs/a", "--max_new_tokens=5", "--seed=3")
    run("export.py", "--ckpt=runs/a", "--format=pt")
    run("train_gpt2.py", *SMALL, "--init_from=runs/a", "--max_steps=2")


def test_resuming_from_another_folder(run, shards, tmp_path, monkeypatch):
    """Where the run's relative --data_dir= does not lead to its shards."""
    run("train_gpt2.py", *SMALL)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resume = ("train_gpt2.py", "--resume", f"--log_dir={tmp_path}/log")
    with pytest.raises(SystemExit, match=r"--data_dir=shards, which is not in .*/elsewhere: resu"):
        run(*resume)
    run(*resume, f"--data_dir={shards}", "--max_steps=9")


def test_a_csv_quotation_without_an_end(tmp_path):
    from data.documents import Documents

    (tmp_path / "a.csv").write_text('text\none\ntwo\n"three\nfour\n')
    with pytest.raises(UserError, match=r"a\.csv: ValueError: row 3: .*: its quotation has no end"):
        list(Documents(str(tmp_path / "a.csv")))


# -- launchers and other projects' names --------------------------------------------
def test_more_processes_than_items(run, spawn, shards, tmp_path, monkeypatch):
    """And EWOK_SRC names a .jsonl file."""
    (tmp_path / "hellaswag").mkdir()
    (tmp_path / "hellaswag" / "hellaswag_val.jsonl").write_text(json.dumps(ITEM) + "\n")
    ewok = {"Context1": "a", "Context2": "b", "Target1": "c", "Target2": "d", "Domain": "x"}
    (tmp_path / "items.jsonl").write_text(json.dumps(ewok) + "\n")
    evals = ["--hellaswag_every=4", "--ewok_every=4"]
    monkeypatch.setenv("EWOK_SRC", "items.jsonl")
    out = spawn("train_gpt2.py", *SMALL, *evals, nproc=2)
    assert out.returncode == 0, out.stderr
    run("train_gpt2.py", *SMALL, *evals, "--log_dir=alone")
    for kind in ("hella", "ewok"):
        logs = [read_log(tmp_path / name, kind) for name in ("log", "alone")]
        assert logs[0] == logs[1]
        assert logs[0].keys() == {0, 4, 8}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--epochs=3"], r"--epochs=3: give the length in steps, as --max_steps="),
        (["--dropout=0.1"], r"--dropout=0\.1: there is none"),
        (["--learning-rate=1e-3"], r"--learning-rate=1e-3: that is --max_lr= here"),
        (["--wandb_project=x"], r"that is --wandb= here"),
        (["--init_from=resume"], r"--init_from=resume: --resume continues the run in log_dir"),
        (["--init_from=scratch"], r"without --init_from= the weights are fresh"),
    ],
)
def test_names_of_other_projects(run, args, message):
    with pytest.raises(SystemExit, match=message):
        run("train_gpt2.py", *args)


def test_local_rank_on_the_command_line(run, shards, tmp_path):
    """torch.distributed.launch and DeepSpeed pass it; hyphens are as good as underscores."""
    run("train_gpt2.py", "--local-rank=0", *SMALL, "--max-steps=2")
    run("train_gpt2.py", *SMALL, "--max_steps=3", "--local_rank", "0", "--log-dir=b")
    assert len(read_log(tmp_path / "b", "train")) == 3


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_mpirun_without_torchrun(run, shards, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    with pytest.raises(SystemExit, match=rf"{name}=2: .*; start them with torchrun"):
        run("train_gpt2.py", *SMALL)
    monkeypatch.setenv(name, "1")
    run("train_gpt2.py", *SMALL, "--max_steps=2")


def test_a_port_in_use(spawn, shards):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = str(s.getsockname()[1])
        env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        out = spawn("train_gpt2.py", *SMALL, environs=[os.environ | env | {"MASTER_PORT": port}])
    assert out.returncode == 1
    assert f"port {port} is in use: run torchrun with --standalone" in out.stderr


def test_lines_reach_a_pipe_at_once(shards, tmp_path):
    """As with nohup, sbatch and docker: PYTHONUNBUFFERED, which hides this, is not set."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        command("train_gpt2.py", *SMALL, "--max_steps=100000", "--print_every=1"),
        cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    seen = ""
    while "step     9" not in seen:
        seen = process.stdout.readline()
        assert seen
    logged = max(read_log(tmp_path / "log", "train"))
    process.kill()
    assert logged < 200  # 8 kB of buffer would hold over a hundred lines
    process.communicate()
