"""Train a diffusion model: EDM's command, for EDM, Warm Diffusion and related systems."""

import contextlib
import inspect
import math
import os
import sys

import click
import torch

from dnnlib import UserError
from dnnlib.files import Tee, interruptible
from dnnlib.flags import Key, NumberRange, Text
from torch_utils import distributed as dist
from torch_utils.precision import PRECISIONS
from torch_utils.signals import EXIT_STOPPED
from training.augment import TRAIN_AUGMENT, TRANSFORMS
from training.batches import DATA_DEVICES
from training.detectors import DETECTORS
from training.evaluation import make_evaluator
from training.metrics import METRICS
from training.run_files import LOG_NAME
from training.run_folder import changed_options, check_run_dir, create_run_dir, run_name, start_point
from training.training_loop import TIMEOUT, decode_in_advance, training_loop
from warm import config as cfg
from warm.flags import compile_flag, given_flags, system_flags, typed_flags
from warm.presets import preset_option
from warm.systems import SYSTEMS


def parse_ints(ctx, param, value):
    """'1,2,2' → [1, 2, 2]; unlike --seeds, without ranges."""
    if value is None:
        return None
    try:
        numbers = [int(part) for part in value.split(',')]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"'{value}' is not a list of positive integers such as 1,2,2")
    return numbers


def check_desc(ctx, param, value):
    """Refuse a path as --desc, part of a folder's name: run folders are only looked for in --outdir itself."""
    if value is not None and ('/' in value or '\\' in value):
        raise click.BadParameter(f"'{value}' would create nested folders; use - instead of / and \\")
    return value


TRAINABLE = [name for name, system in SYSTEMS.items() if system.trainable]
SYSTEMS_HELP = 'System: preconditioning and loss; ' + ', '.join(
    f'{name} ({SYSTEMS[name].paper})' for name in TRAINABLE)
# Defaults are written only where they take effect.
LOOP, SCORES = ({name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
                for function in (training_loop, make_evaluator))
GRID = LOOP['grid_images'] if torch.cuda.is_available() else 16


@click.command(context_settings=dict(show_default=True, max_content_width=120))
@preset_option('train')
# Main options.
@click.option('--outdir', metavar='DIR', type=Text(), default='training-runs', help='Where to save the results')
@click.option('--data', metavar='ZIP|DIR', type=Text(), default=None, help='Data set  [default: the embedded digits]')
@click.option('--cond', metavar='BOOL', type=bool, default=False, help='Train a class-conditional model')
@click.option('--arch', type=Key(cfg.ARCHITECTURES), default='ddpmpp', help='Network architecture')
@click.option('--precond', type=click.Choice(TRAINABLE), default='edm', help=SYSTEMS_HELP)
# Hyperparameters.
@click.option('--duration', metavar='MIMG', type=NumberRange(min=0, min_open=True), default=LOOP['total_kimg'] // 1000,
              help='Length of training, in millions of images')
@click.option('--batch', metavar='INT', type=click.IntRange(min=1), default=LOOP['batch_size'],
              help='Total batch size, over all ranks')
@click.option('--batch-gpu', metavar='INT', type=click.IntRange(min=1), default=None,
              help='Largest batch per GPU; the rest by gradient accumulation')
@click.option('--cbase', metavar='INT', type=click.IntRange(min=1), default=None,
              help="Base number of channels  [default: the architecture's]")
@click.option('--cres', metavar='LIST', callback=parse_ints, default=None,
              help="Channel multiplier per resolution, such as 1,2,2  [default: the architecture's]")
@click.option('--lr', metavar='FLOAT', type=NumberRange(min=0, min_open=True), default=1e-3, help='Learning rate')
@click.option('--lr-rampup', metavar='MIMG', type=NumberRange(min=0), default=LOOP['lr_rampup_kimg'] // 1000,
              help='Length of the linear learning-rate warm-up, in millions of images')
@click.option('--ema', metavar='MIMG', type=NumberRange(min=0), default=LOOP['ema_halflife_kimg'] / 1000,
              help='EMA half-life of the network weights, in millions of images')
@click.option('--dropout', metavar='FLOAT', type=NumberRange(min=0, max=1, max_open=True), default=0.13,
              help='Dropout probability')
@click.option('--augment', metavar='FLOAT', type=NumberRange(min=0, max=1), default=0.12,
              help='Augmentation probability')
@click.option('--augment-with', metavar='LIST', type=Text(), default=','.join(TRAIN_AUGMENT),
              help=f'Augmentations, comma-separated: {", ".join(t.name for t in TRANSFORMS)}')
@click.option('--xflip', metavar='BOOL', type=bool, default=False, help='Add mirrored images to the data set')
# Performance.
@click.option('--precision', type=click.Choice(list(PRECISIONS)), default=None,
              help=f'Precision of the network; the rest is float32  [default: {next(iter(PRECISIONS))}]')
@click.option('--fp16', metavar='BOOL', type=bool, default=None,
              help="EDM's name for --precision=fp16 (CUDA; float32 on the CPU)")
@compile_flag
@click.option('--channels-last', metavar='BOOL', type=bool, default=None,
              help='Use the channels-last memory format in the network  '
                   '[default: on a GPU with --compile and 16-bit precision]')
@click.option('--checkpoint-activations', is_flag=True,
              help='Recompute activations in the backward pass instead of storing them: less memory, a third more work')
@click.option('--ls', metavar='FLOAT', type=NumberRange(min=0, min_open=True), default=LOOP['loss_scaling'],
              help='Loss scaling')
@click.option('--bench', metavar='BOOL', type=bool, default=LOOP['cudnn_benchmark'], help='cuDNN benchmarking')
@click.option('--cache', metavar='BOOL', type=bool, default=True,
              help='Decode the data set once, into the cache folder, and map it into memory (up to 32 GiB)')
@click.option('--data-device', type=click.Choice(DATA_DEVICES), default=DATA_DEVICES[0],
              help='Where the decoded data set is kept; cuda copies all of it to each GPU')
@click.option('--workers', metavar='INT', type=click.IntRange(min=0), default=1,
              help='Data-loading processes per rank, for data that is not decoded in advance; 0: none')
# Input and output.
@click.option('--desc', metavar='STR', type=Text(), callback=check_desc, default=None,
              help='String to include in the name of the run folder')
@click.option('--nosubdir', is_flag=True, help='Write into --outdir itself; if it holds a run, add --auto-resume')
@click.option('--tick', metavar='KIMG', type=NumberRange(min=0, min_open=True), default=LOOP['kimg_per_tick'],
              help='How often to print progress, in thousands of images')
@click.option('--snap', metavar='TICKS', type=click.IntRange(min=0), default=LOOP['snapshot_ticks'],
              help='How often to save snapshots; 0: only at the end')
@click.option('--dump', metavar='TICKS', type=click.IntRange(min=0), default=LOOP['state_dump_ticks'],
              help='How often to save training states; 0: only at the end')
@click.option('--grid', metavar='INT', type=click.IntRange(min=0), default=GRID, show_default='64; 16 on the CPU',
              help='Number of images in the grid drawn with each snapshot; 0: none')
@click.option('--eval', 'eval_ticks', metavar='TICKS', type=click.IntRange(min=0), default=0,
              help='How often to score generated images (also at the end); 0: never')
@click.option('--eval-num', metavar='INT', type=click.IntRange(min=2), default=SCORES['num'],
              help='Images per score; with so few, FID is biased high and only useful to compare runs')
@click.option('--eval-ref', metavar='NPZ|URL', type=Text(), default=None,
              help='Reference statistics from fid.py ref  [default: computed from the training data]')
@click.option('--eval-detector', metavar='NAME|PATH|URL', type=Text(), default=SCORES['detector'],
              help=f'{", ".join(DETECTORS)}, or a TorchScript or .pth file')
@click.option('--eval-metrics', metavar='LIST', type=Text(), default=SCORES['metrics'],
              help=f'Comma-separated: {", ".join(METRICS)}')
@click.option('--tensorboard', is_flag=True, help='Also write TensorBoard event files; needs the package tensorboard')
@click.option('--seed', metavar='INT', type=click.IntRange(min=0, max=(1 << 31) - 1), default=None,
              help='Random seed  [default: random, the same on all ranks]')
@click.option('--transfer', metavar='FILE|URL', type=Text(), default=None, help='Start from the weights of a snapshot')
@click.option('--resume', metavar='PT|DIR|latest', type=Text(), default=None,
              help='Continue, in a new run folder, from a training state, or the newest of a run folder or of --outdir')
@click.option('--auto-resume', is_flag=True,
              help='Continue the run of this name in its own folder if there is one; start it otherwise')
@click.option('--compact-state', is_flag=True,
              help='Save training states of 10 bytes per parameter, not 16; they resume closely, not bit for bit')
@click.option('--keep', metavar='INT', type=click.IntRange(min=0), default=LOOP['keep'],
              help='How many snapshots and states to keep; 0: all')
@click.option('--max-nonfinite', metavar='STEPS', type=click.IntRange(min=0), default=LOOP['max_nonfinite'],
              help='Stop after this many steps in a row with NaN or infinite loss or gradients; 0: never')
@click.option('--timeout', metavar='SEC', type=NumberRange(min=0), default=None,
              help=f'Stop if a rank makes no progress for this long; 0: never  [default: {TIMEOUT}; 0 for one process '
                   'on the CPU]')
@click.option('-n', '--dry-run', is_flag=True, help='Print the training options and exit')
@system_flags('train_options')
def main(**options):
    """Train a diffusion model.

    \b
    # A small Warm model on the embedded handwritten digits: minutes on a laptop
    python train.py --preset=digits

    \b
    # Warm Diffusion on CIFAR-10 with 8 GPUs
    torchrun --standalone --nproc_per_node=8 train.py --data=datasets/cifar10-32x32.zip --precond=warm --bnr=0.5
    """
    # After set-up, Ctrl-C is a signal to save and stop (torch_utils.signals).
    with (interruptible('still setting up, before the first step: run the command again to start'),
          dist.process_group(), dist.report_lost_ranks()):
        with Tee() if dist.get_rank() == 0 else contextlib.nullcontext() as log:
            done = run(options, log)
    if not done:
        sys.exit(EXIT_STOPPED)


def run(options, log):
    """Train as the flags say: flags → dict → one call.

    Args:
        options: Values of the flags, by name.
        log: On rank 0 the `Tee` that also writes to the run folder's log.txt once there is one.

    Returns:
        False if a signal stopped the training, else True.
    """
    check_unused_flags(options)
    for flag in cfg.SIZE_FLAGS:
        if flag not in cfg.size_arguments(options['arch']) and not typed_flags(flag):
            options[flag] = None  # from a preset, which is for the U-Nets
    config = cfg.training_config(options, given_flags('train_options', options))
    name = run_name(config, options['arch'], options['desc'])
    run_dir, start = dist.on_rank0(lambda: start_point(options, name))
    config['resume'] = start.path
    if options['seed'] is None:
        config['seed'] = start.settings.get('seed', config['seed'])
    dataset = open_and_check(options, config, start)
    if start.path is not None and not options['auto_resume'] and start.nimg >= config['total_kimg'] * 1000:
        raise UserError(f'{start.path} has seen {start.nimg / 1000:g} thousand images, all that --duration='
                        f"{options['duration']:g} (in millions) asks for; give a longer --duration")
    if options['dry_run']:
        dist.on_rank0(lambda: check_run_dir(run_dir))
        dist.print0(cfg.summary(config, run_dir))
        dist.print0('Dry run; exiting.')
        return True
    changes = dist.on_rank0(lambda: changed_options(start.path, config))  # before they are replaced
    # Before the run folder is made: an unreadable image must not leave an empty folder behind.
    decode_in_advance(dataset, config['dataset_kwargs']['cache'])
    run_dir = dist.on_rank0(lambda: create_run_dir(run_dir, config, start if options['auto_resume'] else None,
                                                   None if options['nosubdir'] else name))
    if log is not None:
        log.open(os.path.join(run_dir, LOG_NAME))
    dist.print0(cfg.summary(config, run_dir))
    print_warnings(options, start.complaints, changes)
    return training_loop(run_dir=run_dir, systems=SYSTEMS, dataset=dataset, **config)


def check_unused_flags(options):
    """Raise UserError for flags typed that have no effect with the others."""
    unused = typed_flags('eval_num', 'eval_ref', 'eval_detector', 'eval_metrics')
    if unused and not typed_flags('eval_ticks') and not options['eval_ticks']:
        raise UserError(f'{unused[0]} has no effect without scores; add --eval=TICKS, or leave it out')
    if typed_flags('augment_with') and not options['augment']:
        raise UserError('--augment-with has no effect without augmentation; add --augment=PROB, or leave it out')


def open_and_check(options, config, start):
    """The data set, after checking that all options suit it; None if it is missing in a dry run of a preset."""
    if options['data'] is None and not typed_flags('preset'):
        dist.print0(cfg.NO_DATA)
    may_be_missing = options['dry_run'] and not typed_flags('data')
    if may_be_missing and not os.path.exists(config['dataset_kwargs']['path']):
        return None
    dist.print0('Loading dataset...')
    dataset = cfg.open_data(**config['dataset_kwargs'])  # once, and by all ranks at a time: it may take a minute
    dist.on_rank0(lambda: cfg.check_config(config, dataset, start, fetch=not options['dry_run']))
    return dataset


def print_warnings(options, complaints, changes):
    """Print what is unusual: damaged states (`complaints`), other options than before, files that replace others."""
    for complaint in complaints:
        dist.print0(f'Warning: skipping a damaged state: {complaint}')
    if changes:
        dist.print0(f"Warning: this run continues with other options: {', '.join(changes)}.")
    interval = min(filter(None, (options['snap'], options['dump'])), default=math.inf) * options['tick']
    if interval < 1:
        dist.print0('Warning: files are numbered by whole thousands of images, so those saved within the same thousand '
                    'replace each other; raise --tick, --snap or --dump to keep all.')


if __name__ == '__main__':
    main()
