"""The learning rate of each step of a run, linear warmup, then a schedule; and what else its length decides.

cosine    down to min_lr along half a cosine, as in the GPT-3 paper
wsd       warmup, stable, decay: max_lr, then linearly down to min_lr in cooldown_steps (https://arxiv.org/abs/2404.06395)
plateau   wsd whose decay begins when the validation loss has stalled

A run that is made longer, when its learning rate has gone down already, warms up again from where it is
(https://arxiv.org/abs/2403.08763) to what the longer schedule has. The settings come in a dict, as Run.settings has
them.
"""

import math
import sys


def get_lr(s, step, last_step, lengthened=None):
    """The learning rate of a step of a run with settings s that ends at last_step; lengthened: [step, its lr]."""
    if step < s["warmup_steps"]:
        return s["max_lr"] * (step + 1) / s["warmup_steps"]
    if step >= last_step:
        return s["min_lr"]
    if s["schedule"] == "cosine":
        ratio = (step - s["warmup_steps"]) / (last_step - s["warmup_steps"])
        height = 0.5 * (1 + math.cos(math.pi * ratio))
    else:
        height = min(1, (last_step - step) / max(1, s["cooldown_steps"]))
    lr = s["min_lr"] + height * (s["max_lr"] - s["min_lr"])
    if lengthened:
        at, then = lengthened
        lr = min(lr, then + (s["max_lr"] - then) * (step - at + 1) / max(1, s["warmup_steps"]))
    return lr


def stalled(losses, patience):
    """Whether the best of the last `patience` validation losses is no better, by 0.002, than the best before.

    It is the best of them that counts, so that a spike, or one lucky loss, decides nothing.
    """
    before, recent = losses[:-patience], losses[-patience:]
    return bool(before) and min(recent) > min(before) - 0.002


def keep_shares(s, max_steps, given):
    """The warmup and cooldown of settings that were made for another max_steps: as large a share of this one.

    The cooldown makes room for a warmup that is given. With Muon also the weight decay by which a weight forgets its
    past in as large a share of the run, 1 / (max_lr weight_decay) steps, as nanochat has it
    (https://arxiv.org/abs/2405.13698); but no more than 0.2, beyond which it made short runs worse (4M parameters, 1M
    tokens).
    """
    warmup, cooldown = s["warmup_steps"] * max_steps, s["cooldown_steps"] * max_steps
    shares = {"warmup_steps": -(-warmup // s["max_steps"]), "cooldown_steps": cooldown // s["max_steps"]}
    room = max(0, max_steps - given.get("warmup_steps", shares["warmup_steps"]))
    shares["cooldown_steps"] = min(shares["cooldown_steps"], room)
    if s["optimizer"] == "muon" and max_steps:
        decay = s["weight_decay"] * s["max_steps"] / max_steps
        shares["weight_decay"] = float(f"{min(decay, max(0.2, s['weight_decay'])):.3g}")
    return shares


def check_schedule(s):
    """Exit if the warmup and the decay do not fit the run."""
    decay = s["cooldown_steps"] if s["schedule"] != "cosine" else 0
    if s["warmup_steps"] + decay > max(s["max_steps"], 1):
        given, hint = f"--warmup_steps={s['warmup_steps']}", f"--warmup_steps={s['max_steps'] // 25}"
        if decay:
            given, hint = f"{given} --cooldown_steps={decay}", f"{hint} --cooldown_steps={s['max_steps'] // 10}"
        sys.exit(f"{given}: more than --max_steps={s['max_steps']}; use {hint}")


def lengthen(run, was):
    """Where a Run goes on with more max_steps than in `was`, its settings until now, see to its learning rate.

    A plateau that has ended has one again.
    """
    if run.settings["max_steps"] <= was["max_steps"]:
        return
    before = get_lr(was, run.step, min(was["max_steps"], run.last_step or was["max_steps"]), run.lengthened)
    if run.last_step and run.step >= run.last_step:
        run.last_step, run.val_losses = None, []
    if before < get_lr(run.settings, run.step, run.last_step or run.settings["max_steps"]):
        run.lengthened = [run.step, before]


def describe_schedule(s, lengthened=None):
    """The schedule of a run in a line."""
    decay = s["cooldown_steps"] if s["schedule"] != "cosine" else s["max_steps"] - s["warmup_steps"]
    stable = s["max_steps"] - s["warmup_steps"] - decay
    line = f"{s['max_steps']:,} steps, {s['schedule']}: "
    line += f"warmup {s['warmup_steps']:,}, stable {stable:,}, decay {decay:,}"
    if s["optimizer"] == "muon":
        line += f"; weight decay {s['weight_decay']:g}"
    if lengthened:
        at, then = lengthened
        line += f"; longer than it was: the learning rate rises again from {then:.1e}, from step {at} on"
    return line
