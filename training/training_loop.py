"""The training loop: EDM's recipe for any system (spec §7)."""

import contextlib
import copy
import dataclasses
import os

import numpy as np
import torch

from dnnlib import UserError
from torch_utils import distributed as dist
from torch_utils import training_stats
from torch_utils.misc import InfiniteSampler
from training.augment import AugmentPipe
from training.dataset import ImageFolderDataset
from training.evaluation import make_evaluator
from training.generation import gather_images, save_grid
from training.snapshot import build_network, read_snapshot, save_snapshot
from training.state import load_state, matching_snapshot, save_state
from training.status import Status


def training_loop(
    run_dir,                    # Folder of this run; exists already.
    systems,                    # The registry of systems, {name: training.system.System}.
    system,                     # Name of the system to train.
    dataset_kwargs,             # Arguments of ImageFolderDataset.
    network_kwargs,             # Arguments of the system's network, without those that the data set decides.
    optimizer_kwargs,           # Arguments of torch.optim.Adam: lr, betas, eps.
    augment_kwargs=None,        # Arguments of AugmentPipe; None = no augmentation.
    data_loader_kwargs=None,    # Arguments of torch.utils.data.DataLoader.
    seed=0,                     # The same on all ranks.
    batch_size=512,             # Images per step, over all ranks.
    batch_gpu=None,             # Images per forward pass and rank; smaller than a rank's share = accumulation.
    total_kimg=200000,          # Length of training, in thousands of images.
    ema_halflife_kimg=500,      # Half-life of the moving average of the weights.
    ema_rampup_ratio=0.05,      # The half-life is at most this share of the images seen; None = no ramp-up.
    lr_rampup_kimg=10000,       # Linear learning-rate ramp-up.
    loss_scaling=1,             # Scale of the loss in the backward pass, undone in the gradients.
    kimg_per_tick=50,           # Interval of status lines and statistics.
    snapshot_ticks=50,          # Interval of snapshots; 0 = only at the end.
    state_dump_ticks=500,       # Interval of training states; 0 = only at the end.
    grid_images=64,             # Images in the grid that goes with each snapshot; 0 = none.
    transfer=None,              # Snapshot whose EMA weights to start from.
    resume=None,                # Training state to continue.
    eval_kwargs=None,           # Arguments of make_evaluator: ticks, num, ref, detector, metrics; None = no scores.
    tensorboard=False,          # Whether to write event files for TensorBoard too.
    cudnn_benchmark=True,
):
    """Train a system and leave snapshots, states, image grids and stats.jsonl in `run_dir`.

    Raises:
        UserError: batch sizes that do not divide, data or files that cannot be used, a full disk.
    """
    device = dist.device()
    torch.backends.cudnn.benchmark = cudnn_benchmark
    batch_rank, batch_gpu, rounds = split_batch(batch_size, batch_gpu)
    system = systems[system]

    dist.print0('Loading dataset...')
    dataset = ImageFolderDataset(**dataset_kwargs)
    state = None
    if resume is not None:
        dist.print0(f'Resuming from {resume}...')
        state = load_state(resume)
    progress = Progress(**state['progress']) if state else Progress()

    dist.print0('Constructing network...')
    torch.manual_seed(seed)  # the initial weights do not depend on the rank or on the number of ranks
    net = system.network_class(**interface_kwargs(dataset, augment_kwargs), **network_kwargs)
    net.train().requires_grad_(True).to(device)
    loss_fn = system.loss(net)
    augment_pipe = AugmentPipe(**augment_kwargs) if augment_kwargs else None
    optimizer = torch.optim.Adam(net.parameters(), **optimizer_kwargs)
    if transfer is not None:
        transfer_weights(transfer, net)
        ema_rampup_ratio = None
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    if state is not None:
        restore(state, resume, net, ema, optimizer, systems)
    ddp = net if dist.get_world_size() == 1 else torch.nn.parallel.DistributedDataParallel(
        net, device_ids=[device] if device.type == 'cuda' else None, broadcast_buffers=False)
    sample_options = {'data': dataset_kwargs['path']} if system.starts_from_data else None
    evaluate = make_evaluator(run_dir, system, dataset_kwargs['path'], sample_options, **(eval_kwargs or {}))
    batches = endless_batches(dataset, batch_gpu, seed, progress.nimg, data_loader_kwargs or {}, device)
    seed_rank(seed, state)

    grid_sampler = system.make_sampler(ema, sample_options)
    if grid_images and dist.get_rank() == 0:
        save_grid(os.path.join(run_dir, 'reals.png'), some_reals(dataset, grid_images))

    dist.print0(f'Training for {total_kimg:g} kimg...')
    status = Status(run_dir, progress.nimg, total_kimg * 1000, progress.seconds, device, tensorboard)
    while True:
        # One step: gradients over the accumulation rounds, synchronised on the last.
        optimizer.zero_grad(set_to_none=True)
        for i in range(rounds):
            with ddp.no_sync() if ddp is not net and i < rounds - 1 else contextlib.nullcontext():
                images, labels = next(batches)
                loss = loss_fn(ddp, images, labels, augment_pipe)
                training_stats.report('Loss/loss', loss)
                loss.sum().mul(loss_scaling / batch_rank).backward()
        for group in optimizer.param_groups:
            group['lr'] = optimizer_kwargs['lr'] * min(progress.nimg / max(lr_rampup_kimg * 1000, 1e-8), 1)
        clean_gradients(net, loss_scaling)
        optimizer.step()
        update_ema(ema, net, ema_beta(batch_size, progress.nimg, ema_halflife_kimg * 1000, ema_rampup_ratio))
        progress.nimg += batch_size
        status.line.show(progress.nimg)

        # Once per tick; the first tick ends after one batch.
        done = progress.nimg >= total_kimg * 1000
        if not done and progress.tick != 0 and progress.nimg < status.tick_nimg + kimg_per_tick * 1000:
            continue
        status.end_tick(progress.tick, progress.nimg)
        dump = done or (progress.tick != 0 and is_due(progress.tick, state_dump_ticks))
        # A state is resumed together with the snapshot of the same moment.
        if dump or is_due(progress.tick, snapshot_ticks):
            if dist.get_rank() == 0:
                save_snapshot(name_in(run_dir, 'network-snapshot', progress, 'safetensors'), ema, system.name,
                              dataset=facts(dataset), kimg=progress.nimg / 1000)
            if grid_images:
                images = gather_images(ema, list(range(grid_images)), grid_sampler)
                if dist.get_rank() == 0:
                    save_grid(name_in(run_dir, 'fakes', progress, 'png'), images)
                    system.draw_process(name_in(run_dir, 'process', progress, 'png'), ema)
        progress.tick += 1
        if dump:
            progress.seconds = status.elapsed()
            content = dict(net=net.state_dict(), optimizer=optimizer.state_dict(),
                           random_states=dist.gather_objects(random_state()), network_kwargs=net.init_kwargs,
                           progress=dataclasses.asdict(progress))
            if dist.get_rank() == 0:
                save_state(name_in(run_dir, 'training-state', progress, 'pt'), content)
        status.add(evaluate(ema, progress.tick - 1, progress.nimg, done))  # now that the tick's files are safe
        status.start_tick(progress.nimg)
        if done:
            break
    dist.barrier()
    dist.print0('Done.')


@dataclasses.dataclass
class Progress:
    """Where a run stands: images seen, ticks ended, seconds spent."""

    nimg: int = 0
    tick: int = 0
    seconds: float = 0.0


def split_batch(batch_size, batch_gpu=None):
    """(images a rank and step, images a forward pass, accumulation rounds).

    Raises:
        UserError: a batch that does not divide over the ranks or over the rounds.
    """
    ranks = dist.get_world_size()
    if batch_size % ranks:
        raise UserError(f'--batch={batch_size} does not divide over {ranks} ranks; choose a multiple of {ranks}')
    batch_rank = batch_size // ranks
    batch_gpu = min(batch_gpu or batch_rank, batch_rank)
    if batch_rank % batch_gpu:
        raise UserError(f'--batch-gpu={batch_gpu} does not divide the {batch_rank} images that each rank '
                        f'has of --batch={batch_size}; choose a divisor')
    return batch_rank, batch_gpu, batch_rank // batch_gpu


def interface_kwargs(dataset, augment_kwargs):
    """What the data and the augmentation decide about the network."""
    kwargs = dict(img_resolution=dataset.resolution, img_channels=dataset.num_channels, label_dim=dataset.label_dim)
    if augment_kwargs:
        kwargs['augment_dim'] = AugmentPipe(**augment_kwargs).label_dim
    return kwargs


def facts(dataset):
    """What a snapshot records of the data set."""
    return dict(name=dataset.name, num_images=len(dataset), resolution=dataset.resolution,
                num_channels=dataset.num_channels, label_dim=dataset.label_dim)


def name_in(run_dir, kind, progress, ending):
    """RUN_DIR/KIND-KIMG.ENDING (image grids, as in EDM's predecessors, without the dash)."""
    dash = '-' if '-' in kind else ''
    return os.path.join(run_dir, f'{kind}{dash}{progress.nimg // 1000:06d}.{ending}')


def transfer_weights(path, net):
    """Start `net` from the EMA weights of a snapshot (Precond.transfer).

    Raises:
        UserError: nothing in the snapshot fits the network.
    """
    dist.print0(f'Transferring from {path}...')
    copied = net.transfer(read_snapshot(path).state_dict)
    if not copied:
        raise UserError(f'no tensor of {path} fits this network; use the --arch, --cbase and --cres it was trained with')
    dist.print0(f'Transferred {len(copied)} of {len(net.state_dict())} tensors.')


def restore(state, path, net, ema, optimizer, systems):
    """Bring network, moving average and optimiser to the recorded point.

    Raises:
        UserError: the state belongs to another network.
    """
    before, now = state['network_kwargs'], net.init_kwargs
    changed = sorted(k for k in {**before, **now} if before.get(k) != now.get(k))
    if changed:
        raise UserError(f"{path} was saved by a run whose network differs in {', '.join(changed)}; "
                        'resume with the options of that run, see its training_options.json')
    net.load_state_dict(state['net'])
    optimizer.load_state_dict(state['optimizer'])
    ema.load_state_dict(build_network(read_snapshot(matching_snapshot(path)), systems).state_dict())


def random_state():
    """This rank's random state, as tensors."""
    state = {'cpu': torch.get_rng_state()}
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def seed_rank(seed, state=None):
    """Give each rank noise of its own; from a recorded state, continue it where the number of ranks is the same."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if state is not None and len(state['random_states']) == ranks:
        torch.set_rng_state(state['random_states'][rank]['cpu'])
        if torch.cuda.is_available() and 'cuda' in state['random_states'][rank]:
            torch.cuda.set_rng_state(state['random_states'][rank]['cuda'])
        return
    nimg = 0
    if state is not None:
        nimg = state['progress']['nimg']
        dist.print0(f"The run was saved by {len(state['random_states'])} ranks and goes on with {ranks}: "
                    'the data continues in order, the noise differs.')
    torch.manual_seed(int(np.random.SeedSequence([seed, rank, nimg]).generate_state(1)[0]))


def endless_batches(dataset, batch, seed, start_nimg, loader_kwargs, device):
    """Yield (images [B, C, H, W] float32 in [−1, 1], labels [B, label_dim] float32) on `device`, without end."""
    ranks = dist.get_world_size()
    sampler = InfiniteSampler(dataset, rank=dist.get_rank(), num_replicas=ranks, seed=seed,
                              start_idx=start_nimg // ranks)
    # A generator of its own: the loader must not draw from the one that the training noise comes from.
    loader = torch.utils.data.DataLoader(dataset, sampler=sampler, batch_size=batch, generator=torch.Generator(),
                                         pin_memory=device.type == 'cuda', **loader_kwargs)
    for images, labels in loader:
        images = images.to(device, non_blocking=True).to(torch.float32) / 127.5 - 1
        yield images, labels.to(device, non_blocking=True)


def clean_gradients(net, loss_scaling=1):
    """Undo the loss scaling; NaN becomes 0 and ±inf ±1e5, so that one bad batch does not end a run."""
    for param in net.parameters():
        if param.grad is not None:
            if loss_scaling != 1:
                param.grad.div_(loss_scaling)
            torch.nan_to_num(param.grad, nan=0, posinf=1e5, neginf=-1e5, out=param.grad)


def ema_beta(batch_size, nimg, halflife_nimg, rampup_ratio):
    """Decay of one step: 0.5^(batch/half-life), the half-life at most `rampup_ratio`·nimg; 0 at nimg 0."""
    if rampup_ratio is not None:
        halflife_nimg = min(halflife_nimg, nimg * rampup_ratio)
    return 0.5 ** (batch_size / max(halflife_nimg, 1e-8))


@torch.no_grad()
def update_ema(ema, net, beta):
    """ema ← β·ema + (1 − β)·net, all tensors at once."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - beta)


def is_due(tick, interval):
    """Whether what happens every `interval` ticks (0: never) happens at `tick`."""
    return bool(interval) and tick % interval == 0


def some_reals(dataset, count):
    """Up to `count` training images spread over the data set, uint8 [N, C, H, W]."""
    count = min(count, len(dataset))
    return np.stack([dataset[i * len(dataset) // count][0] for i in range(count)])
