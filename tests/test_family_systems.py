"""The whole registry: every system trains, is sampled, and refuses what it does not have."""

import dataclasses
import functools
import inspect
import itertools
import math

import click
import pytest
import torch
from click.testing import CliRunner

from dnnlib import UserError
from tests.commands import SMALL, invoke, json_lines, refused
from tests.small_networks import TINY, TRAINABLE, few_steps, short_network, tiny_network
from training.dataset import EMBEDDED, load_embedded
from training.generation import generate_batch
from training.loss import EDMLoss
from training.precond import Precond
from training.run_folder import StartPoint
from training.snapshot import build_network, read_snapshot, save_snapshot
from training.snapshot import SYSTEM_OF_EDM_CLASS
from training.system import EDM_SYSTEMS, GRID_OPTIONS, Option, own_options
from training.training_loop import training_loop
from warm import flags
from warm.config import check_config
from warm.samplers import SOLVERS
from warm.sources import open_network
from warm.steps import Solver
from warm.systems import SYSTEMS
from warm.systems.edm_like import with_multistep

EDM_NFE = 35  # of EDM's sampler, and so of a system that takes it
DEFAULT_NFE = {'soft': 200, 'blurring': 1000, 'lee': 1000, 'ihdm': 200, 'cold': 50}  # where it is not EDM's
pytestmark = pytest.mark.filterwarnings('ignore:.*pin_memory.*')


def test_edms_classes_are_its_systems():
    """The class in an EDM pickle stands for the system whose network has that class."""
    assert SYSTEM_OF_EDM_CLASS == {system.network_class.__name__: system.name for system in EDM_SYSTEMS}


def test_systems_say_who_they_are():
    for name, system in SYSTEMS.items():
        assert system.name == name and system.title and system.paper
        assert issubclass(system.network_class, Precond)


@pytest.mark.parametrize('name, constant', [('edm', dict(sigma_data=1.0)), ('stf', dict(sigma_data=1.0)),
                                            ('warm', dict(sigma_data=1.0)), ('pfgmpp', dict(sigma_data=1.0)),
                                            ('ve', dict(sigma_max=50)), ('vp', dict(beta_min=0.2))])
def test_network_and_loss_share_their_constants(name, constant):
    net = SYSTEMS[name].network_class(img_resolution=8, img_channels=1, **TINY, **constant)
    loss = SYSTEMS[name].make_loss(net)
    assert {key: getattr(loss, key) for key in constant} == constant


@pytest.mark.parametrize('name, level, form', [
    ('blurring', 0.3, (0, 1, 1, 300)),  # ε̂ itself, at time 1000·t
    ('lee', 7, (0, 1, 1, 7)),  # ε̂ itself
    ('cold', 7, (0, 1, 1, 7)),  # x̂₀ itself
    ('ihdm', 7, (1, 1, 1, 7)),  # the noisy input plus the network's output
    ('soft', 2.0, (1, 2, 4.25 ** -0.5, math.log(2) / 4)),
    ('pfgmpp', 2.0, (0.25 / 4.25, 2 * 0.5 / 4.25 ** 0.5, 4.25 ** -0.5, math.log(2) / 4))])
def test_what_the_family_makes_of_the_unet(name, level, form):
    """net(x, level) = c_skip·x + c_out·F(c_in·x, c_noise), F being the U-Net's output."""
    net, seen = tiny_network(name), []
    net.model.register_forward_hook(lambda module, inputs, F: seen.append((*inputs[:2], F)))
    x = torch.randn([2, 1, 8, 8], generator=torch.Generator().manual_seed(0))
    out, ((given, c_noise, F),) = net(x, level), seen
    skip, scale, c_in, label = form
    assert F.std() > 0.1
    torch.testing.assert_close(out, skip * x + scale * F)
    torch.testing.assert_close(given, c_in * x)
    torch.testing.assert_close(c_noise, torch.full_like(c_noise, label))


@pytest.mark.parametrize('name', TRAINABLE)
def test_every_system_trains_and_its_snapshot_is_sampled(name, tmp_path):
    """training_loop → safetensors → generate.py, a few steps each."""
    system = SYSTEMS[name]
    short = {'ihdm_levels': 3} if name == 'ihdm' else {'cold_steps': 3} if name == 'cold' else {}
    training_loop(
        run_dir=tmp_path, systems=SYSTEMS, system=name, seed=0, batch_size=8, total_kimg=0.024, cudnn_benchmark=False,
        dataset_kwargs=dict(path=EMBEDDED, use_labels=True), network_kwargs={**TINY, **system.network_kwargs(short)},
        optimizer_kwargs=dict(lr=1e-3, betas=[0.9, 0.999], eps=1e-8), lr_rampup_kimg=0.001, augment_kwargs=None,
        grid_images=1 if name in ('ihdm', 'cold') else 0)
    snapshot = tmp_path / 'network-snapshot-000000.safetensors'
    lines = json_lines(tmp_path / 'stats.jsonl')
    assert all(math.isfinite(line['Loss/loss']['mean']) for line in lines)
    steps = [f"--steps={few_steps(name)['num_steps']}"] if 'num_steps' in few_steps(name) else []
    result = invoke('generate.py', f'--network={snapshot}', f'--outdir={tmp_path / "out"}', '--seeds=0-2', *steps)
    assert result.exit_code == 0, (result.output, result.exception)
    assert len(list((tmp_path / 'out').glob('*.png'))) == 3


@pytest.mark.parametrize('name', TRAINABLE)
def test_default_number_of_evaluations(name):
    """The sampler without options, its network replaced by one that only counts."""
    net = short_network(name) if name != 'ihdm' else tiny_network(name)
    calls = [0]

    def count(x, noise_labels, class_labels=None, **kwargs):
        calls[0] += 1
        return torch.zeros(len(x), net.model.out_channels, 8, 8)

    net.model.forward = count
    options = {'data': EMBEDDED} if SYSTEMS[name].starts_from_data else {}
    generate_batch(net, [0], SYSTEMS[name].make_sampler(net, options))
    assert calls[0] == DEFAULT_NFE.get(name, EDM_NFE), 'if this is as intended, say so in DEFAULT_NFE above'


@pytest.mark.parametrize('name', TRAINABLE)
def test_images_depend_on_their_seed_alone(name):
    """They are the same in a batch of three, in another order, and one by one."""
    net = short_network(name)
    sampler = SYSTEMS[name].make_sampler(net, few_steps(name))
    together = generate_batch(net, [5, 6, 7], sampler)
    assert together.dtype == torch.float64
    torch.testing.assert_close(generate_batch(net, [7, 5, 6], sampler), together[[2, 0, 1]], rtol=1e-3, atol=1e-3)
    for i, seed in enumerate((5, 6, 7)):
        torch.testing.assert_close(generate_batch(net, [seed], sampler), together[i:i + 1], rtol=1e-3, atol=1e-3)
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize('name', TRAINABLE)
def test_a_snapshot_rebuilds_the_network(name, tmp_path):
    net = short_network(name)
    save_snapshot(tmp_path / 'network-snapshot-000001.safetensors', net, name)
    again = build_network(read_snapshot(tmp_path / 'network-snapshot-000001.safetensors'), SYSTEMS)
    assert again.init_kwargs == net.init_kwargs
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(net(x, 1.0), again(x, 1.0))


@pytest.mark.parametrize('name', TRAINABLE)
def test_loss_has_gradients_everywhere(name):
    """There is one loss per element, float32 and finite, and every parameter has a finite gradient."""
    net = short_network(name).train().requires_grad_(True)
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    loss = SYSTEMS[name].make_loss(net)(net, images)
    assert loss.shape == images.shape and loss.dtype == torch.float32 and loss.isfinite().all()
    loss.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


# -- options

@pytest.mark.parametrize('name', [name for name, system in SYSTEMS.items() if 'solver' in system.sample_options])
@pytest.mark.parametrize('solver', SOLVERS)
def test_every_solver_serves_every_system_that_takes_one(name, solver):
    net = short_network(name) if SYSTEMS[name].trainable else tiny_network(name)
    images = generate_batch(net, [0], SYSTEMS[name].make_sampler(net, dict(num_steps=3, solver=solver)))
    assert torch.isfinite(images.float()).all()


def test_a_solvers_option_reaches_edm_networks(monkeypatch):
    """One line in SOLVERS gives EDM the flag too, and other solvers refuse it."""
    def damped_step(denoise, x, D, R, here, there, z, memory, damping):
        return x + (1 - damping) * (there.beta - here.beta) * (x - D) / here.beta
    option = Option('damping', 0.0, 'Of every step', type=float)
    net, edm = short_network('edm'), SYSTEMS['edm']
    monkeypatch.setitem(SOLVERS, 'damped', Solver(damped_step, order=1, options=(option,)))
    assert option in with_multistep(EDM_SYSTEMS[-1]).own_sample_options
    system = dataclasses.replace(edm, own_sample_options=(*edm.own_sample_options, option))  # as a script does

    def draw(**options):
        return generate_batch(net, [0], system.make_sampler(net, dict(num_steps=3, **options)))
    assert not torch.equal(draw(solver='damped', damping=0.5), draw(solver='damped'))
    assert torch.equal(draw(damping=0.0), draw())
    for other in ({}, {'solver': 'heun'}):
        with pytest.raises(UserError, match='--damping is not an option of the solver heun; use it with.*damped'):
            draw(damping=0.5, **other)


def test_options_of_a_loss(tmp_path, monkeypatch):
    """Another distribution of noise levels for EDM takes a loss with an option, and no network of its own."""
    seen = []

    def loss(net, p_mean):
        seen.append(p_mean)
        return EDMLoss(P_mean=p_mean)
    other = dataclasses.replace(SYSTEMS['edm'], name='other', loss=loss,
                                loss_options=(Option('p_mean', -1.2, 'Mean of ln σ', type=float),))
    assert other.network_kwargs({'p_mean': 0.5}) == {} and other.loss_kwargs({}) == {'p_mean': -1.2}
    with pytest.raises(UserError, match='--p-mean is not an option of --precond=edm'):
        SYSTEMS['edm'].loss_kwargs({'p_mean': 0.5})

    def train(kimg, **options):
        training_loop(run_dir=str(tmp_path), systems={'other': other}, system='other', total_kimg=kimg, seed=0,
                      dataset_kwargs=dict(path=EMBEDDED, use_labels=False), network_kwargs=TINY, batch_size=4,
                      optimizer_kwargs=dict(lr=1e-3), augment_kwargs=None, grid_images=0, **options)
    train(0.004, loss_kwargs={'p_mean': 0.5}, eval_kwargs=dict(ticks=1, num=4, detector='pixels'))
    assert seen == [0.5]

    # What was changed is recorded, and a run goes on with nothing else.
    assert json_lines(tmp_path / 'metrics.jsonl')[0]['loss'] == {'p_mean': 0.5}
    monkeypatch.setitem(SYSTEMS, 'other', other)
    facts = open_network(tmp_path / 'network-snapshot-000000.safetensors', {}).facts
    assert facts['loss'] == {'p_mean': 0.5} and facts['architecture'] == 'SongUNet' and facts['parameters'] > 1000
    state = str(tmp_path / 'training-state-000000.pt')
    for kwargs, words in (({'p_mean': -1.2}, 'none'), ({'p_mean': 0.7}, '--p-mean=0.7')):
        with pytest.raises(UserError, match=f'from a run with the loss options --p-mean=0.5, not {words}; resume'):
            train(0.008, loss_kwargs=kwargs, resume=state)
    train(0.008, loss_kwargs={'p_mean': 0.5}, resume=state)
    config = dict(system='other', batch_size=4, batch_gpu=None, dataset_kwargs=dict(path=EMBEDDED, use_labels=False),
                  network_kwargs=TINY, augment_kwargs=None, accelerate_kwargs=dict(recompute=False), loss_kwargs={})
    with pytest.raises(UserError, match='from a run with the loss options --p-mean=0.5, not none'):
        check_config(config, load_embedded(use_labels=False), StartPoint(state, {'loss': {'p_mean': 0.5}}))


def foreign(attribute):
    """(system, option that it does not have), all pairs."""
    return [pytest.param(name, option, id=f'{name}-{option.name}')
            for (name, system), option in itertools.product(SYSTEMS.items(), own_options(SYSTEMS, attribute))
            if option.name not in [own.name for own in getattr(system, attribute)]]


@pytest.mark.parametrize('name, option', foreign('train_options'))
def test_training_options_of_others_are_refused_by_name(name, option):
    with pytest.raises(UserError, match=f'{option.flag} .*--precond={name}'):
        SYSTEMS[name].network_kwargs({option.name: option.default})


@functools.cache
def any_network(name):
    return short_network(name)


@pytest.mark.parametrize('name, option', foreign('own_sample_options'))
def test_sampler_options_of_others_are_refused_by_name(name, option):
    with pytest.raises(UserError, match=f'{option.flag} '):
        SYSTEMS[name].make_sampler(any_network(name) if SYSTEMS[name].trainable else None, {option.name: 1})


@pytest.mark.parametrize('name', ['blurring', 'lee', 'ihdm', 'cold', 'soft', 'pfgmpp'])
@pytest.mark.parametrize('option', ['S_churn', 'S_noise', 'solver', 'discretization', 'scaling'])
def test_churn_and_ablations_are_refused_where_they_mean_nothing(name, option):
    with pytest.raises(UserError, match='is not an option of the'):
        SYSTEMS[name].make_sampler(any_network(name), {option: 1})


@pytest.mark.parametrize('name', ['blurring', 'lee', 'cold'])
@pytest.mark.parametrize('option', GRID_OPTIONS[1:])
def test_noise_levels_are_refused_where_there_are_none(name, option):
    with pytest.raises(UserError, match='is not an option of the'):
        SYSTEMS[name].make_sampler(any_network(name), {option: 1})


def test_ihdm_has_no_number_of_steps():
    with pytest.raises(UserError, match='--steps is not an option of the IHDM sampler'):
        SYSTEMS['ihdm'].make_sampler(any_network('ihdm'), {'num_steps': 10})


@pytest.mark.parametrize('option', ['S_churn', 'solver'])
def test_epsilon_scaling_refuses_what_it_would_ignore(option):
    with pytest.raises(UserError, match=f'--epsilon-scale does not go with .*{option}'):
        SYSTEMS['edm'].make_sampler(any_network('edm'), {'epsilon_scale': '1.0006', option: 1})


@pytest.mark.parametrize('name', SYSTEMS)
def test_a_flag_left_out_is_an_argument_left_out(name):
    """What --help shows as a default is the constructor's, or None, which leaves it to the constructor."""
    bases = SYSTEMS[name].network_class.__mro__  # a subclass may hand keywords on to one of them
    parameters = {key: p for cls in reversed(bases) for key, p in inspect.signature(cls.__init__).parameters.items()}
    for option in SYSTEMS[name].network_options:
        assert option.name in parameters, f'{option.flag} is no argument of {SYSTEMS[name].network_class.__name__}'
        assert option.default in (None, parameters[option.name].default), option.flag


def test_option_names_are_each_one_flag():
    """Systems that share an option share the object; two different ones of one name are refused."""
    for attribute in ('train_options', 'own_sample_options'):
        names = [option.name for option in own_options(SYSTEMS, attribute)]
        assert len(names) == len(set(names))
    other = dataclasses.replace(SYSTEMS['edm'], name='other', network_options=(Option('bnr', 1, 'Another', type=int),))
    with pytest.raises(UserError, match="'warm' and 'other' each have an option --bnr of their own"):
        own_options({**SYSTEMS, 'other': other}, 'train_options')


@pytest.mark.filterwarnings('ignore:The parameter .* is used more than once')  # which newer releases of click say
@pytest.mark.parametrize('name, own', [('lr', ['--lr']), ('steps', ['--steps', 'num_steps']), ('x', ['--y', 'x'])])
def test_an_option_does_not_hide_a_flag_of_the_command(name, own, monkeypatch):
    system = dataclasses.replace(SYSTEMS['edm'], name='other', network_options=(Option(name, None, 'Another'),))
    monkeypatch.setattr(flags, 'SYSTEMS', {'other': system})

    @click.command()
    @click.option(*own)
    @flags.system_flags('train_options')
    def command(**options):
        raise AssertionError
    refused(CliRunner().invoke(command, [], prog_name='train.py'),
            f"the Option '{name}' of a system collides with {own[0]}, which train.py already has")


@pytest.mark.parametrize('flags, sentence', [
    (['--precond=edm', '--sigma-blur-max=3'], '--sigma-blur-max is not an option of --precond=edm'),
    (['--precond=blurring', '--bnr=0.5'], '--bnr is not an option of --precond=blurring'),
    (['--precond=cold', '--ihdm-levels=3'], '--ihdm-levels is not an option of --precond=cold'),
    (['--precond=lee', '--f-type=cubic'], 'cubic'),
])
def test_train_refuses(flags, sentence, tmp_path):
    refused(invoke('train.py', f'--outdir={tmp_path}', *flags, *SMALL, '--dry-run'), sentence)


def test_train_passes_options_on(tmp_path):
    result = invoke('train.py', f'--outdir={tmp_path}', '--precond=blurring', '--sigma-blur-max=0', *SMALL, '--dry-run')
    assert result.exit_code == 0 and '"sigma_blur_max": 0.0' in result.output


def test_a_trajectory_needs_predictions_of_images(tmp_path):
    snapshot = tmp_path / 'network-snapshot-000001.safetensors'
    save_snapshot(snapshot, any_network('lee'), 'lee')
    refused(invoke('generate.py', f'--network={snapshot}', f'--outdir={tmp_path / "out"}',
                   f'--trajectory={tmp_path / "x.png"}'), '--trajectory', 'Blur Diffusion')
    assert not (tmp_path / 'out').exists()


def test_an_option_of_zero_is_given(tmp_path):
    """--S_noise=0 and --ihdm-delta=0 are not their defaults; only None says that the user gave nothing."""
    for name, options in (('edm', {'S_noise': 0.0}), ('ihdm', {'ihdm_delta': 0.0, 'data': EMBEDDED})):
        save_snapshot(tmp_path / 'net.safetensors', short_network(name), name)
        assert open_network(tmp_path / 'net.safetensors', {**options, 'num_steps': None}).options == options
