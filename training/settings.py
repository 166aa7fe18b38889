"""The settings of a run, from a preset or from the run that is resumed; and checks of them.

Settings are dicts, {name: value}. overrides are those on the command line; preset_settings(name)
returns all settings of the trainer's file with those of a preset.
"""

import math
import os
import shlex

from configurator import check_choice, check_min
from data.loader import parse_mixture
from data.shards import has_shards, read_meta
from script import UserError
from training.checkpoint import COMMAND_SETTINGS, load_resume
from training.optimizers import OPTIMIZERS
from training.presets import PRESETS
from training.schedule import check_schedule, rescale_schedule, scale_max_lr

DEMO_DIR = "demo_data"
AT_LEAST_1 = (
    "n_layer", "n_head", "n_embd", "B", "T", "total_batch_size",
    "val_tokens", "sample_tokens", "max_bad_steps",
)  # fmt: skip
SCHEDULES = ("cosine", "wsd")
# All numbers must be at least 0, except these.
MINIMUM = {"plot_every": -1, "resume_step": -1, **dict.fromkeys(AT_LEAST_1, 1)}


def resolve_settings(overrides, preset_settings, immutable):
    """All settings of a command: those of the resumed run or of a preset, and then the overrides.

    Later ones win: the trainer's defaults, the preset, what --depth and other scaling make of it,
    the command line. immutable: the names of settings that a resumed run cannot change.
    """
    name = overrides.get("preset", "auto")
    check_choice("preset", name, ("auto", *PRESETS))
    # What no preset has (resume, log_dir, eval_only, depth) can be read from any.
    merged = {**preset_settings("gpt2"), **overrides}
    # A resumed run has its own settings.
    if merged["resume"] or merged["resume_step"] >= 0:
        saved = load_resume(merged["log_dir"], merged["resume_step"], mmap=True)
        if saved:
            return resumed_settings(saved, overrides, preset_settings, immutable)

    # Without shards, `python train_gpt2.py` is a demo.
    is_demo = name in ("auto", "tiny") and "data_dir" not in overrides
    is_demo = is_demo and not has_shards(merged["data_dir"])
    if name == "auto":
        name = "tiny" if is_demo else "gpt2"
    settings = preset_settings(name)
    if is_demo:
        settings["data_dir"] = DEMO_DIR
    # The latest checkpoint of a run is evaluated on the data it was trained on.
    if merged["eval_only"] and merged["ckpt"] in ("latest", "best"):
        saved = load_resume(merged["log_dir"], mmap=True)
        if saved:
            settings["data_dir"] = saved["settings"]["data_dir"]
    # One dial sets the size, the batch and the length.
    plan = {}
    if merged["depth"] > 0:
        if name != "modern":
            raise UserError(f"--depth={merged['depth']}: needs --preset=modern")
        plan = plan_run({**settings, **overrides}, overrides)
    # Warmup, cooldown and weight decay scale with max_steps, the learning rate with the width.
    settings["optimizer"] = overrides.get("optimizer", settings["optimizer"])
    check_choice("optimizer", settings["optimizer"], tuple(OPTIMIZERS))
    target = {**settings, **plan, **overrides}
    settings["max_lr"] = scale_max_lr(settings, target["n_embd"])
    rescaled = rescale_schedule(settings, target["max_steps"], overrides)
    return {**settings, **plan, **rescaled, **overrides, "preset": name}


def plan_run(settings, overrides):
    """The size, batch and length of a run of `modern` with settings["depth"] blocks.

    Width 64 per block and heads of 128, as in nanochat (of 64 below a width of 256). 20 tokens per
    parameter (https://arxiv.org/abs/2203.15556) of the blocks' matrices and the output layer, the
    parameters whose scaling law is cleanest in nanochat. The batch grows with tokens^0.383
    (https://arxiv.org/abs/2505.13738) from 524,288 tokens at depth 12. overrides are kept.
    """
    folder = next(iter(parse_mixture(settings["data_dir"])))
    vocab_size = (read_meta(folder) or {}).get("vocab_size", 50257)

    def size(depth, n_embd=None):
        head_size = 64 if (n_embd or 64 * depth) < 256 else 128
        n_embd = n_embd or math.ceil(64 * depth / head_size) * head_size
        return {"n_layer": depth, "n_embd": n_embd, "n_head": max(1, n_embd // head_size)}

    def count_tokens(s):
        return 20 * (12 * s["n_layer"] * s["n_embd"] ** 2 + vocab_size * s["n_embd"])

    # The batch of a shorter run is smaller, relative to that of `modern`.
    plan = {**size(settings["depth"], overrides.get("n_embd")), **overrides}
    tokens = max(1, count_tokens(plan))
    batch = 524_288 * (tokens / count_tokens(size(12))) ** 0.383
    plan.setdefault("total_batch_size", 2 ** round(math.log2(batch)))
    plan.setdefault("max_steps", tokens // max(1, plan["total_batch_size"]))
    return plan


def resumed_settings(saved, overrides, preset_settings, immutable):
    """All settings of a command that resumes the run in resume.pt's dict.

    Raises UserError if overrides change an immutable setting, or if the trainer's default of a
    setting has changed since the run started and the command line does not say which to use.
    """
    # A setting that did not exist when the run started has today's default.
    old = saved["settings"]
    defaults = preset_settings(old["preset"])
    settings = {key: old.get(key, default) for key, default in defaults.items()}
    check_choice("optimizer", settings["optimizer"], tuple(OPTIMIZERS))
    check_choice("schedule", settings["schedule"], SCHEDULES)
    if overrides.get("preset") == "auto":
        overrides = {**overrides, "preset": old["preset"]}
    for key in immutable:
        if overrides.get(key, settings[key]) != settings[key]:
            raise UserError(
                f"--{key}={overrides[key]}: the run to resume has {settings[key]}; leave it out"
            )
    # Paths are as they were given, perhaps relative to another folder.
    for folder in parse_mixture(old["data_dir"]):
        is_gone = not os.path.isabs(folder) and not os.path.exists(folder)
        if is_gone and "data_dir" not in overrides and folder != DEMO_DIR:
            raise UserError(
                f"the run to resume has --data_dir={old['data_dir']}, which is not in "
                f"{os.getcwd()}: resume it where it was started, or say where it is now"
            )
    # An edited default could be meant for this run, or for the next one: ask.
    edited = []
    for key, default in defaults.items():
        default_at_start = saved["defaults"].get(key, default)
        if key not in overrides and default != default_at_start and default != settings[key]:
            edited.append(key)
    if edited:
        new = " ".join(f"--{key}={shlex.quote(str(defaults[key]))}" for key in edited)
        keep = " ".join(f"--{key}={shlex.quote(str(settings[key]))}" for key in edited)
        raise UserError(
            f"the defaults in train_gpt2.py have changed: pass {new}, or {keep} to keep the run's"
        )

    # Another length. A run of 0 steps gets the schedule of its preset. In any other run, only the
    # cooldown changes, since the warmup is over or under way.
    max_steps = overrides.get("max_steps", settings["max_steps"])
    if settings["max_steps"] == 0:
        settings.update(rescale_schedule(defaults, max_steps, overrides))
    else:
        rescaled = rescale_schedule(settings, max_steps, overrides)
        settings["cooldown_steps"] = rescaled["cooldown_steps"]
    command = {key: preset_settings("gpt2")[key] for key in COMMAND_SETTINGS}
    return {**settings, **command, **overrides, "resume": True}


def check_settings(s):
    """Raise UserError if a setting makes no sense."""
    for key, value in s.items():
        if not isinstance(value, str):
            check_min(MINIMUM.get(key, 0), **{key: value})
    # A seed must fit a 64-bit integer.
    if s["seed"] >= 1 << 63:
        raise UserError(f"--seed={s['seed']}: must be less than 2^63")
    check_choice("optimizer", s["optimizer"], tuple(OPTIMIZERS))
    check_choice("schedule", s["schedule"], SCHEDULES)
    check_schedule(s)
    # nanoGPT's values.
    if s["init_from"] in ("resume", "scratch"):
        raise UserError(
            f"--init_from={s['init_from']}: --resume continues the run in log_dir; without "
            "--init_from= the weights are fresh"
        )
    # Settings that are each fine, but not together.
    if s["ckpt"] != "latest" and not s["eval_only"]:
        hint = "--init_from= starts from weights, --resume_step= goes back"
        raise UserError(f"--ckpt= is for --eval_only=True; {hint}")
    if s["min_lr"] > s["max_lr"]:
        raise UserError(
            f"--min_lr={s['min_lr']} is more than --max_lr={s['max_lr']}; use "
            f"--min_lr={s['max_lr'] / 10:g}"
        )
    if max(s["beta1"], s["beta2"]) >= 1:
        raise UserError(f"--beta1={s['beta1']} --beta2={s['beta2']}: must be less than 1")
