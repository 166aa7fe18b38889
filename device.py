"""What a script computes on: device, dtype, autocast, torch.compile, peak FLOP/s."""

import contextlib
import ctypes
import glob
import os
import re
import sys

from script import UserError, print0

import torch

NVIDIA = "https://www.nvidia.com/en-us/data-center"
GEFORCE = "https://images.nvidia.com/aem-dam/Solutions/geforce"
PDF = "https://www.nvidia.com/content/PDF"
# {words of a card's name: (TFLOP/s, source)}: dense, bfloat16 (V100 and T4: float16), accumulated
# in float32. Where a data sheet only gives the rate with sparsity, it is halved.
PEAK_TFLOPS = {
    "B200": (2250, f"{NVIDIA}/dgx-b200/"),
    "H200": (989, f"{NVIDIA}/h200/"),
    "H100": (989, f"{NVIDIA}/h100/"),
    "H100 PCIe": (756, "https://resources.nvidia.com/en-us-tensor-core"),
    "A100": (312, f"{NVIDIA}/a100/"),
    "L40S": (362, f"{NVIDIA}/l40s/"),
    "L4": (121, f"{NVIDIA}/l4/"),
    "V100": (125, f"{NVIDIA}/v100/"),
    "T4": (65, f"{NVIDIA}/tesla-t4/"),
    "RTX 5090": (209.5, f"{GEFORCE}/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"),
    "RTX 4090": (165.2, f"{GEFORCE}/ada/nvidia-ada-gpu-architecture.pdf"),
    "RTX 3090": (71, f"{PDF}/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"),
    "MI300X": (1307.4, "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NVIDIA_CARDS = "/dev/nvidia[0-9]*"  # the driver makes one such file for each card


def pick_device(device):
    """A torch device name; "auto" is cuda, then mps, then cpu. UserError if it is missing."""
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        # A slow run on the CPU should not be a surprise on a machine with a card.
        if glob.glob(NVIDIA_CARDS) and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            reason = why_no_cuda()
            print0(f"warning: running on the CPU, although there is an NVIDIA card: {reason}")
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"--device={device}: not on this machine ({reason}); use --device=auto")
    return device


def why_no_cuda():
    """Why torch cannot use the NVIDIA cards of this machine, and what to do about it."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as e:
        reason = str(e).partition("\n")[0].partition(". ")[0]
        return (
            f"{reason}; update its driver, or install another torch (this is {torch.__version__})"
        )
    return "torch finds no usable CUDA device; see nvidia-smi"


def pick_dtype(dtype, device):
    """A torch.dtype from "float32", "bfloat16", "float16" or "auto".

    "auto" is bfloat16 where the hardware multiplies it natively (Ampere and newer, CPUs with
    AVX512-BF16 or AMX), else float16 on CUDA, else float32.
    """
    if dtype == "auto":
        if device.startswith("cuda"):
            # Compute capability 8 is Ampere.
            has_bfloat16 = torch.cuda.get_device_capability(device)[0] >= 8
            dtype = "bfloat16" if has_bfloat16 else "float16"
        elif device == "cpu":
            cpu = torch.cpu.get_capabilities()
            has_bfloat16 = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
            dtype = "bfloat16" if has_bfloat16 else "float32"
        else:
            dtype = "float32"
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype}: choose auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def pick_autocast(dtype, device, cache_weights=True):
    """A context that multiplies matrices in pick_dtype's type and keeps the rest in float32.

    cache_weights: reuse converted weights until the context ends. A training step uses each once.
    """
    dtype = pick_dtype(dtype, device)
    device_type = device.split(":")[0]
    return torch.autocast(
        device_type, dtype, enabled=dtype != torch.float32, cache_enabled=cache_weights
    )


def pick_compile(choice, device):
    """Whether to torch.compile: "true", "false", or "auto", which means true on CUDA."""
    choices = {
        "auto": device.startswith("cuda"),
        "true": True,
        "1": True,
        "false": False,
        "0": False,
    }
    if choice.lower() not in choices:
        raise UserError(f"--compile={choice}: choose auto, true or false")
    return choices[choice.lower()]


@contextlib.contextmanager
def eager_mode():
    """For work whose shapes keep changing: no torch.compile and no cuDNN attention.

    Both make a new plan for each new shape, which takes longer than the work itself.
    """
    # Both settings are global, so put back what was there.
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Nothing is compiled without torch._dynamo, and importing it takes a second.
    stance = contextlib.nullcontext()
    if "torch._dynamo" in sys.modules:
        stance = torch.compiler.set_stance("force_eager")
    try:
        with stance:
            yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def peak_flops(device, dtype):
    """(name, FLOP/s) of a device; the FLOP/s are None where no data sheet's number applies."""
    # There are no data sheets for CPUs and Macs in the table.
    if not device.startswith("cuda"):
        return device.split(":")[0], None
    name = torch.cuda.get_device_name(device)
    # The longest name that fits: "H100 PCIe" rather than "H100". A 3090 Ti is not a 3090, and a
    # laptop card is slower than its name.
    known = [key for key in PEAK_TFLOPS if re.search(rf"\b{key}\b(?! (Ti|D|SUPER|NVL)\b)", name)]
    if not known or "Laptop" in name or dtype == torch.float32:
        return name, None
    tflops, _ = PEAK_TFLOPS[max(known, key=len)]
    return name, tflops * 1e12


def tune_malloc():
    """Make glibc's malloc keep freed memory for the next tensors.

    Otherwise it returns large blocks to the kernel, and gets them anew page by page: 124M trains
    1.2 times as fast with this (2 cores, bfloat16, T=1024). Does nothing without glibc.
    """
    if sys.platform != "linux":
        return
    # musl and others have no mallopt.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings for large blocks
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to 2 GB free at the end of the heap
