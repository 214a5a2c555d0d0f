"""All systems side by side: each trained for a few minutes on the embedded digits, sampled and scored.

    python -m warm.family

trains, samples and scores what is not done yet (in --outdir, so that an interrupted command continues there) and writes
docs/family.md with a table, and docs/family.png, a contact sheet. The systems come from the registry, so a new one
appears in both.
"""

import dataclasses
import json
import os
import pathlib
import textwrap
import time

import click
import numpy as np
import torch

from dnnlib.files import atomic_write, file_sha256, make_dirs
from dnnlib.flags import NumberRange, Tool
from torch_utils import distributed as dist
from training import metrics
from training.dataset import load_embedded
from training.detectors import load_detector
from training.generation import generate_images
from training.pictures import tile
from training.snapshot import build_network, read_snapshot
from training.stand_ins import count_evaluations
from training.system import flag_of
from warm.demo import TRAINING, finish, is_trained, last_snapshot, start
from warm.figures import draw
from warm.starts import data_for
from warm.systems import SYSTEMS

COLUMNS = 20  # images of each system in the contact sheet
BATCH = 250


@dataclasses.dataclass(frozen=True)
class Member:
    """A row of the table.

    Attributes:
        title: Its name in the table.
        system: Name in the registry.
        train: Flags of train.py besides --precond; members of one system with the same flags share a run.
        sample: Options of its sampler.
        note: What one has to know to read its score.
        paper: Its paper, if not the system's.
    """

    title: str
    system: str
    train: tuple = ()
    sample: tuple = ()
    note: str = ''
    paper: str = ''

    @property
    def run(self):
        """Name of its run folder."""
        return '-'.join([self.system, *(flag.strip('-').replace('=', '-') for flag in self.train)])


# What the digits need instead of a system's defaults, which are for CIFAR-10.
ON_DIGITS = {
    've': ('--arch=ncsnpp',),  # its own network
    'ihdm': ('--ihdm-blur-max=6', '--ihdm-levels=60'),  # 24 pixels at 32×32, scaled to 8×8; few large steps
}
FROM_DATA = 'starts from blurred training images, which account for part of the score'
NOTES = {
    've': 'has not converged: D = x + σF has to cancel noise of σ = 100 with an F that is not scaled for it',
    'ihdm': f'{FROM_DATA}; blur scaled to 8 pixels, fewer levels because training is so short',
    'lee': "our kernel blurs about twice as much per unit of f as the paper's code",
    'cold': f'{FROM_DATA}; restoration, not generation',
}
VARIANTS = (
    Member('EDM-ES', 'edm', sample=(('epsilon_scale', '1.0006'),), paper='Ning et al. 2023',
           note="EDM's network, predicted noise divided by 1.0006"),
    Member('Denoising Diffusion', 'blurring', train=('--sigma-blur-max=0',), note="Blurring Diffusion's DDPM"),
    Member('Blur Diffusion, ancestral', 'lee', sample=(('reverse_step', 'ancestral'),)),
    Member('Cold Diffusion, colours', 'cold', train=('--cold-blur=strong',), sample=(('cold_start', 'colours'),),
           note="starts from colours like the training images' means"),
)


# Flags of train.py closest to each paper's own network and training (see the notes in each system's file).
PAPER_SETTINGS = {
    'blurring': ('CIFAR-10; 2 million steps', '--data=datasets/cifar10-32x32.zip --arch=ddpmpp --cbase=256 '
                 '--cres=1,1,1 --dropout=0.2 --augment=0 --batch=128 --lr=2e-4 --lr-rampup=0 --ema=0.89 '
                 '--duration=256'),
    'lee': ('LSUN-church 64×64; 600,000 steps', '--data=datasets/lsun-church-64x64.zip --arch=adm --cbase=128 '
            '--cres=1,2,3,4 --dropout=0 --augment=0 --batch=16 --lr=5e-5 --lr-rampup=0 --ema=0.11 --duration=9.6'),
    'ihdm': ('CIFAR-10, as Blurring Diffusion describes its network',
             '--data=datasets/cifar10-32x32.zip --arch=ddpmpp --cbase=128 --cres=1,2,2,2 --augment=0'),
    'stf': ("CIFAR-10, EDM's settings", '--data=datasets/cifar10-32x32.zip'),
    'pfgmpp': ("CIFAR-10, EDM's settings", '--data=datasets/cifar10-32x32.zip --aug-dim=2048'),
}


def members():
    """Every system that can be trained, each followed by its variants."""
    for name, system in SYSTEMS.items():
        if system.trainable:
            yield Member(system.title, name, train=ON_DIGITS.get(name, ()), note=NOTES.get(name, ''))
            yield from (variant for variant in VARIANTS if variant.system == name)


def train(outdir, member, duration):
    """Train `member` unless its run is finished already."""
    if not is_trained(outdir, member.run, duration):
        finish([start(['train.py', f'--outdir={outdir / member.run}', '--nosubdir', '--auto-resume',
                       f'--precond={member.system}', *member.train, *TRAINING, f'--duration={duration}'])])


@dataclasses.dataclass
class Result:
    """What a member gave: uint8 images [COLUMNS, C, H, W], evaluations per image, score, seconds of sampling."""

    member: Member
    images: object
    nfe: int
    score: float
    seconds: float


def evaluate(outdir, member, num, detector, reference):
    """Generate the images of seeds 0 … num − 1 and score them."""
    snapshot = read_snapshot(last_snapshot(outdir, member.run))
    net = build_network(snapshot, SYSTEMS, dist.device())
    system = SYSTEMS[member.system]
    options = dict(member.sample)
    if system.starts_from_data:
        options['data'] = data_for(snapshot)
    sampler = system.make_sampler(net, options)
    began = time.monotonic()
    batches = [images for _, images in generate_images(net, list(range(num)), sampler, BATCH)]
    score = distance(batches, num, detector, reference)
    seconds = time.monotonic() - began
    return Result(member, batches[0][:COLUMNS].cpu().numpy(), count_evaluations(net, sampler), score, seconds)


def evaluated(outdir, member, num, detector, reference):
    """`evaluate`, or its result of an earlier call for the same network, options and number of images."""
    slug = '-'.join([member.run, *(f'{name}-{value}' for name, value in member.sample)])
    path = outdir / f'{slug}.npz'
    of = json.dumps([file_sha256(last_snapshot(outdir, member.run)), dict(member.sample), num])
    if path.is_file():
        with np.load(path) as kept:
            if kept['of'] == of:
                return Result(member, kept['images'], *(kept[name].item() for name in ('nfe', 'score', 'seconds')))
    result = evaluate(outdir, member, num, detector, reference)
    with atomic_write(path) as f:
        np.savez(f, of=of, images=result.images, nfe=result.nfe, score=result.score, seconds=result.seconds)
    return result


def distance(batches, total, detector, reference):
    """Frechet distance between the detector's features of the images and the reference."""
    stats = metrics.accumulate(batches, detector, ['fid'], total)
    return metrics.score(['fid'], stats, reference)['FID']


def reals():
    """All embedded digits, uint8 [1797, 1, 8, 8]."""
    dataset = load_embedded()
    return torch.stack([torch.from_numpy(dataset[i][0]) for i in range(len(dataset))])


def draw_sheet(figure, rows):
    """Draw one row of images for each (label, images)."""
    panels = figure.subplots(len(rows), 1)
    for ax, (label, images) in zip(panels, rows):
        ax.imshow(tile(images, columns=COLUMNS)[0], cmap='gray', vmin=0, vmax=255)
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(label, rotation=0, ha='right', va='center')
        ax.spines[:].set_visible(False)


def paragraph(text):
    """`text` wrapped at 100 characters, never within a flag."""
    return textwrap.fill(text, width=100, break_long_words=False, break_on_hyphens=False)


def page(results, floor, num, duration, figure):
    """docs/family.md; `floor` is the score of `num` real digits."""
    lines = [
        '# The family side by side', '',
        paragraph(
            f'Made by `python -m warm.family --duration={duration:g} --num={num}`: every system trained on the '
            f'embedded handwritten digits (8×8) for {duration * 1000:g} thousand images with '
            f'`train.py {" ".join(TRAINING)}`, seeds 0 to {num - 1} drawn with its own sampler at its defaults, and '
            'scored by FD-pixels (`fid.py`, `--detector=pixels`) against all 1797 digits. The floor for comparison, '
            f'{num} real digits, scores {floor:.2f}; it is biased low, since these digits are part of the reference. '
            'NFE is the counted number of network calls. '
            f'PyTorch {torch.__version__.split("+")[0]} on {dist.device().type}, '
            f'threads: {torch.get_num_threads()}. Training this short on images this small shows that a system works, '
            'not which is better.'), '',
        f'![Contact sheet]({figure})', '',
        '| system | paper | flags | NFE | FD-pixels | sampling | note |',
        '|---|---|---|---|---|---|---|',
    ]
    for r in results:
        system = SYSTEMS[r.member.system]
        flags = ' '.join([f'--precond={system.name}', *r.member.train,
                          *(f'{flag_of(name)}={value}' for name, value in r.member.sample)])
        lines.append(f'| {r.member.title} | {r.member.paper or system.paper} | `{flags}` | {r.nfe} '
                     f'| {r.score:.2f} | {r.seconds:.0f} s | {r.member.note} |')
    return '\n'.join([*lines, *settings()]) + '\n'


def settings():
    """Lines of the page: the papers' own settings as commands."""
    lines = ['', "## The papers' own settings", '',
             paragraph("What the papers say about network and training, as far as our flags can express it (the U-Nets "
                       "are EDM's, with EDM's number of blocks and attention). Cold and Soft Diffusion's papers were "
                       'not available.'), '']
    for name, (what, flags) in PAPER_SETTINGS.items():
        lines.append(f'- {SYSTEMS[name].title} ({what}): `python train.py --precond={name} {flags}`')
    return lines


@click.command(cls=Tool)
@click.option('--outdir', metavar='DIR', default='family', help='Folder of the training runs')
@click.option('--docs', metavar='DIR', default='docs', help='Where to write family.md and family.png')
@click.option('--duration', metavar='MIMG', type=NumberRange(min=0, min_open=True), default=0.08,
              help='Length of each training run, in millions of images')
@click.option('--num', metavar='INT', type=click.IntRange(min=COLUMNS, max=1797), default=500,
              help='Images to generate and score per system')
def main(outdir, docs, duration, num):
    """Train, sample and score every system on the embedded digits."""
    outdir = pathlib.Path(outdir)
    make_dirs(outdir)
    detector, digits = load_detector('pixels', dist.device()), reals()
    reference = metrics.accumulate([digits], detector, ['fid'], len(digits))
    sample = digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))[:num]]
    floor = distance([sample], num, detector, reference)
    results = []
    for member in members():
        train(outdir, member, duration)
        results.append(evaluated(outdir, member, num, detector, reference))
        print(f'{member.title}: FD-pixels {results[-1].score:.2f}, NFE {results[-1].nfe}', flush=True)
    rows = [(f'real digits: {floor:.2f}', sample[:COLUMNS].numpy()),
            *((f'{r.member.title}: {r.score:.2f}, NFE {r.nfe}', r.images) for r in results)]
    draw(os.path.join(docs, 'family'), (10, 0.36 * len(rows)), lambda figure: draw_sheet(figure, rows))
    with atomic_write(os.path.join(docs, 'family.md'), 'w') as f:
        f.write(page(results, floor, num, duration, 'family.png'))


if __name__ == '__main__':
    main()
