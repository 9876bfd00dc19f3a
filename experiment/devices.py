"""The device and dtype of a run, and the settings of torch and of the C library's allocator."""

import argparse
import ctypes
import os

import torch

from experiment.command_line import UserError
from experiment.precision import set_tensor_cores

# glibc's mallopt parameters (malloc.h) and the values given to them
M_TRIM_THRESHOLD, NEVER = -1, -1
M_MMAP_THRESHOLD, MMAP_BYTES = -3, 1 << 25  # 32 MiB, the largest threshold that glibc accepts


def set_up(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Set threads, determinism and allocator as `args` ask; return their device and dtype.

    Raises UserError if the device doesn't exist or there are far fewer cores than threads.
    """
    device = find_device(args.device)
    if args.threads is not None:
        if args.threads > 64 * (os.cpu_count() or 1):
            raise UserError(f"--threads {args.threads}: this machine has {os.cpu_count()} cores")
        torch.set_num_threads(args.threads)
    _be_deterministic(device)
    keep_freed_memory()
    return device, getattr(torch, args.dtype)


def find_device(name: str) -> torch.device:
    """The device called `name`; raises UserError if this machine doesn't have it.

    auto is cuda if there is a CUDA device, else cpu. cuda is the first CUDA device, or under
    torchrun the one of this process (LOCAL_RANK).
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":  # not mps, which lacks the float64 that the probe needs
        name = "cuda" if cuda else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun: one device per process
    device = torch.device(name)
    if device.type == "cuda" and (not cuda or device.index >= torch.cuda.device_count()):
        count = torch.cuda.device_count() if cuda else 0
        raise UserError(
            f"no device {name}: torch sees {count} CUDA devices; try --device auto or --device cpu"
        )
    if device.type == "mps" and not mps:
        raise UserError("no device mps: this is not a Mac that torch can use; try --device auto")
    return device


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors of up to 32 MiB for the next step.

    Otherwise every tensor of a few megabytes is mapped, zeroed page by page and unmapped again at
    each step: filling 500 tensors of 3 MB took 0.4 s instead of 0.1 s. The peak of memory is the
    same, but the process keeps it until it ends. Does nothing under another C library.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
    mallopt(M_TRIM_THRESHOLD, NEVER)


def _be_deterministic(device: torch.device) -> None:
    """Prefer deterministic kernels in full float32; an operation without such a kernel warns."""
    # use_deterministic_algorithms would also import torch's compiler, which takes seconds
    torch.set_deterministic_debug_mode("warn")
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        set_tensor_cores("ieee")
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling would cost time
