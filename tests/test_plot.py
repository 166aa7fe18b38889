"""Pictures of logs of every kind; what is drawn is looked up in matplotlib's own objects."""

import json
import math
import sys

from conftest import GPT2, read_log
import plot

import matplotlib.figure
import numpy as np
from PIL import Image
import pytest


def write_log(folder, steps, tokenizer="gpt2", dataset="fineweb-edu", every=10, metrics=True):
    folder.mkdir()
    lines, records = [], [{"step": 0, "kind": "run", "tokenizer": tokenizer, "dataset": dataset}]

    def record(step, kind, value, **more):
        lines.append(f"{step} {kind} {value:.4f}\n")
        records.append({"step": step, "kind": kind, **more})

    for step in range(steps + 1):
        loss = 3 + 8 * math.exp(-step / 20)
        if step % every == 0:
            record(step, "val", loss, loss=loss)
            record(step, "hella", 0.25 + step / 1e4, acc_norm=0.25 + step / 1e4)
            record(step, "ewok", 0.5 + step / 1e4, context=0.5 + step / 1e4)
        if step < steps:
            more = {"lr": 1e-3, "grad_norm": None if step == 7 else 1.0, "tokens_per_second": 28.0}
            more |= {"seconds": 36.0, "tokens": (step + 1) * 1000}
            record(step, "train", math.nan if step == 7 else loss, **more)
    (folder / "log.txt").write_text("".join(lines))
    if metrics:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def figure(monkeypatch):
    """Holds the last figure that was saved."""
    held = {}
    savefig = matplotlib.figure.Figure.savefig

    def keep(self, *args, **kwargs):
        held["axes"] = {ax.get_title(): ax for ax in self.axes if ax.get_title()}
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return held


def labels(ax):
    """The names in a panel's legend, and of the lines to compare with."""
    return ax.get_legend_handles_labels()[1] + [text.get_text() for text in ax.texts]


def test_a_run(run, tmp_path, figure):
    write_log(tmp_path / "log", 200)
    out = run("plot.py")
    assert out == (
        "log: best val loss 3.0004 at step 200, HellaSwag 0.2700, EWoK 0.5200, 200,000 tokens, "
        "2.00 hours of training\nlog/plot.png\n"
    )
    axes = figure["axes"]
    assert list(axes) == [
        "loss", "HellaSwag", "EWoK", "learning rate", "gradient norm", "throughput",
    ]  # fmt: skip
    assert labels(axes["loss"]) == ["train", "val", "GPT-2 124M val 3.2924"]
    assert labels(axes["HellaSwag"]) == ["chance 0.25", "GPT-2 124M 0.2946", "GPT-3 124M 0.337"]
    val = axes["loss"].lines[1]
    assert dict(zip(*val.get_data(), strict=True)) == read_log(tmp_path / "log", "val")
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in axes.values())
    assert np.asarray(Image.open(tmp_path / "log" / "plot.png").convert("L")).std() > 10


def test_several_runs_and_axes(run, tmp_path, figure):
    write_log(tmp_path / "a", 100)
    write_log(tmp_path / "b", 20)
    run("plot.py", "--logs=a,b", "--x=tokens", "--out=both.png")
    assert labels(figure["axes"]["loss"])[:4] == ["a train", "a val", "b train", "b val"]
    val = figure["axes"]["loss"].lines[1].get_xdata()
    assert val == pytest.approx(np.arange(0, 101, 10) * 1000)
    run("plot.py", "--logs=a,b", "--x=hours", "--out=both.png")
    assert figure["axes"]["loss"].lines[1].get_xdata() == pytest.approx(np.arange(0, 101, 10) / 100)


def test_baselines_only_where_they_apply(run, tmp_path, figure):
    write_log(tmp_path / "bytes", 20, tokenizer="bytes")
    write_log(tmp_path / "other", 20, dataset="textbooks")
    run("plot.py", "--logs=bytes")
    assert labels(figure["axes"]["loss"]) == ["train", "val"]
    assert labels(figure["axes"]["HellaSwag"]) == ["chance 0.25"]
    run("plot.py", "--logs=other")
    assert labels(figure["axes"]["loss"]) == ["train", "val"]
    assert "GPT-3 124M 0.337" in labels(figure["axes"]["HellaSwag"])


def test_a_log_alone_still_being_written(run, tmp_path, figure):
    """As build-nanogpt leaves it: no metrics.jsonl; and the last line is not whole."""
    write_log(tmp_path / "log", 20, metrics=False)
    with open(tmp_path / "log" / "log.txt", "a") as f:
        f.write("20 train 3.")
    assert run("plot.py").startswith(
        "log: best val loss 5.9430 at step 20, HellaSwag 0.2520, EWoK 0.5020, 20 steps"
    )
    assert list(figure["axes"]) == ["loss", "HellaSwag", "EWoK"]
    assert "GPT-2 124M val 3.2924" in labels(figure["axes"]["loss"])
    (tmp_path / "log" / "log.txt").write_text("0 train 5.5\n")
    run("plot.py")
    assert list(figure["axes"]) == ["loss"]


def test_an_eval_of_ones_own(run, tmp_path, figure):
    write_log(tmp_path / "log", 20)
    with open(tmp_path / "log" / "log.txt", "a") as f:
        f.write("0 lambada 0.0\n10 lambada 0.5\n")
    run("plot.py")
    assert list(figure["axes"]["lambada"].lines[0].get_ydata()) == [0, 0.5]


def test_smoothing_is_the_mean_of_the_window():
    values = np.array([1.0, 2.0, np.nan, 4.0, np.inf, 6.0])
    assert plot.smooth(values, 2) == pytest.approx([1, 1.5, 2, 4, 4, 6])


def test_a_real_log(run, shards, tmp_path, figure):
    args = "--preset=tiny --data_dir=shards --n_layer=1 --n_embd=32 --T=16 --B=8"
    args += " --total_batch_size=256"
    run("train_gpt2.py", *args.split(), "--max_steps=20", "--eval_every=5", *GPT2)
    run("plot.py")
    assert list(figure["axes"]) == [
        "loss",
        "accuracy",
        "learning rate",
        "gradient norm",
        "throughput",
    ]
    assert labels(figure["axes"]["loss"]) == ["train", "val"]


def test_mistakes(run, tmp_path, monkeypatch):
    write_log(tmp_path / "log", 5)
    write_log(tmp_path / "bare", 5, metrics=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.txt").write_text("")
    for args, message in (
        (["--logs=gone"], r"gone/log\.txt: cannot be read"),
        (["--logs=empty"], r"empty/log\.txt: is empty"),
        (["--logs="], r"--logs=: expected 1 to 6 folders"),
        (["--x=days"], r"--x=days: choose step, tokens or hours"),
        (
            ["--logs=bare", "--x=tokens"],
            r"--x=tokens: choose step; tokens and hours are for logs with",
        ),
        (["--out=gone/x.png"], r"--out=gone/x\.png: cannot write this picture"),
    ):
        with pytest.raises(SystemExit, match=message) as e:
            run("plot.py", *args)
        assert "\n" not in e.value.code
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"plotting needs matplotlib: pip install matplotlib"):
        run("plot.py")
