"""Several processes, one for each device, as torchrun starts them: how they meet, agree, and share work.

With DDP each process has the whole model. With FSDP (https://arxiv.org/abs/2304.11277) it has a part of every
tensor: of the weights, the gradients and the optimizer's state. Muon's work is shared by matrices.
"""

import os
import sys

import torch
import torch.distributed as dist

from device import keep_freed_memory, pick_device


def start_processes(device):
    """(rank, world_size, device) of this process, with pick_device's device.

    torchrun starts one process a device and says so in the environment: join them, by NCCL on GPUs and
    gloo on CPUs. Alone, this is rank 0 of 1.
    """
    rank, local_rank, world_size = (int(os.environ.get(k, 0)) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if world_size > 1 and device in ("auto", "cuda"):
        gpus = torch.cuda.device_count()
        if local_rank >= gpus and (gpus or device == "cuda"):
            sys.exit(f"more processes than GPUs: use --nproc_per_node={gpus}, or --device=cpu")
        device = f"cuda:{local_rank}" if gpus else "cpu"
    device = pick_device(device)
    if device == "cpu":
        keep_freed_memory()
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if world_size <= 1:
        return 0, 1, device
    store = None
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # torchrun --max-restarts keeps its store, and with it the addresses of processes that are gone: without
        # names of its own a restart waits for them (torch 2.13, gloo). On several machines the counts differ.
        store, rank, world_size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    group = {"store": store, "rank": rank, "world_size": world_size} if store else {}
    if device.startswith("cuda"):
        dist.init_process_group("nccl", device_id=torch.device(device), **group)
    elif device == "cpu":  # torchrun allows each process one thread: share the cores instead
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
        dist.init_process_group("gloo", **group)
    else:
        sys.exit(f"--device={device}: one process only; for several use --device=cpu")
    return rank, world_size, device


def wait_for_all():
    """Return when every process is here."""
    if dist.is_initialized():
        dist.barrier()


def end_processes():
    """The end of start_processes, and of a script: leave together, as gloo aborts a process left behind.

    torch 2.13 keeps references to the group (torch.distributed.nn.functional and FSDP's mesh do), so gloo's
    threads run on: one that asks for Python's lock while the interpreter shuts down aborts the process. Where
    there are several processes this therefore ends them without that.
    """
    wait_for_all()
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def local_first(load):
    """load(), on the first process of each machine before the others, which find what it has fetched."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        dist.barrier()
    try:
        return load()
    finally:
        if first:
            wait_for_all()


def all_agree(yes, where):
    """Whether `yes` is true on every rank."""
    yes = torch.tensor(bool(yes), dtype=torch.int, device=where)
    if dist.is_initialized():
        dist.all_reduce(yes, op=dist.ReduceOp.MIN)
    return yes.item() == 1


def from_rank_0(number, where):
    """The whole number that rank 0 has."""
    number = torch.tensor(number, device=where)
    if dist.is_initialized():
        dist.broadcast(number, 0)
    return number.item()


def all_finite(tensors, where):
    """Whether tensors are finite, on every rank."""
    local = (t.to_local() if is_divided(t) else t for t in tensors)
    return all_agree(all(t.isfinite().all() for t in local), where)


# -- FSDP ---------------------------------------------------------------------------


def shard(model, dtype, compiled):
    """Divide a GPT among the processes, block by block; its blocks then compute in dtype."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        if compiled:
            block.compile()
        fully_shard(block, mp_policy=policy)
    fully_shard(model)
    for name in ("hidden", "logits"):
        register_fsdp_forward_method(model, name)


def gather(model):
    """Have each process hold the whole model, until release(), so that it can be called by some of them only.

    Does nothing to a model that is not divided.
    """
    for module in divided_modules(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


def release(model):
    """The end of gather()."""
    for module in divided_modules(model):
        module.set_reshard_after_forward(module is not model, recurse=False)
        module.reshard()


def divided_modules(model):
    return [module for module in model.modules() if hasattr(module, "unshard")]


def is_divided(tensor):
    return hasattr(tensor, "full_tensor")


def divided_like(p, tensor):
    """A whole tensor divided as the parameter p is, if that is."""
    if not is_divided(p) or tensor.shape != p.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements)


def whole(value):
    """A state dict with divided tensors made whole, on rank 0's CPU; elsewhere None. All ranks call it."""
    if isinstance(value, dict):
        return {key: whole(x) for key, x in value.items()}
    if isinstance(value, list):
        return [whole(x) for x in value]
    if is_divided(value):
        value = value.full_tensor()
        return value.cpu() if dist.get_rank() == 0 else None
    return value


# -- Muon ---------------------------------------------------------------------------


def shares(optimizer):
    """Muon's matrices, the large ones first; rank r has the work of each world_size-th from number r on.

    None of AdamW's, none where there is one process, and none with FSDP: there the matrices are DTensors, and
    the processes share each of Muon's products.
    """
    if not (dist.is_initialized() and isinstance(optimizer, torch.optim.Muon)):
        return []
    whole_ones = [p for p in optimizer.param_groups[0]["params"] if not is_divided(p)]
    return sorted(whole_ones, key=torch.numel, reverse=True)


@torch.no_grad()
def spread(tensors):
    """Send each tensor from the rank that has it, by its place in the list, to all others."""
    works = [dist.broadcast(t, i % dist.get_world_size(), async_op=True) for i, t in enumerate(tensors)]
    for work in works:
        work.wait()


def step_optimizer(optimizer, scaler):
    """scaler.step(optimizer), each process with its share of the matrices."""
    matrices = shares(optimizer)
    for i, p in enumerate(matrices):
        if i % dist.get_world_size() != dist.get_rank():
            p.grad = None
    scaler.step(optimizer)
    spread(matrices)


# -- checkpoints --------------------------------------------------------------------


def state_dicts(model, optimizers):
    """(the model's state dict, [each optimizer's]), whole on rank 0. All ranks call it."""
    for optimizer in optimizers:
        states = [(optimizer.state[p], p) for p in shares(optimizer)]  # each process has its share's momenta
        spread([state.setdefault("momentum_buffer", torch.zeros_like(p)) for state, p in states])
    weights, states = model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]
    if divided_modules(model):
        weights, states = whole(weights), whole(states)
        weights["lm_head.weight"] = weights["transformer.wte.weight"]  # tied, and made whole one by one
    return weights, states
