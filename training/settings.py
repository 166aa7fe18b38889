"""The settings of a run: from a preset, or from the run that is resumed; and what makes no sense.

Settings are dicts, {name: value}. overrides are those on the command line, presets the trainer's
PRESETS; preset_settings(name) returns all settings of the trainer's file with those of a preset.
"""

import shlex

from configurator import check_choice, check_min
from data.shards import has_shards
from script import UserError
from training.checkpoint import load_resume, run_settings
from training.optimizers import OPTIMIZERS
from training.schedule import check_schedule, rescale_schedule

DEMO_DIR = "demo_data"
AT_LEAST_1 = (
    "n_layer", "n_head", "n_embd", "B", "T", "total_batch_size",
    "val_tokens", "sample_tokens", "max_bad_steps",
)  # fmt: skip
MINIMUM = {"plot_every": -1, "resume_step": -1, **dict.fromkeys(AT_LEAST_1, 1)}


def resolve_settings(overrides, presets, preset_settings, immutable):
    """The settings below the command line's: the resumed run's, or the preset's.

    immutable: the names of settings that a resumed run cannot change.
    """
    # --preset=auto means the same as no preset.
    if overrides.get("preset") == "auto":
        del overrides["preset"]
    name = overrides.get("preset", "auto")
    check_choice("preset", name, ("auto", *presets))
    # Resuming: the run's own settings replace all defaults.
    given = {**preset_settings("gpt2"), **overrides}
    if given["resume"] or given["resume_step"] >= 0:
        saved = load_resume(given["log_dir"], given["resume_step"], mmap=True)
        if saved:
            return resolve_resumed_settings(saved, overrides, preset_settings, immutable)

    # Without shards, `python train_gpt2.py` is a demo.
    is_demo = name in ("auto", "tiny") and "data_dir" not in overrides
    is_demo = is_demo and not has_shards(given["data_dir"])
    if name == "auto":
        name = "tiny" if is_demo else "gpt2"
    settings = {**presets[name], "preset": name}
    if is_demo:
        settings["data_dir"] = DEMO_DIR
    # Evaluating the latest checkpoint of a run, on its own data.
    if given["eval_only"] and given["ckpt"] in ("latest", "best") and "data_dir" not in overrides:
        saved = load_resume(given["log_dir"], mmap=True)
        if saved:
            settings["data_dir"] = saved["settings"]["data_dir"]  # the data it was trained on
    # Warmup, cooldown and weight decay scale with max_steps.
    defaults = preset_settings(name)
    if "optimizer" in overrides:
        defaults["optimizer"] = overrides["optimizer"]
        check_choice("optimizer", defaults["optimizer"], tuple(OPTIMIZERS))
    new_max_steps = overrides.get("max_steps", defaults["max_steps"])
    return {**settings, **rescale_schedule(defaults, new_max_steps, overrides)}


def resolve_resumed_settings(saved, overrides, preset_settings, immutable):
    """The settings of the run in resume.pt's dict, rescaled if overrides change its length.

    Raises UserError if overrides change an immutable setting, or if the trainer's default of a
    setting has changed since the run started and the command line does not say which to use.
    """
    old = saved["settings"]
    defaults = preset_settings(old["preset"])
    # A setting that did not exist when the run started has today's default.
    settings = {key: old.get(key, default) for key, default in defaults.items()}
    for key in immutable:
        if overrides.get(key, settings[key]) != settings[key]:
            raise UserError(
                f"--{key}={overrides[key]}: the run to resume has {settings[key]}; leave it out"
            )
    # An edited default could mean that this run should change, or that the next one should: ask.
    changed = []
    for key, default in defaults.items():
        known = (saved["defaults"].get(key, default), settings[key])
        if key not in overrides and default not in known:
            changed.append(key)
    if changed:
        new = ", ".join(f"{key}={defaults[key]}" for key in changed)
        keep = " ".join(f"--{key}={shlex.quote(str(settings[key]))}" for key in changed)
        raise UserError(
            f"train_gpt2.py has other defaults now: {new}; choose them, or what the run has: {keep}"
        )

    settings = {**run_settings(settings), "resume": True}
    new_max_steps = overrides.get("max_steps", settings["max_steps"])
    if settings["max_steps"] == 0:  # it has no proportions to keep: take the preset's
        return {**settings, **rescale_schedule(defaults, new_max_steps, overrides)}
    # The warmup is over, or under way: only the cooldown still changes.
    rescaled = rescale_schedule(settings, new_max_steps, overrides)
    return {**settings, "cooldown_steps": rescaled["cooldown_steps"]}


def check_settings(s):
    """Raise UserError if a setting makes no sense."""
    # Numbers have a lower limit.
    for key, value in s.items():
        if not isinstance(value, str):
            check_min(MINIMUM.get(key, 0), **{key: value})
    if s["seed"] >= 1 << 63:
        raise UserError(f"--seed={s['seed']}: must be less than 2^63")
    check_choice("optimizer", s["optimizer"], tuple(OPTIMIZERS))
    check_choice("schedule", s["schedule"], ("cosine", "wsd"))
    check_schedule(s)
    if s["ckpt"] != "latest" and not s["eval_only"]:
        hint = "--init_from= starts from weights, --resume_step= goes back"
        raise UserError(f"--ckpt= is for --eval_only=True; {hint}")
    if s["min_lr"] > s["max_lr"]:
        raise UserError(
            f"--min_lr={s['min_lr']}: is more than --max_lr={s['max_lr']}; use "
            f"--min_lr={s['max_lr'] / 10:g}"
        )
    if max(s["beta1"], s["beta2"]) >= 1:
        raise UserError(f"--beta1={s['beta1']} --beta2={s['beta2']}: must be less than 1")
