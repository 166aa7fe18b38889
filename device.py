"""What a script runs on: the device, its precision, its peak speed."""

import ctypes
import re
import sys

import torch

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


def peak_flops(device, dtype):
    """(name, FLOP/s) of a device, the FLOP/s None where a data sheet's number does not apply."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device.split(":")[0]
    peaks = [flops for key, flops in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)]
    return name, peaks[0] if peaks and dtype != torch.float32 else None
