"""The learning rate of each step of a run, and the settings that scale with its length.

After a linear warmup to max_lr:

cosine    down to min_lr along half a cosine, as in the GPT-3 paper
wsd       warmup, stable, decay: max_lr, then linearly down to min_lr in the last cooldown_steps
          (https://arxiv.org/abs/2404.06395)

If a run is made longer after its learning rate has fallen, it warms up again from there to the
rate of the longer schedule (https://arxiv.org/abs/2403.08763). `s` is always a dict of settings.
"""

import math

from script import UserError
from training.optimizers import OPTIMIZERS


def get_lr(s, step, rewarm_from=None):
    """The learning rate of a step.

    rewarm_from: [step, learning rate] where the run was made longer, or None, see extend_run().
    """
    max_steps = s["max_steps"]
    # 1. Linear warmup: the first step has a rate above 0.
    if step < s["warmup_steps"]:
        return s["max_lr"] * (step + 1) / s["warmup_steps"]
    # 2. After the end of the schedule.
    if step >= max_steps:
        return s["min_lr"]
    # 3. In between: how far from min_lr (0) to max_lr (1).
    if s["schedule"] == "cosine":
        decay_ratio = (step - s["warmup_steps"]) / (max_steps - s["warmup_steps"])
        coeff = 0.5 * (1 + math.cos(math.pi * decay_ratio))
    else:
        coeff = min(1, (max_steps - step) / max(1, s["cooldown_steps"]))
    lr = s["min_lr"] + coeff * (s["max_lr"] - s["min_lr"])
    # 4. After an extension, the rate may not jump.
    if rewarm_from:
        rewarm_step, rewarm_lr = rewarm_from
        ratio = (step - rewarm_step + 1) / max(1, s["warmup_steps"])
        lr = min(lr, rewarm_lr + (s["max_lr"] - rewarm_lr) * ratio)
    return lr


def rescale_schedule(s, max_steps, overrides):
    """Rescale warmup and cooldown in proportion to max_steps.

    The cooldown is shortened if a warmup on the command line (overrides) leaves less room. Muon's
    weight decay scales inversely: weights average over about 1 / (lr * weight_decay) steps, and a
    run half as long needs half of that, so twice the decay (nanochat;
    https://arxiv.org/abs/2405.13698). It grows to 0.2 at most, since larger values hurt short runs
    (4M parameters, 1M tokens).
    """
    # Keep the proportions of the schedule.
    warmup = -(-s["warmup_steps"] * max_steps // s["max_steps"])  # rounded up
    cooldown = s["cooldown_steps"] * max_steps // s["max_steps"]
    room = max(0, max_steps - overrides.get("warmup_steps", warmup))
    rescaled = {"warmup_steps": warmup, "cooldown_steps": min(cooldown, room)}
    if OPTIMIZERS[s["optimizer"]].scales_with_size and max_steps:
        # More weight decay in shorter runs.
        decay = s["weight_decay"] * s["max_steps"] / max_steps
        decay = min(decay, max(0.2, s["weight_decay"]))
        rescaled["weight_decay"] = float(f"{decay:.3g}")
    return rescaled


def scale_max_lr(s, n_embd):
    """The max_lr of a preset, whose settings are s, for a model of the width n_embd.

    With Muon it is proportional to n_embd^-0.5, as nanochat scales AdamW's rates. Search found 7e-3
    for a width of 192 and 5e-3 for 384; the rule, with 3.6e-3 at 768, gives 7.2e-3 and 5.1e-3 (6
    layers, dev/LOG.md). The other presets have GPT-3's table instead.
    """
    if not OPTIMIZERS[s["optimizer"]].scales_with_size:
        return s["max_lr"]
    return float(f"{s['max_lr'] * (s['n_embd'] / max(1, n_embd)) ** 0.5:.3g}")


def check_schedule(s):
    """Raise UserError if warmup and cooldown do not fit into the run."""
    max_steps = s["max_steps"]
    decay = 0 if s["schedule"] == "cosine" else s["cooldown_steps"]
    if s["warmup_steps"] + decay <= max(max_steps, 1):
        return
    given = f"--warmup_steps={s['warmup_steps']}"
    hint = f"--warmup_steps={max_steps // 25}"
    if decay:
        given += f" --cooldown_steps={decay}"
        hint += f" --cooldown_steps={max_steps // 10}"
    raise UserError(f"{given}: more than --max_steps={max_steps}; use {hint}")


def extend_run(run, old_settings):
    """Set up a re-warmup if a resumed Run is longer and its learning rate would jump up."""
    if run.settings["max_steps"] <= old_settings["max_steps"]:
        return
    old_lr = get_lr(old_settings, run.step, run.rewarm_from)
    if old_lr < get_lr(run.settings, run.step):
        run.rewarm_from = [run.step, old_lr]


def describe_schedule(s, rewarm_from=None):
    """The schedule of a run in one line."""
    max_steps = s["max_steps"]
    warmup = s["warmup_steps"]
    decay = max_steps - warmup if s["schedule"] == "cosine" else s["cooldown_steps"]
    stable = max_steps - warmup - decay
    line = f"{max_steps:,} steps, {s['schedule']}: "
    line += f"warmup {warmup:,}, stable {stable:,}, decay {decay:,}; max_lr {s['max_lr']:g}"
    if OPTIMIZERS[s["optimizer"]].scales_with_size:
        line += f", weight_decay {s['weight_decay']:g}"
    if rewarm_from:
        rewarm_step, rewarm_lr = rewarm_from
        line += f"; extended: rises again from {rewarm_lr:.1e} at step {rewarm_step}"
    return line
