"""The training loop: EDM's recipe for any system (Karras et al. 2022, Table 7)."""

import contextlib
import copy
import os

import numpy as np
import torch

from dnnlib import UserError
from torch_utils import distributed as dist
from torch_utils import training_stats
from torch_utils.signals import StopRequest, Watchdog
from training.acceleration import accelerate
from training.augment import AugmentPipe, enabled_names
from training.batches import Batches, report_lost_workers
from training.compact import compact
from training.dataset import ImageFolderDataset
from training.decoded import decoded_images
from training.evaluation import make_evaluator
from training.generation import gather_images
from training.health import AGAIN, Health
from training.pictures import save_grid
from training.progress import (Progress, check_origin, checked_seed, restore, resume_from, run_state, seed_rank,
                               warn_if_dataset_changed)
from training.saving import Saver, SaveSchedule
from training.snapshot import read_snapshot
from training.status import Status

TIMEOUT = 600  # seconds
MIN_TRANSFER = 0.1  # of a network's tensors; other architectures share up to 0.02, other sizes of one 0.3 and more


def training_loop(
    run_dir,                    # Folder of this run; must exist.
    systems,                    # The registry of systems, {name: training.system.System}.
    system,                     # Name of the system to train.
    dataset_kwargs,             # Arguments of ImageFolderDataset.
    network_kwargs,             # Arguments of the system's network, except those that follow from the data set.
    optimizer_kwargs,           # Arguments of torch.optim.Adam: lr, betas, eps.
    augment_kwargs=None,        # Arguments of AugmentPipe; None = no augmentation.
    data_loader_kwargs=None,    # Arguments of torch.utils.data.DataLoader, for sets that are not decoded in advance.
    data_device='cpu',          # Where the decoded data set is kept; 'cuda' puts all of it on each GPU.
    accelerate_kwargs=None,     # Arguments of training.acceleration.accelerate: precision, compile, …
    seed=0,                     # The same on all ranks.
    batch_size=512,             # Images per step, over all ranks.
    batch_gpu=None,             # Images per forward pass and rank; smaller than a rank's share = gradient accumulation.
    total_kimg=200000,          # Length of training, in thousands of images.
    ema_halflife_kimg=500,      # Half-life of the EMA of the weights.
    ema_rampup_ratio=0.05,      # The half-life is at most this share of the images seen; None = no ramp-up.
    lr_rampup_kimg=10000,       # Length of the linear learning-rate warm-up.
    loss_scaling=1,             # Scale of the loss in the backward pass, undone in the gradients.
    kimg_per_tick=50,           # Interval of status lines and statistics.
    snapshot_ticks=50,          # Interval of snapshots; 0 = only at the end.
    state_dump_ticks=500,       # Interval of training states; 0 = only at the end.
    grid_images=64,             # Images in the grid that goes with each snapshot; 0 = none.
    loss_kwargs=None,           # Options of the system's loss.
    transfer=None,              # Snapshot whose EMA weights to start from.
    resume=None,                # Training state to continue.
    compact_state=False,        # Whether states take 10 bytes per parameter, not 16, and do not resume exactly.
    keep=0,                     # Snapshots and states kept; 0 = all.
    max_nonfinite=100,          # Steps in a row with a non-finite loss or gradients that end the run; 0 = no limit.
    timeout=None,               # Seconds without progress that mean a rank hangs; 0 = never; None: see `watched_sec`.
    eval_kwargs=None,           # Arguments of make_evaluator: ticks, num, ref, detector, metrics; None = no scores.
    tensorboard=False,          # Whether to write event files for TensorBoard too.
    dataset=None,               # The data set, if it is already open (and decoded); else `open_dataset` opens it.
    cudnn_benchmark=True,
):
    """Train a system and write snapshots, states, image grids and stats.jsonl to `run_dir`.

    Returns:
        Whether training is done; False if a signal stopped it (torch_utils.signals), with its state saved.

    Raises:
        UserError: batch sizes that do not divide, data or files that cannot be used, a full disk, a loss or
            gradients that stay non-finite.
    """
    device = dist.device()
    torch.backends.cudnn.benchmark = cudnn_benchmark
    batch_rank, batch_gpu, rounds = split_batch(batch_size, batch_gpu)
    total_nimg = round(total_kimg * 1000)
    seed = checked_seed(seed)
    system = systems[system]
    loss_kwargs = loss_kwargs or {}
    changed_loss = system.changed_loss(loss_kwargs)

    if dataset is None:
        dataset = open_dataset(**dataset_kwargs)
    augmentations = enabled_names(augment_kwargs)
    state = resume_from(resume) if resume is not None else None
    if state is not None:  # before the early return: a finished run of another system must not count as this one's
        check_origin(state['settings'], resume, system=system.name, augmentations=augmentations, loss=changed_loss)
        warn_if_dataset_changed(state['settings'], dataset)
    progress = Progress(**state['progress']) if state else Progress()
    if progress.nimg >= total_nimg:
        dist.print0(f'All {total_kimg:g} kimg are already done.')
        return True

    dist.print0('Constructing network...')
    torch.manual_seed(seed)  # the initial weights do not depend on the rank or on the number of ranks
    net = system.network_class(**interface_kwargs(dataset, augment_kwargs), **network_kwargs)
    net.train().requires_grad_(True).to(device)
    accelerate(net, **(accelerate_kwargs or {}))
    loss_fn = system.make_loss(net, loss_kwargs)
    augment_pipe = AugmentPipe(**augment_kwargs) if augment_kwargs else None
    optimizer = make_optimizer(net, **optimizer_kwargs)
    if state is not None:
        ema_rampup_ratio = state['settings']['ema_rampup_ratio']
    elif transfer is not None:
        dist.print0(f'Transferring from {transfer}...')
        dist.print0(f'Transferred {transfer_weights(transfer, net)} of {len(net.state_dict())} tensors.')
        ema_rampup_ratio = None
    settings = dict(seed=seed, ema_rampup_ratio=ema_rampup_ratio, system=system.name, dataset=dataset.name,
                    num_images=dataset.num_files, optimizer=type(optimizer).__name__, augmentations=augmentations,
                    loss=changed_loss)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    if state is not None:
        check_origin(state['settings'], resume, optimizer=type(optimizer).__name__)
        restore(state, resume, net, ema, optimizer)
    ddp = dist.data_parallel(net)
    sample_options = {'data': dataset_kwargs['path']} if system.starts_from_data else None
    evaluate = make_evaluator(run_dir, system, dataset, sample_options, changed_loss, **(eval_kwargs or {}))
    batches = Batches(dataset, batch_gpu, seed, progress.nimg, data_loader_kwargs or {}, device, data_device)
    seed_rank(seed, state, resume)
    del state  # it is as large as network, EMA and optimiser together

    grid_sampler = system.make_sampler(ema, sample_options)
    if grid_images and dist.get_rank() == 0:
        save_grid(os.path.join(run_dir, 'reals.png'), some_reals(dataset, grid_images))

    dist.print0(f'Training for {total_kimg:g} kimg...')
    status = Status(run_dir, progress.nimg, total_nimg, progress.seconds, device, tensorboard)
    health = Health(max_nonfinite, progress.nonfinite)
    schedule = SaveSchedule(snapshot_ticks, state_dump_ticks)
    with (StopRequest() as stop, Watchdog(watched_sec(timeout, device), f'rank {dist.get_rank()}') as watchdog,
          Saver(run_dir, keep, compact if compact_state else None) as saver, report_lost_workers(),
          contextlib.closing(batches)):
        while True:
            optimizer.zero_grad(set_to_none=True)
            finite = accumulate_gradients(ddp, loss_fn, batches, rounds, augment_pipe, loss_scaling / batch_rank,
                                          watchdog.beat)
            for group in optimizer.param_groups:  # states hold plain numbers, whatever the schedule computes with
                group['lr'] = float(learning_rate(progress.nimg, optimizer_kwargs['lr'], lr_rampup_kimg * 1000))
            finite.append(clean_gradients(net, loss_scaling))
            optimizer.step()
            update_ema(ema, net, ema_beta(batch_size, progress.nimg, ema_halflife_kimg * 1000, ema_rampup_ratio))
            progress.nimg += batch_size
            status.line.show(progress.nimg)
            health.end_step(progress.nimg // batch_size, finite, stop.name is not None)

            # Once per tick, and when asked to stop; the first tick ends after one batch.
            done = progress.nimg >= total_nimg
            tick_ends = done or progress.tick == 0 or progress.nimg >= progress.tick_nimg + kimg_per_tick * 1000
            if not tick_ends and not health.stopping:
                continue
            watchdog.rest()
            dist.on_rank0(saver.check)
            health.settle()
            tick = progress.tick
            if tick_ends:
                training_stats.report('Progress/nonfinite', health.count)
                data_wait = batches.take_wait() / max(status.tick_seconds(), 1e-8)
                training_stats.report('Timing/data_wait', data_wait)
                status.end_tick(tick, progress.nimg)
                if tick > 0:  # the first waits for everything to start
                    batches.report_wait(data_wait)
                progress.tick, progress.tick_nimg = tick + 1, progress.nimg
                health.count = 0
            leaving = done or health.stopping
            schedule.update(tick, leaving)
            if schedule.snapshot_due and worth_saving(health, progress, ema, leaving):
                progress.seconds, progress.nonfinite = status.elapsed(), health.count
                save_run(saver, net, ema, optimizer, progress, settings, facts(dataset), status.last_line(),
                         schedule.dump_due)
                schedule.saved()
                if grid_images and not health.stopping:
                    draw_images(run_dir, ema, system, grid_sampler, grid_images, progress)
                dist.barrier()  # the others wait for rank 0 here, where the watchdog does not count it as a hang
            if tick_ends:
                if not health.stopping:  # when stopping, time may be short
                    status.add(evaluate(ema, tick, progress.nimg, done))
                status.start_tick(progress.nimg)
            if leaving:
                break
        dist.on_rank0(saver.finish)
    dist.barrier()
    if not done:
        dist.print0(f'Stopped by a signal after {progress.nimg / 1000:g} kimg; the same command with --auto-resume, or '
                    f'with --resume={run_dir}, continues from there.')
        return False
    dist.print0('Done.')
    return True


def watched_sec(timeout, device):
    """The watchdog's seconds; by default TIMEOUT, but 0 for a single process on the CPU.

    There a step may take any time, such as 20 minutes for 512 images, and no rank waits for another.
    """
    if timeout is not None:
        return timeout
    alone = device.type == 'cpu' and dist.get_world_size() == 1
    return 0 if alone else TIMEOUT


def split_batch(batch_size, batch_gpu=None):
    """(images per rank and step, images per forward pass, accumulation rounds).

    Raises:
        UserError: a batch that does not divide evenly over the ranks or the rounds.
    """
    ranks = dist.get_world_size()
    if batch_size % ranks:
        raise UserError(f'--batch={batch_size} does not split evenly over {ranks} ranks; choose a multiple of {ranks}')
    batch_rank = batch_size // ranks
    batch_gpu = min(batch_gpu or batch_rank, batch_rank)
    if batch_rank % batch_gpu:
        raise UserError(f'--batch-gpu={batch_gpu} does not divide the {batch_rank} images that each rank '
                        f'has of --batch={batch_size}; choose a divisor')
    return batch_rank, batch_gpu, batch_rank // batch_gpu


def interface_kwargs(dataset, augment_kwargs):
    """Arguments of the network that follow from the data and the augmentation."""
    kwargs = dict(img_resolution=dataset.resolution, img_channels=dataset.num_channels, label_dim=dataset.label_dim)
    if augment_kwargs:
        kwargs['augment_dim'] = AugmentPipe(**augment_kwargs).label_dim
    return kwargs


def facts(dataset):
    """What a snapshot records of the data set."""
    return dict(name=dataset.name, num_images=len(dataset), resolution=dataset.resolution,
                num_channels=dataset.num_channels, label_dim=dataset.label_dim)


def worth_saving(health, progress, ema, leaving):
    """Whether to save after this step: not if it was a bad one, so that what was saved before stays the newest.

    A run that ends has no later step to wait for. Its bad gradients were replaced, so finite weights are good ones.

    Raises:
        UserError: the run ends and its weights are not finite.
    """
    if not health.streak:
        return True
    if not leaving:
        dist.print0(f'Nothing is saved at {progress.nimg / 1000:g} kimg, but after the next good tick: the loss or its '
                    'gradients are not finite.')
        return False
    if not torch.stack([p.isfinite().all() for p in ema.parameters()]).all():
        raise UserError(f'the weights are not finite after {progress.nimg / 1000:g} kimg, and are not saved; {AGAIN}')
    return True


def save_run(saver, net, ema, optimizer, progress, settings, dataset_facts, last_line, dump):
    """Hand a snapshot, and with `dump` a training state, to rank 0's saver. Call on all ranks.

    Args:
        settings, last_line: `settings` and `last_tick` of training.progress.run_state.
        dataset_facts: From `facts`.
    """
    weights = ema.state_dict()
    snapshot = dict(tensors=weights, network_kwargs=ema.init_kwargs, system=settings['system'], dataset=dataset_facts,
                    kimg=progress.nimg / 1000, extra={'loss': settings['loss']} if settings['loss'] else None)
    state = run_state(net, weights, optimizer, progress, settings, last_line) if dump else None
    if dist.get_rank() == 0:
        saver.save(progress.nimg, snapshot, state)


def draw_images(run_dir, ema, system, sampler, count, progress):
    """Draw pictures beside a snapshot: a grid of `count` images and the system's reverse process. Call on all ranks."""
    images = gather_images(ema, list(range(count)), sampler)
    if dist.get_rank() == 0:
        save_grid(picture_path(run_dir, 'fakes', progress), images)
        system.draw_process(picture_path(run_dir, 'process', progress), ema)


def picture_path(run_dir, kind, progress):
    """RUN_DIR/KINDKIMG.png."""
    return os.path.join(run_dir, f'{kind}{progress.nimg // 1000:06d}.png')


def transfer_weights(path, net):
    """Start `net` from the EMA weights of a snapshot (Precond.transfer); returns how many of its tensors were set.

    Raises:
        UserError: it is not a snapshot, or one of another architecture, with hardly a tensor in common.
    """
    snapshot = read_snapshot(path)
    copied = net.transfer(snapshot.state_dict, snapshot.network_kwargs)
    total = len(net.state_dict())
    if len(copied) < MIN_TRANSFER * total:
        theirs, ours = ('{img_resolution} pixels and {img_channels} channels'.format(**kwargs)
                        for kwargs in (snapshot.network_kwargs, net.init_kwargs))
        remedy = ('use the --arch, --cbase and --cres of its training' if theirs == ours else
                  f'it is for images of {theirs}, the data here have {ours}: convert them with dataset_tool.py')
        raise UserError(f"only {len(copied)} of this network's {total} tensors match one in {path}; {remedy}")
    return len(copied)


def accumulate_gradients(ddp, loss_fn, batches, rounds, augment_pipe, scale, begin_round=lambda: None):
    """Accumulate the gradients of scale · Σ loss over `rounds` batches; the last round averages them over ranks.

    Args:
        ddp: The network, perhaps wrapped (torch_utils.distributed.data_parallel).
        loss_fn: As made by training.system.System.loss.
        batches: Iterator of (images, labels).
        augment_pipe: As for the loss.
        scale: Loss scaling divided by the number of images per rank.
        begin_round: Called before each round.

    Returns:
        Whether each round's loss was finite: 0-d bool tensors, which stay on the device.
    """
    net = dist.unwrapped(ddp)
    finite = []
    for i in range(rounds):
        begin_round()
        with ddp.no_sync() if ddp is not net and i < rounds - 1 else contextlib.nullcontext():
            images, labels = next(batches)
            loss = loss_fn(ddp, images, labels, augment_pipe)
            training_stats.report('Loss/loss', loss)
            total = loss.sum()
            finite.append(total.detach().isfinite())
            with net.products():
                total.mul(scale).backward()
    return finite


def open_dataset(cache=True, **kwargs):
    """Open the data set, and decode it in advance with `cache`. Call on all ranks."""
    dataset = ImageFolderDataset(**kwargs)
    decode_in_advance(dataset, cache)
    return dataset


def decode_in_advance(dataset, cache=True):
    """With `cache`, decode the images of a data set in advance unless it is too large. Call on all ranks."""
    images = decoded_images(dataset) if cache else None
    if images is not None:
        dataset.use_decoded(images)


def make_optimizer(net, **kwargs):
    """Adam, on a GPU in its fused form: one pass over all weights, which never makes the host wait."""
    parameters = list(net.parameters())
    return torch.optim.Adam(parameters, **kwargs, fused=True if parameters[0].is_cuda else None)


def clean_gradients(net, loss_scaling=1):
    """Undo the loss scaling; replace NaN by 0 and ±inf by ±1e5, so that one bad batch does not end a run.

    Returns:
        Whether all were finite, as a 0-d bool tensor on their device.
    """
    grads = [param.grad for param in net.parameters() if param.grad is not None]
    if loss_scaling != 1:
        torch._foreach_div_(grads, loss_scaling)
    # On a GPU, launching hundreds of kernels takes longer than copying the gradients into one tensor and back.
    pieces = [torch.cat([grad.flatten() for grad in grads])] if grads[0].is_cuda else grads
    finite = torch.stack([piece.sum() for piece in pieces]).isfinite().all()  # infinities and NaN survive the sum
    for piece in pieces:
        piece.nan_to_num_(nan=0, posinf=1e5, neginf=-1e5)
    if pieces is not grads:
        parts = pieces[0].split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads)])
    return finite


def learning_rate(nimg, lr, rampup_nimg):
    """Learning rate of the step after `nimg` images: linear warm-up from 0 to `lr` over `rampup_nimg` images (EDM)."""
    return lr * min(nimg / max(rampup_nimg, 1e-8), 1)


def ema_beta(batch_size, nimg, halflife_nimg, rampup_ratio):
    """EMA decay of one step: 0.5^(batch/half-life), the half-life at most `rampup_ratio`·nimg; 0 at nimg 0."""
    if rampup_ratio is not None:
        halflife_nimg = min(halflife_nimg, nimg * rampup_ratio)
    return 0.5 ** (batch_size / max(halflife_nimg, 1e-8))


@torch.no_grad()
def update_ema(ema, net, beta):
    """ema ← β·ema + (1 − β)·net, all tensors at once."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - beta)


def some_reals(dataset, count):
    """Up to `count` training images spread over the data set, uint8 [N, C, H, W]."""
    count = min(count, len(dataset))
    return np.stack([dataset[i * len(dataset) // count][0] for i in range(count)])
