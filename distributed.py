"""Several processes as one training, one GPU each: torchrun --nproc_per_node=4 train.py ...

Each process ("rank") keeps a copy of the model and works on its share of every batch;
DistributedDataParallel averages the gradients. Without torchrun nothing here does anything.
"""

import contextlib
import datetime
import os
import sys

import torch
import torch.distributed as dist


def speaks():
    """Is this the process that prints? Of several that torchrun has started, the first."""
    rank = os.environ.get("RANK", "0")
    return rank == "0" or not rank.isdecimal() or "WORLD_SIZE" not in os.environ


def join(device="auto"):
    """Join the processes that torchrun has started. Returns the device of this one, as a name.

    Only rank 0 goes on printing. Raises ValueError for a device that several processes cannot
    share, or RANK and WORLD_SIZE that make no sense, and OSError where they do not find each other.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return device
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(f"RANK={rank!r} and WORLD_SIZE={world!r} in the environment are no place "
                         "among several processes: torchrun sets both, "
                         "and one process needs neither")
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError("several processes run on auto, cuda (a GPU for each) or cpu, "
                         f"not on {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' cannot be used: no GPU was found")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        raise ValueError(f"{os.environ['LOCAL_WORLD_SIZE']} processes need a GPU each, "
                         f"and there are {torch.cuda.device_count()}: "
                         "lower --nproc_per_node, or use --device cpu")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu"
    if not dist.is_initialized():
        # The others wait while rank 0 reads a folder or draws: more than the usual ten minutes.
        patience = datetime.timedelta(hours=6)
        try:
            if on_gpu:
                torch.cuda.set_device(device)     # or all would meet on the first GPU
                dist.init_process_group("nccl", timeout=patience, device_id=torch.device(device))
            else:
                dist.init_process_group("gloo", timeout=patience)
        except (RuntimeError, ValueError) as error:  # a port in use, or an address that is not set
            raise OSError("the processes do not find each other: "
                          f"{str(error).splitlines()[0]}") from error
        if not speaks():
            sys.stdout = open(os.devnull, "w", errors="backslashreplace")
    return device


def leave():
    """Part from the other processes at the end of the run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def place():
    """(rank, number of processes): (0, 1) for a process that is alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def first_rank_first():
    """Rank 0 does what follows alone (a download, a cache), then the others, who find it done."""
    rank, world = place()
    if rank > 0:
        try:
            dist.barrier()
        except RuntimeError as error:           # rank 0 is gone, and has said why
            raise SystemExit(2) from error
    try:
        yield
    finally:                                  # also after an error, which the others then meet, too
        if rank == 0 and world > 1:
            dist.barrier()


def mean_over_ranks(values):
    """The mean of a tensor over all processes."""
    _, world = place()
    if world > 1:
        values = values.clone()
        dist.all_reduce(values)               # the sum, in place; gloo has no mean
    return values / world
