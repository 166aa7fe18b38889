"""What a script runs on: device, precision, and the processes that torchrun starts, one for each device."""

import ctypes
import os
import re
import sys

import torch
import torch.distributed as dist

# Dense bfloat16 FLOP/s (float16 before Ampere) from NVIDIA's data sheets, for MFU, by a word of the name.
PEAK_FLOPS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12,
    "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip


def pick_device(device):
    """A torch device name; "auto" is cuda, then mps, then cpu. Exits if there is no such device."""
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        sys.exit(f"--device={device}: not on this machine ({str(e).splitlines()[0]}); use --device=auto")
    return device


def keep_freed_memory():
    """Have glibc's malloc keep the memory of freed tensors for the next ones.

    It gives large blocks back to the kernel otherwise, and gets them anew page by page: 124M trains 1.2 times
    as fast with this (2 cores, bfloat16, T=1024). Where there is no glibc it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to 2 GB free at the end of the heap


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


def end_processes():
    """The end of start_processes: leave together, as gloo aborts a process that others leave behind."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def local_first(load):
    """load(), on the first process of each machine before the others, which find what it has fetched."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        dist.barrier()
    try:
        return load()
    finally:
        if first and dist.is_initialized():
            dist.barrier()


def pick_dtype(dtype, device):
    """A torch.dtype from "float32", "bfloat16", "float16" or "auto".

    "auto" is bfloat16 where the hardware multiplies it natively (Ampere and newer, CPUs with
    AVX512-BF16 or AMX), else float16 on CUDA, else float32.
    """
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        if device.startswith("cuda"):
            dtype = "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16"
        else:
            cpu = torch.cpu.get_capabilities() if device == "cpu" else {}
            dtype = "bfloat16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "float32"
    if dtype not in names:
        sys.exit(f"--dtype={dtype}: choose auto, {', '.join(names)}")
    return names[dtype]


def pick_autocast(dtype, device):
    """The context that runs matrix products in pick_dtype's type and keeps the rest in float32."""
    dtype = pick_dtype(dtype, device)
    return torch.autocast(device.split(":")[0], dtype, enabled=dtype != torch.float32)


def pick_compile(choice, device):
    """Whether to torch.compile: true, false, or auto, which is true on CUDA."""
    choices = {"auto": device.startswith("cuda"), "true": True, "1": True, "false": False, "0": False}
    if choice.lower() not in choices:
        sys.exit(f"--compile={choice}: choose auto, true or false")
    return choices[choice.lower()]


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


# -- FSDP: each process keeps a part of every tensor (https://arxiv.org/abs/2304.11277) -----------------------


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
    for module in sharded_modules(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


def release(model):
    """The end of gather()."""
    for module in sharded_modules(model):
        module.set_reshard_after_forward(module is not model, recurse=False)
        module.reshard()


def sharded_modules(model):
    return [module for module in model.modules() if hasattr(module, "unshard")]


def whole(value):
    """A state dict with divided tensors made whole, on rank 0's CPU; elsewhere None. All ranks call it."""
    if isinstance(value, dict):
        return {key: whole(x) for key, x in value.items()}
    if isinstance(value, list):
        return [whole(x) for x in value]
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
        return value.cpu() if dist.get_rank() == 0 else None
    return value


def divided_like(p, tensor):
    """A whole tensor divided as the parameter p is, if that is."""
    if not hasattr(p, "full_tensor") or tensor.shape != p.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements)


def all_finite(tensors, where):
    """Whether tensors are finite, on every rank."""
    local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    return all_agree(all(t.isfinite().all() for t in local), where)


def peak_flops(device, dtype):
    """(name, FLOP/s) of a device, the FLOP/s None where a data sheet's number does not apply."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device.split(":")[0]
    peaks = [flops for key, flops in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)]
    return name, peaks[0] if peaks and dtype != torch.float32 else None
