"""Checkpoints: finding, reading and writing .pt files, and what a resumed run may change.

model_00250.pt is {"model", "config", "step", "val_loss", "settings", "tokenizer"}: a model after
250 updates. resume.pt has what only training needs: the fields of a Run, the states of
"optimizers", "scaler" and "rng", and the validation losses of "checkpoints". All of it is plain
tensors, numbers, strings, lists and dicts, so that loading a file never runs code.
"""

import dataclasses
import os
import pickle
import re
import shlex
import shutil

from files import atomic_write
from script import UserError, env_int, print0
from training.distributed import all_true, broadcast_int
from training.schedule import extend_run

import torch
from torch.nn import functional as F

# Settings and fields that old files have under another name, and values likewise.
RENAMED_KEYS = {
    "tied": "tie_embeddings",
    "save_minutes": "save_every_minutes",
    "precision": "compute_dtype",
    "exposed": "exposed_tokens",
    "lengthened": "extended",
    "neuron_squares": "second_momentum_buffer",
}
RENAMED_VALUES = {"weightless": "rmsnorm_noaffine"}
NOT_OF_THE_RUN = ("log_dir", "resume", "resume_step")  # settings of a command rather than a run


@dataclasses.dataclass
class Run:
    """The state of a run besides its weights and optimizers; resume.pt stores it.

    To checkpoint another counter, add a field with a plain value as its default, which runs have
    that were saved without it.
    """

    settings: dict  # the trainer's settings
    defaults: dict  # the defaults of these settings in the trainer's file
    data: list  # Mixture.fingerprint()
    compute_dtype: str  # the dtype it computes in
    step: int  # updates made
    tokens: int  # tokens read for them
    evaluated_step: int | None = None  # the last step whose evaluations are all done
    exposed_tokens: int = 0  # tokens that exposure.jsonl accounts for
    bad_steps: int = 0  # steps in a row whose loss or gradient was not finite
    extended: list | None = None  # [step, learning rate] where max_steps was raised
    wandb_id: str = ""  # the run's id at Weights & Biases


def run_settings(settings):
    """The settings that belong to a run, wherever it is resumed."""
    return {key: value for key, value in settings.items() if key not in NOT_OF_THE_RUN}


# -- finding and reading .pt files --------------------------------------------------
def model_path(log_dir, step):
    """The path of the model after `step` updates."""
    return f"{log_dir}/model_{step:05d}.pt"


def resume_path(log_dir, step=-1):
    """The path of the latest training state, or of that of an earlier step."""
    name = "resume.pt" if step < 0 else f"resume_{step:05d}.pt"
    return f"{log_dir}/{name}"


def checkpoint_steps(log_dir, kind="model"):
    """The steps of log_dir/model_*.pt, or of resume_*.pt, sorted."""
    names = os.listdir(log_dir) if os.path.isdir(log_dir) else []
    matches = [re.fullmatch(rf"{kind}_(\d+)\.pt", name) for name in names]
    return sorted(int(match[1]) for match in matches if match)


def last_good(log_dir):
    """The end of an error message: which checkpoint there is to go back to."""
    steps = checkpoint_steps(log_dir)
    if not steps:
        return "there is no checkpoint"
    return f"the last good checkpoint is {model_path(log_dir, steps[-1])}"


def find_checkpoint(ckpt, log_dir):
    """The path of a .pt file, or of the "latest" or "best" (by validation loss) in log_dir."""
    if ckpt not in ("latest", "best"):
        if not os.path.isfile(ckpt):
            raise UserError(
                f"{ckpt}: no such checkpoint; use latest, best, gpt2 ... gpt2-xl, a .pt file or a "
                "Hugging Face folder"
            )
        return ckpt
    # The highest step is the latest, whatever the files' dates.
    paths = [model_path(log_dir, step) for step in checkpoint_steps(log_dir)]
    if not paths:
        raise UserError(
            f"no checkpoint in {log_dir}/: python train_gpt2.py makes one, --ckpt= or --init_from= "
            "names another"
        )
    if ckpt == "latest":
        return paths[-1]
    # The best by validation loss, among those where it was measured.
    losses = {}
    for path in paths:
        loss = load_checkpoint(path, mmap=True).get("val_loss")
        if loss is not None and loss == loss:  # not nan
            losses[path] = loss
    if not losses:
        raise UserError(f"no checkpoint in {log_dir}/ has a validation loss")
    return min(losses, key=losses.get)


class NanoGPTConfigStub:
    """Stands in for __main__.GPTConfig of build-nanogpt's checkpoints; only its values are used."""


def load_checkpoint(path, mmap=False):
    """The dict in a .pt file, on the CPU. Raises UserError if it is damaged or holds code."""
    try:
        with torch.serialization.safe_globals([(NanoGPTConfigStub, "__main__.GPTConfig")]):
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused, it holds something other than tensors and plain values")
    except Exception as e:  # torch.load raises many types of exceptions on corrupt files
        reason = str(e).partition("\n")[0].partition(". ")[0] or type(e).__name__
        hint = ""
        if "resume" in os.path.basename(path):
            hint = "; --resume_step= goes back to an earlier one"
        raise UserError(f"{path}: not a complete checkpoint file ({reason}){hint}")
    return rename(saved)


def rename(value):
    """The content of a .pt file with today's names."""
    if isinstance(value, dict):
        return {RENAMED_KEYS.get(key, key): rename(x) for key, x in value.items()}
    if isinstance(value, list):
        return [rename(x) for x in value]
    if isinstance(value, str):
        return RENAMED_VALUES.get(value, value)
    return value


def read_checkpoint(path):
    """(config, state dict, tokenizer, step) of a .pt file: ours, nanoGPT's or build-nanogpt's.

    nanoGPT computes GELU exactly, we by tanh: its losses differ in the fourth digit here.
    """
    # Ours says which tokenizer it has; nanoGPT's and build-nanogpt's do not.
    saved = load_checkpoint(path)
    try:
        if "tokenizer" in saved:
            return saved["config"], saved["model"], saved["tokenizer"], saved.get("step", 0)
        args = saved["model_args"] if "model_args" in saved else vars(saved["config"])
        config = {"vocab_size": 50257, "bias": args.get("bias", True)}
        for key in ("block_size", "n_layer", "n_head", "n_embd"):
            config[key] = args[key]
        state = {}
        for name, tensor in saved["model"].items():
            if not name.endswith(".attn.bias"):  # a causal mask
                state[name.removeprefix("_orig_mod.")] = tensor
        wte = state["transformer.wte.weight"]
        step = saved.get("iter_num", saved.get("step"))
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path}: not a checkpoint of this project's GPT-2, of nanoGPT or build-nanogpt ({e})"
        )
    if len(wte) not in (50257, 50304):
        raise UserError(f"{path}: its {len(wte)} tokens are not GPT-2's: are they meta.pkl's?")
    # nanoGPT saves 50,304 or 50,257 rows: pad them to 50,304, as model.py does.
    wte = F.pad(wte, (0, 0, 0, 50304 - len(wte)))
    state["transformer.wte.weight"] = wte
    state["lm_head.weight"] = wte
    return config, state, "gpt2", step


# -- writing ------------------------------------------------------------------------
def import_state_dict():
    """torch.distributed.checkpoint.state_dict, when needed: importing it takes a second."""
    from torch.distributed.checkpoint import state_dict

    return state_dict


def full_state_dicts(model, optimizers):
    """(the model's state dict, [each optimizer's]) on the CPU of rank 0, empty on other ranks.

    Complete with DDP, FSDP and Muon's work split over ranks. All ranks call it.
    """
    # full_state_dict gathers shards on rank 0; elsewhere the dicts are empty.
    dcp = import_state_dict()
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    states = []
    for optimizer in optimizers:
        if hasattr(optimizer, "consolidate_state"):
            optimizer.consolidate_state()
        state = {"state": {}, "param_groups": []}
        if optimizer.state:  # torch would make one by a step of its own, before the first update
            state = dcp.get_optimizer_state_dict(model, optimizer, options=options)
        states.append(state)
    # With FSDP, tied weights arrive as two tensors.
    weights = dcp.get_model_state_dict(model, options=options)
    if weights and model.config.tie_embeddings:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]  # one tensor, stored once
    return weights, states


def save_tensors(path, state):
    """torch.save() to a complete file or none; raises the OSError of a full disk."""

    def write(f):
        try:
            torch.save(state, f)
        except RuntimeError as e:  # torch wraps the OSError
            raise e.__context__ if isinstance(e.__context__, OSError) else e from None

    atomic_write(path, write)


def hardlink_or_copy(path, new_path):
    """Give a file a second name, atomically; copy it where there are no hard links."""
    temporary = new_path + ".tmp"
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, new_path)
    if os.path.exists(temporary):  # both names were the same file already
        os.remove(temporary)


# -- resuming -----------------------------------------------------------------------
def load_resume(log_dir, step=-1, mmap=False):
    """The dict in log_dir/resume.pt, or in that of an earlier step; None if there is no resume.pt.

    Raises UserError if it is damaged or its model is missing.
    """
    # Other checkpoints that could be resumed, for the messages.
    path = resume_path(log_dir, step)
    others = ""
    steps = [
        s for s in checkpoint_steps(log_dir, "resume") if os.path.exists(model_path(log_dir, s))
    ]
    if steps:
        others = f"; --resume_step= goes back to {', '.join(map(str, steps))}"
    if not os.path.exists(path):
        if step >= 0:
            raise UserError(f"{path}: there is none{others}")
        return None
    # Whatever a Run needs and has no default for must be there.
    saved = load_checkpoint(path, mmap)
    required = {"optimizers", "scaler", "rng"}
    for field in dataclasses.fields(Run):
        if field.default is dataclasses.MISSING:
            required.add(field.name)
    missing = required - saved.keys()
    if missing:
        raise UserError(f"{path}: not this trainer's, it has no {', '.join(sorted(missing))}")
    model = model_path(log_dir, saved["step"])
    if not os.path.exists(model):
        raise UserError(f"{path}: belongs to {model}, which is missing{others}")
    return saved


def describe_changes(saved, overrides):
    """What the command line changes in a resumed run: " with B=8 instead of 4", or ""."""
    # For example "B=8 instead of 4".
    changes = []
    for key, old in run_settings(saved["settings"]).items():
        if overrides.get(key, old) != old:
            changes.append(f"{key}={overrides[key]} instead of {old}")
    if not changes:
        return ""
    note = ""
    if {"seed", "T"} & {change.partition("=")[0] for change in changes}:
        note = "; the rest of the epoch is read in another order"
    return f" with {', '.join(changes)}{note}"


def init_run(log_dir, saved, overrides, loader, settings, defaults, compute_dtype):
    """The Run: a new one, or the one that `saved`, the dict of resume.pt, holds.

    Raises UserError if the run has read other shards, if it has computed in another dtype and the
    command line (overrides) does not choose one, or if ranks have found different files.
    """
    fields = {
        "settings": settings,
        "defaults": defaults,
        "data": loader.fingerprint(),
        "compute_dtype": compute_dtype,
    }
    # A new run, or the saved one with today's settings and data.
    if not saved:
        run = Run(step=0, tokens=0, **fields)
    else:
        for field in dataclasses.fields(Run):
            if field.name in saved:
                fields.setdefault(field.name, saved[field.name])
        run = Run(**fields)
        # If T has changed, continue at the next full sequence.
        run.tokens = -(-run.tokens // loader.T) * loader.T
        run.exposed_tokens = -(-run.exposed_tokens // loader.T) * loader.T
        verify_same_data(log_dir, saved["data"], loader, run.tokens // loader.T)
        if "dtype" not in overrides and compute_dtype != saved["compute_dtype"]:
            old = saved["compute_dtype"].removeprefix("torch.")
            new = compute_dtype.removeprefix("torch.")
            raise UserError(
                f"the run in {log_dir} computes in {old}, --dtype=auto is {new} here: "
                "choose with --dtype="
            )
        extend_run(run, run.settings | saved["settings"])
        print0(f"resuming {log_dir} at step {run.step}{describe_changes(saved, overrides)}")
    if not all_true(run.step == broadcast_int(run.step)):
        rank = env_int("RANK", 0)
        raise UserError(f"{log_dir}: is at step {run.step} on rank {rank}, but not on all ranks")
    return run


def verify_same_data(log_dir, saved_data, loader, num_sequences):
    """Raise UserError if the shards that the run has read, num_sequences of them, have changed."""
    # Old runs stored lists instead of dicts.
    keys = ("weight", "shards", "dataset")
    saved_data = [
        s if isinstance(s, dict) else dict(zip(keys, s, strict=False)) for s in saved_data
    ]
    found_data = loader.fingerprint()
    needed = f"the run in {log_dir} needs those that it has read"
    if [s["weight"] for s in saved_data] != [s["weight"] for s in found_data]:
        raise UserError(f"--data_dir: the run in {log_dir} has another mixture; leave it out")
    # Each source must still start with the shards that the run has read. New ones may follow as
    # long as the run is in its first epoch: later epochs shuffle all shards.
    counts = loader.counts_before(num_sequences)
    for saved, found, source, count in zip(
        saved_data, found_data, loader.loaders, counts, strict=True
    ):
        folder = source.shards.data_dir
        if saved.get("dataset", found["dataset"]) != found["dataset"]:
            raise UserError(f"{folder}: holds {found['dataset']}, not {saved['dataset']}: {needed}")
        old = saved["shards"]
        new = found["shards"]
        # Checksums are compared as far as the run has them.
        same = [a == b[: len(a)] for a, b in zip(old, new, strict=False)]
        if len(new) < len(old) or not all(same):
            raise UserError(f"{folder}: not the same shards: {needed}")
        old_per_epoch = sum(max(0, size - 1) // loader.T for _, size, *_ in old)
        if len(new) > len(old) and count > old_per_epoch:
            raise UserError(
                f"{folder}: shards were added, which changes the order of all epochs after the "
                "first: take them out, or start a new run with --init_from=latest"
            )


def restore(log_dir, model, optimizers, scaler, saved):
    """Load the states of optimizers, GradScaler and random numbers from resume.pt's dict.

    The options of the optimizers' groups stay as they are. Raises UserError if the states belong to
    another model.
    """
    # Optimizer states are stored by the names of parameters.
    names = {p: name for name, p in model.named_parameters()}
    try:
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            if state["state"]:
                restore_optimizer(model, names, optimizer, state)
    except (ValueError, KeyError, RuntimeError, AttributeError):
        raise UserError(
            f"{log_dir}/resume.pt: does not belong to the model next to it; both are needed"
        )
    if saved["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(saved["scaler"])
    torch.set_rng_state(saved["rng"])


def restore_optimizer(model, names, optimizer, state):
    """Load an optimizer's full state dict; ValueError or KeyError if it is another model's."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if 0 in state["state"]:  # old files number the parameters
        by_name = {names[p]: state["state"][i] for i, p in enumerate(params)}
        named_groups = []
        for group in optimizer.param_groups:
            named_groups.append({**group, "params": [names[p] for p in group["params"]]})
        state = {"state": by_name, "param_groups": named_groups}
    # torch copies tensors without looking at their shapes.
    for p in params:
        for tensor in state["state"][names[p]].values():
            if tensor.dim() == p.dim() and tensor.shape != p.shape:
                raise ValueError(names[p])
    # Loading would also replace the options of the groups, such as the weight decay: keep today's.
    groups = [dict(group) for group in optimizer.param_groups]
    dcp = import_state_dict()
    options = dcp.StateDictOptions(full_state_dict=True)
    dcp.set_optimizer_state_dict(model, optimizer, state, options=options)
    for group, old in zip(optimizer.param_groups, groups, strict=True):
        group.clear()
        group.update(old)


def resume_command(log_dir):
    """The command that resumes this run."""
    script = "train_gpt2.py --resume"
    if log_dir != "log":
        script += f" --log_dir={shlex.quote(log_dir)}"
    world_size = env_int("WORLD_SIZE", 1)
    if world_size == 1:
        return f"python {script}"
    if world_size == env_int("LOCAL_WORLD_SIZE", 0):
        return f"torchrun --standalone --nproc_per_node={world_size} {script}"
    return f"the same torchrun command with {script}"
