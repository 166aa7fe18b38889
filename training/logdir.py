"""The log folder of a run: its records and its checkpoints.

log.txt           lines of "<step> <kind> <value>", kind train, val, hella or ewok
metrics.jsonl     one object per record, with everything else
exposure.jsonl    which tokens the model has seen, with --exposure_every
ewok_items.jsonl  the scores of each EWoK item, with --ewok_items
model_00250.pt    the model after 250 updates
resume.pt         the rest of the training state, to resume from it, see checkpoint.py
resume_00250.pt   the same for an earlier checkpoint (of --save_every), to go back to

All .pt files are complete or absent, and the model is written first: at any moment resume.pt
belongs to a model that exists. A resumed run drops the records after resume.pt's step, since it
makes them again. Weights & Biases and TensorBoard get the numbers of metrics.jsonl, as train/loss,
val/loss and so on.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid

from data.tokenizer import tokenizer_state
from files import atomic_write, lock_folder
from script import UserError
from training.checkpoint import (
    full_state_dicts,
    hardlink_or_copy,
    load_resume,
    run_settings,
)
from training.distributed import all_finite
from weights import (
    checkpoint_paths,
    last_checkpoint_message,
    model_path,
    resume_path,
    save_tensors,
)

RECORDS = r"log\.txt|(metrics|exposure|\w+_items)\.jsonl"
CHECKPOINTS = r"(model|resume)_(\d+)\.pt"
RUN_FILES = rf"{RECORDS}|plot\.png|tensorboard|resume\.pt|{CHECKPOINTS}"


def parse_record(line):
    """(step, kind, record) of a line of log.txt or a .jsonl file; (None, "", {}) for other lines.

    record: the dict of a .jsonl line, {} for a line of log.txt.
    """
    try:
        if line.startswith("{"):
            record = json.loads(line)
            return int(record["step"]), record["kind"], record
        step, kind, _ = line.split()
        return int(step), kind, {}
    except (ValueError, KeyError, TypeError):
        return None, "", {}


class LogDir:
    """The log folder. Only rank 0 writes (`writes`); elsewhere every method but save() is a no-op.

    saved: the dict of resume.pt to resume from, None for a fresh start, which moves the files of an
    earlier run to old_1/, old_2/, ...; settings: the trainer's. Raises UserError if another process
    uses the folder, or it cannot be written.
    """

    def __init__(self, settings, saved=None, writes=True):
        self.path = settings["log_dir"]
        self.writes = writes
        self.dashboards = {}  # {name: (send(step, numbers), close())}
        self.saved_state = None  # (step, evaluated_step) of resume.pt
        if saved:
            self.saved_state = (saved["step"], saved.get("evaluated_step"))
        self.saved_at = time.monotonic()
        self.save_seconds = 0.0  # how long the last save took
        # Evaluations of the resumed step, which stay in metrics.jsonl; TensorBoard drops them.
        self.records_to_replay = []
        self._files = {}
        self._plotting = None
        if not writes:
            return
        try:
            # Nobody else may write here until this process ends.
            self._lock = lock_folder(self.path)
            self._check_unchanged(settings, saved)
            for name in os.listdir(self.path):
                if name.endswith(".tmp") and re.fullmatch(RUN_FILES, name.removesuffix(".tmp")):
                    os.remove(f"{self.path}/{name}")  # a run was killed while writing it
            # A fresh start keeps an earlier run's files, and so does going back to a step.
            if saved is None:
                self._archive_old_run()
            elif settings["resume_step"] >= 0:
                self._archive_later_checkpoints(saved["step"])
            if saved:
                self.records_to_replay = self._rewind(saved["step"], saved.get("evaluated_step"))
        except OSError as e:
            raise UserError(f"--log_dir={self.path}: cannot write there ({e.strerror})")
        # Models may have been deleted by hand: list only those that exist.
        losses = saved.get("checkpoints", {}) if saved else {}
        # {step: validation loss, or None if it was not measured} of the model files
        self.checkpoints = {step: losses.get(step) for step in checkpoint_paths(self.path)}

    def _check_unchanged(self, settings, saved):
        """Raise UserError if another run has saved here since resume.pt was read."""
        if not settings["resume"]:
            return
        current = load_resume(self.path, settings["resume_step"], mmap=True)
        saved_step = saved["step"] if saved else None
        current_step = current["step"] if current else None
        if current_step != saved_step:
            raise UserError(f"{self.path}/: another run has just saved there; repeat the command")

    # -- earlier runs -------------------------------------------------------------------
    def _run_files(self):
        return [name for name in os.listdir(self.path) if re.fullmatch(RUN_FILES, name)]

    def _archive_folder(self):
        """Make old_1/, old_2/, ..., the first of them that does not exist; returns its path."""
        paths = (f"{self.path}/old_{n}" for n in itertools.count(1))
        path = next(path for path in paths if not os.path.exists(path))
        os.makedirs(path)
        return path

    def _archive_old_run(self):
        """Move the files of an earlier run to old_1/, old_2/, ..."""
        names = self._run_files()
        if not names:
            return
        archive = self._archive_folder()
        for name in names:
            os.rename(f"{self.path}/{name}", f"{archive}/{name}")
        print(f"{self.path}/ held an earlier run: moved to {archive}/")

    def _archive_later_checkpoints(self, step):
        """Go back to a step: move later checkpoints to old_N/, with copies of the other files."""
        names = self._run_files()
        archive = self._archive_folder()
        try:
            for name in names:
                path = f"{self.path}/{name}"
                if os.path.isdir(path):
                    shutil.copytree(path, f"{archive}/{name}")
                elif not re.fullmatch(CHECKPOINTS, name):
                    shutil.copy2(path, archive)
        except OSError:  # a full disk: leave everything as it was
            shutil.rmtree(archive)
            raise
        # resume.pt first, so that it never belongs to a model that has been moved.
        hardlink_or_copy(resume_path(self.path, step), resume_path(self.path))
        for name in names:
            match = re.fullmatch(CHECKPOINTS, name)
            if match and int(match[2]) > step:
                os.rename(f"{self.path}/{name}", f"{archive}/{name}")
        print(f"{self.path}/ had continued after step {step}: moved to {archive}/")

    def _rewind(self, step, evaluated_step):
        """Drop the records that were made after the state in resume.pt.

        Returns the records of its step that stay, for the dashboards.
        """
        replay = []
        for name in os.listdir(self.path):
            if not re.fullmatch(RECORDS, name):
                continue
            path = f"{self.path}/{name}"
            lines = []
            with open(path, encoding="utf-8", errors="surrogateescape") as f:
                for line in f:
                    record_step, kind, record = parse_record(line)
                    if record_step is None:
                        # The user's own line stays, a line that a crash cut short does not.
                        stays = line.endswith("\n")
                    elif kind == "run" or record_step < step:
                        stays = True
                    else:
                        # At the step itself, evaluations come first, and then the update.
                        is_evaluation = record_step == step and kind != "train"
                        stays = is_evaluation and evaluated_step == step
                        if stays and record and name == "metrics.jsonl":
                            replay.append(record)
                    if stays:
                        lines.append(line)
            content = "".join(lines).encode(errors="surrogateescape")
            atomic_write(path, lambda f, content=content: f.write(content))
        return replay

    # -- records ------------------------------------------------------------------------
    def _recreate(self):
        """Make the folder again if it has disappeared during the run."""
        if not os.path.isdir(self.path):
            self._lock = lock_folder(self.path)
            self._files = {}

    def _append(self, name, line):
        self._recreate()
        if name not in self._files:
            path = f"{self.path}/{name}"
            self._files[name] = open(path, "a", encoding="utf-8", buffering=1)
        self._files[name].write(line + "\n")

    def log_metric(self, step, kind, value, values):
        """Write a record: value to log.txt, the other values to metrics.jsonl and dashboards."""
        if self.writes:
            digits = 6 if kind == "train" else 4
            self._append("log.txt", f"{step} {kind} {value:.{digits}f}")
        self.log_event(step, kind, values)

    def log_event(self, step, kind, values):
        """Write a record to the .jsonl file of its kind; nan and inf become null."""
        if not self.writes:
            return
        values = json.loads(json.dumps(values), parse_constant=lambda name: None)
        record = {"step": step, "kind": kind}
        for key, value in values.items():
            record.setdefault(key, value)  # an eval's result can have such keys too
        line = json.dumps(record)
        if kind.endswith("_item"):
            self._append(f"{kind}s.jsonl", line)
        elif kind == "exposure":
            self._append("exposure.jsonl", line)
        else:
            self._append("metrics.jsonl", line)
            self._send(step, kind, values)

    # -- checkpoints --------------------------------------------------------------------
    def save(self, run, setup, val_loss=None):
        """Save a checkpoint of a Run and the trainer's Setup, unless the last one has this state.

        All ranks call it. Raises UserError if a parameter is not finite: a broken model never
        replaces a good one. With keep_checkpoints=N, only the newest N models and the best by
        validation loss are kept.
        """
        if (run.step, run.evaluated_step) == self.saved_state:
            return
        start = time.monotonic()
        model = setup.model
        if not all_finite(model.parameters()):
            raise UserError(
                f"step {run.step}: the weights are no longer finite; nothing saved, "
                f"{last_checkpoint_message(self.path)}"
            )
        # All ranks take part in gathering the state, rank 0 writes it.
        weights, states = full_state_dicts(model, setup.optimizers)
        if self.writes:
            self._recreate()
            run.data = setup.loader.fingerprint(run.tokens // setup.loader.T)
            path = model_path(self.path, run.step)
            model_file = {
                "model": weights,
                "config": dataclasses.asdict(model.config),
                "step": run.step,
                "val_loss": val_loss,
                "settings": run.settings,
                "tokenizer": tokenizer_state(setup.loader.enc),
            }
            # First the model, then resume.pt, which refers to it.
            save_tensors(path, model_file)
            is_new = run.step not in self.checkpoints  # not saved before its evaluations
            self.checkpoints[run.step] = val_loss
            for f in self._files.values():  # after a power cut no record before it may be missing
                os.fsync(f.fileno())
            resume_file = {
                **dataclasses.asdict(run),
                "optimizers": states,
                "scaler": setup.scaler.state_dict(),
                "checkpoints": self.checkpoints,
            }
            save_tensors(resume_path(self.path), resume_file)
            # --resume_step can return to a checkpoint of --save_every: resume_<step>.pt is another
            # name of the same file.
            every = run.settings["save_every"]
            if every and run.step % every == 0:
                hardlink_or_copy(resume_path(self.path), resume_path(self.path, run.step))
            if run.settings["keep_checkpoints"]:
                self._delete_checkpoints(run.step, run.settings["keep_checkpoints"])
            if is_new:
                print(f"step {run.step:5d} | saved {path}")
        self.saved_state = (run.step, run.evaluated_step)
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - start

    @contextlib.contextmanager
    def save_before_error(self, run, setup):
        """Save a checkpoint before a UserError, such as a shard that is gone, ends the run."""
        try:
            yield
        except UserError:
            if run.step > 0:
                self.save(run, setup)
            raise

    def _delete_checkpoints(self, step, keep):
        """Delete all checkpoints but the newest `keep` and the best."""
        losses = {}
        for s, loss in self.checkpoints.items():
            if loss is not None and loss == loss:  # measured, and not nan
                losses[s] = loss
        kept = {step, *sorted(self.checkpoints)[-keep:]}
        if losses:
            kept.add(min(sorted(losses), key=losses.get))
        for s in set(self.checkpoints) - kept:
            for path in (model_path(self.path, s), resume_path(self.path, s)):
                if os.path.exists(path):
                    os.remove(path)
            del self.checkpoints[s]

    # -- pictures -----------------------------------------------------------------------
    def plot(self, timeout=0.0):
        """Have plot.py draw plot.png in a process of its own, which cannot end the run.

        Waits for it at most `timeout` seconds. Does nothing without matplotlib, or while the last
        picture is still being drawn.
        """
        if not self.writes or importlib.util.find_spec("matplotlib") is None:
            return
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if self._plotting:
                self._plotting.wait(timeout)
            root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
            self._plotting = subprocess.Popen(
                [sys.executable, f"{root}/plot.py", f"--logs={self.path}"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            if timeout:
                self._plotting.wait(timeout)

    # -- dashboards ---------------------------------------------------------------------
    def open_dashboards(self, run):
        """Start to send records to the dashboards that the settings of a Run ask for."""
        s = run.settings
        if s["tensorboard"]:
            self._add_dashboard("tensorboard", open_tensorboard, self.path, run.step)
        if s["wandb"]:
            # A run that went back to a step is a new line next to the old one.
            if not run.wandb_id or s["resume_step"] >= 0:
                run.wandb_id = uuid.uuid4().hex[:8]
            self._add_dashboard("wandb", open_wandb, self.path, s, run.wandb_id)

    def _add_dashboard(self, name, open_dashboard, *args):
        try:
            self.dashboards[name] = open_dashboard(*args)
        except Exception as e:
            self._drop_dashboard(name, e)

    def _drop_dashboard(self, name, error):
        """Continue without a dashboard that has failed, whatever its error."""
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        print(f"warning: this run continues without {name}: {reason}")
        self.dashboards.pop(name, None)

    def _send(self, step, kind, values):
        # Only numbers can be plotted.
        numbers = {}
        for key, value in values.items():
            if isinstance(value, (int, float)) and kind != "run":
                numbers[f"{kind}/{key}"] = value
        # A dashboard that fails, for example without a network, must not end the run.
        for name, (send, _) in list(self.dashboards.items()):
            try:
                send(step, numbers)
            except Exception as e:
                self._drop_dashboard(name, e)

    def close(self):
        """Close the dashboards."""
        for name, (_, close) in list(self.dashboards.items()):
            try:
                close()
            except Exception as e:
                self._drop_dashboard(name, e)


def open_tensorboard(folder, step):
    """(send, close) for event files in folder/tensorboard. Drops what was sent from `step` on."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(f"{folder}/tensorboard", purge_step=step)

    def send(step, numbers):
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)

    return send, writer.close


def open_wandb(folder, settings, run_id):
    """(send, close) for a run at Weights & Biases; a resumed run continues the one with its id."""
    import wandb

    run = wandb.init(
        id=run_id,
        resume="allow",
        project=settings["wandb"],
        name=settings["wandb_name"] or None,
        config=run_settings(settings),
        dir=folder,
    )
    # log(step=) drops steps before the last one, which a run has again after it was killed.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")

    def send(step, numbers):
        run.log({"step": step, **numbers})

    return send, run.finish


def open_log(run, saved, loader, model, writes):
    """The LogDir of a Run, with its first record and its dashboards."""
    s = run.settings
    # Check what can be missing before any file is moved.
    for name in ("wandb", "tensorboard"):
        if s[name] and importlib.util.find_spec(name) is None:
            raise UserError(f"--{name}={s[name]} needs {name}: pip install {name}")
    log = LogDir(s, saved, writes)
    if writes:
        log.open_dashboards(run)
    if not saved:
        dataset = " + ".join(str(source.shards.dataset) for source in loader.loaders)
        about = {
            "tokenizer": loader.enc.name,
            "dataset": dataset,
            "parameters": model.num_params(),
            "settings": run_settings(s),
        }
        log.log_event(0, "run", about)
    elif writes:
        for record in log.records_to_replay:
            log._send(record.pop("step"), record.pop("kind"), record)
    return log
