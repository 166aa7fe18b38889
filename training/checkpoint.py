"""The training state: what resume.pt holds, how it is read, and what a resumed run may change.

resume.pt has what only training needs: the fields of a Run, the states of "optimizers" and
"scaler", and the validation losses of "checkpoints". weights.py has the model files next to it.
LogDir.save() in logdir.py writes both.
"""

import dataclasses
import os
import shlex
import shutil

from script import UserError, env_int, is_out_of_memory, is_rank_0, print0
from training.distributed import all_true, broadcast_int, on_all_ranks
from training.schedule import extend_run
from weights import checkpoint_paths, load_checkpoint, model_path, resume_path

import torch
import torch.distributed as dist

COMMAND_SETTINGS = ("log_dir", "resume", "resume_step")  # they belong to a command, not to a run


@dataclasses.dataclass
class Run:
    """The state of a run besides its weights and optimizers; resume.pt stores it.

    To checkpoint another counter, add a field with a plain default, which runs that were saved
    without it get.
    """

    settings: dict  # the trainer's settings
    defaults: dict  # the defaults of these settings in the trainer's file
    data: list  # MixtureLoader.fingerprint()
    compute_dtype: str  # the dtype it computes in
    step: int  # updates made
    tokens: int  # tokens read for them
    evaluated_step: int | None = None  # the last step whose evaluations are all done
    exposed_tokens: int = 0  # tokens that exposure.jsonl accounts for
    bad_steps: int = 0  # steps in a row whose loss or gradient was not finite
    rewarm_from: list | None = None  # [step, learning rate] where max_steps was raised
    wandb_id: str = ""  # the run's id at Weights & Biases


def run_settings(settings):
    """The settings that belong to a run, wherever it is resumed."""
    return {key: value for key, value in settings.items() if key not in COMMAND_SETTINGS}


# -- writing ------------------------------------------------------------------------
def import_state_dict():
    """Import torch.distributed.checkpoint.state_dict lazily, since that takes a second."""
    from torch.distributed.checkpoint import state_dict

    return state_dict


def full_state_dicts(model, optimizers):
    """(the model's state dict, [each optimizer's]) on the CPU of rank 0, empty on other ranks.

    Complete with DDP, FSDP and Muon's work split over ranks. All ranks call it.
    """
    dcp = import_state_dict()
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    states = []
    for optimizer in optimizers:
        if hasattr(optimizer, "consolidate_state"):
            optimizer.consolidate_state()
        state = {"state": {}, "param_groups": []}
        if optimizer.state:  # if it is empty, torch would call optimizer.step() to fill it
            state = dcp.get_optimizer_state_dict(model, optimizer, options=options)
        states.append(state)
    # With FSDP, tied weights arrive as two tensors.
    weights = dcp.get_model_state_dict(model, options=options)
    if weights and model.config.tie_embeddings:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]  # one tensor, stored once
    return weights, states


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
    path = resume_path(log_dir, step)
    # For messages: the earlier steps to which the run could go back.
    others = ""
    models = checkpoint_paths(log_dir)
    steps = [s for s in checkpoint_paths(log_dir, "resume") if s in models]
    if steps:
        others = f"; --resume_step= goes back to {', '.join(map(str, steps))}"
    if not os.path.exists(path):
        if step >= 0:
            raise UserError(f"{path}: there is none{others}")
        return None
    saved = load_checkpoint(path, mmap)
    # Whatever a Run needs and has no default for must be there.
    required = {"optimizers", "scaler"}
    for field in dataclasses.fields(Run):
        if field.default is dataclasses.MISSING:
            required.add(field.name)
    missing = required - saved.keys()
    if missing:
        raise UserError(
            f"{path}: not written by this trainer: it has no {', '.join(sorted(missing))}"
        )
    # The model is written before resume.pt, so it can only be missing if someone deleted it.
    model = model_path(log_dir, saved["step"])
    if not os.path.exists(model):
        raise UserError(f"{path}: belongs to {model}, which is missing{others}")
    return saved


def describe_changes(saved, overrides, settings):
    """What the command line changes in a resumed run: " with B=8 instead of 4", or ""."""
    changes = []
    for key, old in run_settings(saved["settings"]).items():
        if key in overrides and settings[key] != old:
            changes.append(f"{key}={settings[key]} instead of {old}")
    if not changes:
        return ""
    note = ""
    if {"seed", "T"} & {change.partition("=")[0] for change in changes}:
        note = "; the rest of the epoch is read in another order"
    return f" with {', '.join(changes)}{note}"


def init_run(log_dir, saved, overrides, loader, settings, defaults, compute_dtype):
    """The Run: a new one, or the one in resume.pt (`saved`).

    Raises UserError if the run has read other shards, if it has computed in another dtype and the
    command line (overrides) does not choose one, or if ranks have found different files.
    """
    # The saved values, if there are any, with today's settings and data.
    values = {"step": 0, "tokens": 0}
    if saved:
        names = {field.name for field in dataclasses.fields(Run)}
        values = {key: value for key, value in saved.items() if key in names}
    values["settings"] = settings
    values["defaults"] = defaults
    values["data"] = []  # LogDir.save() fills it in
    values["compute_dtype"] = compute_dtype
    run = Run(**values)
    if saved:
        # If T has changed, continue at the next full sequence.
        run.tokens = -(-run.tokens // loader.T) * loader.T
        run.exposed_tokens = -(-run.exposed_tokens // loader.T) * loader.T
        num_sequences = run.tokens // loader.T
        on_all_ranks(lambda: verify_same_data(log_dir, saved["data"], loader, num_sequences))
        if "dtype" not in overrides and compute_dtype != saved["compute_dtype"]:
            old = saved["compute_dtype"].removeprefix("torch.")
            new = compute_dtype.removeprefix("torch.")
            raise UserError(
                f"the run in {log_dir} computes in {old}, --dtype=auto is {new} here: "
                "choose with --dtype="
            )
        extend_run(run, run.settings | saved["settings"])
        changes = describe_changes(saved, overrides, settings)
        print0(f"resuming {log_dir} at step {run.step}{changes}")
    # On several machines, each must see the same log folder.
    if not all_true(run.step == broadcast_int(run.step)):
        rank = env_int("RANK", 0)
        raise UserError(f"{log_dir}: is at step {run.step} on rank {rank}, but not on all ranks")
    return run


def verify_same_data(log_dir, saved_data, loader, num_sequences):
    """Raise UserError if the shards of the num_sequences that the run has read have changed."""
    if not is_rank_0():  # one process reads them all
        return
    found_data = loader.fingerprint(num_sequences)
    if [x["weight"] for x in saved_data] != [x["weight"] for x in found_data]:
        raise UserError(f"--data_dir: the run in {log_dir} has another mixture; leave it out")
    counts = loader.counts_before(num_sequences)
    sources = zip(saved_data, found_data, loader.loaders, counts, strict=True)
    for saved, found, shard_loader, num_read in sources:
        folder = shard_loader.shards.data_dir
        if saved.get("dataset", found["dataset"]) != found["dataset"]:
            raise UserError(
                f"{folder}: holds {found['dataset']}, not {saved['dataset']}: "
                f"the run in {log_dir} needs those that it has read"
            )
        # Each source must still start with the same shards, by their names, sizes and checksums.
        old = saved["shards"]
        new = found["shards"]
        if len(new) < len(old) or not all(map(is_same_shard, old, new)):
            raise UserError(
                f"{folder}: not the same shards: the run in {log_dir} needs those that it has read"
            )
        # New shards may follow, while fineweb.py is writing, but only in the first epoch: later
        # epochs shuffle all shards.
        old_windows = sum(max(0, size - 1) // loader.T for _, size, *_ in old)
        if len(new) > len(old) and num_read > old_windows:
            raise UserError(
                f"{folder}: shards were added, which changes the order of all epochs after the "
                "first: take them out, or start a new run with --init_from=latest"
            )


def is_same_shard(old, new):
    """Whether (name, size, checksum) are equal; a shard that was never read has no checksum."""
    return all(a == b or a is None or b is None for a, b in zip(old, new, strict=False))


def restore(log_dir, model, optimizers, scaler, saved):
    """Load the states of the optimizers and the GradScaler from resume.pt's dict.

    The options of the optimizers' groups stay as they are. Raises UserError if the states belong to
    another model.
    """
    # The states of a model of another size have the same names.
    config = dataclasses.asdict(model.config)
    same_model = all(saved["settings"].get(key, value) == value for key, value in config.items())
    try:
        if not same_model:
            raise ValueError("another model")
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            if state["state"]:
                restore_optimizer(model, optimizer, state)
    except (ValueError, KeyError, RuntimeError, AttributeError) as e:
        if is_out_of_memory(e) or isinstance(e, dist.DistError):
            raise
        raise UserError(
            f"{log_dir}/resume.pt: does not belong to the model next to it; both are needed"
        )
    # Only float16 scales the loss; a run can continue in another dtype.
    if saved["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(saved["scaler"])


def restore_optimizer(model, optimizer, state):
    """Load an optimizer's full state dict, in which parameters have their names as keys."""
    names = {p: name for name, p in model.named_parameters()}
    if 0 in state["state"]:  # a former resume.pt, which numbers the parameters instead
        params = [p for group in optimizer.param_groups for p in group["params"]]
        by_name = {names[p]: state["state"][i] for i, p in enumerate(params)}
        named_groups = []
        for group in optimizer.param_groups:
            named_groups.append({**group, "params": [names[p] for p in group["params"]]})
        state = {"state": by_name, "param_groups": named_groups}
    # Not every size of a model is a setting: block_size is not.
    for name, p in model.named_parameters():
        for value in state["state"].get(name, {}).values():
            if torch.is_tensor(value) and value.dim() == p.dim():
                value.expand(p.shape)  # a RuntimeError if it belongs to another shape
    # Loading also replaces the options of the groups, such as the weight decay: keep today's.
    groups = [dict(group) for group in optimizer.param_groups]
    dcp = import_state_dict()
    options = dcp.StateDictOptions(full_state_dict=True)
    dcp.set_optimizer_state_dict(model, optimizer, state, options=options)
    for group, old in zip(optimizer.param_groups, groups, strict=True):
        group.clear()
        group.update(old)


def resume_command(log_dir):
    """The command that resumes this run."""
    # As the user started it: one process, all on this machine, or on several.
    script = "train_gpt2.py --resume"
    if log_dir != "log":
        script += f" --log_dir={shlex.quote(log_dir)}"
    world_size = env_int("WORLD_SIZE", 1)
    if world_size == 1:
        return f"python {script}"
    if world_size == env_int("LOCAL_WORLD_SIZE", 0):
        return f"torchrun --standalone --nproc_per_node={world_size} {script}"
    return f"the same torchrun command with {script}"
