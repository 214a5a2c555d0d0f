"""Warm Diffusion as a system: its network, loss and samplers together, and the options that they take.

The method itself is in warm.blur, path, targets, precond, loss and samplers. Another loss or sampler for Warm's network
goes into a file like this one, with `dataclasses.replace(WARM, name=…, loss=…)`.
"""

import functools

from dnnlib import UserError
from dnnlib.flags import Key
from training.system import COMMON_SAMPLE_OPTIONS, GRID_OPTIONS, Option, System
from warm.blur import BLUR_RATES
from warm.bnr import band_power, recommended_bnr
from warm.choices import BLUR_EMBEDDINGS, DEFAULTS, REST_LOSSES, REST_SCALES, flags_of
from warm.loss import WarmLoss
from warm.path import PAPER_BNR, parse_path, schedule_texts
from warm.precond import WarmPrecond
from warm.samplers import SOLVERS, default_path, grid_options, options_of, warm_sampler, with_defaults
from warm.targets import PAPER_TARGETS, TARGETS
from warm.trajectory import save_trajectory, watch

DRAWN_SEEDS = (0, 1)  # whose reverse process is drawn beside the image grids
SCHEDULES = f"Schedule of the blur: {', '.join(schedule_texts())}"


def make_warm_sampler(net, bnr=None, bnr_schedule=None, **options):
    """`warm_sampler` with its options checked, along the path that --bnr and --bnr-schedule select.

    Raises:
        UserError: a path that the network was not trained for; options that do not go together.
    """
    full = with_defaults(options)
    grid_options(net, {name: full[name] for name in GRID_OPTIONS})
    path = chosen_path(net, full['sigma_min'], full['sigma_max'], bnr, bnr_schedule)
    return functools.partial(warm_sampler, path=path, **options)


def chosen_path(net, beta_min, beta_max, bnr=None, bnr_schedule=None):
    """The path that --bnr and --bnr-schedule select for a network, its default one where both are None.

    Raises:
        UserError: a path that the network was not trained for at noise levels from `beta_min` to `beta_max`.
    """
    if bnr is None and bnr_schedule is None:
        return default_path(net)
    path = parse_path(bnr, bnr_schedule)
    if not net.family.contains(path, beta_min, beta_max):
        low, high = path.bnr_bounds(beta_min, beta_max)
        varies = '' if low == high else f', whose BNR goes from {low:.2g} to {high:.2g}'
        raise UserError(f'this network knows {net.family}, not {path}{varies}; choose a --bnr or --bnr-schedule '
                        'within it, or train a network for it')
    return path


def measured_bnr(bnr, dataset, options):
    """--bnr as given, or for 'auto' the largest that the spectrum of the data allows for this --blur (warm.bnr)."""
    if bnr != 'auto':
        return bnr
    measured = f"{recommended_bnr(band_power(dataset), rates=BLUR_RATES[options['blur']]):.2f}"
    print(f'The spectrum of {dataset.name} recommends BNR {measured} (python -m warm.spectrum shows why).')
    return measured


def warm_facts(net, options):
    """The path that is sampled, its BNR (None where it varies), and what the network was trained on.

    `targets` is followed by the choices that are not the defaults ('residual --rest-scale=edm'), so that scores of
    such networks are kept apart and no table takes them for those of the method itself.
    """
    path = net.family.default
    if options.get('bnr') is not None or options.get('bnr_schedule') is not None:
        path = parse_path(options.get('bnr'), options.get('bnr_schedule'))
    return dict(bnr=getattr(path, 'bnr', None), path=str(path), trained_on=str(net.family),
                targets=' '.join([net.init_kwargs['targets'], *flags_of(net.choices)]))


WARM = System(
    name='warm',
    title='Warm',
    paper='Warm Diffusion, ICLR 2025',
    network_class=WarmPrecond,
    loss=lambda net: WarmLoss(sigma_data=net.sigma_data, rest_weight=net.rest_weight, rest_loss=net.rest_loss),
    sampler=make_warm_sampler,
    sample_options=(*COMMON_SAMPLE_OPTIONS, 'solver'),
    describe=warm_facts,
    draw_process=lambda path, net: save_trajectory(path, watch(net, WARM, DRAWN_SEEDS)),
    own_sample_options=(
        Option('bnr', None, 'Blur-to-Noise Ratio of the path',
               shown=f'as trained; if on several, the nearest to {PAPER_BNR}'),
        Option('bnr_schedule', None, SCHEDULES, shown='as trained'),
        *options_of(SOLVERS),
    ),
    network_options=(
        Option('bnr', None, 'Blur-to-Noise Ratio: a number, a list such as 0,0.1,0.5 or a log-uniform range '
                            'such as 0.1-2, drawn per image; auto measures the data (warm.spectrum)',
               shown=str(PAPER_BNR), from_data=measured_bnr),
        Option('bnr_schedule', None, SCHEDULES, shown='constant'),
        Option('targets', PAPER_TARGETS, 'What the branches estimate (Table 5)', type=Key(TARGETS)),
        Option('blur', DEFAULTS['blur'], 'Kind of blur: how fast each band of the DCT fades', type=Key(BLUR_RATES)),
        Option('rest_weight', DEFAULTS['rest_weight'], "Weight of R's term in the loss", type=float),
        Option('rest_scale', DEFAULTS['rest_scale'], "Scale of R's output", type=Key(REST_SCALES)),
        Option('rest_loss', DEFAULTS['rest_loss'], "Weight of R's squared error over the noise levels",
               type=Key(REST_LOSSES)),
        Option('blur_embedding', DEFAULTS['blur_embedding'], 'How the blur is embedded', type=Key(BLUR_EMBEDDINGS)),
    ),
)
