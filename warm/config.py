"""From train.py's flags to the arguments of the training loop: one dict, which is printed and saved as JSON."""

import json
import os
import pathlib
import re
import secrets

import torch

from dnnlib import UserError
from dnnlib.download import is_url, local_path
from dnnlib.files import Tee, atomic_write, make_dirs
from torch_utils import distributed as dist
from training.augment import TRAIN_AUGMENT
from training.dataset import EMBEDDED, ImageFolderDataset
from training.state import matching_snapshot
from training.training_loop import interface_kwargs, split_batch
from training.status import check_tensorboard
from warm.systems import SYSTEMS

# What --arch stands for: arguments of the U-Net (spec §3). --cbase and --cres replace two of them.
ARCHITECTURES = {
    'ddpmpp': dict(model_type='SongUNet', embedding_type='positional', encoder_type='standard',
                   decoder_type='standard', channel_mult_noise=1, resample_filter=[1, 1], model_channels=128,
                   channel_mult=[2, 2, 2]),
    'ncsnpp': dict(model_type='SongUNet', embedding_type='fourier', encoder_type='residual',
                   decoder_type='standard', channel_mult_noise=2, resample_filter=[1, 3, 3, 1], model_channels=128,
                   channel_mult=[2, 2, 2]),
    'adm': dict(model_type='DhariwalUNet', model_channels=192, channel_mult=[1, 2, 3, 4]),
}
GET_CIFAR10 = 'python dataset_tool.py --source=cifar10 --dest=datasets/cifar10-32x32.zip'


def training_config(o, system_options):
    """Arguments of `training_loop` (all but run_dir and systems), as plain JSON values.

    Args:
        o: Values of train.py's flags, by name.
        system_options: {name: value} of the flags that only some systems have, as far as the user gave them.

    Raises:
        UserError: options that do not go together, data that cannot be used.
    """
    if o['transfer'] and o['resume']:
        raise UserError('--transfer starts a new run and --resume continues an old one; give one of them')
    if o['tensorboard']:
        check_tensorboard()
    system = SYSTEMS[o['precond']]
    own = system.network_kwargs(system_options)
    if o['data'] is None:
        dist.print0(f'No --data given: training on the embedded handwritten digits (8×8). For CIFAR-10: {GET_CIFAR10}')
    dataset_kwargs = dict(path=o['data'] or EMBEDDED, use_labels=o['cond'], xflip=o['xflip'], cache=o['cache'])
    own.update(measured(system, own, dataset_kwargs))
    network_kwargs = dict(ARCHITECTURES[o['arch']], dropout=o['dropout'], use_fp16=o['fp16'], **own)
    if o['cbase'] is not None:
        network_kwargs['model_channels'] = o['cbase']
    if o['cres'] is not None:
        network_kwargs['channel_mult'] = o['cres']
    return dict(
        system=system.name,
        dataset_kwargs=dataset_kwargs,
        data_loader_kwargs=dict(num_workers=o['workers'], **({'prefetch_factor': 2} if o['workers'] else {})),
        network_kwargs=network_kwargs,
        optimizer_kwargs=dict(lr=o['lr'], betas=[0.9, 0.999], eps=1e-8),
        augment_kwargs=dict(p=o['augment'], **TRAIN_AUGMENT) if o['augment'] else None,
        seed=dist.broadcast_object(secrets.randbelow(1 << 31)) if o['seed'] is None else o['seed'],
        batch_size=o['batch'],
        batch_gpu=o['batch_gpu'],
        total_kimg=max(round(o['duration'] * 1000, 3), 0.001),
        ema_halflife_kimg=o['ema'] * 1000,
        lr_rampup_kimg=o['lr_rampup'] * 1000,
        loss_scaling=o['ls'],
        cudnn_benchmark=o['bench'],
        kimg_per_tick=o['tick'],
        snapshot_ticks=o['snap'],
        state_dump_ticks=o['dump'],
        grid_images=o['grid'],
        eval_kwargs=dict(ticks=o['eval_ticks'], num=o['eval_num'], ref=o['eval_ref'], detector=o['eval_detector'],
                         metrics=o['eval_metrics']) if o['eval_ticks'] else None,
        tensorboard=o['tensorboard'],
        transfer=o['transfer'],
        resume=o['resume'],
    )


def measured(system, own, dataset_kwargs):
    """The system's options whose values are measured on the data, as {name: value}; nothing is read without any."""
    wanted = [option for option in system.train_options if option.from_data and own[option.name] is not None]

    def measure():
        dataset = ImageFolderDataset(**dataset_kwargs)
        return {option.name: option.from_data(own[option.name], dataset) for option in wanted}
    return dist.on_rank0(measure) if wanted else {}


def check_config(config):
    """Find mistakes before there is a run folder: open the data, outline the network, look for the files.

    Raises:
        UserError: whatever would stop the run before its first step.
    """
    split_batch(config['batch_size'], config['batch_gpu'])
    dataset = ImageFolderDataset(**{**config['dataset_kwargs'], 'cache': False})
    with torch.device('meta'):  # names and shapes, without the memory
        SYSTEMS[config['system']].network_class(**interface_kwargs(dataset, config['augment_kwargs']),
                                                **config['network_kwargs'])
    if config['resume'] is not None:
        matching_snapshot(config['resume'])
    for path in (config['transfer'], config['resume']):
        if path is not None and not is_url(path):
            local_path(path)


def run_name(config, arch, desc=None):
    """DATASET-COND-ARCH-PRECOND-gpusG-batchB-DTYPE[-DESC] (spec §1)."""
    parts = [
        pathlib.Path(config['dataset_kwargs']['path']).stem,
        'cond' if config['dataset_kwargs']['use_labels'] else 'uncond',
        arch,
        config['system'],
        f'gpus{dist.get_world_size()}',
        f"batch{config['batch_size']}",
        'fp16' if config['network_kwargs']['use_fp16'] else 'fp32',
    ]
    return '-'.join(parts + ([desc] if desc else []))


def next_run_dir(outdir, name):
    """OUTDIR/NNNNN-NAME with NNNNN one above the highest there; not created."""
    numbers = [int(m[0]) for entry in (os.listdir(outdir) if os.path.isdir(outdir) else [])
               if (m := re.match(r'\d{5,}(?=-|$)', entry))]
    return os.path.join(outdir, f'{max(numbers, default=-1) + 1:05d}-{name}')


def create_run_dir(run_dir, config):
    """Make the run folder with its training_options.json; returns the `Tee` that copies what is printed to log.txt."""
    make_dirs(run_dir)
    with atomic_write(os.path.join(run_dir, 'training_options.json'), 'w') as f:
        json.dump(config, f, indent=2)
    return Tee(os.path.join(run_dir, 'log.txt'))


def summary(config, run_dir):
    """The lines that train.py prints before it starts."""
    return '\n'.join([
        'Training options:',
        json.dumps(config, indent=2),
        '',
        f'Output directory:        {run_dir}',
        f"Dataset path:            {config['dataset_kwargs']['path']}",
        f"Class-conditional:       {config['dataset_kwargs']['use_labels']}",
        f"System:                  {config['system']}",
        f'Number of processes:     {dist.get_world_size()}',
        f"Batch size:              {config['batch_size']}",
        '',
    ])
