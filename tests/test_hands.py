"""Runs under real hands: pipes, short and long runs, copies, terminals, launchers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

from conftest import TEXT, command, read_jsonl, read_log
from model import GPT, GPTConfig, load_model
from script import UserError, num_cpus
from test_train import SMALL, assert_same_run
from training.schedule import describe_schedule, get_lr
from weights import load_checkpoint

import numpy as np
import pytest
import torch

LONG = [arg for arg in SMALL if not arg.startswith(("--max_steps", "--save_every"))] + [
    "--max_steps=100000"
]


def wait_for(path, text, seconds=60):
    end = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end, f"no {text!r} in {path}"
        time.sleep(0.05)


def shell(line, cwd, **how):
    """A command line of a shell, in a process group of its own."""
    return subprocess.Popen(["bash", "-c", line], cwd=cwd, start_new_session=True, text=True, **how)


def quoted(*args):
    return " ".join(f"'{arg}'" for arg in args)


# -- terminals and pipes --------------------------------------------------------------
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_pipe_still_saves(shards, tmp_path, signum):
    """`train_gpt2.py | tee run.log`, then Ctrl-C: tee ends first, and then printing fails."""
    run = shell(f"{quoted(*command('train_gpt2.py', *LONG))} | tee run.log", tmp_path)
    wait_for(tmp_path / "log" / "log.txt", "\n5 train")
    os.killpg(run.pid, signum)
    run.wait(60)
    wait_for(tmp_path / "log" / "log.txt", "")
    end = time.monotonic() + 30
    while not (tmp_path / "log" / "resume.pt").exists():
        assert time.monotonic() < end, "nothing was saved"
        time.sleep(0.1)
    time.sleep(0.5)
    saved = load_checkpoint(str(tmp_path / "log" / "resume.pt"))["step"]
    assert saved == max(read_log(tmp_path / "log", "train")) + 1, "no step was lost"


def test_a_reader_that_leaves_does_not_end_the_run(shards, tmp_path):
    line = f"set -o pipefail; {quoted(*command('train_gpt2.py', *SMALL))} 2>&1 | head -n 2"
    assert shell(line, tmp_path, stdout=subprocess.PIPE).wait(60) == 0
    assert (
        list(read_log(tmp_path / "log", "train")) == list(range(8))
        and (tmp_path / "log" / "model_00008.pt").exists()
    )


def test_head_ends_other_scripts_without_a_word(run, shards, tmp_path):
    run("train_gpt2.py", *SMALL)
    for args in (["sample.py", "--max_new_tokens=60"], ["train_gpt2.py", "--help"]):
        line = f"set -o pipefail; {quoted(*command(*args))} | head -c 1"
        result = shell(line, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        _, err = result.communicate(timeout=60)
        assert result.returncode == 0 and "Traceback" not in err and "Broken" not in err, err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_is_not_utf8(run, shards, tmp_path, encoding):
    run("train_gpt2.py", *SMALL)
    line, env = (
        command("sample.py", "--prompt=Łódź 日本", "--max_new_tokens=40"),
        {"PYTHONIOENCODING": encoding},
    )
    result = subprocess.run(
        line, cwd=tmp_path, capture_output=True, env=os.environ | env, timeout=60
    )
    assert result.returncode == 0 and result.stdout.startswith(
        "Łódź ??".encode(encoding, "replace")
    ), result.stderr


def test_an_argument_that_is_not_utf8(tmp_path):
    bad = subprocess.run(
        [*command("sample.py"), b"--prompt=\xff\xfe"], cwd=tmp_path, capture_output=True, timeout=60
    )
    assert bad.returncode == 1 and bad.stderr.splitlines()[-1] == b"--prompt: is not UTF-8"


# -- schedules ----------------------------------------------------------------------
def settings(**changes):
    return {
        "schedule": "cosine", "max_steps": 19073, "warmup_steps": 715, "cooldown_steps": 1900,
        "max_lr": 6e-4, "min_lr": 6e-5,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([], "19,073 steps, cosine: warmup 715, stable 0, decay 18,358; max_lr 0.0006"),
        (["--max_steps=200"], "200 steps, cosine: warmup 8, stable 0, decay 192; max_lr 0.0006"),
        (
            ["--max_steps=57219", "--n_embd=192"],
            "57,219 steps, cosine: warmup 2,145, stable 0, decay 55,074; max_lr 0.0006",
        ),
        (
            ["--max_steps=1000", "--preset=modern"],
            "1,000 steps, wsd: warmup 3, stable 397, decay 600; max_lr 0.0036, weight_decay 0.2",
        ),
        (
            ["--preset=modern"],
            "19,073 steps, wsd: warmup 40, stable 7,589, decay 11,444; "
            "max_lr 0.0036, weight_decay 0.04",
        ),
        (
            ["--preset=modern", "--max_steps=10000", "--n_embd=192"],
            "10,000 steps, wsd: warmup 21, stable 3,979, decay 6,000; "
            "max_lr 0.0072, weight_decay 0.0763",
        ),
        (
            ["--preset=modern", "--optimizer=adamw", "--n_embd=192"],
            "19,073 steps, wsd: warmup 40, stable 7,589, decay 11,444; max_lr 0.0036",
        ),
        (
            ["--max_steps=1000", "--warmup_steps=5"],
            "1,000 steps, cosine: warmup 5, stable 0, decay 995; max_lr 0.0006",
        ),
        (
            ["--max_steps=1", "--preset=modern", "--n_embd=192", "--max_lr=5e-3"],
            "1 steps, wsd: warmup 1, stable 0, decay 0; max_lr 0.005, weight_decay 0.2",
        ),
    ],
)
def test_what_is_not_given_keeps_its_share_of_the_run(monkeypatch, args, line):
    import configurator
    import train_gpt2

    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", "--data_dir=x", *args])
    module = dict(vars(train_gpt2))
    configurator.configure(module, train_gpt2.initial_settings)
    assert describe_schedule(module) == line
    rates = [get_lr(module, step) for step in range(module["max_steps"])]
    assert max(rates) == pytest.approx(module["max_lr"]) and (
        len(rates) == 1 or rates[-1] < 0.2 * module["max_lr"]
    )


def test_what_is_given_and_does_not_fit_is_one_line(run, shards):
    with pytest.raises(
        SystemExit, match=r"--warmup_steps=9: more than --max_steps=8; use --warmup_steps=0$"
    ):
        run("train_gpt2.py", *SMALL, "--warmup_steps=9")
    why = "--warmup_steps=2 --cooldown_steps=7: more than --max_steps=8"
    why += "; use --warmup_steps=0 --cooldown_steps=0$"
    with pytest.raises(SystemExit, match=why):
        run("train_gpt2.py", *SMALL, "--schedule=wsd", "--cooldown_steps=7")


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_run_that_is_made_longer_warms_up_again(run, shards, tmp_path, schedule):
    """No jump: from the rate it ended at, within warmup_steps, to what the longer schedule has."""
    args = [
        *SMALL,
        f"--schedule={schedule}",
        "--warmup_steps=4",
        "--cooldown_steps=3",
        "--max_steps=16",
    ]
    run("train_gpt2.py", *args)
    ended = max(read_log(tmp_path / "log", "train")) + 1
    assert ended == 16
    out = run("train_gpt2.py", "--resume", "--max_steps=40")
    assert "extended: rises again from" in out and f"at step {ended}\n" in out
    rates = [
        r["lr"] for r in read_jsonl(tmp_path / "log" / "metrics.jsonl") if r["kind"] == "train"
    ]
    highest = max(rates[:ended])
    rises = [b - a for a, b in zip(rates[ended - 1 :], rates[ended:], strict=False)]
    assert len(rates) > ended + 8 and 0 < max(rises) < 0.4 * highest, (
        "it rises, by steps no larger than a warmup's"
    )
    assert max(rates[ended:]) > 0.6 * highest and rates[-1] < 0.5 * highest
    longer = settings(
        schedule=schedule,
        max_steps=40,
        warmup_steps=4,
        cooldown_steps=7,
        max_lr=1e-2,
        min_lr=1e-3,
    )
    assert rates[ended + 5 :] == pytest.approx(
        [get_lr(longer, step) for step in range(ended + 5, 40)]
    )


def test_a_run_of_no_steps_goes_on(run, shards, tmp_path):
    """--max_steps=0 only evaluates; more later is a run with the preset's shares."""
    args = [arg for arg in SMALL if not arg.startswith(("--warmup", "--max_steps"))]
    run("train_gpt2.py", *args, "--max_steps=0")
    assert "22 steps, cosine: warmup 1, stable 0, decay 21" in run(
        "train_gpt2.py", "--resume", "--max_steps=22"
    )
    assert len(read_log(tmp_path / "log", "train")) == 22


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        # depth 12 is the preset, with 20 tokens for each of 85M + 38.6M parameters
        (["--depth=12"], (12, 768, 6, 524_288, 4712, 3.6e-3)),
        (["--depth=8"], (8, 512, 4, 524_288, 1941, 4.41e-3)),
        (["--depth=5"], (5, 384, 3, 262_144, 2147, 5.09e-3)),
        (["--depth=3"], (3, 192, 3, 262_144, 837, 7.2e-3)),
        (["--depth=8", "--total_batch_size=65536"], (8, 512, 4, 65_536, 15_532, 4.41e-3)),
        (["--depth=8", "--n_embd=256", "--max_steps=9"], (8, 256, 2, 262_144, 9, 6.24e-3)),
        (["--depth=8", "--n_layer=2", "--max_lr=1"], (2, 512, 4, 262_144, 2443, 1.0)),
    ],
)
def test_one_dial(args, expected):
    import configurator
    import train_gpt2

    overrides = configurator.parse_command_line(
        ["--preset=modern", "--data_dir=x", *args], configurator.read_settings(train_gpt2.__file__)
    )
    s = train_gpt2.initial_settings(overrides)
    keys = ("n_layer", "n_embd", "n_head", "total_batch_size", "max_steps", "max_lr")
    assert tuple(s[key] for key in keys) == expected
    total = s["total_batch_size"] * s["max_steps"]
    if "--max_steps=9" not in args:
        parameters = 12 * s["n_layer"] * s["n_embd"] ** 2 + 50_257 * s["n_embd"]
        assert total == pytest.approx(20 * parameters, rel=1e-3)


def test_a_run_with_a_depth(run, shards):
    """The vocabulary is that of the shards; what a run prints before it starts; resumed."""
    args = ["--preset=modern", "--depth=2", "--data_dir=shards", "--T=32", "--B=4"]
    args += ["--dtype=float32", "--eval_every=0", "--sample_every=0", "--hellaswag_every=0"]
    args += ["--ewok_every=0", "--total_batch_size=128"]
    # 20 tokens for each of 2 blocks' and the output layer's parameters
    length = 20 * (12 * 2 * 128**2 + 257 * 128) // 128
    with pytest.raises(SystemExit, match=f"--warmup_steps={length + 1}: more than"):
        run("train_gpt2.py", *args, f"--warmup_steps={length + 1}", "--schedule=cosine")
    out = run("train_gpt2.py", *args, "--max_steps=2")
    assert "0.46M parameters" in out and "; max_lr 0.00882," in out
    flops = 256 * (6 * (12 * 2 * 128**2 + 257 * 128) + 12 * 2 * 128 * 32)
    line = "128 tokens per step (1 x 4 x 32 on each device), 256 in all, "
    assert f"{line}{flops:.2g} FLOPs" in out
    with pytest.raises(SystemExit, match=r"--depth=3: the run to resume has 2; leave it out"):
        run("train_gpt2.py", "--resume", "--depth=3")
    with pytest.raises(SystemExit, match=r"--depth=2: needs --preset=modern$"):
        run("train_gpt2.py", "--depth=2", "--data_dir=shards", "--log_dir=other")
    with pytest.raises(SystemExit, match=r"--depth=-1: must be at least 0$"):
        run("train_gpt2.py", "--depth=-1", "--data_dir=shards", "--log_dir=other")


def test_a_resumed_run_keeps_its_learning_rate(run, shards):
    """Runs of other widths started at 0.0036 before the rate followed n_embd."""
    args = """--preset=modern --data_dir=shards --n_layer=1 --n_head=1 --n_embd=32 --T=32 --B=4
        --total_batch_size=512 --max_steps=4 --dtype=float32 --eval_every=0 --sample_every=0
        --hellaswag_every=0 --ewok_every=0""".split()
    assert "; max_lr 0.0176, weight_decay 0.2" in run("train_gpt2.py", *args)
    run("train_gpt2.py", *args, "--max_lr=3.6e-3", "--max_steps=2", "--log_dir=old")
    out = run("train_gpt2.py", "--resume", "--log_dir=old", "--max_steps=4")
    assert "; max_lr 0.0036, weight_decay 0.2" in out


# -- checkpoints --------------------------------------------------------------------
def test_going_back(run, shards, tmp_path, monkeypatch):
    """From an earlier checkpoint: the same run again; what came after it is moved to old_1/.

    That can be resumed itself.
    """
    run("train_gpt2.py", *SMALL)
    shutil.copytree(tmp_path / "log", tmp_path / "first")
    before = sorted(os.listdir(tmp_path / "log"))
    with (
        monkeypatch.context() as full,
        pytest.raises(SystemExit, match=r"log: cannot write there \(No space left"),
    ):
        full.setattr(
            "shutil.copy2", lambda *args: exec("raise OSError(28, 'No space left on device')")
        )
        run("train_gpt2.py", "--resume_step=3")
    assert sorted(os.listdir(tmp_path / "log")) == before
    out = run("train_gpt2.py", "--resume_step=3")
    assert (
        "resuming log at step 3" in out
        and "log/ had continued after step 3: moved to log/old_1/" in out
    )
    assert_same_run(tmp_path / "first", tmp_path / "log")
    assert read_log(tmp_path / "log" / "old_1", "train") == read_log(tmp_path / "first", "train")
    assert {p.name for p in (tmp_path / "log" / "old_1").glob("*.pt")} == {
        "resume.pt", "model_00006.pt", "model_00008.pt", "resume_00006.pt",
    }  # fmt: skip
    assert "nothing" not in run("train_gpt2.py", "--resume", "--log_dir=log/old_1", "--max_steps=9")
    assert max(read_log(tmp_path / "log" / "old_1", "train")) == 8
    with pytest.raises(
        SystemExit, match=r"log/resume_00005\.pt: there is none; --resume_step= goes back to 3, 6"
    ):
        run("train_gpt2.py", "--resume_step=5")


def test_the_newest_model_deleted(run, shards, tmp_path):
    run("train_gpt2.py", *SMALL)
    (tmp_path / "log" / "model_00008.pt").unlink()
    with pytest.raises(
        SystemExit, match=r"model_00008\.pt, which is missing; --resume_step= goes back to 3, 6"
    ):
        run("train_gpt2.py", "--resume")
    run("train_gpt2.py", "--resume_step=6")
    assert list(read_log(tmp_path / "log", "train")) == list(range(8))


def test_checkpoints_that_are_not_kept_leave_nothing_to_go_back_to(run, shards, tmp_path):
    run("train_gpt2.py", *SMALL, "--keep_checkpoints=1", "--save_every=2", "--eval_every=0")
    assert {p.name for p in (tmp_path / "log").glob("*.pt")} == {
        "model_00008.pt",
        "resume_00008.pt",
        "resume.pt",
    }
    assert os.stat(tmp_path / "log" / "resume.pt").st_nlink == 2, "one file on the disk"


@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_the_log_folder_is_gone(run, shards, tmp_path, at_step, how):
    """In the middle of a run: it is created again at the same path, for what comes from then on."""
    run("train_gpt2.py", *SMALL, "--log_dir=whole")

    def gone():
        os.rename(tmp_path / "log", tmp_path / "elsewhere") if how == "moved" else shutil.rmtree(
            tmp_path / "log"
        )

    at_step(4, gone)
    out = run("train_gpt2.py", *SMALL)
    assert "python sample.py --log_dir=log\n" in out
    assert not (tmp_path / "log_1").exists()
    whole = (tmp_path / "whole" / "log.txt").read_text()
    found = (tmp_path / "log" / "log.txt").read_text()
    assert found.startswith("4 train") and whole.endswith("\n" + found)
    at_step(-1, None)
    run("train_gpt2.py", "--resume", "--max_steps=9")


def test_output_that_was_closed_from_the_start(shards, tmp_path):
    line = quoted(*command("train_gpt2.py", *SMALL))
    assert shell(f"{line} >&- 2>&-", tmp_path).wait(60) == 0
    assert list(read_log(tmp_path / "log", "train")) == list(range(8))


def test_edited_logs(run, shards, tmp_path):
    """Notes among the records stay; what is no record harms neither the run nor its picture."""
    run("train_gpt2.py", *SMALL, "--max_steps=6")
    log, metrics = tmp_path / "log" / "log.txt", tmp_path / "log" / "metrics.jsonl"
    log.write_bytes(b"# a caf\xe9 note\n" + log.read_bytes() + b"half a li")
    metrics.write_bytes(b'null\n5\n{"kind": "mine"}\n{"a": "\xe9"}\n[1]\n' + metrics.read_bytes())
    run("train_gpt2.py", "--resume", "--max_steps=8")
    assert (
        log.read_bytes().startswith(b"# a caf\xe9 note\n0 val") and b"half" not in log.read_bytes()
    )
    assert metrics.read_bytes().startswith(b'null\n5\n{"kind": "mine"}\n{"a": "\xe9"}\n[1]\n')
    assert "best val loss" in run("plot.py")


# -- data ---------------------------------------------------------------------------
def test_other_data_of_the_same_size(run, shards, tmp_path):
    run("train_gpt2.py", *SMALL)
    path = next(shards.glob("*train_000001.npy"))
    tokens = np.load(path)
    np.save(path, tokens[::-1].copy())
    with pytest.raises(
        SystemExit,
        match=r"shards: not the same shards: the run in log needs those that it has read",
    ):
        run("train_gpt2.py", "--resume", "--max_steps=9")
    np.save(path, tokens)
    meta = shards / "meta.json"
    meta.write_text(meta.read_text().replace('"dataset": "toy"', '"dataset": "other"'))
    with pytest.raises(SystemExit, match=r"shards: holds other, not toy: the run in log needs"):
        run("train_gpt2.py", "--resume", "--max_steps=9")


def test_shards_added(run, shards, tmp_path):
    """In the first epoch they are its end; later they would change the order of what is left."""
    run("train_gpt2.py", *SMALL, "--max_steps=2")
    folder = tmp_path / "log2"
    run("train_gpt2.py", *SMALL, "--max_steps=40", "--log_dir=log2")
    assert max(r.get("epoch", 0) for r in read_jsonl(folder / "metrics.jsonl")) > 1
    meta = json.loads((shards / "meta.json").read_text())
    new = dict(meta["shards"][-1], file="toy_train_000099.npy")
    shutil.copy(shards / meta["shards"][-1]["file"], shards / new["file"])
    meta["shards"].append(new)
    (shards / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(
        SystemExit, match=r"shards: shards were added, which changes the order of all epochs after"
    ):
        run("train_gpt2.py", "--resume", "--log_dir=log2", "--max_steps=41")
    run("train_gpt2.py", "--resume", "--max_steps=3")


def test_sources_without_validation_tokens(run, shards, tmp_path):
    """Told at the start; the others are measured, and one without any goes without."""
    shutil.copytree(shards, tmp_path / "bare")
    meta = json.loads((tmp_path / "bare" / "meta.json").read_text())
    meta["shards"] = [shard for shard in meta["shards"] if shard["split"] == "train"]
    (tmp_path / "bare" / "meta.json").write_text(json.dumps(meta))
    out = run("train_gpt2.py", *SMALL, "--data_dir=bare", "--log_dir=none")
    assert (
        out.count(
            "bare has no validation tokens: there is no validation loss (fineweb.py --val_tokens="
        )
        == 1
    )
    assert (
        read_log(tmp_path / "none", "val") == {} and len(read_log(tmp_path / "none", "train")) == 8
    )
    out = run("train_gpt2.py", *SMALL, "--data_dir=shards:0.5,bare:0.5", "--log_dir=half")
    assert "bare has no validation tokens: the validation loss is that of the others" in out
    run("train_gpt2.py", *SMALL, "--data_dir=bare", "--val_dir=shards", "--log_dir=other")
    assert (
        list(read_log(tmp_path / "other", "val"))
        == list(read_log(tmp_path / "half", "val"))
        == [0, 3, 6, 8]
    )
    with pytest.raises(SystemExit, match="there is nothing to measure the loss on"):
        run("train_gpt2.py", "--eval_only=True", "--data_dir=bare")


@pytest.mark.parametrize(
    ("size", "val_tokens"), [(2000, 500), (2000, 3000), (100_000, 500), (100_000, 5000)]
)
def test_the_size_of_the_validation_split(tmp_path, run, size, val_tokens):
    (tmp_path / "my.txt").write_text(TEXT)
    run(
        "fineweb.py",
        "--dataset=my.txt",
        "--tokenizer=bytes",
        "--out_dir=x",
        f"--shard_size={size}",
        f"--val_tokens={val_tokens}",
    )
    meta = json.loads((tmp_path / "x" / "meta.json").read_text())
    sizes = [shard["tokens"] for shard in meta["shards"]]
    assert sizes[0] == val_tokens
    tokens = [np.load(tmp_path / "x" / shard["file"]) for shard in meta["shards"]]
    assert bytes(np.concatenate(tokens)[1:].astype(np.uint8)) == TEXT.encode()
    with pytest.raises(SystemExit, match=r"--val_tokens=1000000: there are only \d+ tokens"):
        run(
            "fineweb.py",
            "--dataset=my.txt",
            "--tokenizer=bytes",
            "--out_dir=y",
            "--val_tokens=1000000",
        )


def test_the_demo_says_how_much_it_uses(run, tmp_path):
    (tmp_path / "input.txt").write_text("All work and no play. " * 100_000)
    assert "training data: input.txt, its first 2,000,000 bytes\n" in run(
        "train_gpt2.py", "--max_steps=1", "--eval_every=0", "--sample_every=0"
    )


def test_init_from_keeps_its_own_architecture(run, shards, tmp_path):
    """And what is recorded is what is trained."""
    run("train_gpt2.py", *SMALL)
    rest = [
        arg
        for arg in SMALL
        if not arg.startswith(("--n_", "--pos", "--norm", "--mlp", "--qk", "--bias"))
    ]
    run("train_gpt2.py", *rest, "--init_from=log/model_00008.pt", "--log_dir=tuned")
    for about in (
        read_jsonl(tmp_path / "tuned" / "metrics.jsonl")[0],
        load_checkpoint(str(tmp_path / "tuned/model_00008.pt")),
    ):
        assert {k: about["settings"][k] for k in ("n_layer", "n_embd", "pos", "mlp", "bias")} == {
            "n_layer": 2, "n_embd": 32, "pos": "learned", "mlp": "gelu", "bias": True,
        }  # fmt: skip
    with pytest.raises(
        SystemExit, match=r"--n_layer=7: log/model_00008\.pt has n_layer=2; leave it out"
    ):
        run("train_gpt2.py", *rest, "--init_from=log/model_00008.pt", "--log_dir=x", "--n_layer=7")
    run(
        "train_gpt2.py", *rest, "--init_from=log/model_00008.pt", "--log_dir=tuned", "--resume"
    )  # the same command
    for other in ("--init_from=log/model_00003.pt", "--ckpt=log/model_00003.pt"):
        with pytest.raises(SystemExit, match=r"--init_from=|--ckpt= is for --eval_only"):
            run("train_gpt2.py", "--resume", "--log_dir=tuned", other)


# -- machines -----------------------------------------------------------------------
def test_home_is_where_the_tilde_is(spawn, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.py").write_text(
        '\ufeffdata_dir = "~/shards"\n', encoding="utf-8"
    )
    args = [arg for arg in SMALL if not arg.startswith("--data_dir")]
    for script, *more in (
        ["train_gpt2.py", *args, "mine.py", "--log_dir=~/log"],
        ["sample.py", "--log_dir=~/log", "--out=~/x.txt"],
    ):
        out = spawn(script, *more, cwd=tmp_path / "elsewhere")
        assert out.returncode == 0, out.stderr
    assert (tmp_path / "log" / "model_00008.pt").exists() and (tmp_path / "x.txt").exists()
    (tmp_path / "p.txt").write_text("Once")
    out = spawn("sample.py", "--log_dir=~/log", "--prompt=FILE:~/p.txt", cwd=tmp_path / "elsewhere")
    assert out.stdout.startswith("Once")
    assert os.listdir(tmp_path / "elsewhere") == ["mine.py"]


def test_launchers_that_say_less_than_torchrun(spawn, shards, tmp_path):
    """RANK, LOCAL_RANK and WORLD_SIZE alone, as from srun; empty ones; no address."""
    bare = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    env = bare | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29763", "WORLD_SIZE": "2"}
    two = spawn(
        "train_gpt2.py",
        *SMALL,
        environs=[env | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)],
    )
    assert two.returncode == 0, two.stderr
    empty = spawn(
        "train_gpt2.py", *SMALL, "--log_dir=one", environs=[env | {"RANK": "", "WORLD_SIZE": ""}]
    )
    assert empty.returncode == 0, empty.stderr
    assert read_log(tmp_path / "one", "train") == pytest.approx(
        read_log(tmp_path / "log", "train"), abs=5e-5
    )
    lost = spawn("train_gpt2.py", *SMALL, environs=[bare | {"RANK": "0", "WORLD_SIZE": "2"}])
    assert (
        "MASTER_ADDR" in lost.stderr.splitlines()[-1] and "start it with torchrun" in lost.stderr
    ), lost.stderr


def test_cores_are_those_that_may_be_used(monkeypatch):
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert num_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_names_that_others_use(run):
    for script, key, ours in (
        ("train_gpt2.py", "lr", "max_lr"), ("train_gpt2.py", "learning_rate", "max_lr"),
        ("train_gpt2.py", "batch_size", "B"), ("train_gpt2.py", "block_size", "T"),
        ("train_gpt2.py", "out_dir", "log_dir"), ("sample.py", "start", "prompt"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=rf"--{key}=1: that is --{ours}= here"):
            run(script, f"--{key}=1")


def test_texts_where_shards_should_be(run, tmp_path):
    (tmp_path / "my text's.txt").write_text("x")
    (tmp_path / "texts").mkdir()
    shutil.copy(tmp_path / "my text's.txt", tmp_path / "texts")
    for name in ("my text's.txt", "texts"):
        with pytest.raises(SystemExit) as e:
            run("train_gpt2.py", f"--data_dir={name}")
        typed = f"printf '%s\\n' {e.value.code.partition('fineweb.py ')[2]}"
        arguments = subprocess.run(["bash", "-c", typed], capture_output=True, text=True)
        assert arguments.stdout.splitlines() == [f"--dataset={name}", "--out_dir=my_shards"]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            ["sample.py", "--seed=18446744073709551616"],
            "--seed=18446744073709551616: must be less than 2^63",
        ),
        (["ewok.py", "--limit=-1"], "--limit=-1: must be at least 0"),
        (["hellaswag.py", "--limit=-1"], "--limit=-1: must be at least 0"),
        (["hellaswag.py", "--batch_tokens=-1"], "--batch_tokens=-1: must be at least 0"),
    ],
)
def test_numbers_that_make_no_sense(run, args, line):
    with pytest.raises(SystemExit) as e:
        run(*args)
    assert e.value.code == line


def test_temperatures_that_are_nearly_nothing(run, shards):
    run("train_gpt2.py", *SMALL)
    texts = {
        run("sample.py", f"--temperature={t}", "--dtype=float32", "--max_new_tokens=20")
        for t in ("0", "1e-39", "1e-7")
    }
    assert len(texts) == 1


def test_prompts_as_help_shows_them(run, shards, tmp_path):
    """A new document, as in nanoGPT, and the line end that --help shows."""
    run("train_gpt2.py", *SMALL)
    greedy = ["--temperature=0", "--dtype=float32", "--max_new_tokens=20"]
    assert run("sample.py", "--prompt=<|endoftext|>", *greedy).removeprefix("<|endoftext|>") == run(
        "sample.py", "--prompt=", *greedy
    )
    assert run("sample.py", "--prompt=\\n", *greedy) == run("sample.py", "--prompt=\n", *greedy)


def test_ctrl_c_while_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\ntime.sleep(9)\n"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    # A shell starts background jobs with SIGINT ignored, and then Python leaves it so.
    result = subprocess.run(
        command("sample.py"),
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert result.returncode != 0 and result.stderr == ""


def test_out_of_memory_in_a_sample(run, shards, monkeypatch):
    run("train_gpt2.py", *SMALL)
    monkeypatch.setattr(
        "model.GPT.new_cache", lambda *args: exec("raise RuntimeError('CUDA out of memory.')")
    )
    with pytest.raises(SystemExit, match="out of memory: try a smaller batch, or a smaller model"):
        run("sample.py")


def test_a_folder_that_cannot_be_written(shards, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    os.chmod(tmp_path, 0o500)
    result = subprocess.run(
        command("train_gpt2.py"), cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    os.chmod(tmp_path, 0o700)
    assert (
        result.returncode == 1
        and "Traceback" not in result.stderr
        and "Permission denied" in result.stderr
    )


# -- the peers ----------------------------------------------------------------------
def peers_weights(config):
    torch.manual_seed(3)
    return GPT(config).eval()


def test_a_checkpoint_of_nanogpt(tmp_path, gpt2, capsys):
    """Compiled, with padding; without, and with the mask that it had before flash attention."""
    for rows, prefix, bias in ((50304, "_orig_mod.", False), (50257, "", True)):
        model = peers_weights(GPTConfig(16, 50257, 1, 2, 32, bias=bias))
        state = {
            f"{prefix}{k}": v[:rows] if k in ("lm_head.weight", "transformer.wte.weight") else v
            for k, v in model.state_dict().items()
        }
        state[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
        args = {
            "n_layer": 1,
            "n_head": 2,
            "n_embd": 32,
            "block_size": 16,
            "bias": bias,
            "vocab_size": rows,
            "dropout": 0.0,
        }
        torch.save(
            {
                "model": state,
                "model_args": args,
                "iter_num": 7,
                "best_val_loss": torch.tensor(3.0),
                "config": {},
            },
            tmp_path / "ckpt.pt",
        )
        found, enc = load_model(str(tmp_path / "ckpt.pt"))
        x = torch.randint(50257, (1, 16))
        torch.testing.assert_close(found(x), model(x))
        assert enc.name == "gpt2" and "ckpt.pt: step 7" in capsys.readouterr().err
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:65]
    torch.save({"model": state, "model_args": args}, tmp_path / "ckpt.pt")
    with pytest.raises(
        UserError, match=r"its 65 tokens are not GPT-2's: are they characters \(meta\.pkl\)\?"
    ):
        load_model(str(tmp_path / "ckpt.pt"))


def test_a_checkpoint_of_build_nanogpt(tmp_path, gpt2):
    """Its pickled GPTConfig, of a script that is not there, is let through; nothing else is."""
    model = peers_weights(GPTConfig(16, 50257, 1, 2, 32))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    (tmp_path / "theirs.py").write_text(
        "import torch\nfrom dataclasses import dataclass\n@dataclass\nclass GPTConfig:\n"
        "    block_size: int = 16\n    vocab_size: int = 50304\n    n_layer: int = 1\n"
        "    n_head: int = 2\n    n_embd: int = 32\n"
        "class Other:\n    pass\n"
        "state = torch.load('state.pt')\n"
        "saved = {'model': state, 'config': GPTConfig(), 'step': 19072, 'val_loss': 3.07}\n"
        "torch.save(saved, 'model_19072.pt')\n"
        "torch.save({'model': state, 'config': GPTConfig(), 'step': Other()}, 'evil.pt')\n"
    )
    subprocess.run([sys.executable, "theirs.py"], cwd=tmp_path, check=True)
    found, _ = load_model(str(tmp_path / "model_19072.pt"))
    x = torch.randint(50257, (1, 16))
    torch.testing.assert_close(found(x), model(x))
    with pytest.raises(
        UserError, match="refused, it holds something other than tensors and plain values"
    ):
        load_model(str(tmp_path / "evil.pt"))
