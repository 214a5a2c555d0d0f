"""From train.py's flags to the arguments of the training loop: one dict, which is printed and saved as JSON."""

import json
import os
import re
import secrets
import tempfile

import torch

from dnnlib import UserError
from dnnlib.download import is_url, local_path
from dnnlib.files import atomic_write, make_dirs, remove_temporary_files
from torch_utils import distributed as dist
from torch_utils.precision import PRECISIONS
from training.augment import enabled_names, training_strengths
from training.batches import check_data_device
from training.dataset import EMBEDDED, ImageFolderDataset, name_of
from training.detectors import DETECTORS, Detector, PixelDetector, load_detector
from training.metrics import METRICS, check_images, load_reference, parse_metrics
from training.progress import check_network, check_origin, load_run_state
from training.saving import find_states, newest_good, saved_files
from training.status import check_tensorboard, trim_records
from training.training_loop import interface_kwargs, split_batch, transfer_weights
from training.unet import MODELS
from warm.presets import PRESETS
from warm.systems import SYSTEMS

# What --arch stands for: arguments of the network, EDM's. --cbase and --cres replace two of them, if it has such.
ARCHITECTURES = {
    'ddpmpp': dict(model_type='SongUNet', embedding_type='positional', encoder_type='standard',
                   decoder_type='standard', channel_mult_noise=1, resample_filter=[1, 1], model_channels=128,
                   channel_mult=[2, 2, 2]),
    'ncsnpp': dict(model_type='SongUNet', embedding_type='fourier', encoder_type='residual',
                   decoder_type='standard', channel_mult_noise=2, resample_filter=[1, 3, 3, 1], model_channels=128,
                   channel_mult=[2, 2, 2]),
    'adm': dict(model_type='DhariwalUNet', model_channels=192, channel_mult=[1, 2, 3, 4]),
}
SIZE_FLAGS = ('cbase', 'cres')
OPTIONS_NAME = 'training_options.json'  # in every run folder
NO_DATA = ('No --data given: training on the embedded handwritten digits (8×8). '
           f"For CIFAR-10: {PRESETS['cifar10'].data}")


def training_config(flags, system_options):
    """Arguments of `training_loop` (all but run_dir and systems), as plain JSON values.

    Args:
        flags: Values of train.py's flags, by name.
        system_options: {name: value} of the flags that only some systems have, as far as the user gave them.

    Raises:
        UserError: options that do not go together, data that cannot be used.
    """
    if flags['transfer'] and flags['resume']:
        raise UserError('--transfer starts a new run and --resume continues an old one; give one of them')
    if flags['tensorboard']:
        check_tensorboard()
    precision = chosen_precision(flags['precision'], flags['fp16'])
    check_data_device(flags['data_device'])
    strengths = training_strengths(flags['augment_with'])
    system = SYSTEMS[flags['precond']]
    own = system.network_kwargs(system_options)
    dataset_kwargs = dict(path=EMBEDDED if flags['data'] is None else flags['data'], use_labels=flags['cond'],
                          xflip=flags['xflip'], cache=flags['cache'])
    own.update(measured(system, own, dataset_kwargs))
    network_kwargs = dict(ARCHITECTURES[flags['arch']], dropout=flags['dropout'], use_fp16=precision == 'fp16', **own)
    for flag in SIZE_FLAGS:
        if flags[flag] is not None:
            if flag not in size_arguments(flags['arch']):
                raise UserError(f"--arch={flags['arch']} has no use for --{flag}; leave it out")
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
    """{flag of SIZE_FLAGS: argument that it replaces}, of --arch's network; without those that it does not have."""
    return MODELS[ARCHITECTURES[arch]['model_type']].size_arguments


def chosen_precision(precision, fp16):
    """The name in PRECISIONS that --precision and EDM's --fp16 stand for, None where they were not given.

    Raises:
        UserError: they contradict each other.
    """
    if None not in (precision, fp16) and fp16 != (precision == 'fp16'):
        raise UserError(f'--fp16={int(fp16)} and --precision={precision} contradict each other; give one of them')
    return precision or ('fp16' if fp16 else next(iter(PRECISIONS)))


def measured(system, own, dataset_kwargs):
    """The system's options whose values are measured on the data, as {name: value}; nothing is read without any."""
    wanted = [option for option in system.network_options if option.from_data and own[option.name] is not None]

    def measure():
        dataset = open_data(**dataset_kwargs)
        return {option.name: option.from_data(own[option.name], dataset) for option in wanted}
    return dist.on_rank0(measure) if wanted else {}


def open_data(path, cache=None, **kwargs):
    """The data set, its images not decoded in advance; the message on a preset's missing one says how it is made.

    Args:
        path, kwargs: As for ImageFolderDataset.
        cache: Without effect here: how training reads the images (training.training_loop.open_dataset).
    """
    command = next((preset.data for preset in PRESETS.values() if preset.train.get('data') == path), None)
    if command and not os.path.exists(path):
        raise UserError(f'there is no data set {path}; make it with `{command}`, or name another with --data')
    return ImageFolderDataset(path, **kwargs)


def check_config(config, start, fetch=True):
    """Find mistakes before there is a run folder: open the data, outline the network, look into the files.

    Args:
        config: From `training_config`.
        start: From `start_point`.
        fetch: Whether a snapshot to transfer from may be downloaded.

    Raises:
        UserError: whatever would stop the run before its first step.
    """
    split_batch(config['batch_size'], config['batch_gpu'])
    dataset = open_data(**config['dataset_kwargs'])
    system = SYSTEMS[config['system']]
    with torch.device('meta'):  # names and shapes, without the memory
        net = system.network_class(**interface_kwargs(dataset, config['augment_kwargs']), **config['network_kwargs'])
    if config['accelerate_kwargs']['recompute']:
        net.model.check_recompute()
    if start['path'] is not None:
        check_origin(start, start['path'], system=system.name, augmentations=enabled_names(config['augment_kwargs']))
        check_network(start, start['path'], net, [option.name for option in system.network_options])
    elif config['transfer'] is not None and (fetch or not is_url(config['transfer'])):
        transfer_weights(config['transfer'], net)  # which sets nothing: there are only names and shapes
    if config['eval_kwargs'] is not None:
        check_evaluation(dataset.num_files, **config['eval_kwargs'])


def check_evaluation(num_files, num, ref, detector, metrics, ticks=None):
    """Check the --eval flags without downloading anything; of a detector that is downloaded, only the name is checked.

    Args:
        num_files: Images of the training data, of which the reference is made if there is no `ref`.
        num, ref, detector, metrics, ticks: As for training.evaluation.make_evaluator.

    Raises:
        UserError: what `make_evaluator` would refuse, as far as that is known without the download.
    """
    names = parse_metrics(metrics)
    elsewhere = is_url(detector) or DETECTORS.get(detector, PixelDetector) is not PixelDetector
    found = Detector(detector, '', 'cpu', has_probs=True) if elsewhere else load_detector(detector)
    check_images(names, num, found, '--eval-')
    if ref is None:
        check_images([name for name in names if METRICS[name].ref_arrays], num_files, found, '--eval-')
    elif not is_url(ref):
        local_path(ref)
        if not elsewhere:
            load_reference(ref, names, found)


def run_name(config, arch, desc=None):
    """DATASET-COND-ARCH-PRECOND-gpusG-batchB-DTYPE[-DESC], as EDM names its run folders."""
    parts = [
        name_of(config['dataset_kwargs']['path']),
        'cond' if config['dataset_kwargs']['use_labels'] else 'uncond',
        arch,
        config['system'],
        f'gpus{dist.get_world_size()}',
        f"batch{config['batch_size']}",
        config['accelerate_kwargs']['precision'],
    ]
    return '-'.join(parts + ([desc] if desc else []))


def next_run_dir(outdir, name):
    """OUTDIR/NNNNN-NAME with NNNNN one above the highest there; not created."""
    numbers = [int(m[0]) for entry in (os.listdir(outdir) if os.path.isdir(outdir) else [])
               if (m := re.match(r'\d{5,}(?=-|$)', entry))]
    return os.path.join(outdir, f'{max(numbers, default=-1) + 1:05d}-{name}')


def start_point(flags, name):
    """(run folder, what to continue). Only looks; nothing is created.

    --auto-resume takes the run folder with the highest number and this run's name, whatever its number of ranks,
    and the newest good state in it; without any, --resume's state.

    Returns:
        The folder; {'path', 'settings', 'network_kwargs', 'tick', 'last_tick', 'complaints'} of a state
        (training.progress.run_state). 'path' None: a new run.

    Raises:
        UserError: --nosubdir without --auto-resume, and a run is there already; there is no state where --resume says,
            or none that can be read.
    """
    if flags['nosubdir'] and not flags['auto_resume'] and not flags['dry_run']:
        if os.path.exists(os.path.join(flags['outdir'], OPTIONS_NAME)):
            raise UserError(f"{flags['outdir']} holds a run already, over which --nosubdir would train; choose another "
                            '--outdir, or continue that run with --auto-resume')
    run_dir = flags['outdir'] if flags['nosubdir'] else next_run_dir(flags['outdir'], name)
    path, state, complaints = None, None, []
    if flags['auto_resume']:
        run_dir = run_dir if flags['nosubdir'] else same_run_dir(flags['outdir'], name) or run_dir
        path, state, complaints = newest_good(saved_files(run_dir, 'training-state'))
        if path is None and complaints and not flags['resume']:  # starting over would write over what is there
            raise UserError(f'none of the training states in {run_dir} can be read ({complaints[0]}); if they are '
                            'lost, delete them to start over there, or start elsewhere with another --outdir or --desc')
    if path is None and flags['resume']:
        states = find_states(flags['resume'], flags['outdir'])
        if len(states) == 1:
            load_run_state(states[0])  # says what is wrong with it
        path, state, complaints = newest_good(states)
        if path is None:
            raise UserError(f'none of the {len(states)} training states in {states[0].parent} can be read '
                            f'({complaints[0]}); resume from another run')
    if path is None:
        state = dict(settings={}, network_kwargs={}, progress={'tick': 0}, last_tick='{}')
    return run_dir, dict(path=path and str(path), settings=state['settings'], network_kwargs=state['network_kwargs'],
                         tick=state['progress']['tick'], last_tick=state['last_tick'], complaints=complaints)


def same_run_dir(outdir, name):
    """The folder OUTDIR/NNNNN-NAME with the highest number, None without one; the number of ranks in it may differ."""
    def but_ranks(text):
        return re.sub(r'-gpus\d+-', '-gpus*-', text)
    found = [entry for entry in (os.listdir(outdir) if os.path.isdir(outdir) else [])
             if (m := re.fullmatch(r'\d{5,}-(.*)', entry)) and but_ranks(m[1]) == but_ranks(name)]
    return os.path.join(outdir, max(found, key=lambda entry: int(entry.split('-')[0]))) if found else None


def check_run_dir(run_dir):
    """Raise UserError where `create_run_dir` could not make the folder; nothing stays of the attempt."""
    folder = os.path.abspath(run_dir)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    try:
        os.rmdir(tempfile.mkdtemp(dir=folder))
    except OSError as e:
        raise UserError(f'could not create the folder {run_dir}: {e.strerror or e}; choose another --outdir') from e


def create_run_dir(run_dir, config, start):
    """Make the run folder with its training_options.json. On rank 0.

    Args:
        start: From `start_point`. What the folder's records say about later ticks is dropped with --auto-resume;
            None otherwise.

    Raises:
        UserError: another run has begun there meanwhile; a file or the folder cannot be written.
    """
    make_dirs(run_dir)
    if start is None:
        try:
            open(os.path.join(run_dir, OPTIONS_NAME), 'x').close()  # claims the folder: of two runs one gets it
        except FileExistsError as e:
            raise UserError(f'another run has begun in {run_dir} meanwhile; run the command again') from e
        except OSError as e:
            raise UserError(f'could not write in {run_dir}: {e.strerror or e}; choose another --outdir') from e
    else:
        trim_records(run_dir, start['tick'], json.loads(start['last_tick']))
        remove_temporary_files(run_dir)
    with atomic_write(os.path.join(run_dir, OPTIONS_NAME), 'w') as f:
        json.dump(config, f, indent=2)


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
