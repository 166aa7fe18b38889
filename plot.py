"""Plot training runs: their logs as curves.

    python plot.py                                    # log/ -> log/plot.png
    python plot.py --logs=log,log2 --x=tokens         # several runs in one picture

Also reads build-nanogpt's log.txt, and a log that is still being written. Baselines are drawn
where they apply: for GPT-2 tokens, and the validation loss for FineWeb-Edu only. They are GPT-2
124M's loss of 3.2924 on build-nanogpt's validation shard and its HellaSwag acc_norm of 29.46, as
measured by https://github.com/karpathy/build-nanogpt, and GPT-3 124M's 33.7 of the GPT-3 paper.
"""

import dataclasses
import json
import math
import os
import re

from configurator import check_choice, check_command_line, configure

if __name__ == "__main__":
    check_command_line(__file__)  # before the imports below, which take a while

from files import atomic_write
from script import UserError, run_as_script

import numpy as np

# -- settings: override any with --key=value --------------------------------------
logs = "log"  # the log folders of runs, separated by commas
out = ""  # the picture to write; empty: plot.png in the first of the folders
x = "step"  # the horizontal axis: step, tokens or hours

GPT2_LOSS = 3.2924
HELLASWAG = ((0.2946, "GPT-2 124M"), (0.337, "GPT-3 124M"))
RECORD = re.compile(r"(\d+) (\w+) (-?(?:[\d.]+(?:e[-+]?\d+)?|inf|nan))\n")  # a line of log.txt
COLORS = ["#1f5fa8", "#d1602b", "#2d8a57", "#8a4fa3", "#8a6d1b", "#c23b6b"]
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 9,
    "legend.edgecolor": "none",
}


# -- reading ------------------------------------------------------------------------
@dataclasses.dataclass
class RunLog:
    """The records of a run.

    rows: {kind: records as dicts, sorted by step}; about: the dict of the run's first record.
    """

    name: str  # for the legend; "" if there is one run only
    color: str
    rows: dict
    about: dict

    def values(self, kind, key):
        """The values of a key in the records of a kind, a float array; nan where there is none."""
        # A record can lack a value, or have null in its place.
        values = []
        for row in self.rows.get(kind, []):
            value = row.get(key)
            values.append(value if isinstance(value, (int, float)) else math.nan)
        return np.array(values, dtype=float)

    def has(self, kind, key):
        return any(key in row for row in self.rows.get(kind, []))

    def x_values(self, kind):
        """The positions of the records of a kind on the horizontal axis."""
        steps = self.values(kind, "step")
        if x == "step":
            return steps
        # build-nanogpt's log.txt has neither tokens nor times.
        if not self.has("train", "tokens"):
            raise UserError(
                f"--x={x}: choose step; tokens and hours are for logs with a metrics.jsonl"
            )
        # Tokens and hours are those of the training steps; other records lie between two of them.
        if x == "tokens":
            values = self.values("train", "tokens")
        else:
            values = np.nancumsum(self.values("train", "seconds")) / 3600
        if kind != "train":
            steps = steps - 1  # such a record of step s was made after the update of step s - 1
        return np.interp(steps, self.values("train", "step"), values, left=0)


def open_log(path):
    return open(path, encoding="utf-8", errors="replace")


def read_run(folder, name="", color=COLORS[0]):
    """The RunLog of a log folder. Lines that are not records are ignored."""
    # log.txt has the steps and values, metrics.jsonl the rest of each record.
    records = {}  # {kind: {step: {key: value}}}
    path = f"{folder}/log.txt"
    try:
        with open_log(path) as f:
            for line in f:
                if match := RECORD.fullmatch(line):
                    step = int(match[1])
                    row = {"step": step, "value": float(match[3])}
                    records.setdefault(match[2], {})[step] = row
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); --logs= names the folders of runs")
    if not records:
        raise UserError(f"{path}: is empty; python train_gpt2.py writes it")
    # The first record of a run says what it was trained on.
    about = {"tokenizer": "gpt2", "dataset": "fineweb-edu"}  # build-nanogpt only has a log.txt
    path = f"{folder}/metrics.jsonl"
    if os.path.isfile(path):
        with open_log(path) as f:
            for line in f:
                try:
                    record = json.loads(line)
                    kind = record["kind"]
                    if kind == "run":
                        about = record
                    elif record["step"] in records.get(kind, {}):
                        records[kind][record["step"]] |= record
                except (ValueError, KeyError, TypeError):
                    continue  # a line that is still being written, or the user's own
    # A step that was repeated after a crash is there once: the last record wins.
    rows = {}
    for kind, by_step in records.items():
        rows[kind] = [by_step[step] for step in sorted(by_step)]
    return RunLog(name, color, rows, about)


def summary(run):
    """What people read first: best validation loss, last HellaSwag and EWoK, tokens, hours."""
    parts = []
    # The best validation loss, and when.
    val = run.values("val", "value")
    if np.isfinite(val).any():
        best = np.nanargmin(val)
        step = run.rows["val"][best]["step"]
        parts.append(f"best val loss {val[best]:.4f} at step {step}")
    for kind, name in (("hella", "HellaSwag"), ("ewok", "EWoK")):
        if kind in run.rows:
            parts.append(f"{name} {run.values(kind, 'value')[-1]:.4f}")
    if run.has("train", "tokens"):
        hours = np.nansum(run.values("train", "seconds")) / 3600
        parts.append(f"{np.nanmax(run.values('train', 'tokens')):,.0f} tokens")
        parts.append(f"{hours:.2f} hours of training")
    elif "train" in run.rows:
        last = run.rows["train"][-1]
        parts.append(f"{last['step'] + 1} steps, train loss {last['value']:.4f}")
    return ", ".join(parts)


# -- drawing ------------------------------------------------------------------------
def smooth(values, window):
    """The mean of the last `window` values, ignoring nan and inf."""
    # Means by differences of running sums.
    is_finite = np.isfinite(values)
    sums = np.concatenate(([0.0], np.where(is_finite, values, 0).cumsum()))
    counts = np.concatenate(([0], is_finite.cumsum()))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[start]) / (counts[end] - counts[start])


def import_pyplot():
    """matplotlib.pyplot in this project's style; raises UserError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plotting needs matplotlib: pip install matplotlib")
    # Draw to a file: there may be no display. A notebook has its own way to show pictures.
    if "MPLBACKEND" not in os.environ:
        matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def save(fig, path):
    """Write the picture atomically: a viewer may have the file open."""
    # matplotlib cannot tell the format from the temporary name.
    extension = os.path.splitext(path)[1][1:] or "png"
    try:
        atomic_write(path, lambda f: fig.savefig(f, dpi=110, format=extension))
    except (OSError, ValueError) as e:
        raise UserError(f"--out={path}: cannot write this picture ({e})")
    print(path)


def draw_baseline(ax, y, name, align="left"):
    """A dashed line to compare with, and its name."""
    # The line, and its name on a white ground, so that curves do not hide it.
    ax.axhline(y, color="0.35", linestyle="--", linewidth=1)
    ax.text(
        0.01 if align == "left" else 0.99,
        y,
        f"{name} {y:g}",
        ha=align,
        va="bottom",
        fontsize=9,
        transform=ax.get_yaxis_transform(),
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
    )


def all_gpt2_tokens(runs):
    """Whether all runs have GPT-2's tokens, so that published numbers can be compared with them."""
    return all(run.about.get("tokenizer") == "gpt2" for run in runs)


def draw_loss(ax, runs):
    """The training and validation loss of RunLogs."""
    highs = []
    lows = []
    for run in runs:
        for kind in ("train", "val"):
            if kind not in run.rows:
                continue
            # The training loss is smoothed and pale, gray if there is one run only; the validation
            # loss is exact and bold.
            values = run.values(kind, "value")
            style = {"color": run.color, "label": f"{run.name} {kind}".strip()}
            if kind == "train":
                values = smooth(values, max(1, len(values) // 200))
                style |= {"linewidth": 1, "alpha": 0.5}
                if len(runs) == 1:
                    style["color"] = "0.4"
            else:
                style |= {"linewidth": 2.2, "markersize": 5}
                if len(values) < 40:
                    style["marker"] = "o"
            ax.plot(run.x_values(kind), values, **style)
            values = values[np.isfinite(values)]
            if len(values):
                # The first steps fall from ln(vocabulary), and would flatten the rest.
                start = min(max(1, len(values) // 20), 500, len(values) - 1)
                highs.append(values[start])
                lows.append(values.min())
    # GPT-2's loss is of FineWeb-Edu: on other data it would mean nothing.
    is_fineweb_edu = all(run.about.get("dataset") == "fineweb-edu" for run in runs)
    if all_gpt2_tokens(runs) and is_fineweb_edu:
        draw_baseline(ax, GPT2_LOSS, "GPT-2 124M val", align="right")
        highs.append(GPT2_LOSS)  # a label outside of the axes would push them together
        lows.append(GPT2_LOSS)
    if highs:
        low = min(lows)
        high = max(highs)
        margin = 0.06 * (high - low) + 0.02
        ax.set_ylim(low - margin, high + margin)
    ax.set(title="loss", ylabel="nats per token")


@dataclasses.dataclass
class Curve:
    """A panel with one value of the records of a kind."""

    kind: str
    key: str
    title: str
    ylabel: str
    scale: float = 1.0
    log: bool = False
    has_outliers: bool = False  # leave out the first step, and zoom in on 96% of the others
    chance: float | None = None
    published: tuple = ()  # (score, name) of models to compare with

    def draw(self, ax, runs):
        shown = [np.empty(0)]
        for run in runs:
            if not run.has(self.kind, self.key):
                continue
            # Values of every step are smoothed; the others are few, and get markers.
            values = run.values(self.kind, self.key) * self.scale
            if self.has_outliers:
                values[:1] = math.nan
                shown.append(values[np.isfinite(values)])
            style = {"color": run.color, "label": run.name}
            if self.kind == "train":
                values = smooth(values, max(1, len(values) // 200))
                style["linewidth"] = 1.2
            else:
                style |= {"marker": "o", "markersize": 3}
            ax.plot(run.x_values(self.kind), values, **style)
        if self.chance is not None:
            draw_baseline(ax, self.chance, "chance", align="right")
        if all_gpt2_tokens(runs):
            for score, name in self.published:
                draw_baseline(ax, score, name)
        shown = np.concatenate(shown)
        if len(shown):
            low, high = np.percentile(shown, (2, 98))
            ax.set_ylim(0.9 * low, 1.1 * high)
        # The axes: a log scale for norms, powers of ten for rates.
        ax.set(title=self.title, ylabel=self.ylabel)
        if self.log:
            ax.set_yscale("log")
        elif self.kind == "train":
            ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
        else:
            ax.margins(y=0.12)


CURVES = [
    Curve("val", "accuracy", "accuracy", "share of tokens predicted"),
    Curve("hella", "value", "HellaSwag", "acc_norm", chance=0.25, published=HELLASWAG),
    Curve("ewok", "value", "EWoK", "context score", chance=0.5),
    Curve("train", "lr", "learning rate", "AdamW's lr"),
    Curve("train", "grad_norm", "gradient norm", "norm before clipping", log=True),
    Curve("train", "tokens_per_second", "throughput", "thousand tokens/s", 1e-3, has_outliers=True),
]


def choose_panels(runs):
    """The functions (ax, runs) that draw what the runs have logged, in order."""
    kinds = {kind for run in runs for kind in run.rows}
    panels = []
    if "train" in kinds or "val" in kinds:
        panels.append(draw_loss)
    for curve in CURVES:
        if any(run.has(curve.kind, curve.key) for run in runs):
            panels.append(curve.draw)
    known = {"train", "val"} | {curve.kind for curve in CURVES}
    for kind in sorted(kinds - known):  # the user's own eval
        panels.append(Curve(kind, "value", kind, "score").draw)
    return panels


def draw_runs(folders):
    """Draw the runs in some log folders into one figure."""
    # Read the runs first: errors are reported before matplotlib is imported, which takes a second.
    runs = []
    for folder, color in zip(folders, COLORS, strict=False):
        name = folder if len(folders) > 1 else ""
        runs.append(read_run(folder, name, color))
        print(f"{folder}: {summary(runs[-1])}")
    plt = import_pyplot()
    panels = choose_panels(runs)
    num_columns = min(2, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    size = (5.6 * num_columns, 3.5 * num_rows)
    fig = plt.figure(figsize=size, layout="constrained")
    grid = fig.add_gridspec(num_rows, num_columns)
    for i, draw in enumerate(panels):
        # The last one fills its row.
        row, column = divmod(i, num_columns)
        ax = fig.add_subplot(grid[row, column:] if i == len(panels) - 1 else grid[row, column])
        draw(ax, runs)
        ax.set_xlabel("hours of training" if x == "hours" else x)
        if x == "tokens":
            ax.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))  # 1M
        ax.locator_params(axis="x", nbins=5, integer=x == "step")
        # A single unnamed curve needs no legend.
        labels = ax.get_legend_handles_labels()[1]
        if labels:
            ax.legend(ncols=2 if len(labels) > 4 else 1)
    return fig


def main():
    check_choice("x", x, ("step", "tokens", "hours"))
    folders = [folder.strip() for folder in logs.split(",") if folder.strip()]
    if os.path.isdir(logs):
        folders = [logs]  # its name has a comma
    if not 0 < len(folders) <= len(COLORS):
        raise UserError(f"--logs={logs}: expected 1 to {len(COLORS)} folders, separated by commas")
    save(draw_runs(folders), out or f"{folders[0]}/plot.png")


if __name__ == "__main__":
    with run_as_script():
        configure(globals())
        main()
