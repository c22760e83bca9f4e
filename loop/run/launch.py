"""The ranks: how many the launcher has started, and the Accelerator that joins them."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from loop.config import Config, InputError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker
    from torch import nn

# Set by torchrun and `accelerate launch`; by Open MPI, MPICH and Intel MPI, MVAPICH; by srun for the tasks of a step.
WORLD_SIZE = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
LOCAL_WORLD_SIZE = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")

# Set by `accelerate launch` as `accelerate config` was answered, for what is more than plain data parallelism.
OTHER_PARALLELISM = {
    "ACCELERATE_DYNAMO_BACKEND": "torch.compile",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
OFF = ("", "no", "false", "0")
HOW_TO_CONFIGURE = (
    "launch with --config_file accelerate_config.yaml, or run `accelerate config` again and answer no to all of these"
)
HOW_TO_LAUNCH = (
    "use scripts/train.sh, `torchrun --nproc_per_node N train.py`, "
    "or `accelerate launch --multi_gpu --num_processes N train.py`, on CPUs too"
)


def reports_errors() -> bool:
    """Whether this process prints the errors that every rank meets: the first rank of each machine does."""
    try:
        return launched_world_size() == 1 or launched_local_rank() == 0
    except InputError:
        return True


def check_launch(args: list[str]) -> None:
    """Raise InputError where the launcher has died, or its variables contradict each other, as left over in a shell.

    args: the command line. An empty variable is unset: Accelerate would take it for a number.
    """
    for name in (*WORLD_SIZE, *RANK, *LOCAL_RANK, *LOCAL_WORLD_SIZE):
        if not os.environ.get(name):
            os.environ.pop(name, None)
    if any(arg.startswith(("--local-rank", "--local_rank")) for arg in args):
        raise InputError("`python -m torch.distributed.launch` adds --local-rank: use torchrun instead")
    world_size = launched_world_size()
    if world_size < 1:
        raise InputError(f"{_set(WORLD_SIZE)}={world_size}: unset it, or let a launcher set it")
    if world_size == 1 and "LOCAL_RANK" in os.environ and "MASTER_ADDR" not in os.environ:
        raise InputError("LOCAL_RANK is set, but no MASTER_ADDR: unset what another launch has left over in this shell")
    for names in (RANK, LOCAL_RANK, LOCAL_WORLD_SIZE):
        name, number = _set(names), _from_environment(names, 0)
        if number >= world_size + (names == LOCAL_WORLD_SIZE):
            raise InputError(
                f"{name}={number}, but the number of ranks is {world_size}: unset what another launch has left over in "
                f"this shell, or use {HOW_TO_LAUNCH.removeprefix('use ')}"
            )
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # Where the launcher died while this process was starting, its parent is another already: the store shows it.
        address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        try:
            socket.create_connection((address, port), timeout=30).close()
        except OSError as error:
            told = f"the launcher's store at {address}:{port} is gone, and maybe the launcher: {error}"
            raise InputError(told) from None


def launched_world_size() -> int:
    """Return how many ranks the launcher has started; 1 without a launcher."""
    return _from_environment(WORLD_SIZE, 1)


def launched_rank() -> int:
    """Return this process's rank over all machines."""
    return _from_environment(RANK, 0)


def launched_local_rank() -> int:
    """Return this process's rank on its machine."""
    return _from_environment(LOCAL_RANK, 0)


def count_gpus(config: Config, *, share_gpus: bool = False) -> int:
    """Return how many GPUs this machine's ranks may use; raises InputError where the flags or the ranks need more."""
    import torch

    gpus = 0 if config.cpu else torch.cuda.device_count()
    if config.mixed_precision == "fp16" and not gpus:
        raise InputError("--mixed-precision fp16 needs a GPU, and there is none: use bf16")
    ranks = _from_environment(LOCAL_WORLD_SIZE, launched_local_rank() + 1)
    if 0 < gpus < ranks and not share_gpus:
        raise InputError(f"{ranks} ranks on a machine of {gpus} GPU(s): start {gpus}, or train with --cpu")
    return gpus


def join_ranks(config: Config, trackers: list[GeneralTracker], *, share_gpus: bool = False) -> Accelerator:
    """Join the ranks and return their Accelerator.

    share_gpus: let several ranks use the same GPU, which NCCL refuses: over gloo, which also serves CUDA tensors.

    Raises InputError where the launcher asks for more than plain data parallelism, where its processes would each train
    alone or cannot be joined, and as `count_gpus`.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import DistributedType, GradientAccumulationPlugin

    from loop.run.watchdog import first_line, is_from_backend

    _refuse_other_parallelism(config)
    by_accelerate = {"MASTER_PORT", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys()
    if by_accelerate and not any(name in os.environ for name in WORLD_SIZE):  # MPI's sets one of them
        raise InputError(
            "`accelerate launch` seems to have been asked for several processes and started one, as it does with --cpu "
            f"and in MULTI_CPU configurations: {HOW_TO_LAUNCH}. (If one is what you want: unset MASTER_PORT.)"
        )
    # Longer than the watchdog's: NCCL answers its own by SIGABRT.
    group: dict[str, Any] = {"timeout": timedelta(seconds=config.ddp_timeout + max(config.ddp_timeout, 30))}
    gpus = count_gpus(config, share_gpus=share_gpus)
    if share_gpus and gpus and launched_world_size() > 1:
        group["backend"] = "gloo"
        # Accelerate hands it to DDP and to each barrier as the GPU's index
        os.environ["LOCAL_RANK"] = str(launched_local_rank() % gpus)
    try:
        accelerator = Accelerator(
            cpu=gpus == 0,
            mixed_precision=config.mixed_precision,
            # as a plugin: ACCELERATE_GRADIENT_ACCUMULATION_STEPS would override the plain number
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.accumulate),
            log_with=trackers or None,
            kwargs_handlers=[InitProcessGroupKwargs(**group)],
        )
    except Exception as error:  # of many kinds: what a configuration asks for may not be installed, or not fit
        reason = first_line(error)
        if is_from_backend(error):
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise InputError(f"the ranks cannot join each other at {where}: {reason}") from None
        told = ", ".join(f"{name}={value}" for name, value in os.environ.items() if name.startswith("ACCELERATE_"))
        raise InputError(
            f"Accelerate cannot be set up: {reason} (set are: {told or 'no ACCELERATE_ variables'})"
        ) from None
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise InputError(
            f"Accelerate was set up for {kind.value}, and this is plain data parallelism: {HOW_TO_CONFIGURE}"
        )
    if accelerator.num_processes != launched_world_size():
        raise InputError(
            f"the launcher started {launched_world_size()} processes, but they do not see each other: each would train "
            f"alone, as one of {accelerator.num_processes}: {HOW_TO_LAUNCH}"
        )
    set_float32_precision(tf32=config.tf32)
    return accelerator


def leave_ranks() -> None:
    """Destroy the process group, if there is one, with all that holds it: when the process ends.

    A net under DDP holds it too. Where one is left in a reference cycle, such as a scheduler's with its optimizer,
    gloo's threads would outlive the group, and end the process by an abort (exit code -6) in some runs.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def prepare_net(accelerator: Accelerator, net: nn.Module) -> nn.Module:
    """Return the net on the run's device, under DDP where there are several ranks.

    Raises InputError where Accelerate has wrapped it in anything else.
    """
    from torch.nn.parallel import DistributedDataParallel

    prepared: nn.Module = accelerator.prepare(net)
    if accelerator.num_processes > 1 and not isinstance(prepared, DistributedDataParallel):
        raise InputError(
            f"Accelerate put the net into {type(prepared).__name__}, not DistributedDataParallel: {HOW_TO_CONFIGURE}"
        )
    return prepared


def set_float32_precision(*, tf32: bool) -> None:
    """Set how GPUs multiply float32 numbers: in float32, or in TF32, which is torch's default for LeNet's layers."""
    import torch

    torch.backends.cudnn.fp32_precision = "tf32" if tf32 else "ieee"  # cuBLAS included


@contextmanager
def equal_bits() -> Iterator[None]:
    """Within it, the same operations on the same numbers give the same bits, or raise an error that names one.

    To be entered before torch is imported and the ranks are joined: cuBLAS reads its variable once, and Accelerate sets
    a number of threads where OMP_NUM_THREADS is not set.
    """
    os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}
    import torch

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)  # another number would split a matrix product in another way
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def keep_freed_memory() -> None:
    """Make glibc, where it is the C library, keep freed memory for the next step.

    By default it may return LeNet's activations to the kernel at every step, and then fault them in again page by page.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: mmap for larger blocks only; glibc's maximum
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def _refuse_other_parallelism(config: Config) -> None:
    """Raise InputError where `accelerate launch` asks for more than this loop does; warn of what has no effect."""
    for name, what in OTHER_PARALLELISM.items():
        value = os.environ.get(name, "")
        if value.lower() not in OFF:
            raise InputError(f"{name}={value} asks for {what}, and this is plain data parallelism: {HOW_TO_CONFIGURE}")
    if device := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        raise InputError(f"ACCELERATE_TORCH_DEVICE={device}: unset it; each rank takes its own GPU, or the CPU")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision.lower() == "fp8" and config.mixed_precision == "no":
        raise InputError(f"ACCELERATE_MIXED_PRECISION={precision} is not supported: use --mixed-precision bf16 or fp16")
    accumulate = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if accumulate not in ("", str(config.accumulate)) and launched_local_rank() == 0:
        print(
            f"train.py: warning: ACCELERATE_GRADIENT_ACCUMULATION_STEPS={accumulate} has no effect: micro-batches are "
            f"--accumulate {config.accumulate}",
            file=sys.stderr,
        )


def _set(names: tuple[str, ...]) -> str:
    """Return the first of the variables that is set, "" where none is."""
    return next((name for name in names if os.environ.get(name)), "")


def _from_environment(names: tuple[str, ...], default: int) -> int:
    name = _set(names)
    value = os.environ.get(name, str(default))
    if not (value.isascii() and value.isdigit()):
        raise InputError(f"{name}={value} is no number: unset it, or let a launcher set it")
    return int(value)
