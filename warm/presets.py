"""The paper's four experiments, and a small one, as presets: `train.py --preset=NAME`, `generate.py --preset=NAME`.

A preset only changes defaults: options given explicitly take precedence, so `--preset=ffhq --precond=edm` is the EDM
counterpart of the paper's FFHQ experiment. To add one: one entry in PRESETS.
"""

import dataclasses

import click


@dataclasses.dataclass(frozen=True)
class Preset:
    """An experiment.

    Attributes:
        data: Command that prepares the data set.
        train, sample: {Python name of a flag: value as typed} for train.py and generate.py.
    """

    data: str
    train: dict
    sample: dict


CIFAR10 = dict(data='datasets/cifar10-32x32.zip', precond='warm')
CIFAR10_TOOL = 'python dataset_tool.py --source=cifar10 --dest=datasets/cifar10-32x32.zip'

PRESETS = {
    'cifar10': Preset(CIFAR10_TOOL, dict(CIFAR10, cond=False), dict(num_steps=18)),
    'cifar10-cond': Preset(CIFAR10_TOOL, dict(CIFAR10, cond=True), dict(num_steps=18)),
    'ffhq': Preset(  # EDM's options for FFHQ, as the paper keeps EDM's hyper-parameters
        'python dataset_tool.py --source=downloads/ffhq/images1024x1024 --resolution=64x64 '
        '--dest=datasets/ffhq-64x64.zip',
        dict(data='datasets/ffhq-64x64.zip', precond='warm', batch=256, cres='1,2,2,2', lr=2e-4, dropout=0.05,
             augment=0.15),
        dict(num_steps=40)),
    'lsun-church': Preset(  # the paper does not give its network: FFHQ's options with one more level are our choice
        'python dataset_tool.py --source=downloads/lsun/church_outdoor_train_lmdb '
        '--transform=center-crop --resolution=128x128 --dest=datasets/lsun-church-128x128.zip',
        dict(data='datasets/lsun-church-128x128.zip', precond='warm', batch=256, cres='1,1,2,2,2', lr=2e-4,
             dropout=0.05, augment=0.15),
        dict(num_steps=256)),
    'digits': Preset(  # not in the paper: 1.5 M parameters, a short learning-rate warm-up and a short EMA half-life
        '',
        dict(precond='warm', cond=True, cbase=32, cres='1,2', batch=64, duration=0.08, lr=2e-3, lr_rampup=0.005,
             ema=0.005, dropout=0.0, augment=0.0, tick=4, snap=0, dump=0, workers=0),
        dict(num_steps=18)),
}


def preset_option(part):
    """The flag --preset, which makes a preset's values the click context's defaults; `part`: 'train' or 'sample'."""
    def choose(ctx, param, value):
        if value is not None:
            ctx.default_map = {**(ctx.default_map or {}), **getattr(PRESETS[value], part)}
        return value
    return click.option('--preset', type=click.Choice(list(PRESETS)), default=None, is_eager=True, callback=choose,
                        expose_value=False, help="One of the paper's experiments, or the digits; explicit options win")
