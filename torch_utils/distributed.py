"""Ranks: the process group under torchrun, and the same calls in a single process without one."""

import collections
import contextlib
import datetime
import inspect
import json
import os
import re
import secrets
import socket
import time
import warnings

import torch
import torch.distributed

from dnnlib import UserError
from dnnlib.files import escape_on_stdout

TIMEOUT = datetime.timedelta(minutes=30)
TORCHRUN_NAMES = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')  # of its environment, what a process group needs


def init():
    """Bind this process to its device and, under torchrun, join the process group.

    NCCL on CUDA, gloo elsewhere. Without torchrun's environment there is one process, no group and
    no port; every function of this module then acts as rank 0 of 1.

    Raises:
        UserError: more processes than GPUs; ranks that do not join; only part of torchrun's environment.
    """
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if local_rank() >= gpus:
            raise UserError(f'there is no GPU for process {local_rank()} (counted from 0), as this machine has {gpus}; '
                            f'start at most one per GPU, with --nproc_per_node={gpus}')
        torch.cuda.set_device(local_rank())
    if {'RANK', 'WORLD_SIZE'} & os.environ.keys() and not torch.distributed.is_initialized():
        lacking = [name for name in TORCHRUN_NAMES if name not in os.environ]
        if lacking:
            given = [name for name in ('RANK', 'WORLD_SIZE') if name in os.environ]
            set_ = f"{' and '.join(given)} {'are' if len(given) > 1 else 'is'} set"
            raise UserError(f"{set_}, but not {' and '.join(lacking)}; start the ranks with "
                            'torchrun, or unset all of these for a single process')
        own, number = os.environ['RANK'], os.environ['WORLD_SIZE']
        if not (own.isdecimal() and number.isdecimal() and int(own) < int(number)):
            raise UserError(f'RANK={own} is none of WORLD_SIZE={number} ranks, which are counted from 0; start the '
                            'ranks with torchrun, or correct these two')
        address = os.environ['MASTER_ADDR']
        try:
            socket.getaddrinfo(address, None)
        except OSError as e:  # PyTorch would try again for as long as TIMEOUT
            raise UserError(f'MASTER_ADDR={address} is no known host ({e.strerror or e}); correct it, or the '
                            '--rdzv_endpoint of torchrun') from e
        on_cuda = torch.cuda.is_available()
        try:
            store, rank, ranks = next(torch.distributed.rendezvous('env://', timeout=TIMEOUT))
            torch.distributed.init_process_group(
                'nccl' if on_cuda else 'gloo', store=fresh_store(store, rank, ranks), rank=rank, world_size=ranks,
                timeout=TIMEOUT, device_id=device() if on_cuda else None)
            barrier()  # a rank that now ends at bad input would else look lost to one still connecting
        except (RuntimeError, ValueError) as e:  # PyTorch's stores, gloo and NCCL raise all kinds of the first
            raise UserError(f"rank {os.environ['RANK']} could not join the others at {os.environ['MASTER_ADDR']}:"
                            f"{os.environ['MASTER_PORT']} ({_first_line(e)[-160:]}); check that rank 0 runs there, "
                            'that no other program has the port, and what the other ranks say') from e


def fresh_store(store, rank, ranks):
    """The rendezvous store under a prefix that no earlier start of these ranks has used.

    When torchrun restarts the ranks it may give them the same store again, in which a rank would find the stale address
    of another. So rank 0 draws a random prefix and sends it to each rank, which asks for it with a random token.
    """
    token = secrets.token_hex(8)
    if rank > 0:
        store.set(f'asking/{rank}', token)
        prefix = store.get(f'answer/{token}').decode()
        store.set(f'{prefix}/heard/{rank}', 'yes')
        return torch.distributed.PrefixStore(prefix, store)
    end = time.monotonic() + TIMEOUT.total_seconds()
    for r in range(1, ranks):
        while not store.check([f'{token}/heard/{r}']):
            if store.check([f'asking/{r}']):  # perhaps from an earlier start
                store.set(f"answer/{store.get(f'asking/{r}').decode()}", token)
            if time.monotonic() > end:
                raise UserError(f'rank {r} of {ranks} has not joined within {TIMEOUT}; check its output')
            time.sleep(0.01)
    return torch.distributed.PrefixStore(token, store)


def cleanup():
    """Leave the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def process_group():
    """Context in which this process is one of the ranks (`init`); it leaves the group however the block ends."""
    escape_on_stdout()
    try:
        init()
        yield
    except UserError as e:
        tell_torchrun(str(e))
        raise
    finally:
        cleanup()


def tell_torchrun(sentence):
    """Write down why this process ends where torchrun looks for it, so that its report on the job quotes it."""
    path = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if path:
        message = dict(message=sentence, extraInfo=dict(timestamp=str(int(time.time()))))
        with contextlib.suppress(OSError), open(path, 'w', encoding='utf-8') as f:
            json.dump(dict(message=message), f)


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


class LostRank(UserError):
    """The connection to another rank is lost. A job's script can tell it by its exit code: other errors have 1."""

    exit_code = 71


@contextlib.contextmanager
def report_lost_ranks():
    """Context that turns the errors by which gloo and NCCL report a lost rank into a `LostRank`."""
    try:
        yield
    except RuntimeError as e:
        reason = _first_line(e)
        lost = re.search('closed by peer|reset by peer|Broken pipe|NCCL|timed out', reason, re.I)
        if get_world_size() == 1 or not lost:
            raise
        raise LostRank(f'rank {get_rank()} lost the connection to another rank ({reason[-160:]}); check '
                        "that rank's output, and run the same command with --auto-resume to continue from the last "
                        'state') from e


def _first_line(error):
    """What PyTorch's error says, without the stack trace of C++ that often follows."""
    return (str(error).splitlines() or [''])[0]


def barrier():
    """Wait until every rank is here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def print0(*args, **kwargs):
    """Print on rank 0 only."""
    if get_rank() == 0:
        print(*args, **kwargs)


def data_parallel(net):
    """`net` wrapped so that gradients are averaged over the ranks; a single process gets it back unchanged."""
    if get_world_size() == 1:
        return net
    wrapper = torch.nn.parallel.DistributedDataParallel
    # Our buffers are constants: no need to broadcast them at every step. PyTorch has renamed the flag.
    flag = 'forward_sync_buffers' if 'forward_sync_buffers' in inspect.signature(wrapper).parameters \
        else 'broadcast_buffers'
    # 1×1 kernels have two equivalent memory layouts, which PyTorch mistakes for a mismatch.
    warnings.filterwarnings('ignore', message='Grad strides do not match bucket view strides')
    return wrapper(net, device_ids=[device()] if torch.cuda.is_available() else None, **{flag: False})


def unwrapped(net):
    """The network inside `data_parallel`'s wrapper, or `net` itself."""
    return getattr(net, 'module', net)


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


class Ballot:
    """Sums a few numbers over the ranks at each step and brings the sums to the host, without making it wait.

    On a GPU the sums of a step are read once the next step has been launched, on the CPU at once.
    """

    def __init__(self):
        self._under_way = collections.deque()

    def cast(self, numbers):
        """Submit this rank's numbers for a step, float32 [n] on its device. Call on all ranks."""
        all_reduce_sum(numbers)
        event = None
        if numbers.is_cuda:
            numbers = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._under_way.append((numbers, event))

    def results(self, wait=False):
        """Yield the sums, as lists, of the steps that can be read by now, each once; with `wait`, of all steps."""
        while self._under_way and (wait or self._under_way[0][1] is None or len(self._under_way) > 1):
            numbers, event = self._under_way.popleft()
            if event is not None:
                event.synchronize()
            yield numbers.tolist()


def on_rank0(function):
    """Run function() on rank 0 alone and return its result on every rank; a UserError there is raised everywhere.

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
    """Run function() on every rank, on rank 0 first (it may fill a cache that the others then find)."""
    result = []
    on_rank0(lambda: result.append(function()))
    return result[0] if result else function()
