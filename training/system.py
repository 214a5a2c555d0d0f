"""What a system (EDM, Warm, …) must provide to be trained, sampled and scored: `System`, and EDM's own systems.

A system is a network class, a loss, and samplers, with the options they take. The registry of all
systems is warm.systems; training code is handed the system that it works on.
"""

import dataclasses
import functools
from collections.abc import Callable

from dnnlib import UserError
from training.loss import EDMLoss, VELoss, VPLoss
from training.networks import EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from training.samplers import ablation_sampler, edm_sampler

GRID_OPTIONS = ('num_steps', 'sigma_min', 'sigma_max', 'rho')
COMMON_SAMPLE_OPTIONS = (*GRID_OPTIONS, 'S_churn', 'S_min', 'S_max', 'S_noise')
FLAG_NAMES = {'num_steps': 'steps', 'discretization': 'disc'}  # where EDM's flag and keyword differ
ABLATION_OPTIONS = ('solver', 'discretization', 'schedule', 'scaling')


def flag_of(name):
    """The command-line flag for an option's name; EDM's own keep their underscores."""
    edm = (*COMMON_SAMPLE_OPTIONS, *ABLATION_OPTIONS)
    return '--' + (FLAG_NAMES.get(name, name) if name in edm else name.replace('_', '-'))


def as_flags(options):
    """{name: value} as typed: ['--steps=3', '--bnr=0.5']."""
    return [f'{flag_of(str(name))}={value}' for name, value in options.items()]


@dataclasses.dataclass(frozen=True)
class Option:
    """An option that only some systems have; train.py and generate.py make their flags from these.

    Names are unique. One that the command itself has (train.py's `lr`, every sampler's `rho`) is refused by
    warm.flags.SystemFlag; systems with the same option share one Option object, which `own_options` checks.

    Attributes:
        name: Keyword of the network's constructor, the loss or the sampler; the flag is --name with dashes.
        default: Value if the user gives none; None leaves it to the constructor or sampler.
        help: For the help text.
        type: Converts the text of the command line: str, int, float or a click type.
        shown: The default as the help text shows it, if not `default`.
        from_data: from_data(value, dataset, options) → value, for values measured from the data ('auto') given all of
            the network's options by name; None: taken as is.
    """

    name: str
    default: object
    help: str
    type: object = str
    shown: str | None = None
    from_data: Callable | None = None

    @property
    def flag(self):
        """The flag, as typed on the command line."""
        return flag_of(self.name)


@dataclasses.dataclass(frozen=True)
class System:
    """A diffusion system, which shares data, networks, training loop and scores with the others.

    Attributes:
        name: As in `--precond`; also recorded in snapshots.
        title, paper: For help texts.
        network_class: Preconditioned network, called as net(x, sigma, class_labels, …) (training.precond.Precond).
        loss: loss(net, **loss options) → callable(net, images, labels, augment_pipe) → tensor like images; `net` is
            bare, not wrapped for data parallelism.
        network_options: Options of train.py that become constructor arguments of the network, recorded in snapshots.
        loss_options: Options of train.py that become arguments of `loss`; snapshots record those that were changed.
        sample_options: Names of generate.py's common options that its sampler accepts.
        own_sample_options: Options of generate.py specific to such systems.
        sampler: sampler(net, **options), which checks the options for this network → callable(net, latents,
            class_labels, randn_like) → float64 images.
        trainable: Whether train.py offers it; otherwise only existing snapshots can be used.
        describe: describe(net, sample options) → {name: plain value}: what tables of results say of the sampled
            path, such as Warm's `bnr`.
        draw_process: draw_process(path, net) draws the reverse process, beside the image grids in training.
        predicts_images: Whether its network's prediction is an image, x̂₀; otherwise it is noise, or another state.
    """

    name: str
    title: str
    paper: str
    network_class: type
    loss: Callable
    sampler: Callable
    sample_options: tuple
    own_sample_options: tuple = ()
    network_options: tuple = ()
    loss_options: tuple = ()
    trainable: bool = True
    describe: Callable = lambda net, options: {}
    draw_process: Callable = lambda path, net: None
    predicts_images: bool = True

    @property
    def train_options(self):
        """Options of train.py specific to such systems."""
        return self.network_options + self.loss_options

    def network_kwargs(self, given):
        """Constructor arguments of the network from the system's own training options, defaults filled in.

        Args:
            given: {name: value} of the system-specific options that the user gave.

        Raises:
            UserError: an option that this system does not have.
        """
        return self._filled(self.network_options, given)

    def loss_kwargs(self, given):
        """Arguments of `loss`, as `network_kwargs` gives the network's."""
        return self._filled(self.loss_options, given)

    def make_loss(self, net, given=None):
        """The loss for `net` with the options {name: value}, defaults filled in; raises as `network_kwargs`."""
        return self.loss(net, **self.loss_kwargs(given or {}))

    def changed_loss(self, kwargs):
        """{name: value} of those arguments of `loss` that are not its options' defaults."""
        return _changed(self.loss_options, kwargs)

    def changed_network(self, kwargs):
        """{name: value} of those of the network's constructor arguments `kwargs` that are not its options' defaults."""
        return _changed(self.network_options, kwargs)

    def _filled(self, options, given):
        names = [option.name for option in self.train_options]
        for name in given:
            if name not in names:
                raise UserError(f'{flag_of(name)} is not an option of --precond={self.name}; '
                                'leave it out or choose the system that has it')
        return {option.name: given.get(option.name, option.default) for option in options}

    @property
    def starts_from_data(self):
        """Whether its samples start from training images, which its sampler's option `data` names."""
        return any(option.name == 'data' for option in self.own_sample_options)

    def check_options(self, names, shown=flag_of):
        """Raise UserError for a name that is no option of the sampler; `shown` turns it into the user's name for it."""
        known = (*self.sample_options, *(option.name for option in self.own_sample_options))
        for name in names:
            if name not in known:
                raise UserError(f'{shown(name)} is not an option of the {self.title} sampler; it takes '
                                f"{', '.join(map(shown, known))}")

    def make_sampler(self, net, options=None):
        """The sampler as callable(latents, class_labels, randn_like) with `options` checked and bound.

        Raises:
            UserError: an option that this system's sampler does not have, or a value that it refuses.
        """
        options = {} if options is None else options
        self.check_options(options)
        return functools.partial(self.sampler(net, **options), net)


def _changed(options, kwargs):
    return {option.name: kwargs[option.name] for option in options
            if kwargs.get(option.name, option.default) != option.default}


def make_edm_sampler(net, **options):
    """EDM's sampler, or the generalised ablation sampler as soon as one of its own four options is given."""
    ablated = any(name in options for name in ABLATION_OPTIONS)
    return functools.partial(ablation_sampler if ablated else edm_sampler, **options)


def loss_for(loss_class):
    """loss(net, **options) for a loss dataclass; fields that the network has, such as sigma_data, take its values."""
    def loss(net, **options):
        shared = [field.name for field in dataclasses.fields(loss_class) if hasattr(net, field.name)]
        return loss_class(**{**{name: getattr(net, name) for name in shared}, **options})
    return loss


def _edm_system(name, title, paper, network_class, loss_class, trainable=True):
    return System(name=name, title=title, paper=paper, network_class=network_class, loss=loss_for(loss_class),
                  sampler=make_edm_sampler, sample_options=COMMON_SAMPLE_OPTIONS + ABLATION_OPTIONS,
                  trainable=trainable, describe=lambda net, options: {'bnr': 0.0})


EDM_SYSTEMS = (
    _edm_system('vp', 'VP', 'Song et al. 2021, as in Karras et al. 2022', VPPrecond, VPLoss),
    _edm_system('ve', 'VE', 'Song et al. 2021, as in Karras et al. 2022', VEPrecond, VELoss),
    # EDM trains no iDDPM either: it samples from Dhariwal and Nichol's network.
    _edm_system('iddpm', 'iDDPM', 'Nichol and Dhariwal 2021, as in Karras et al. 2022', iDDPMPrecond, EDMLoss,
                trainable=False),
    _edm_system('edm', 'EDM', 'Karras et al. 2022', EDMPrecond, EDMLoss),
)


def own_options(systems, attribute):
    """{option: [names of the systems that have it]} over a registry; `attribute` names the System's list of them.

    Raises:
        UserError: two systems have different options of the same name, hence two flags of that name.
    """
    users, by_name = {}, {}
    for system in systems.values():
        for option in getattr(system, attribute):
            first = by_name.setdefault(option.name, option)
            if first != option:
                raise UserError(f"the systems '{users[first][0]}' and '{system.name}' each have an option "
                                f'{option.flag} of their own; let them share one Option, or rename one')
            users.setdefault(option, []).append(system.name)
    return users
