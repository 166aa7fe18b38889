"""Train one model for each combination of settings, and draw the loss over the learning rate.

    python dev/sweep.py --data_dir=textbooks --grid="n_embd=128,256,512 lr_factor=0.7,1,1.4"
    python dev/sweep.py --data_dir=textbooks --grid="total_batch_size=8192 lr_factor=1,2 seed=1,2"
    python dev/sweep.py --draw=docs/rates.png                    # everything in dev/runs.jsonl

Each run becomes a line of dev/runs.jsonl: its settings, the commit, the validation loss by step. A
combination that is already there is skipped, so a sweep that was stopped goes on. lr_factor
multiplies the learning rate that --preset=modern would choose; heads have 64 dimensions below a
width of 256, and 128 from there on.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the root

from configurator import check_command_line, configure, convert

if __name__ == "__main__":
    check_command_line(__file__)  # before torch is imported, which takes seconds

from script import UserError, run_as_script
from training.presets import PRESETS
from training.schedule import scale_max_lr

# -- settings: override any with --key=value --------------------------------------
data_dir = ""  # the token shards to train on
grid = ""  # settings and their values, such as "n_embd=128,256 lr_factor=0.7,1,1.4 seed=1,2"
base = "--preset=modern --n_layer=6 --n_embd=192 --T=256 --B=8 --total_batch_size=2048"  # for all
tokens = 500_000  # length of a run
val_tokens = 65_536  # the validation loss is measured on so many tokens, ten times in a run
records = "dev/runs.jsonl"  # where the runs are recorded
draw = ""  # draw the recorded runs to this file, and train nothing

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEFAULTS = {**PRESETS["gpt2"], "n_embd": 768, **PRESETS["modern"]}


def parse_grid(text):
    """[{setting: value}] of all combinations in a grid; values are strings."""
    axes = []
    for axis in text.split():
        name, equals, values = axis.partition("=")
        if not equals or not values:
            raise UserError(f"--grid={text}: expected name=value,value ... with spaces between")
        axes.append([(name, value) for value in values.split(",")])
    return [dict(combination) for combination in itertools.product(*axes)]


def run_settings(combination):
    """The trainer's settings of a run, {name: value}, strings."""
    settings = dict(arg.removeprefix("--").split("=", 1) for arg in base.split())
    settings |= combination
    factor = convert(settings.pop("lr_factor", "1"), 1.0, "lr_factor")
    width = convert(settings["n_embd"], 768, f"n_embd={settings['n_embd']}")
    # What follows from the width, unless the grid has it.
    rate = factor * scale_max_lr(DEFAULTS, width)
    settings.setdefault("max_lr", f"{rate:.3g}")
    settings.setdefault("n_head", str(max(1, width // (64 if width < 256 else 128))))
    settings.setdefault("seed", "1")
    steps = tokens // int(settings["total_batch_size"])
    return {**settings, "max_steps": str(steps), "val_tokens": str(val_tokens)}


def read_records():
    """The recorded runs, a list of dicts."""
    if not os.path.exists(records):
        if draw:
            raise UserError(f"--records={records}: there is no such file")
        return []
    with open(records) as f:
        return [json.loads(line) for line in f]


def train(settings, log_dir):
    """Train with these settings; returns {step: validation loss}."""
    every = max(1, int(settings["max_steps"]) // 10)
    line = [sys.executable, f"{ROOT}/train_gpt2.py", f"--data_dir={data_dir}"]
    line += [f"--log_dir={log_dir}", f"--eval_every={every}", "--hellaswag_every=0"]
    line += ["--ewok_every=0", "--sample_every=0", "--plot_every=0", "--save_every=0"]
    line += [f"--{key}={value}" for key, value in settings.items()]
    if subprocess.run(line, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"the run with {settings} has failed, see above; the earlier ones are kept")
    losses = {}
    with open(f"{log_dir}/log.txt") as f:
        for record in f:
            step, kind, value = record.split()
            if kind == "val":
                losses[step] = float(value)
    return losses


def draw_records(path):
    """A panel for the widths and one for the batches: the last loss over the learning rate."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for ax, key in zip(axes, ("n_embd", "total_batch_size")):
        curves = {}
        for record in read_records():
            settings = record["settings"]
            curve = curves.setdefault(int(settings[key]), {})
            loss = list(record["val"].values())[-1]
            curve.setdefault(float(settings["max_lr"]), []).append(loss)
        for value, curve in sorted(curves.items()):
            rates = sorted(curve)
            means = [sum(curve[rate]) / len(curve[rate]) for rate in rates]
            (line,) = ax.plot(rates, means, "o-", label=f"{value:,}")
            if key == "n_embd":
                ax.axvline(scale_max_lr(DEFAULTS, value), color=line.get_color(), ls=":", lw=1)
        ax.set(xscale="log", xlabel="max_lr", ylabel="validation loss", title=key)
        ax.legend()
    figure.savefig(path, dpi=110)
    print(path)


def main():
    if draw:
        draw_records(draw)
        return
    if not data_dir:
        raise UserError("--data_dir= names the token shards to train on")
    done = [record["settings"] for record in read_records()]
    line = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(line, capture_output=True, text=True).stdout.strip()
    for combination in parse_grid(grid):
        settings = run_settings(combination)
        if settings in done:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as log_dir:
            losses = train(settings, log_dir)
        record = {"settings": settings, "commit": commit, "val": losses}
        with open(records, "a") as f:
            f.write(json.dumps(record) + "\n")
        seconds = time.perf_counter() - start
        print(f"{combination} max_lr {settings['max_lr']}: {losses.popitem()} {seconds:.0f} s")


if __name__ == "__main__":
    with run_as_script():
        configure(globals())
        main()
