"""The log folder of a run: its records, its checkpoints, and how a run that ended goes on from them.

log.txt           "<step> <kind> <value>" a line, kind train, val, hella or ewok
metrics.jsonl     one object a record, with everything else
exposure.jsonl    which tokens the model has seen, if the run keeps account of it
ewok_items.jsonl  the numbers of each item of EWoK, likewise
model_00250.pt    the model after 250 updates; resume.pt what else the run needs to go on from there
resume_00250.pt   the same of an earlier checkpoint (of save_every's), to go back to: twice the model's size on the disk

All .pt files are written whole or not at all, the model first: resume.pt names a model that is there, at any moment. A
run that goes on drops the records behind resume.pt's step, since it makes them again.
"""

import contextlib
import dataclasses
import errno
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

from dashboards import Dashboards
from parallel import all_agree, all_finite, divided_like, from_rank_0, print0, state_dicts
from schedule import lengthen
from shards import lock_folder, write_whole
from tokenizer import tokenizer_state
from weights import load_checkpoint

import torch

RECORDS = r"log\.txt|(metrics|exposure|\w+_items)\.jsonl"  # the files of records
CHECKPOINTS = r"(model|resume)_(\d+)\.pt"
LOST = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ESTALE)  # a folder that is gone


@dataclasses.dataclass
class Run:
    """What a run consists of besides its weights and optimizers: saved in resume.pt, and restored, whole.

    A new counter is one line here, a plain value. Its default is what it has in runs that were saved without it.
    """

    settings: dict  # of the trainer
    defaults: dict  # the same, as the trainer's file had them
    data: list  # of order.Mixture.contents
    precision: str  # that it computes in
    step: int  # updates made
    tokens: int  # read for them
    evaluated_step: int | None = None  # the last step whose evaluations are all done
    exposed: int = 0  # tokens whose account is in exposure.jsonl
    bad_steps: int = 0  # in a row, whose loss or gradient was not finite
    last_step: int | None = None  # where plateau ends it; None: at max_steps
    val_losses: list = dataclasses.field(default_factory=list)  # all so far
    lengthened: list | None = None  # [step, its learning rate] where the run was given more steps, see schedule.py


def model_path(log_dir, step):
    """The file of the model after so many updates."""
    return os.path.join(log_dir, f"model_{step:05d}.pt")


# -- going on from a run --------------------------------------------------------------
def load_resume(log_dir, step=-1, mmap=False):
    """The dict in log_dir/resume.pt, None if there is none; exits if it is damaged or its model missing.

    It holds a Run's fields, the states of "optimizers", "scaler" and "rng", and the list of "checkpoints". With a step
    it is that of this earlier checkpoint.
    """
    path = os.path.join(log_dir, "resume.pt" if step < 0 else f"resume_{step:05d}.pt")
    steps = [s for s in sorted(checkpoint_steps(log_dir, "resume")) if os.path.exists(model_path(log_dir, s))]
    others = f"; --resume_step= goes back to {', '.join(map(str, steps))}" if steps else ""
    if not os.path.exists(path):
        return sys.exit(f"{path}: there is none{others}") if step >= 0 else None
    saved = load_checkpoint(path, mmap)
    try:
        restored_run(saved), saved["optimizers"]
    except (TypeError, KeyError):
        missing = {"optimizers", *(field.name for field in dataclasses.fields(Run))} - set(saved)
        sys.exit(f"{path}: not this trainer's, it has no {', '.join(sorted(missing))}")
    if not os.path.exists(model_path(log_dir, saved["step"])):
        sys.exit(f"{path}: goes with {model_path(log_dir, saved['step'])}, which is missing{others}")
    return saved


def restored_run(saved, **now):
    """The Run in the dict of resume.pt, but for the fields that are given; raises TypeError if it is none."""
    fields = {field.name: saved[field.name] for field in dataclasses.fields(Run) if field.name in saved}
    return Run(**fields | now)


def kept(settings):
    """The settings that stay with a run, wherever it goes on: all but these three."""
    return {key: value for key, value in settings.items() if key not in ("log_dir", "resume", "resume_step")}


def resumed_settings(saved, given, file_settings, fixed):
    """The settings of the saved run; exits if the command line, or the trainer's file, says what cannot be.

    given is what the command line says, file_settings(preset) what the trainer's file says now; fixed are the names of
    those that a run cannot change.
    """
    was = saved["settings"]
    if "softcap" not in was:  # a run of when `modern` and Muon were others, which it goes on with
        optimizer = {"muon": "muon1"}.get(was["optimizer"], was["optimizer"])
        was = file_settings("gpt2") | was | {"optimizer": optimizer}
        saved = saved | {"defaults": file_settings(was["preset"])}  # no difference is an edit of the file
    now = file_settings(was["preset"])
    for key in fixed:
        if given.get(key, was.get(key, now[key])) != was.get(key, now[key]):
            sys.exit(f"--{key}={given[key]}: the run to resume has {was.get(key, now[key])}; leave it out")
    old = saved["defaults"]
    edited = [key for key, x in now.items() if key not in given and x not in (old.get(key, x), was.get(key, x))]
    if edited:
        says = ", ".join(f"{key}={now[key]}" for key in edited)
        keep = " ".join(f"--{key}={shlex.quote(str(was[key]))}" for key in edited)
        sys.exit(f"train_gpt2.py has other defaults now: {says}; choose them, or what the run has: {keep}")
    return kept(now | was)


def changes(saved, given):
    """What the command line changes in a resumed run: " with key=value instead of ...", or nothing."""
    was = kept(saved["settings"])
    changed = [key for key in was if given.get(key, was[key]) != was[key]]
    order = "; the rest of the epoch is read in another order" if {"seed", "T"} & set(changed) else ""
    changed = [f"{key}={given[key]} instead of {was[key]}" for key in changed]
    return f" with {', '.join(changed)}{order}" if changed else ""


def begin(log_dir, saved, given, order, settings, defaults, precision):
    """The Run: at its first step, or where `saved`, the dict of resume.pt, has it.

    Exits if the run has read other shards, or computed in another precision which the command line (given) does not
    choose, or if processes have found different files.
    """
    now = {"settings": settings, "defaults": defaults, "data": order.contents(), "precision": precision}
    run = restored_run(saved, **now) if saved else Run(step=0, tokens=0, **now)
    if saved:
        # T may be another: on from the next whole sequence
        run.tokens, run.exposed = (-(-tokens // order.T) * order.T for tokens in (run.tokens, run.exposed))
        check_data(log_dir, saved["data"], order, run.tokens // order.T)
        if "dtype" not in given and run.precision != saved["precision"]:
            was, now = (name.removeprefix("torch.") for name in (saved["precision"], run.precision))
            sys.exit(f"the run in {log_dir} computes in {was}, --dtype=auto is {now} here: choose with --dtype=")
        lengthen(run, run.settings | saved["settings"])
        print0(f"resuming {log_dir} at step {run.step}{changes(saved, given)}")
    if not all_agree(run.step == from_rank_0(run.step)):
        rank = os.environ["RANK"]
        sys.exit(f"{log_dir}: is at step {run.step} for process {rank}, which not all processes have")
    return run


def check_data(log_dir, read, order, sequences):
    """Exit if an order is not one of the data, of Mixture.contents, of which the run has read so many sequences."""
    there, needs = order.contents(), f"the run in {log_dir} needs those that it has read"
    if [weight for weight, *_ in read] != [weight for weight, *_ in there]:
        sys.exit(f"--data_dir: the run in {log_dir} mixes its data otherwise; leave it out")
    sources = zip(read, there, order.orders, order.before(sequences), strict=True)
    for (_, before, *was), (_, now, dataset), source, seen in sources:
        if was not in ([], [dataset]):
            sys.exit(f"{source.shards.data_dir}: holds {dataset}, not {was[0]}: {needs}")
        if len(now) < len(before) or any(a != b[: len(a)] for a, b in zip(before, now, strict=False)):
            sys.exit(f"{source.shards.data_dir}: not the same shards: {needs}")
        if len(now) > len(before) and seen > sum(max(0, size - 1) // order.T for _, size, *_ in before):
            why = "shards were added, which changes the order of the epochs behind the first"
            sys.exit(f"{source.shards.data_dir}: {why}: take them out, or start afresh with --init_from=latest")


def restore(log_dir, optimizers, scaler, saved):
    """Load what resume.pt has for the optimizers, the GradScaler and the random numbers.

    The settings of the optimizers stay as they are. Exits if what it has is another model's.
    """
    try:
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
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
    if saved["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(saved["scaler"])
    torch.set_rng_state(saved["rng"])


def resume_command(log_dir):
    """What to type to go on with this run."""
    script = "train_gpt2.py --resume" + (f" --log_dir={shlex.quote(log_dir)}" if log_dir != "log" else "")
    processes, here = (os.environ.get(key) for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if processes in (None, "1"):
        return f"python {script}"
    if processes == here:
        return f"torchrun --standalone --nproc_per_node={processes} {script}"
    return f"the same torchrun command with {script}"


# -- the folder -----------------------------------------------------------------------
def last_good(log_dir):
    """Words for the end of an error: which checkpoint there is to go back to."""
    steps = checkpoint_steps(log_dir)
    return f"the last good checkpoint is {model_path(log_dir, max(steps))}" if steps else "there is no checkpoint"


def checkpoint_steps(log_dir, kind="model"):
    """The steps of the models in the folder, or of the states to go back to (kind="resume"), in no order."""
    names = os.listdir(log_dir) if os.path.isdir(log_dir) else []
    matches = (re.fullmatch(CHECKPOINTS, name) for name in names)
    return [int(match[2]) for match in matches if match and match[1] == kind]


def link(path, to):
    """Give a file another name at once, without a second copy where the disk can."""
    try:
        os.link(path, to + ".tmp")
    except OSError:
        shutil.copyfile(path, to + ".tmp")
    os.replace(to + ".tmp", to)
    with contextlib.suppress(FileNotFoundError):  # it was of that name already
        os.remove(to + ".tmp")


def free_name(path):
    """path_1, path_2, ...: the first that there is not."""
    return next(f"{path}_{n}" for n in itertools.count(1) if not os.path.exists(f"{path}_{n}"))


def save_tensors(path, state):
    """torch.save, whole or not at all; raises the OSError of a disk that is full."""

    def write(f):
        try:
            torch.save(state, f)
        except RuntimeError as e:  # torch's, on top of what the disk said
            raise e.__context__ if isinstance(e.__context__, OSError) else e from None

    write_whole(path, write)


class LogDir:
    """The folder in the hands of the one process that writes to it; in those of the others it does nothing.

    saved is the dict of resume.pt, or of the earlier checkpoint resume_step, to go on from, None for a fresh start,
    which moves the files of an earlier run to old_1/ and so on; resume: whether a resume.pt would have been gone on
    from. Exits if another live run has the folder, or it cannot be written. Where it is gone later, or can no longer be
    written, all goes on in a new one beside it.
    """

    def __init__(self, path, saved=None, resume=False, resume_step=-1, writes=True):
        self.path, self.writes, self._files, self._drawing = path, writes, {}, None
        self.dashboards = Dashboards(path)  # none
        self.saved_state = (saved["step"], saved.get("evaluated_step")) if saved else None  # what resume.pt is of
        self.saved_at, self.save_seconds = time.monotonic(), 0.0
        if not writes:
            return
        try:
            self._hold()
            now = load_resume(path, resume_step, mmap=True) if resume else None
            if (now or {}).get("step") != (saved or {}).get("step"):
                sys.exit(f"{path}/: another run has just saved there; --resume again goes on from that")
            for name in os.listdir(path):
                if re.fullmatch(rf"({RECORDS}|resume\.pt|{CHECKPOINTS})\.tmp", name):
                    os.remove(os.path.join(path, name))  # of a run that died while it wrote
            if saved is None or resume_step >= 0:
                self._set_aside(resume_step)
            if saved:
                self._rewind(saved["step"], saved.get("evaluated_step"))
            # {step: validation loss, None if it was not measured} of the checkpoints
            self.checkpoints = {step: (saved or {}).get("checkpoints", {}).get(step) for step in checkpoint_steps(path)}
        except OSError as e:
            sys.exit(f"--log_dir={path}: cannot write there ({e.strerror})")

    def _set_aside(self, step):
        """Move an earlier run's files to old_1, old_2, ..., or those that are behind a step to go back to."""
        old = [x for x in os.listdir(self.path) if re.fullmatch(rf"{RECORDS}|plot\.png|resume\.pt|{CHECKPOINTS}", x)]
        if not old:
            return
        aside = free_name(os.path.join(self.path, "old"))
        os.makedirs(aside)
        if step >= 0:  # the records up to it stay, and resume.pt at no moment names a model that is not there
            try:
                for name in [x for x in old if not re.fullmatch(CHECKPOINTS, x)]:
                    shutil.copy2(os.path.join(self.path, name), aside)
            except OSError:  # a full disk: all stays as it was
                shutil.rmtree(aside)
                raise
            link(os.path.join(self.path, f"resume_{step:05d}.pt"), os.path.join(self.path, "resume.pt"))
            old = [x for x in old if (match := re.fullmatch(CHECKPOINTS, x)) and int(match[2]) > step]
        for name in old:
            os.rename(os.path.join(self.path, name), os.path.join(aside, name))
        what = f"had gone on behind step {step}: that is" if step >= 0 else "held an earlier run: moved"
        print(f"{self.path}/ {what} {'in' if step >= 0 else 'to'} {aside}/")

    def _rewind(self, step, evaluated_step):
        """Drop what was recorded behind the state that resume.pt holds."""

        def comes_before(line):
            try:
                if line.startswith("{"):
                    record = json.loads(line)
                    at, kind = record["step"], record["kind"]
                else:
                    at, kind, _ = line.split()
                evaluated = int(at) == step == evaluated_step and kind != "train"
                return kind == "run" or int(at) < step or evaluated
            except (ValueError, KeyError, TypeError):
                # No record: somebody's own line stays, one that a crash cut short does not.
                return line.endswith("\n")

        for path in (os.path.join(self.path, x) for x in os.listdir(self.path) if re.fullmatch(RECORDS, x)):
            with open(path, encoding="utf-8", errors="surrogateescape") as f:
                text = "".join(line for line in f if comes_before(line))
            write_whole(path, lambda f, text=text: f.write(text.encode(errors="surrogateescape")))

    def _hold(self):
        """Lock the folder, and remember which it is, whatever is moved to its name."""
        self._lock, self._identity = lock_folder(self.path), os.stat(self.path)

    def _append(self, name, line):
        if name not in self._files:
            self._files[name] = open(os.path.join(self.path, name), "a+", buffering=1)
        self._files[name].write(line + "\n")

    def _beside(self, work):
        """work(), once more in a new folder if this one has been moved, deleted, replaced or closed to us."""
        try:
            if not os.path.samestat(os.stat(self.path), self._identity):
                raise FileNotFoundError(errno.ENOENT, "another folder is in its place")
            return work()
        except OSError as e:
            if e.errno not in LOST:
                raise
            was, self.path = self.path, free_name(self.path.rstrip("/"))
            self._hold()
            for name, f in self._files.items():  # which we hold, wherever it is now
                f.seek(0)
                self._files[name] = open(os.path.join(self.path, name), "a+", buffering=1)
                self._files[name].write(f.read())
            self.checkpoints = {}
            print(f"{was}/ cannot be written any more ({e.strerror}): this run goes on in {self.path}/")
            return work()

    def record(self, step, kind, value, **more):
        """One line in log.txt and, with everything else there is to say, one in metrics.jsonl."""
        if self.writes:
            line = f"{step} {kind} {value:.{6 if kind == 'train' else 4}f}"
            self._beside(lambda: self._append("log.txt", line))
        self.note(step, kind, **more)

    def note(self, step, kind, **more):
        """A line of the .jsonl file of its kind. JSON has no nan and no infinity: they become null."""
        more = json.loads(json.dumps(more), parse_constant=lambda name: None)
        line = json.dumps({"step": step, "kind": kind, **more})
        file = f"{kind}s" if kind.endswith("_item") else kind if kind == "exposure" else "metrics"
        if self.writes:
            self._beside(lambda: self._append(f"{file}.jsonl", line))
            if file == "metrics":
                self.dashboards.send(step, kind, more)

    def save(self, run, model, optimizers, scaler, enc, val_loss=None, keep=0):
        """Save a checkpoint, if the last one is of another state: the model and resume.pt. All ranks call it.

        Exits if a parameter is not finite: a broken model never takes the place of a good one. With keep, deletes all
        but the newest `keep` models and the best by validation loss.
        """
        if (run.step, run.evaluated_step) == self.saved_state:
            return
        start = time.monotonic()
        if not all_finite(model.parameters()):
            good = last_good(self.path)
            sys.exit(f"step {run.step}: the weights are no longer finite; nothing saved, {good}")
        weights, states = state_dicts(model, optimizers)
        if self.writes:
            model_file = {"model": weights, "config": dataclasses.asdict(model.config), "step": run.step}
            model_file |= {"val_loss": val_loss, "settings": run.settings, "tokenizer": tokenizer_state(enc)}
            resume_file = dataclasses.asdict(run) | {"optimizers": states, "scaler": scaler.state_dict()}
            resume_file |= {"rng": torch.get_rng_state()}
            every = run.settings["save_every"]
            self._beside(lambda: self._write(model_file, resume_file, keep, every and run.step % every == 0))
        self.saved_state, self.saved_at = (run.step, run.evaluated_step), time.monotonic()
        self.save_seconds = self.saved_at - start

    def _write(self, model_file, resume_file, keep, planned):
        step, last = model_file["step"], os.path.join(self.path, "resume.pt")
        path = model_path(self.path, step)
        save_tensors(path, model_file)
        self.checkpoints[step] = model_file["val_loss"]
        for f in self._files.values():  # a power cut must not take records that the checkpoint counts on
            os.fsync(f.fileno())
        save_tensors(last, resume_file | {"checkpoints": self.checkpoints})
        if planned:
            link(last, os.path.join(self.path, f"resume_{step:05d}.pt"))
        if keep:
            measured = {s: loss for s, loss in self.checkpoints.items() if loss is not None and loss == loss}
            stay = {step, *sorted(self.checkpoints)[-keep:], *sorted(measured, key=measured.get)[:1]}
            for s in set(self.checkpoints) - stay:
                for old in (model_path(self.path, s), os.path.join(self.path, f"resume_{s:05d}.pt")):
                    if os.path.exists(old):
                        os.remove(old)
                del self.checkpoints[s]
        print(f"step {step:5d} | saved {path}")

    def draw(self, wait=0.0):
        """Have plot.py draw plot.png, if matplotlib is there, in a process of its own: it cannot end the run.

        Waits for at most so many seconds until it is done. Nothing happens while an earlier picture is not.
        """
        if not self.writes or importlib.util.find_spec("matplotlib") is None:
            return
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if self._drawing:
                self._drawing.wait(wait)
            script = os.path.join(os.path.dirname(__file__), "plot.py")
            how = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL) | {"start_new_session": True}
            self._drawing = subprocess.Popen([sys.executable, script, f"--logs={self.path}"], **how)
            if wait:
                self._drawing.wait(wait)


def open_log(run, saved, order, model, writes):
    """The LogDir of a Run, with the record that it starts with and the dashboards that its settings ask for."""
    s = run.settings
    for name in ("wandb", "tensorboard"):  # before anything is moved aside
        if s[name] and importlib.util.find_spec(name) is None:
            sys.exit(f"--{name}={s[name]} needs {name}: pip install {name}")
    log = LogDir(s["log_dir"], saved, s["resume"], s["resume_step"], writes)
    if writes and (s["wandb"] or s["tensorboard"]):
        log.dashboards = Dashboards(log.path, s["wandb"], s["wandb_name"], s["tensorboard"], kept(s))
    if not saved:
        dataset = " + ".join(str(source.shards.dataset) for source in order.orders)
        about = {"tokenizer": order.enc.name, "dataset": dataset, "parameters": model.num_params()}
        log.note(0, "run", **about, settings=kept(s))
    return log
