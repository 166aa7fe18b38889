"""The log folder of a run: its records, its checkpoints, and how a run that ended goes on from them.

log.txt         "<step> <kind> <value>" a line, kind train, val, hella or ewok
metrics.jsonl   one object a record, with everything else
exposure.jsonl  which tokens the model has seen, if the run keeps account of it
model_00250.pt  the model after 250 updates; resume.pt what else the run needs to go on from there

Both .pt files are written whole or not at all, the model first: resume.pt names a model that is there, at
any moment. A run that goes on drops the records behind resume.pt's step, since it makes them again.
"""

import glob
import json
import math
import os
import re
import sys

import torch

from parallel import divided_like
from shards import lock_folder, write_whole
from weights import load_checkpoint

RECORDS = ("log.txt", "metrics.jsonl", "exposure.jsonl")

# The settings that say what is learned: a resumed run keeps its own, but for those on the command line.
LEARNING = """seed n_layer n_head n_embd pos norm mlp qk_norm bias T total_batch_size max_steps warmup_steps
    max_lr min_lr optimizer schedule cooldown_steps patience weight_decay beta1 beta2 grad_clip dtype""".split()

# What the trainer puts into resume.pt; save() adds the list of checkpoints.
RESUME_KEYS = """step evaluated_step tokens exposed bad_steps last_step val_losses data settings defaults
    precision optimizers scaler rng""".split()


def model_path(log_dir, step):
    """The file of the model after so many updates."""
    return os.path.join(log_dir, f"model_{step:05d}.pt")


def load_resume(log_dir, mmap=False):
    """The dict in log_dir/resume.pt, None if there is none; exits if it is damaged or its model missing."""
    path = os.path.join(log_dir, "resume.pt")
    if not os.path.exists(path):
        return None
    saved = load_checkpoint(path, mmap)
    missing = set(RESUME_KEYS) - set(saved)
    if missing:
        sys.exit(f"{path}: not this trainer's, it has no {', '.join(sorted(missing))}")
    if not os.path.exists(model_path(log_dir, saved["step"])):
        sys.exit(f"{path}: goes with {model_path(log_dir, saved['step'])}, which is missing")
    return saved


def resumed_settings(saved, given, file_settings):
    """The settings of the saved run; exits if the command line, or the trainer's file, says what cannot be.

    given is what the command line says, file_settings(preset) what the trainer's file says now.
    """
    settings = saved["settings"]
    if given.get("preset", "auto") not in ("auto", settings["preset"]):
        sys.exit(f"--preset={given['preset']}: the run to resume has {settings['preset']}; leave it out")
    for key in ("n_layer", "n_head", "n_embd", "pos", "norm", "mlp", "qk_norm", "bias", "optimizer"):
        if given.get(key, settings[key]) != settings[key]:
            sys.exit(f"--{key}={given[key]}: the run to resume has {settings[key]}; leave it out")
    now = file_settings(settings["preset"])
    for key in LEARNING:
        if key not in given and now[key] not in (saved["defaults"].get(key, now[key]), settings[key]):
            sys.exit(f"train_gpt2.py has {key}={now[key]} now, the run {settings[key]}: choose with --{key}=")
    return {key: value for key, value in settings.items() if key not in ("log_dir", "resume")}


def changes(saved, given):
    """What the command line changes in a resumed run: " with key=value instead of ...", or nothing."""
    was = saved["settings"]
    changed = [key for key in LEARNING if given.get(key, was[key]) != was[key]]
    order = "; the rest of the epoch is read in another order" if {"seed", "T"} & set(changed) else ""
    changed = [f"{key}={given[key]} instead of {was[key]}" for key in changed]
    return f" with {', '.join(changed)}{order}" if changed else ""


def check_resumption(log_dir, saved, mixture, sources, precision):
    """Exit if the run has read other shards, or computed in another precision, where one is given."""
    now = describe_data(mixture, sources)
    if [weight for weight, _ in saved["data"]] != [weight for weight, _ in now]:
        sys.exit(f"--data_dir: the run in {log_dir} mixes its data otherwise; leave it out")
    for (_, read), (_, there), source in zip(saved["data"], now, sources, strict=True):
        if read != there[: len(read)]:
            sys.exit(f"{source.data_dir}: not the shards that the run in {log_dir} has read: it needs those")
    if precision not in (None, saved["precision"]):
        was, now = (name.removeprefix("torch.") for name in (saved["precision"], precision))
        sys.exit(f"the run in {log_dir} computes in {was}, --dtype=auto is {now} here: choose with --dtype=")


def describe_data(mixture, sources):
    """[weight, [[file, tokens] of each training shard]] of each source: enough to notice that it is another."""
    return [
        [str(weight), [[os.path.basename(path), size] for path, size in shards.train]]
        for weight, shards in zip(mixture.values(), sources, strict=True)
    ]


def restore_optimizers(log_dir, optimizers, states):
    """Load the optimizers' states, but for what the settings say; exits if they are another model's."""
    try:
        for optimizer, state in zip(optimizers, states, strict=True):
            now = [{k: g[k] for k in ("betas", "weight_decay") if k in g} for g in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for p, s in optimizer.state.items():
                if s.get("exp_avg", s.get("momentum_buffer")).shape != p.shape:
                    raise ValueError
                optimizer.state[p] = {key: divided_like(p, tensor) for key, tensor in s.items()}
            for group, settings in zip(optimizer.param_groups, now, strict=True):
                group.update(settings)
    except (ValueError, KeyError, AttributeError):
        sys.exit(f"{log_dir}/resume.pt: is not of the model beside it; both are needed to go on")


def check_finite(log_dir, step, finite):
    """Exit if a parameter is not finite, so that a broken model never takes the place of a good one."""
    if not finite:
        sys.exit(f"step {step}: the weights are no longer finite; nothing saved, {last_good(log_dir)}")


def last_good(log_dir):
    """Words for the end of an error: which checkpoint there is to go back to."""
    steps = checkpoint_steps(log_dir)
    return (
        f"the last good checkpoint is {model_path(log_dir, max(steps))}" if steps else "there is no checkpoint"
    )


def checkpoint_steps(log_dir):
    """The steps of the models in the folder, in no order."""
    names = [os.path.basename(path) for path in glob.glob(os.path.join(glob.escape(log_dir), "model_*.pt"))]
    return [int(match[1]) for match in (re.fullmatch(r"model_(\d+)\.pt", name) for name in names) if match]


def save_tensors(path, state):
    """torch.save, whole or not at all; raises the OSError of a disk that is full."""

    def write(f):
        try:
            torch.save(state, f)
        except RuntimeError as e:  # torch's, on top of what the disk said
            raise e.__context__ if isinstance(e.__context__, OSError) else e from None

    write_whole(path, write)


class LogDir:
    """The folder in the hands of the one process that writes to it.

    saved is the dict of resume.pt to go on from, None for a fresh start, which moves the files of an
    earlier run to old_1/ and so on; resume: whether a resume.pt would have been gone on from. Exits if
    another live run has the folder, or it cannot be written.
    """

    def __init__(self, path, saved=None, resume=False):
        self.path, self._files = path, {}
        try:
            self._lock = lock_folder(path)
            now = load_resume(path, mmap=True) if resume else None
            if (now or {}).get("step") != (saved or {}).get("step"):
                sys.exit(f"{path}/: another run has just saved there; --resume again goes on from that")
            for name in os.listdir(path):
                if re.fullmatch(r"(log\.txt|\w+\.jsonl|resume\.pt|model_\d+\.pt)\.tmp", name):
                    os.remove(os.path.join(path, name))  # of a run that died while it wrote
            if saved is None:
                self._set_aside()
            else:
                self._rewind(saved["step"], saved["evaluated_step"])
            # {step: validation loss, None if it was not measured} of the checkpoints
            self.checkpoints = {
                step: (saved or {}).get("checkpoints", {}).get(step) for step in checkpoint_steps(path)
            }
        except OSError as e:
            sys.exit(f"--log_dir={path}: cannot write there ({e.strerror})")

    def _set_aside(self):
        names = os.listdir(self.path)
        old = [
            name for name in names if name in (*RECORDS, "resume.pt") or re.fullmatch(r"model_\d+\.pt", name)
        ]
        if old:
            n = 1
            while os.path.exists(os.path.join(self.path, f"old_{n}")):
                n += 1
            aside = os.path.join(self.path, f"old_{n}")
            os.makedirs(aside)
            for name in old:
                os.rename(os.path.join(self.path, name), os.path.join(aside, name))
            print(f"{self.path}/ held an earlier run: moved to {aside}/")

    def _rewind(self, step, evaluated_step):
        """Drop what was recorded behind the state that resume.pt holds."""

        def comes_before(line):
            try:
                if line.startswith("{"):
                    record = json.loads(line)
                    at, kind = record["step"], record.get("kind")
                else:
                    at, kind, _ = line.split()
                evaluated = int(at) == step == evaluated_step and kind != "train"
                return kind == "run" or int(at) < step or evaluated
            except ValueError:  # cut short by a crash
                return False

        for path in (os.path.join(self.path, name) for name in RECORDS):
            if os.path.exists(path):
                with open(path) as f:
                    lines = [line for line in f if comes_before(line)]
                write_whole(path, lambda f, lines=lines: f.write("".join(lines).encode()))

    def _append(self, name, line):
        if name not in self._files:
            self._files[name] = open(os.path.join(self.path, name), "a", buffering=1)
        self._files[name].write(line + "\n")

    def record(self, step, kind, value, **more):
        """One line in log.txt and, with everything else there is to say, one in metrics.jsonl."""
        self._append("log.txt", f"{step} {kind} {value:.{6 if kind == 'train' else 4}f}")
        self.note(step, kind, **more)

    def note(self, step, kind, file="metrics.jsonl", **more):
        """A line of a .jsonl file. JSON has no nan and no infinity: they become null."""
        odd = [key for key, x in more.items() if isinstance(x, float) and not math.isfinite(x)]
        self._append(file, json.dumps({"step": step, "kind": kind, **more, **dict.fromkeys(odd)}))

    def save(self, model, resume, keep=0):
        """Save a checkpoint, the dicts model and resume, both with their "step"; returns the model's path.

        With keep, deletes all but the newest `keep` checkpoints and the best by validation loss.
        """
        step = model["step"]
        path = model_path(self.path, step)
        save_tensors(path, model)
        self.checkpoints[step] = model["val_loss"]
        for f in self._files.values():  # a power cut must not take records that the checkpoint counts on
            os.fsync(f.fileno())
        save_tensors(os.path.join(self.path, "resume.pt"), resume | {"checkpoints": self.checkpoints})
        if keep:
            measured = {s: loss for s, loss in self.checkpoints.items() if loss is not None and loss == loss}
            kept = {step, *sorted(self.checkpoints)[-keep:], *sorted(measured, key=measured.get)[:1]}
            for s in set(self.checkpoints) - kept:
                if os.path.exists(model_path(self.path, s)):
                    os.remove(model_path(self.path, s))
                del self.checkpoints[s]
        return path
