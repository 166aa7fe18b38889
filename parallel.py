"""Devices and processes: what a script runs on, and how the processes of torchrun meet, agree and share work.

With DDP each process has the whole model. With FSDP (https://arxiv.org/abs/2304.11277) it has a part of every tensor:
of the weights, the gradients and the optimizer's state. Muon's work is shared by matrices.
"""

import contextlib
import ctypes
import datetime
import errno
import glob
import os
import re
import signal
import sys
import time

from configurator import cores, from_environment

import torch
import torch.distributed as dist

# TFLOP/s for MFU, by words of the name, as the makers' data sheets have them (from memory: check your card's): dense,
# in bfloat16 (float16 before Ampere) with float32 accumulation. V100s need a torch for CUDA 12: 13's starts at Turing.
PEAK_TFLOPS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H100": 989, "H100 NVL": 835, "H100 PCIe": 756, "H800": 989, "H20": 148,
    "A100": 312, "A800": 312, "A40": 149.7, "A30": 165, "A10": 125, "L40S": 362, "L40": 181, "L4": 121, "V100": 125,
    "T4": 65, "RTX 6000 Ada": 364, "RTX A6000": 154.8, "RTX A5000": 111.1, "RTX A4000": 76.7,
    "RTX 5090": 209.5, "RTX 5080": 112.6, "RTX 5070 Ti": 87.9, "RTX 5070": 61.7,
    "RTX 4090": 165.2, "RTX 4080 SUPER": 104.4, "RTX 4080": 97.5, "RTX 4070 Ti SUPER": 88.2, "RTX 4070 Ti": 80.2,
    "RTX 4070 SUPER": 71, "RTX 4070": 58.3, "RTX 4060 Ti": 44.1, "RTX 4060": 30.2,
    "RTX 3090 Ti": 80, "RTX 3090": 71.2, "RTX 3080 Ti": 68.2, "RTX 3080": 59.5, "RTX 3070 Ti": 43.5, "RTX 3070": 40.6,
    "RTX 3060 Ti": 32.4, "RTX 3060": 25.5, "MI325X": 1307.4, "MI300X": 1307.4, "MI250X": 383, "MI210": 181,
}  # fmt: skip
SAID = {getattr(errno, name) for name in "ENOSPC EDQUOT EROFS EIO EACCES EPERM EISDIR EEXIST".split()}  # by a disk
NVIDIA_CARDS = "/dev/nvidia[0-9]*"  # what the driver shows of them


def pick_device(device):
    """A torch device name; "auto" is cuda, then mps, then cpu. Exits if there is no such device."""
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        if glob.glob(NVIDIA_CARDS) and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            print0(f"warning: this runs on the CPU, though there is an NVIDIA card: {why_no_cuda()}")
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        sys.exit(f"--device={device}: not on this machine ({str(e).splitlines()[0]}); use --device=auto")
    return device


def why_no_cuda():
    """What torch says against the cards of this machine, and what to do."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as e:
        said = str(e).partition("\n")[0].partition(". ")[0]
        return f"{said}; update its driver, or install a torch that is built for it (torch {torch.__version__} is here)"
    return "torch finds none of its devices; see nvidia-smi"


def keep_freed_memory():
    """Have glibc's malloc keep the memory of freed tensors for the next ones.

    It gives large blocks back to the kernel otherwise, and gets them anew page by page: 124M trains 1.2 times as fast
    with this (2 cores, bfloat16, T=1024). Where there is no glibc it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to 2 GB free at the end of the heap


def pick_dtype(dtype, device):
    """A torch.dtype from "float32", "bfloat16", "float16" or "auto".

    "auto" is bfloat16 where the hardware multiplies it natively (Ampere and newer, CPUs with AVX512-BF16 or AMX), else
    float16 on CUDA, else float32.
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


def pick_autocast(dtype, device, cache=True):
    """The context that runs matrix products in pick_dtype's type and keeps the rest in float32.

    cache: keep the weights that were converted until its end, for the next use. A training step has none.
    """
    dtype = pick_dtype(dtype, device)
    return torch.autocast(device.split(":")[0], dtype, enabled=dtype != torch.float32, cache_enabled=cache)


def pick_compile(choice, device):
    """Whether to torch.compile: true, false, or auto, which is true on CUDA."""
    choices = {"auto": device.startswith("cuda"), "true": True, "1": True, "false": False, "0": False}
    if choice.lower() not in choices:
        sys.exit(f"--compile={choice}: choose auto, true or false")
    return choices[choice.lower()]


@contextlib.contextmanager
def any_shape():
    """For work whose shapes keep changing: without torch.compile and cuDNN's attention, which plan anew for each."""
    was = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)


def peak_flops(device, dtype):
    """(name, FLOP/s) of a device, the FLOP/s None where a data sheet's number does not apply."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device.split(":")[0]
    known = [key for key in PEAK_TFLOPS if re.search(rf"\b{key}\b", name) and "Laptop" not in name]
    return name, PEAK_TFLOPS[max(known, key=len)] * 1e12 if known and dtype != torch.float32 else None


# -- processes ----------------------------------------------------------------------
def is_rank_0():
    """Whether this is the process that prints and writes."""
    return from_environment("RANK", 0) == 0


def print0(*args):
    """print(), on rank 0 alone."""
    if is_rank_0():
        print(*args)


def start_processes(device):
    """(rank, world_size, device) of this process, with pick_device's device.

    torchrun starts one process a device and says so in the environment: join them, by NCCL on GPUs and gloo on CPUs.
    Alone, this is rank 0 of 1.
    """
    rank, local_rank, world_size = (from_environment(name, 0) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
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
    group = {"timeout": datetime.timedelta(hours=1)}  # others wait while rank 0 saves a large model or downloads
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # torchrun --max-restarts keeps its store, and with it the addresses of processes that are gone: without names
        # of its own a restart waits for them (torch 2.13, gloo). On several machines the counts differ.
        store, rank, world_size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        group |= {"store": store, "rank": rank, "world_size": world_size}
    if device.startswith("cuda"):
        dist.init_process_group("nccl", device_id=torch.device(device), **group)
    elif device == "cpu":  # torchrun allows each process one thread: share the cores instead
        torch.set_num_threads(max(1, cores() // from_environment("LOCAL_WORLD_SIZE", world_size)))
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

    torch 2.13 keeps references to the group (torch.distributed.nn.functional and FSDP's mesh do), so gloo's threads run
    on: one that asks for Python's lock while the interpreter shuts down aborts the process. Where there are several
    processes this therefore ends them without that.
    """
    wait_for_all()
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def out_of_memory(e):
    return isinstance(e, RuntimeError) and bool(re.search("out of memory|can't allocate|not enough memory", str(e)))


def fits_memory(work, model):
    """Whether work(), which makes gradients of model, finds the memory it needs on every rank. All ranks call it."""
    try:
        work()
        fits = True
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        fits = False
    model.zero_grad(set_to_none=True)
    if not (fits := all_agree(fits)):
        torch.compiler.reset()  # what was compiled for this shape: another would be compiled for any
    return fits


def explain(e, B, folder):
    """The line for an error that is no fault of the code, None for others. folder: where the script writes."""
    first = str(e).partition("\n")[0]
    if out_of_memory(e):
        hint = f"try --B={B // 2}" if B > 1 else "it needs a smaller model or --T"
        return f"out of memory with --B={B}: {hint}; total_batch_size, and so the result, stays the same"
    if re.search(r"Failed to find C compiler|No working C\+\+ compiler|Python\.h: No such file", str(e)):
        return "torch.compile found no C++ compiler or Python headers: install g++ and python3-dev, or --compile=False"
    if "no kernel image" in first:
        return f"torch {torch.__version__} is not built for this GPU: install one that is (for a V100, CUDA 12's)"
    if "env:// rendezvous" in first:
        return f"{first.partition('rendezvous: ')[2]}: torchrun sets all that is needed"
    if isinstance(e, dist.DistError) or (isinstance(e, RuntimeError) and "gloo" in str(e)):
        return f"process {os.environ.get('RANK')} lost the others: {first}"
    if isinstance(e, OSError) and e.errno in SAID:
        return f"{e.filename or folder}: {e.strerror}; what was saved before is whole: mend it, then --resume"


def explain_any(e):
    """The line for an error that any script can meet and is no fault of the code, None for others."""
    if out_of_memory(e):
        return "out of memory: try less at once, or a smaller model"
    if isinstance(e, OSError) and e.errno in SAID:
        return f"{e.filename}: {e.strerror}" if e.filename else e.strerror


def run_script(main, explain=explain_any):
    """main(), and the end of the processes. An error ends them all with one line, said once.

    explain(exception) is the line for one that is no fault of the code, None for others, which are raised.
    """
    try:
        try:
            main()
        except Exception as e:
            line = explain(e)
            if not line:
                raise
            sys.exit(line)
    except SystemExit as e:
        if e.code and not is_rank_0():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)  # most likely rank 0 says why, and torchrun ends this one: one line is enough
        raise
    end_processes()


def local_first(load):
    """load(), on the first process of each machine before the others, which find what it has fetched."""
    first = from_environment("LOCAL_RANK", 0) == 0
    if not first:
        dist.barrier()
    try:
        return load()
    finally:
        if first:
            wait_for_all()


def sum_over_ranks(tensor):
    """A tensor, summed over all ranks, on the CPU. All ranks call it."""
    if dist.is_initialized():
        tensor = tensor.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(tensor)
    return tensor.cpu()


def all_agree(yes):
    """Whether `yes` is true on every rank. All ranks call it."""
    return sum_over_ranks(torch.tensor(int(not yes))).item() == 0


def from_rank_0(number):
    """The whole number that rank 0 has. All ranks call it."""
    return sum_over_ranks(torch.tensor(number if is_rank_0() else 0)).item()


def all_finite(tensors):
    """Whether tensors are finite, on every rank."""
    local = (t.to_local() if is_divided(t) else t for t in tensors)
    return all_agree(all(t.isfinite().all() for t in local))


class StopRequests:
    """What asks a run to end after its step: Ctrl-C, a scheduler's SIGTERM or, ahead of it, SIGUSR1, a closed terminal.

    A second Ctrl-C ends the process at once. For another reason to end a run, here() is the place: whoever asks, at
    whatever point of a step, asks anywhere(), which asks here() of each process.
    """

    def __init__(self):
        self.received = []  # (signal, when)
        for name in {"SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"} & set(dir(signal)):
            if name != "SIGHUP" or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which is what nohup asks for
                signal.signal(getattr(signal, name), self._receive)

    def _receive(self, signum, frame):
        self.received.append((signum, time.monotonic()))
        times = [at for number, at in self.received if number == signal.SIGINT]
        if signum == signal.SIGINT and times[-1] - times[0] > 1:  # sooner, it may be torchrun that passes it on
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        if is_rank_0():  # print() must not be called again while it is at work
            with contextlib.suppress(OSError):
                os.write(1, b"\nstopping after this step; a second Ctrl-C stops at once\n")

    def here(self):
        """Whether this process has been asked to stop."""
        return len(self.received) > 0

    def anywhere(self):
        """Whether any process has been. All ranks call it."""
        return not all_agree(not self.here())


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
    """The end of gather(); from now on the parts of a block are given back after its forward pass again."""
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

    None of AdamW's, none where there is one process, and none with FSDP, where each process works on all of them.
    """
    if not (dist.is_initialized() and "momentum" in optimizer.param_groups[0]):
        return []
    whole_ones = [p for group in optimizer.param_groups for p in group["params"] if not is_divided(p)]
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
        matrices = shares(optimizer)  # each process has the state of its share
        empty = getattr(optimizer, "empty_state", lambda p: {"momentum_buffer": torch.zeros_like(p)})  # torch's Muon
        for p in matrices:
            optimizer.state[p] = empty(p) | optimizer.state[p]
        for key in optimizer.state[matrices[0]] if matrices else ():
            spread([optimizer.state[p][key] for p in matrices])
    weights, states = model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]
    if divided_modules(model):
        weights, states = whole(weights), whole(states)
        if model.config.tied:
            weights["lm_head.weight"] = weights["transformer.wte.weight"]  # one tensor, which was made whole twice
    return weights, states
