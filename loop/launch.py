"""The ranks: what the launcher says there are, and the Accelerator that joins them."""

from __future__ import annotations

import ctypes
import os
import platform
from datetime import timedelta
from typing import TYPE_CHECKING

from loop.config import Config, InputError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

# Set by torchrun and `accelerate launch`; by Open MPI, MPICH and Intel MPI, MVAPICH; by srun for the tasks of a step.
WORLD_SIZE = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
LOCAL_WORLD_SIZE = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")

HOW_TO_LAUNCH = (
    "use scripts/train.sh, `torchrun --nproc_per_node N train.py`, "
    "or `accelerate launch --multi_gpu --num_processes N train.py`, on CPUs too"
)


def launched_world_size() -> int:
    """Return how many ranks the launcher says it started; 1 without a launcher."""
    return _from_environment(WORLD_SIZE, 1)


def launched_rank() -> int:
    """Return this process's rank over all machines."""
    return _from_environment(RANK, 0)


def launched_local_rank() -> int:
    """Return this process's rank on its machine."""
    return _from_environment(LOCAL_RANK, 0)


def count_gpus(config: Config) -> int:
    """Return how many GPUs this machine's ranks may use; raises InputError where the flags or the ranks need more."""
    import torch

    gpus = 0 if config.cpu else torch.cuda.device_count()
    if config.mixed_precision == "fp16" and not gpus:
        raise InputError("--mixed-precision fp16 needs a GPU, and there is none: use bf16")
    ranks = _from_environment(LOCAL_WORLD_SIZE, launched_local_rank() + 1)
    if 0 < gpus < ranks:
        raise InputError(f"{ranks} ranks on a machine of {gpus} GPU(s): start {gpus}, or train with --cpu")
    return gpus


def make_accelerator(config: Config, trackers: list[GeneralTracker]) -> Accelerator:
    """Join the ranks and return their Accelerator.

    Raises InputError where the launcher's processes would each train alone or cannot be joined, and as `count_gpus`.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    if "WORLD_SIZE" not in os.environ and "MASTER_PORT" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        raise InputError(
            "`accelerate launch` seems to have been asked for several processes and started one, as it does with --cpu "
            f"and in MULTI_CPU configurations: {HOW_TO_LAUNCH}. (If one is what you want: unset MASTER_PORT.)"
        )
    try:
        accelerator = Accelerator(
            cpu=count_gpus(config) == 0,
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.accumulate,
            log_with=trackers,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.ddp_timeout))],
        )
    except ValueError as error:  # InputError among them
        raise InputError(str(error)) from None
    except RuntimeError as error:  # torch's DistError among them
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise InputError(f"the ranks cannot join each other at {where}: {str(error).splitlines()[0]}") from None
    if accelerator.num_processes != launched_world_size():
        raise InputError(
            f"the launcher started {launched_world_size()} processes, but they do not see each other: each would train "
            f"alone, as one of {accelerator.num_processes}: {HOW_TO_LAUNCH}"
        )
    return accelerator


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step, where it is the C library.

    By itself it may hand LeNet's activations back to the kernel at every step, to take them page by page anew.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: only larger blocks, it allows no more, are the kernel's own
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def _from_environment(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)
