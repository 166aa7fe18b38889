"""A run's records for Weights & Biases and TensorBoard, beside its own files.

Both get the numbers of metrics.jsonl, as train/loss, val/loss and so on: when a run starts or goes on, all that its
files hold, and then each record as it is made. So a step that is made again after a kill is not there twice:
TensorBoard's files are written anew, and Weights & Biases gets a new run in the group of the log folder. Neither can
end a run.
"""

import contextlib
import json
import os
import shutil


def open_wandb(folder, project, name, settings):
    """(send, close) of a run of Weights & Biases."""
    import wandb

    how = {"name": name or None, "group": os.path.abspath(folder), "config": settings, "dir": folder}
    run = wandb.init(project=project, **how)
    return lambda step, numbers: run.log(numbers, step=step), run.finish


def open_tensorboard(folder):
    """The same of event files in folder/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(os.path.join(folder, "tensorboard"), ignore_errors=True)
    writer = SummaryWriter(os.path.join(folder, "tensorboard"))

    def send(step, numbers):
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)

    return send, writer.close


class Dashboards:
    """What has been opened of them, for logdir.LogDir; one that fails is left out from then on, with a warning."""

    def __init__(self, folder, wandb="", wandb_name="", tensorboard=False, settings=None):
        self.open = {}
        if wandb:
            self._try("wandb", lambda: self.open.update(wandb=open_wandb(folder, wandb, wandb_name, settings)))
        if tensorboard:
            self._try("tensorboard", lambda: self.open.update(tensorboard=open_tensorboard(folder)))
        path = os.path.join(folder, "metrics.jsonl")
        if self.open and os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as f:
                for line in f:
                    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # no record
                        record = json.loads(line)
                        self.send(record.pop("step"), record.pop("kind"), record)

    def _try(self, name, work):
        try:
            work()
        except Exception as e:  # whatever they raise
            print(f"warning: this run goes on without {name}: {type(e).__name__}: {str(e).partition(chr(10))[0]}")
            self.open.pop(name, None)

    def send(self, step, kind, more):
        numbers = {f"{kind}/{key}": x for key, x in more.items() if isinstance(x, (int, float))}
        for name in list(self.open) if numbers and kind != "run" else ():
            self._try(name, lambda name=name: self.open[name][0](step, numbers))

    def close(self):
        for name in list(self.open):
            self._try(name, lambda name=name: self.open[name][1]())
