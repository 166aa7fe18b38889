"""The processes of a run: how they start, agree and stop, and how FSDP shards a model over them.

torchrun starts one process per device. With DDP each process has the whole model. With FSDP2
(https://arxiv.org/abs/2304.11277) each has a shard of every weight, gradient and optimizer state.
"""

import contextlib
import datetime
import os
import re
import signal
import sys
import time

from device import pick_device, tune_malloc
from script import (
    UserError,
    env_int,
    explain_error,
    is_rank_0,
    num_cpus,
    print0,
    run_as_script,
)

import torch
import torch.distributed as dist
from tqdm import tqdm

# How many processes mpirun (Open MPI, MPICH) and srun have started.
OTHER_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


# -- start and end ------------------------------------------------------------------
def init_distributed(device):
    """Join the processes that torchrun started: NCCL on GPUs, gloo on CPUs.

    Returns (rank, world_size, device); device is a name as pick_device returns it. A process that
    was not started by torchrun is rank 0 of 1.
    """
    # Without torchrun, each copy would train alone and write to the same log.
    for name in OTHER_LAUNCHERS:
        if env_int(name, 1) > 1 and "WORLD_SIZE" not in os.environ:
            raise UserError(
                f"{name}={os.environ[name]}: these processes would not know of each other; start "
                "them with torchrun, once per machine"
            )
    # torchrun says in the environment which process this is.
    rank = env_int("RANK", 0)
    local_rank = env_int("LOCAL_RANK", 0)
    world_size = env_int("WORLD_SIZE", 0)
    # Each process gets the GPU with its local rank.
    if world_size > 1 and device in ("auto", "cuda"):
        num_gpus = torch.cuda.device_count()
        if local_rank >= num_gpus and (num_gpus or device == "cuda"):
            raise UserError(
                f"more processes than GPUs: use --nproc_per_node={num_gpus}, or --device=cpu"
            )
        device = f"cuda:{local_rank}" if num_gpus else "cpu"
    device = pick_device(device)
    if device == "cpu":
        tune_malloc()
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if world_size <= 1:
        return 0, 1, device

    # The other ranks wait while rank 0 saves a large model or downloads.
    kwargs = {"timeout": datetime.timedelta(hours=1)}
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # After a restart (torchrun --max-restarts) the store still has the addresses of the
        # processes that died, and gloo would wait for them (torch 2.13): use other keys each time.
        # On several machines the restart counts can differ, so this is for one machine only.
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store, rank, world_size = next(dist.rendezvous("env://"))
        kwargs["store"] = dist.PrefixStore(f"restart_{restarts}", store)
        kwargs["rank"] = rank
        kwargs["world_size"] = world_size
    if device.startswith("cuda"):
        dist.init_process_group("nccl", device_id=torch.device(device), **kwargs)
    elif device == "cpu":
        # torchrun allows one thread per process: share the cores instead.
        num_processes = env_int("LOCAL_WORLD_SIZE", world_size)
        torch.set_num_threads(max(1, num_cpus() // num_processes))
        dist.init_process_group("gloo", **kwargs)
    else:
        raise UserError(f"--device={device}: one process only; for several use --device=cpu")
    return rank, world_size, device


def cleanup_distributed():
    """Leave the process group. With several processes this ends the process, with status 0.

    All ranks leave together, since gloo aborts a process whose peer is gone. torch 2.13 keeps
    references to the group (torch.distributed.nn.functional and FSDP's mesh do), so gloo's threads
    live on, and one that asks for the GIL during interpreter shutdown aborts the process. That is
    why this calls os._exit.
    """
    barrier()
    if dist.is_initialized():
        # Nothing runs after os._exit, so the output must be flushed before.
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def explain_distributed_error(error):
    """explain_error() for a script that torchrun may start, or that compiles."""
    message = str(error)
    first_line = message.partition("\n")[0]
    if "env:// rendezvous" in first_line:
        reason = first_line.partition("rendezvous: ")[2]
        return f"{reason}: start it with torchrun, which sets what is needed"
    if re.search("EADDRINUSE|address already in use", message):
        port = os.environ.get("MASTER_PORT")
        return f"port {port} is in use: run torchrun with --standalone, or --master_port= another"
    # A peer that died shows as an error of the collective that waited for it.
    is_gloo = isinstance(error, RuntimeError) and "gloo" in message
    if isinstance(error, dist.DistError) or is_gloo:
        return f"process {os.environ.get('RANK')} lost the others: {first_line}"
    if re.search(
        r"Failed to find C compiler|No working C\+\+ compiler|Python\.h: No such", message
    ):
        hint = "install g++ and python3-dev, or --compile=False"
        return f"torch.compile found no C++ compiler or Python headers: {hint}"
    if "no kernel image" in first_line:
        hint = "install a build that supports it (a V100 needs CUDA 12)"
        return f"torch {torch.__version__} is not built for this GPU: {hint}"
    return explain_error(error)


@contextlib.contextmanager
def run_as_distributed_script(explain=explain_distributed_error):
    """run_as_script() for a script that torchrun may start: its processes end together."""
    with run_as_script(explain):
        yield
    cleanup_distributed()


# -- agreement ----------------------------------------------------------------------
def barrier():
    """Return when every rank has called it."""
    if dist.is_initialized():
        dist.barrier()


def local_main_process_first(function):
    """Call function() on the first process of each machine, then on the others.

    The others find what the first has downloaded. Returns its result.
    """
    is_first = env_int("LOCAL_RANK", 0) == 0
    if not is_first:
        dist.barrier()
    try:
        return function()
    finally:
        if is_first:
            barrier()


def sum_over_ranks(tensor):
    """The sum of a tensor over all ranks, on the CPU. All ranks call it."""
    if dist.is_initialized():
        # NCCL only reduces tensors on GPUs, gloo only those on CPUs.
        tensor = tensor.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(tensor)
    return tensor.cpu()


def all_true(flag):
    """Whether flag is true on every rank. All ranks call it."""
    return sum_over_ranks(torch.tensor(0 if flag else 1)).item() == 0


def any_true(flag):
    """Whether flag is true on any rank. All ranks call it."""
    return not all_true(not flag)


def broadcast_int(number):
    """Rank 0's value of an int. All ranks call it."""
    return sum_over_ranks(torch.tensor(number if is_rank_0() else 0)).item()


def on_all_ranks(function, is_interruptible=False):
    """Call function() on each rank; a UserError of one is raised on all. Returns its result.

    All ranks call it, and function must not communicate. A UserError, such as a shard that is gone,
    is raised on all ranks, which can still save a checkpoint together. With is_interruptible, a
    signal ends function() at once, and then all ranks raise Interrupted. Any other error ends its
    process, and torchrun ends the others.
    """
    error = None
    # A signal that arrives after the inner block no longer raises: from there on, all ranks reach
    # all_true() together.
    try:
        try:
            StopRequests.is_interruptible = is_interruptible
            if is_interruptible and StopRequests.signal_received:
                raise Interrupted
            result = function()
        finally:
            StopRequests.is_interruptible = False
    except (UserError, Interrupted) as e:
        error = e
    if all_true(error is None):
        return result
    # If one has failed, all learn why. A UserError says more than an interruption.
    errors = [error]
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    for error in errors:
        if isinstance(error, UserError):
            raise error
    raise Interrupted


def score_on_all_ranks(score, count, width, name, rank, world_size):
    """The rows that score() gives the items range(count), (count, width), float64, on all ranks.

    score is called with tensors of up to 256 indices, a share on each rank; it must not
    communicate. Rank 0 shows its progress as `name`.
    """
    # Each rank scores every world_size-th item; the sum over ranks fills in the others.
    rows = torch.zeros(count, width, dtype=torch.float64)
    indices = torch.arange(count)[rank::world_size]
    parts = indices.split(256) if len(indices) else ()  # there can be fewer items than ranks

    def score_share():
        for part in tqdm(parts, desc=name, leave=False, disable=rank != 0):
            rows[part] = score(part)

    on_all_ranks(score_share, is_interruptible=True)
    return sum_over_ranks(rows)


def all_finite(tensors):
    """Whether tensors have no nan and no infinity on any rank. All ranks call it."""
    # Every rank looks at its own shards.
    flag = True
    for t in tensors:
        local = t.to_local() if is_dtensor(t) else t
        flag = flag and bool(local.isfinite().all())
    return all_true(flag)


class Interrupted(BaseException):
    """A stop was requested in the middle of an evaluation. No `except Exception` catches it."""


class StopRequests:
    """Requests to end a run after its current step, or at once during evaluations.

    By signals: Ctrl-C, SIGTERM from a scheduler, SIGUSR1 (a warning before SIGTERM), or SIGHUP from
    a closed terminal. A second Ctrl-C ends the process at once. To add another reason to stop,
    append to `conditions` a function that returns whether to stop. It is called on each rank, after
    each step and each evaluation, and every 5 seconds of waiting for data.
    """

    # Class attributes, since signals are sent to the process. While is_interruptible is set, by
    # on_all_ranks(), a signal raises Interrupted.
    signal_received = False
    is_interruptible = False

    def __init__(self):
        self.interrupts = []  # times of SIGINT
        StopRequests.signal_received = False
        self.conditions = [lambda: StopRequests.signal_received]
        # The first signal asks for a stop, which happens after the current step.
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
            signum = getattr(signal, name)
            if name == "SIGHUP" and signal.getsignal(signum) == signal.SIG_IGN:
                continue  # nohup: the run is meant to go on without its terminal
            signal.signal(signum, self._handle)

    def _handle(self, signum, frame):
        StopRequests.signal_received = True
        if signum == signal.SIGINT:
            self.interrupts.append(time.monotonic())
            # Within a second it may be the same Ctrl-C, which torchrun passes on.
            if self.interrupts[-1] - self.interrupts[0] > 1:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
        if is_rank_0():
            # os.write, since print() must not be called again while it is running.
            with contextlib.suppress(OSError):
                os.write(1, b"\nstopping after this step; a second Ctrl-C stops at once\n")
        if StopRequests.is_interruptible:
            StopRequests.is_interruptible = False
            raise Interrupted

    def check(self):
        """Raise Interrupted on all ranks if any has a reason to stop. All ranks call it."""
        if self.any_rank_requested():
            raise Interrupted

    def any_rank_requested(self):
        """Whether any process has a reason to stop. All ranks call it."""
        return any_true(any(condition() for condition in self.conditions))


def wait_for_data(loader, n, stop, timeout_minutes):
    """Wait until sequence n of a MixtureLoader exists on every rank.

    Returns "", or the reason to stop: "interrupted", or "data_timeout" if fineweb.py has not
    touched meta.json for timeout_minutes. Looks every 5 seconds. All ranks call it, and none waits
    alone. Raises UserError on all ranks if one finds a folder damaged.
    """
    # data_complete is set when no rank waits for data any more: then there is nothing to agree on.
    is_waiting = False
    while not loader.data_complete:
        if all_true(on_all_ranks(lambda: loader.is_available(n))):
            break
        if not is_waiting:
            counts = []
            for source in loader.incomplete():
                counts.append(f"{len(source.shards.train)} in {source.shards.data_dir}")
            found = ", ".join(counts)
            print0(f"waiting for fineweb.py to write the next training shard: there are {found}")
            is_waiting = True
        time.sleep(5)
        if stop.any_rank_requested():
            return "interrupted"
        if not all_true(loader.seconds_since_update() < 60 * timeout_minutes):
            return "data_timeout"
    if not loader.data_complete:
        loader.data_complete = all_true(not loader.incomplete())
    return ""


# -- FSDP ---------------------------------------------------------------------------
def apply_fsdp(model, dtype, compile_blocks):
    """Shard a GPT over the processes, block by block; its blocks then compute in dtype."""
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # Blocks compute in dtype and sum gradients in float32, like autocast without FSDP.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # A block at a time: its weights are gathered before it runs and freed after it.
    for block in model.transformer.h:
        if compile_blocks:
            block.compile()
        fully_shard(block, mp_policy=policy)
    fully_shard(model)
    # Scoring and generating call these two methods instead of forward().
    register_fsdp_forward_method(model, "hidden")
    register_fsdp_forward_method(model, "logits")


def fsdp_modules(model):
    """The modules of a model that FSDP shards; none without FSDP."""
    return [module for module in model.modules() if hasattr(module, "unshard")]


def unshard(model):
    """Give each process the whole model until reshard(), so that some of them can call it alone."""
    for module in fsdp_modules(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


def reshard(model):
    """Undo unshard(): blocks are resharded after their forward pass again."""
    for module in fsdp_modules(model):
        module.set_reshard_after_forward(module is not model, recurse=False)
        module.reshard()


def is_dtensor(tensor):
    """Whether a tensor is sharded, by FSDP."""
    return hasattr(tensor, "full_tensor")


def shard_like(p, tensor):
    """Shard a full tensor like the parameter p; unchanged if p is not sharded."""
    if not is_dtensor(p):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements)
