"""Ranks: the process group under torchrun, and the same calls in a single process without one."""

import datetime
import os

import torch
import torch.distributed

from dnnlib import UserError

TIMEOUT = datetime.timedelta(minutes=30)


def init():
    """Bind this process to its device and, under torchrun, join the process group.

    NCCL on CUDA, gloo elsewhere. Without torchrun's environment there is one process, no group and
    no port; every function of this module then acts as rank 0 of 1.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    if 'RANK' in os.environ and 'WORLD_SIZE' in os.environ and not torch.distributed.is_initialized():
        on_cuda = torch.cuda.is_available()
        torch.distributed.init_process_group(
            'nccl' if on_cuda else 'gloo', timeout=TIMEOUT, device_id=device() if on_cuda else None)


def cleanup():
    """Leave the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def local_rank():
    """Index of this process on its machine."""
    return int(os.environ.get('LOCAL_RANK', '0'))


def get_rank():
    """Index of this process among all; 0 without a group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def get_world_size():
    """Number of processes; 1 without a group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def device():
    """This rank's device: its GPU, or the CPU where there is none."""
    return torch.device('cuda', local_rank()) if torch.cuda.is_available() else torch.device('cpu')


def barrier():
    """Wait until every rank is here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def print0(*args, **kwargs):
    """Print on rank 0 only."""
    if get_rank() == 0:
        print(*args, **kwargs)


def broadcast_object(value):
    """Rank 0's plain Python value, on every rank."""
    if get_world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=device())
    return box[0]


def gather_objects(value):
    """The plain Python values of all ranks, in rank order, on every rank."""
    if get_world_size() == 1:
        return [value]
    values = [None] * get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def all_reduce_sum(tensor):
    """Sum `tensor` over the ranks, in place; returns it."""
    if get_world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def on_rank0(function):
    """Result of function() as computed by rank 0 alone, on every rank; a UserError there is raised everywhere.

    The result must be plain Python data.
    """
    result, message = None, None
    if get_rank() == 0:
        try:
            result = function()
        except UserError as e:
            if get_world_size() == 1:
                raise
            message = str(e)
    result, message = broadcast_object((result, message))
    if message is not None:
        raise UserError(message)
    return result


def first_on_rank0(function):
    """function() on every rank, on rank 0 first (it may fill a cache that the others then find)."""
    result = []
    on_rank0(lambda: result.append(function()))
    return result[0] if result else function()
