"""From train.py's flags to the arguments of the training loop: one dict, which is printed and saved as JSON."""

import json
import os
import secrets

import torch

from dnnlib import UserError
from dnnlib.download import is_url, local_path
from torch_utils import distributed as dist
from torch_utils.precision import PRECISIONS
from training.augment import enabled_names, training_strengths
from training.batches import check_data_device
from training.dataset import EMBEDDED, ImageFolderDataset
from training.detectors import load_detector, needs_download
from training.metrics import METRICS, check_images, load_reference, parse_metrics
from training.progress import check_network, check_origin
from training.status import check_tensorboard
from training.training_loop import interface_kwargs, split_batch, transfer_weights
from training.unet import ARCHITECTURES, MODELS
from warm.presets import PRESETS
from warm.systems import SYSTEMS

SIZE_FLAGS = ('cbase', 'cres')
NO_DATA = ('No --data given: training on the embedded handwritten digits (8×8). '
           f"For CIFAR-10: {PRESETS['cifar10'].data}")


def training_config(flags, system_options):
    """Arguments of `training_loop` (all but run_dir, systems and dataset), as plain JSON values.

    Args:
        flags: Values of train.py's flags, by name.
        system_options: {name: value} of the system-specific flags that the user gave.

    Raises:
        UserError: options that do not go together, data that cannot be used.
    """
    if flags['transfer'] and flags['resume']:
        raise UserError('--transfer starts a new run and --resume continues an old one; give one of them')
    if flags['tensorboard']:
        check_tensorboard()
    precision = chosen_precision(flags['precision'], flags['fp16'])
    check_data_device(flags['data_device'])
    split_batch(flags['batch'], flags['batch_gpu'])  # only a check here
    strengths = training_strengths(flags['augment_with'])
    system = SYSTEMS[flags['precond']]
    network_options = system.network_kwargs(system_options)
    dataset_kwargs = dict(path=EMBEDDED if flags['data'] is None else flags['data'], use_labels=flags['cond'],
                          xflip=flags['xflip'], cache=flags['cache'])
    network_options.update(measure_from_data(system, network_options, dataset_kwargs))
    network_options = system.network_class.meaning(network_options)  # says, for one, what BNR the default is
    network_kwargs = dict(ARCHITECTURES[flags['arch']], dropout=flags['dropout'], use_fp16=precision == 'fp16',
                          **network_options)
    for flag in SIZE_FLAGS:
        if flags[flag] is not None:
            if flag not in size_arguments(flags['arch']):
                raise UserError(f"--{flag} has no effect with --arch={flags['arch']}; leave it out")
            network_kwargs[size_arguments(flags['arch'])[flag]] = flags[flag]
    return dict(
        system=system.name,
        dataset_kwargs=dataset_kwargs,
        data_loader_kwargs=dict(num_workers=flags['workers'], **({'prefetch_factor': 2} if flags['workers'] else {})),
        data_device=flags['data_device'],
        network_kwargs=network_kwargs,
        loss_kwargs=system.loss_kwargs(system_options),
        accelerate_kwargs=dict(precision=precision, channels_last=flags['channels_last'],
                               recompute=flags['checkpoint_activations'], compile=bool(flags['compile'])),
        optimizer_kwargs=dict(lr=flags['lr'], betas=[0.9, 0.999], eps=1e-8),
        augment_kwargs=dict(p=flags['augment'], **strengths) if flags['augment'] else None,
        seed=dist.broadcast_object(secrets.randbelow(1 << 31)) if flags['seed'] is None else flags['seed'],
        batch_size=flags['batch'],
        batch_gpu=flags['batch_gpu'],
        total_kimg=max(round(flags['duration'] * 1000, 3), 0.001),
        ema_halflife_kimg=flags['ema'] * 1000,
        lr_rampup_kimg=flags['lr_rampup'] * 1000,
        loss_scaling=flags['ls'],
        cudnn_benchmark=flags['bench'],
        kimg_per_tick=flags['tick'],
        snapshot_ticks=flags['snap'],
        state_dump_ticks=flags['dump'],
        grid_images=flags['grid'],
        eval_kwargs={name: flags[f'eval_{name}'] for name in ('ticks', 'num', 'ref', 'detector', 'metrics')}
        if flags['eval_ticks'] else None,
        tensorboard=flags['tensorboard'],
        transfer=flags['transfer'],
        resume=flags['resume'],
        compact_state=flags['compact_state'],
        keep=flags['keep'],
        max_nonfinite=flags['max_nonfinite'],
        timeout=flags['timeout'],
    )


def size_arguments(arch):
    """{flag in SIZE_FLAGS: network argument that it sets}, for those flags that --arch's network has."""
    return MODELS[ARCHITECTURES[arch]['model_type']].size_arguments


def chosen_precision(precision, fp16):
    """The name in PRECISIONS that --precision and EDM's --fp16 select; each of them is None if not given.

    Raises:
        UserError: they contradict each other.
    """
    if None not in (precision, fp16) and fp16 != (precision == 'fp16'):
        raise UserError(f'--fp16={int(fp16)} and --precision={precision} contradict each other; give one of them')
    return precision or ('fp16' if fp16 else next(iter(PRECISIONS)))


def measure_from_data(system, values, dataset_kwargs):
    """{name: value} of those of the system's network options that the data determine; without any, nothing is read.

    Args:
        system: Its `network_options` say how (training.system.Option.from_data).
        values: {name: value} of all of them.
        dataset_kwargs: As for `open_data`.
    """
    wanted = [option for option in system.network_options if option.from_data and values[option.name] is not None]

    def measure():
        dataset = open_data(**dataset_kwargs)
        return {option.name: option.from_data(values[option.name], dataset, values) for option in wanted}
    return dist.on_rank0(measure) if wanted else {}


def open_data(path, **kwargs):
    """Open the data set without decoding it in advance; if a preset's is missing, the error says how to make it.

    Args:
        path, kwargs: As for ImageFolderDataset.
    """
    command = next((preset.data for preset in PRESETS.values() if preset.train.get('data') == path), None)
    if command and not os.path.exists(path):
        raise UserError(f'there is no data set {path}; make it with `{command}`, or name another with --data')
    return ImageFolderDataset(path, **kwargs)


def check_config(config, dataset, start, fetch=True):
    """Find mistakes before the run folder is made: outline the network (on the meta device), check data and files.

    Args:
        config: From `training_config`.
        dataset: Its data set, from `open_data`.
        start: Where the run starts, a training.run_folder.StartPoint.
        fetch: Whether a snapshot to transfer from, or a detector, may be downloaded.

    Raises:
        UserError: whatever would stop the run before its first step.
    """
    if config['dataset_kwargs']['use_labels'] and not dataset.has_labels:
        raise UserError(f'{dataset.path} has no labels; train without them (--cond=0), or recreate it with '
                        'dataset_tool.py from a labelled source')
    system = SYSTEMS[config['system']]
    with torch.device('meta'):  # names and shapes, without memory
        net = system.network_class(**interface_kwargs(dataset, config['augment_kwargs']), **config['network_kwargs'])
    if config['accelerate_kwargs']['recompute']:
        net.model.check_recompute()
    if start.path is not None:
        check_origin(start.settings, start.path, system=system.name,
                     augmentations=enabled_names(config['augment_kwargs']),
                     loss=system.changed_loss(config['loss_kwargs']))
        check_network(start.network_kwargs, start.path, net, [option.name for option in system.network_options])
    elif config['transfer'] is not None and (fetch or not is_url(config['transfer'])):
        transfer_weights(config['transfer'], net)  # only a check here: on the meta device there is nothing to set
    if config['eval_kwargs'] is not None:
        check_evaluation(dataset.num_files, **config['eval_kwargs'], fetch=fetch)


def check_evaluation(num_files, num, ref, detector, metrics, ticks=None, fetch=False):
    """Check the --eval flags; a reference that needs a download is not looked at.

    Args:
        num_files: Number of training images, from which the reference is computed if there is no `ref`.
        num, ref, detector, metrics, ticks: As for training.evaluation.make_evaluator.
        fetch: Whether a detector may be downloaded in the end; if not, one that needs it is only checked by name.

    Raises:
        UserError: what `make_evaluator` would refuse, as far as can be told so.
    """
    names = parse_metrics(metrics)
    here = None if needs_download(detector) else load_detector(detector)
    check_images(names, num, here, '--eval-')
    if ref is None:
        check_images([name for name in names if METRICS[name].ref_arrays], num_files, here, '--eval-')
    elif not is_url(ref):
        local_path(ref)
        if here is not None:
            load_reference(ref, names, here)
    if fetch and here is None:
        load_detector(detector)


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
