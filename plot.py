"""Pictures of a run: its log as curves, or what its position embeddings have learned.

    python plot.py                                    # log/log.txt, log/metrics.jsonl -> log/plot.png
    python plot.py --logs=log,log2 --x=tokens         # several runs in one picture
    python plot.py --what=wpe --ckpt                  # position embeddings -> log/wpe.png

Also reads the log.txt of build-nanogpt, and a log that is still being written. Lines to compare with are drawn where
they apply: for models of GPT-2 tokens, the validation loss for FineWeb-Edu alone. They are GPT-2 124M's loss of 3.2924
on build-nanogpt's validation shard and HellaSwag acc_norm of 29.46, as https://github.com/karpathy/build-nanogpt has
measured them, and GPT-3 124M's 33.7 of the GPT-3 paper.
"""

import functools
import json
import math
import os
import re
import sys

from configurator import configure
from shards import write_whole

import numpy as np

# -- settings: override any with --key=value --------------------------------------
logs = "log"  # log folders of runs, separated by commas
out = ""  # the picture; empty: plot.png or wpe.png in the first of the folders
x = "step"  # the horizontal axis: step, tokens or hours
what = "run"  # run or wpe
ckpt = "latest"  # of --what=wpe: latest (in the folder), a .pt file, gpt2 ... gpt2-xl, a Hugging Face folder

GPT2_LOSS = 3.2924
HELLASWAG = ((0.2946, "GPT-2 124M"), (0.337, "GPT-3 124M"))
lines_of = functools.partial(open, encoding="utf-8", errors="replace")
LINE = r"^(\d+) (\w+) (-?(?:[\d.]+(?:e[-+]?\d+)?|inf|nan))\n"  # a record in log.txt
COLORS = ["#1f5fa8", "#d1602b", "#2d8a57", "#8a4fa3", "#8a6d1b", "#c23b6b"]


def read_run(folder):
    """(run, about): the records of a log folder, and the dict of its run record.

    run is {kind: {"step": array, key: array, ..., "rows": the records as dicts}}. Values that a record lacks, or that
    are not numbers, are nan; what is no record is left out. A file may be what nanoGPT has printed. Exits if there is
    no log.
    """
    records = {}  # {kind: {step: {key: value}}}
    path = folder if os.path.isfile(folder) else os.path.join(folder, "log.txt")
    try:
        for line in lines_of(path):
            for step, kind, value in re.findall(LINE, line) or spoken(line):
                records.setdefault(kind, {})[int(step)] = {"value": float(value)}
    except OSError as e:
        sys.exit(f"{path}: cannot be read ({e.strerror}); --logs= names the folders of runs")
    if not records:
        sys.exit(f"{path}: is empty; python train_gpt2.py writes it")
    about = {"tokenizer": "gpt2", "dataset": "fineweb-edu"}  # build-nanogpt's, which has only a log.txt
    path = os.path.join(folder, "metrics.jsonl")
    for line in lines_of(path) if os.path.isfile(path) else ():
        try:
            record = json.loads(line)
            kind, step = record["kind"], record["step"]
            if kind == "run":
                about = record
            elif step in records.get(kind, {}):
                records[kind][step] |= record
        except (ValueError, KeyError, TypeError):  # a line that is still being written, or somebody's own
            continue
    run = {}
    for kind, by_step in records.items():
        steps = sorted(by_step)
        rows = [by_step[step] for step in steps]
        keys = {key for row in rows for key, value in row.items() if isinstance(value, (int, float))}
        run[kind] = {key: np.array([row.get(key, np.nan) for row in rows], dtype=float) for key in keys}
        run[kind] |= {"step": np.array(steps), "rows": rows}
    return run, about


def spoken(line):
    """The records in a line that nanoGPT's train.py prints."""
    match = re.match(r"iter (\d+): loss ([\d.]+)|step (\d+): train loss [\d.]+, val loss ([\d.]+)", line)
    if match is None:
        return []
    return [(match[1], "train", match[2]) if match[1] else (match[3], "val", match[4])]


def axis(run, kind):
    """Where the records of a kind stand on the horizontal axis."""
    steps, train = run[kind]["step"], run.get("train", {})
    if x == "step":
        return steps
    if "tokens" not in train:
        sys.exit(f"--x={x}: choose step; tokens and hours are for logs with a metrics.jsonl")
    values = train["tokens"] if x == "tokens" else np.nancumsum(train["seconds"]) / 3600
    # A record of step s other than train was made before the update of s: behind step s - 1.
    return np.interp(steps - (kind != "train"), train["step"], values, left=0)


def smooth(values, window):
    """The mean of the last `window` values, of those that are numbers."""
    known = np.isfinite(values)
    sums = np.concatenate(([0.0], np.where(known, values, 0).cumsum()))
    counts = np.concatenate(([0], known.cumsum()))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[start]) / (counts[end] - counts[start])


def pyplot():
    """matplotlib.pyplot, in this project's style; exits if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("plotting needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 11, "axes.titlesize": 12, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 9, "legend.edgecolor": "none"}
    plt.rcParams.update(style)
    return plt


def save(fig, path):
    """Write the picture, whole or not at all: somebody may be looking at the last one."""
    kind = os.path.splitext(path)[1][1:] or "png"
    try:
        write_whole(path, lambda f: fig.savefig(f, dpi=110, format=kind))
    except (OSError, ValueError) as e:
        sys.exit(f"--out={path}: cannot write this picture ({e})")
    print(path)


# -- a run --------------------------------------------------------------------------
def baseline(ax, y, name, right=False):
    """A dashed line to compare with, and its name on it."""
    ax.axhline(y, color="0.35", linestyle="--", linewidth=1)
    side = {"x": 0.99, "ha": "right"} if right else {"x": 0.01, "ha": "left"}
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
    ax.text(**side, y=y, s=f"{name} {y:g}", va="bottom", fontsize=9, transform=ax.get_yaxis_transform(), bbox=box)


def draw_loss(ax, runs):
    """Training and validation loss of runs: [(name, run, about)], as read_run has them."""
    highs, lows = [], []
    for (name, run, _), color in zip(runs, COLORS, strict=False):
        for kind in (kind for kind in ("train", "val") if kind in run):
            at, line, look = axis(run, kind), run[kind]["value"], {"linewidth": 2, "markersize": 4}
            if kind == "val" and len(line) < 40:
                look["marker"] = "o"
            if kind == "train":
                window, look = max(1, len(line) // 200), {"linewidth": 1, "alpha": 0.7}
                if window > 1:
                    ax.plot(at, line, color=color, alpha=0.15, linewidth=0.5)
                line = smooth(line, window)
            ax.plot(at, line, color=color, label=f"{name} {kind}".strip(), **look)
            line = line[np.isfinite(line)]
            if len(line):
                # The first steps fall from ln(vocabulary): they would press the rest flat.
                highs.append(line[min(max(1, len(line) // 20), 500, len(line) - 1)])
                lows.append(line.min())
    if of_gpt2(runs) and all(about.get("dataset") == "fineweb-edu" for _, _, about in runs):
        baseline(ax, GPT2_LOSS, "GPT-2 124M val", right=True)
        highs, lows = [*highs, GPT2_LOSS], [*lows, GPT2_LOSS]  # a label outside of the axes would push them together
    if highs:
        low, high = min(lows), max(highs)
        ax.set_ylim(low - 0.06 * (high - low) - 0.02, high + 0.06 * (high - low) + 0.02)
    ax.set(title="loss", ylabel="nats a token")


def of_gpt2(runs):
    """Whether all runs have GPT-2's tokens, so that the published numbers may stand beside them."""
    return all(about.get("tokenizer") == "gpt2" for _, _, about in runs)


def draw_curve(ax, runs, kind, key, title, ylabel, scale=1.0, log=False, chance=None, published=()):
    """One quantity of the records of a kind; published: (score, name) of models to compare with."""
    for (name, run, _), color in zip(runs, COLORS, strict=False):
        if key in run.get(kind, {}):
            values = run[kind][key] * scale
            if kind == "train":
                values, look = smooth(values, max(1, len(values) // 200)), {"linewidth": 1.2}
            else:
                look = {"marker": "o", "markersize": 3}
            ax.plot(axis(run, kind), values, color=color, label=name, **look)
    if chance is not None:
        baseline(ax, chance, "chance", right=True)
    for score, model in published if of_gpt2(runs) else ():
        baseline(ax, score, model)
    ax.set(title=title, ylabel=ylabel)
    if log:
        ax.set_yscale("log")
    elif kind == "train":
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
    else:
        ax.margins(y=0.12)


CURVES = [  # the panels of one quantity: kind, key, title, unit, what else draw_curve takes
    ("val", "accuracy", "accuracy", "share of tokens predicted", {}),
    ("hella", "value", "HellaSwag", "acc_norm", {"chance": 0.25, "published": HELLASWAG}),
    ("ewok", "value", "EWoK", "context score", {"chance": 0.5}),
    ("train", "lr", "learning rate", "AdamW's lr", {}),
    ("train", "grad_norm", "gradient norm", "norm before clipping", {"log": True}),
    ("train", "tokens_per_second", "throughput", "thousand tokens/s", {"scale": 1e-3}),
]


def domains(runs):
    """The names of the EWoK domains that any record of the runs has."""
    rows = [row for _, run, _ in runs for row in run.get("ewok", {}).get("rows", [])]
    return sorted({domain for row in rows for domain in row.get("by_Domain", {})})


def draw_domains(ax, runs):
    """The last EWoK scores by domain, a bar for each run."""
    names = domains(runs)
    height = 0.8 / len(runs)
    for i, ((name, run, _), color) in enumerate(zip(runs, COLORS, strict=False)):
        last = run.get("ewok", {"rows": [{}]})["rows"][-1].get("by_Domain", {})
        scores = [last.get(d, {}).get("context", np.nan) for d in names]
        at = np.arange(len(names)) + (i - (len(runs) - 1) / 2) * height
        ax.barh(at, scores, height * 0.9, color=color, label=name)
    ax.axvline(0.5, color="0.4", linestyle=":", linewidth=1)
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.invert_yaxis()
    ax.set(title="EWoK by domain, at the end (chance 0.5)", xlabel="context score", xlim=(0, 1))


def draw_run():
    folders = [folder.strip() for folder in logs.split(",") if folder.strip()]
    if not 0 < len(folders) <= len(COLORS):
        sys.exit(f"--logs={logs}: expected 1 to {len(COLORS)} folders, separated by commas")
    if x not in ("step", "tokens", "hours"):
        sys.exit(f"--x={x}: choose step, tokens or hours")
    runs = []
    for folder in folders:
        run, about = read_run(folder)
        runs.append((folder if len(folders) > 1 else "", run, about))
        print(f"{folder}: {summary(run)}")
    plt = pyplot()

    kinds = {kind for _, run, _ in runs for kind in run}
    panels = [draw_loss] if kinds & {"train", "val"} else []
    for kind, key, title, unit, more in CURVES:
        if any(key in run.get(kind, {}) for _, run, _ in runs):
            panels.append(functools.partial(draw_curve, kind=kind, key=key, title=title, ylabel=unit, **more))
        if kind == "ewok" and domains(runs):
            panels.append(draw_domains)
    for kind in sorted(kinds - {"train", "val", *(kind for kind, *_ in CURVES)}):  # an eval of your own
        panels.append(functools.partial(draw_curve, kind=kind, key="value", title=kind, ylabel="score"))
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (5.6 * columns, 3.5 * rows)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax, draw in zip(axes.flat, panels, strict=False):
        draw(ax, runs)
        if draw is not draw_domains:
            ax.set_xlabel("hours of training" if x == "hours" else x)
            if x == "tokens":
                ax.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))  # 250k, 1M
            ax.locator_params(axis="x", nbins=5, integer=x == "step")
        if names := ax.get_legend_handles_labels()[1]:
            ax.legend(ncols=1 + (len(names) > 4))
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    save(fig, out or os.path.join(folders[0] if os.path.isdir(folders[0]) else os.path.dirname(folders[0]), "plot.png"))


def summary(run):
    """What people read first: best validation loss, last HellaSwag and EWoK, tokens, hours."""
    parts = []
    val = run.get("val", {}).get("value", np.array([]))
    if np.isfinite(val).any():
        best = np.nanargmin(val)
        parts.append(f"best val loss {val[best]:.4f} at step {run['val']['step'][best]}")
    for kind, name in (("hella", "HellaSwag"), ("ewok", "EWoK")):
        if kind in run:
            parts.append(f"{name} {run[kind]['value'][-1]:.4f}")
    train = run.get("train", {})
    if "tokens" in train:
        parts.append(f"{np.nanmax(train['tokens']):,.0f} tokens")
        parts.append(f"{np.nansum(train['seconds']) / 3600:.2f} hours of training")
    elif train:
        parts.append(f"{train['step'][-1] + 1} steps, train loss {train['value'][-1]:.4f}")
    return ", ".join(parts)


# -- position embeddings ------------------------------------------------------------
def draw_wpe():
    from model import load_model

    folder = logs.split(",")[0].strip()
    model, _ = load_model(ckpt, "cpu", folder)
    if model.config.pos != "learned":
        sys.exit(f"--ckpt={ckpt}: has no position embeddings, its positions are pos={model.config.pos}")
    wpe = model.transformer.wpe.weight.detach().numpy()  # (block_size, n_embd)
    plt = pyplot()
    fig, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    limit = np.percentile(abs(wpe), 99)
    image = axes[0].imshow(wpe, aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
    axes[0].set(title="position embeddings", xlabel="channel", ylabel="position")
    fig.colorbar(image, ax=axes[0], label="value")
    strongest = np.argsort(-wpe.std(axis=0), kind="stable")[:4]
    for channel, color in zip(strongest, COLORS, strict=False):
        axes[1].plot(wpe[:, channel], color=color, linewidth=1, label=f"channel {channel}")
    axes[1].set(title="the four channels that vary most", xlabel="position", ylabel="value")
    axes[1].legend()
    unit = wpe / np.maximum(np.linalg.norm(wpe, axis=1, keepdims=True), 1e-12)
    image = axes[2].imshow(unit @ unit.T, cmap="viridis", vmin=-1, vmax=1, interpolation="nearest")
    axes[2].set(title="cosine similarity of positions", xlabel="position", ylabel="position")
    fig.colorbar(image, ax=axes[2], label="cosine")
    for ax in (axes[0], axes[2]):
        ax.grid(False)
    save(fig, out or os.path.join(folder if os.path.isdir(folder) else "", "wpe.png"))


def main():
    if what not in ("run", "wpe"):
        sys.exit(f"--what={what}: choose run or wpe")
    draw_run() if what == "run" else draw_wpe()


if __name__ == "__main__":
    configure(globals())
    main()
