"""Train one model for each combination of settings, and plot the loss against the learning rate.

    python dev/sweep.py --data_dir=textbooks --grid="n_embd=128,256,512 lr_factor=0.7,1,1.4"
    python dev/sweep.py --data_dir=textbooks --grid="total_batch_size=8192 lr_factor=1,2 seed=1,2"
    python dev/sweep.py --draw=docs/rates.png                    # everything in dev/runs.jsonl

Each run becomes a line of dev/runs.jsonl: its settings, the commit, the validation loss by step (no
losses if it diverged). A combination that is already there is skipped, so a sweep that was stopped
resumes. lr_factor multiplies the learning rate that --preset=modern would choose; heads have 64
dimensions below a width of 256, and 128 from there on.
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
val_tokens = 65_536  # measure the validation loss on the first N validation tokens, ten times
records = "dev/runs.jsonl"  # where the runs are recorded
draw = ""  # draw the recorded runs to this file, and train nothing

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODERN = {"n_embd": 768, **PRESETS["modern"]}


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
    settings = {"data_dir": data_dir, "n_embd": "768", "total_batch_size": "524288"}
    for arg in base.split():
        name, _, value = arg.removeprefix("--").partition("=")
        settings[name] = value or "true"
    settings |= combination
    factor = convert(settings.pop("lr_factor", "1"), 1.0, "lr_factor")
    width = convert(settings["n_embd"], 768, f"n_embd={settings['n_embd']}")
    batch = settings["total_batch_size"]
    batch = convert(batch, 2048, f"total_batch_size={batch}")
    # What follows from the width, unless the grid has it.
    rate = factor * scale_max_lr(MODERN, width)
    settings.setdefault("max_lr", f"{rate:.3g}")
    settings.setdefault("n_head", str(max(1, width // (64 if width < 256 else 128))))
    settings.setdefault("seed", "1")
    return {**settings, "max_steps": str(tokens // batch), "val_tokens": str(val_tokens)}


def describe_commit():
    """The project's commit, such as "5e53f7e-dirty"."""
    line = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    return subprocess.run(line, capture_output=True, text=True).stdout.strip() or "unknown"


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
    line = [sys.executable, f"{ROOT}/train_gpt2.py", f"--log_dir={log_dir}"]
    line += [f"--eval_every={every}", "--hellaswag_every=0", "--ewok_every=0"]
    line += ["--sample_every=0", "--plot_every=0", "--save_every=0"]
    line += [f"--{key}={value}" for key, value in settings.items()]
    result = subprocess.run(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if "were not finite" in result.stderr:
        return {}
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1]
        raise UserError(f"{settings}: the run has failed ({reason}); the earlier ones are kept")
    losses = {}
    with open(f"{log_dir}/log.txt") as f:
        for record in f:
            step, kind, value = record.split()
            if kind == "val":
                losses[step] = float(value)
    return losses


def draw_records(path):
    """One panel for the widths and one for the batches, a curve for each experiment."""
    import matplotlib.pyplot as plt

    # An experiment is what differs only in the rate and the seed.
    experiments = {}
    for record in read_records():
        settings = dict(record["settings"])
        rate = float(settings.pop("max_lr"))
        del settings["seed"], settings["max_steps"]
        curve = experiments.setdefault(json.dumps(settings, sort_keys=True), {})
        if record["val"]:
            curve.setdefault(rate, []).append(list(record["val"].values())[-1])
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for experiment, curve in experiments.items():
        settings = json.loads(experiment)
        label = f"width {settings['n_embd']}, {int(settings['total_batch_size']):,} tokens per step"
        rates = sorted(curve)
        means = [sum(curve[rate]) / len(curve[rate]) for rate in rates]
        # The panel of the batches has all that are not the base's.
        is_base = f"--total_batch_size={settings['total_batch_size']}" in base.split()
        ax = axes[0 if is_base else 1]
        (line,) = ax.plot(rates, means, "o-", label=label)
        rule = scale_max_lr(MODERN, int(settings["n_embd"]))
        ax.axvline(rule, color=line.get_color(), ls=":", lw=1)
    for ax, title in zip(axes, ("widths", "batches")):
        ax.set(xscale="log", xlabel="max_lr", ylabel="validation loss", title=title)
        if ax.lines:
            ax.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    print(path)


def main():
    if draw:
        draw_records(draw)
        return
    if not data_dir:
        raise UserError("--data_dir= names the token shards to train on")
    done = [record["settings"] for record in read_records()]
    open(records, "a").close()  # before hours of work that could not be recorded
    commit = describe_commit()
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
        step, loss = list(losses.items())[-1] if losses else ("", "diverged")
        print(f"{combination}: max_lr {settings['max_lr']}, step {step}: {loss} ({seconds:.0f} s)")


if __name__ == "__main__":
    with run_as_script():
        configure(globals())
        main()
