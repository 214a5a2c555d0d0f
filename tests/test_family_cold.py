"""Systems that start from training images: IHDM and Cold Diffusion."""

import json
import shutil
import types

import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib import UserError
from tests.commands import SMALL, invoke, refused
from tests.family_oracle import LinearOracle, spectrum
from training.dataset import EMBEDDED, ImageFolderDataset
from training.provenance import sampling_facts
from warm.bands import diffuse
from warm.blur import blur, dct2, idct2
from warm.starts import TrainingImages, data_for
from warm.systems import SYSTEMS
from warm.systems.cold import (BLURS, PRIORS, STARTS, ColdPrecond, ColdProcess, cold_loss, cold_sampler, colour_start,
                       make_cold_sampler, restoration_step)
from warm.systems.ihdm import HeatLevels, IHDMPrecond, ihdm_loss, ihdm_sampler, make_ihdm_sampler

S = spectrum() / 4  # of images in [0, 1]
ONES = torch.ones(8, 8, dtype=torch.float64)


def level(k):
    return torch.tensor(k)


def stub(process=None, label_dim=0, channels=1):
    return types.SimpleNamespace(process=process, label_dim=label_dim, img_channels=channels, img_resolution=8)


class LevelOracle(LinearOracle):
    """An oracle for integer levels, which networks are given as floats."""

    def __call__(self, x, k, class_labels=None):
        return super().__call__(x, k.round().long(), class_labels)


def given(*images):
    """A stand-in for `TrainingImages` that starts from these."""
    return types.SimpleNamespace(draw=lambda latents, class_labels, randn_like: torch.cat(images))


# -- IHDM

def test_recorded_ihdm(golden):
    r = golden('ihdm')
    levels = HeatLevels(noise=r.meta['sigma'])
    torch.testing.assert_close(levels.alphas(), torch.tensor(r.levels), rtol=1e-9, atol=1e-12)
    u = torch.tensor(r.u)
    for k, expected in zip((0, 1, 100, 200), r.blurred):
        torch.testing.assert_close(diffuse(u, torch.zeros_like(u), levels.at(level(k), 16)), torch.tensor(expected),
                                   rtol=1e-9, atol=1e-9)
    assert levels.at(level(7), 16).noise.item() == 0.01
    assert make_ihdm_sampler.__defaults__ == (None, r.meta['delta'])


def ihdm_gain(levels):
    """E[u_{k−1}|noisy u_k] for Gaussian data, per band and level."""
    def gain(k):
        a, a_next = levels.at(k, 8).signal, levels.at(k - 1, 8).signal
        return a_next * a * S / (a ** 2 * S + levels.noise ** 2)
    return gain


def ihdm_variance(delta, levels):
    """Variance of the samples per band, noise by noise as for the others, and with that of the images started from."""
    K, net = levels.num_levels, LevelOracle(ihdm_gain(levels), process=levels)
    start = torch.zeros(1 + K, 1, 8, 8, dtype=torch.float64)
    start[0] = idct2(S.sqrt())
    drawn = [0]

    def randn_like(x):
        drawn[0] += 1
        z = torch.zeros_like(x)
        z[drawn[0]] = idct2(ONES)
        return z

    # [−1, 1] → [0, 1] halves and shifts; the shift is taken out, and the noise counts in units of [0, 1].
    out = ihdm_sampler(net, start, None, randn_like, given(2 * start - 1), delta)
    assert net.calls == K
    return dct2((out + 1) / 2).square().sum(dim=(0, 1))


def test_ihdm_sampler_does_what_its_noise_allows():
    """Even exact predictions do not give the data's covariance, but what a fixed δ makes of it, level by level.

    v_{k−1} = g_k² v_k + δ² from v_K = a_K² S, the last level without δ (its mean is returned).
    """
    levels, delta = HeatLevels(), 0.0125
    g, v = ihdm_gain(levels), levels.at(level(200), 8).signal ** 2 * S
    for k in range(200, 0, -1):
        v = g(level(k)) ** 2 * v + (delta ** 2 if k > 1 else 0)
    torch.testing.assert_close(ihdm_variance(delta, levels), v, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize('num_levels', [100, 200, 400])
def test_ihdm_covariance_with_the_papers_noise(num_levels):
    """For images in [0, 1], samples have the mean colour of the images started from, and half to three quarters of the
    variance elsewhere, all of it made by δ; more levels do not bring it nearer.

    Blurring Diffusion, Sec. 3: a scalar noise that is the same for all steps is not guaranteed to be right.
    """
    levels = HeatLevels(num_levels=num_levels)
    ratio, without = (ihdm_variance(delta, levels) / S for delta in (0.0125, 0.0))
    assert ratio[0, 0] == pytest.approx(1, abs=0.03)
    detail = ratio.flatten()[1:]
    assert 0.45 < detail.min() and detail.max() < 0.8 and 0.7 < detail.median()
    assert without.flatten()[1:].max() < 1e-6


class PerfectPrevious:
    """Predicts the level before, off by `wrong`, and notes its input's noise."""

    process = HeatLevels(num_levels=20)

    def __init__(self, images, wrong):
        self.images, self.wrong, self.noise = images, wrong, None

    def __call__(self, x, k, labels=None, augment_labels=None):
        u = (self.images + 1) / 2
        self.noise = x - blur(u, self.process.alpha(k))
        return blur(u, self.process.alpha(k - 1)) + self.wrong


@pytest.mark.parametrize('wrong', [0.0, 0.3])
def test_ihdm_loss(wrong):
    """It is the plain squared error in units of [0, 1], with noise on the input alone."""
    images = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    net = PerfectPrevious(images, wrong)
    torch.testing.assert_close(ihdm_loss(net, images), torch.full_like(images, wrong ** 2), rtol=1e-4, atol=1e-8)
    assert net.noise.std().item() == pytest.approx(0.01, rel=0.03)


# -- Cold Diffusion

def test_cold_kernels_are_convolutions_with_reflected_edges():
    """a_1 is a direct convolution of a 16×16 image with the first 11×11 kernel (standard deviation 0.35)."""
    x = torch.rand(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    j = torch.arange(-5, 6, dtype=torch.float64)
    kernel = torch.exp(-(j[:, None] ** 2 + j ** 2) / (2 * 0.35 ** 2))
    padded = torch.tensor(np.pad(x.numpy(), 5, mode='symmetric'))
    expected = torch.nn.functional.conv2d(padded[None, None], (kernel / kernel.sum())[None, None])
    at = ColdProcess().at(level(1), 16)
    torch.testing.assert_close(diffuse(x[None, None], torch.zeros(1, 1, 16, 16), at), expected)


@pytest.mark.parametrize('name', BLURS)
def test_cold_blur_grows_from_none(name):
    process = ColdProcess(name)
    gains = torch.stack([process.at(level(s), 8).signal for s in range(51)])
    assert torch.equal(gains[0], ONES)
    torch.testing.assert_close(gains[:, 0, 0], torch.ones(51, dtype=torch.float64))
    assert (gains.diff(dim=0)[:, 1:, 1:] < 0).all()


def test_the_papers_blur_is_four_pixels_and_the_strong_one_leaves_a_colour():
    # Variances of cumulative kernels add up; on a wide image the lowest band feels only their sum.
    std = 0.35 + 0.01 * np.arange(50)
    assert np.sqrt((std ** 2).sum()) == pytest.approx(4.3, abs=0.1)
    expected = np.exp(-(np.pi / 32) ** 2 * (std ** 2).sum() / 2)
    assert ColdProcess().at(level(50), 32).signal[0, 1].item() == pytest.approx(expected, rel=0.02)
    strong = ColdProcess('strong').at(level(50), 32).signal.clone()
    assert strong[0, 1].item() == pytest.approx(np.exp(-(np.pi / 32) ** 2 * (1.25 * 32) ** 2 / 2))
    strong[0, 0] = 0
    assert strong.max() < 5e-4


@pytest.mark.parametrize('n', [8, 16, 32, 64])
def test_as_many_kernels_as_blur_are_let_through(n):
    """One more is refused, and so is any larger number: the table has no logarithm, and every loss would be NaN."""
    least = next(T for T in range(100, 200) if not BLURS['paper'](T, n).isfinite().all())
    ColdProcess(num_steps=least - 1).check(n)
    for more in (least, least + 1, 1000):
        with pytest.raises(UserError, match=f'--cold-steps={more} .*such as 50, or --cold-blur=strong'):
            ColdProcess(num_steps=more).check(n)
        ColdProcess('strong', more).check(n)


def test_too_many_kernels_are_refused_when_training_starts(tmp_path):
    small = dict(model_channels=8, channel_mult=[1], num_blocks=1)
    with pytest.raises(UserError, match='--cold-steps=200'):
        ColdPrecond(8, 1, cold_steps=200, **small)
    ColdPrecond(8, 1, cold_steps=200, cold_blur='strong', **small)
    refused(invoke('train.py', f'--outdir={tmp_path}', '--precond=cold', '--cold-steps=200', *SMALL, '--dry-run'),
            '--cold-steps=200 is too many')


@pytest.mark.parametrize('name', BLURS)
@pytest.mark.parametrize('num_steps', [50, 7])
def test_cold_sampler_restores_what_the_network_can_know(name, num_steps):
    """As the paper says, with exact predictions the states are those of the blurred image, back to the image itself.

    The oracle inverts the blur in bands of which more than 1e-6 is left and predicts 0 for the others: what is lost at
    the start stays lost, and everything else is restored.
    """
    process = ColdProcess(name)
    image = torch.rand(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def gain(s):
        a = process.at(s, 8).signal
        return torch.where(a > 1e-6, 1 / a.clamp(min=1e-6), 0)

    net, last = LevelOracle(gain, process=process), process.at(level(50), 8).signal
    out = cold_sampler(net, image, start=lambda *_: idct2(last * dct2(image)), num_steps=num_steps)
    assert net.calls == num_steps
    survivors = last > 1e-6
    torch.testing.assert_close(dct2(out)[..., survivors], dct2(image)[..., survivors], rtol=0, atol=1e-7)


def test_cold_sampler_forgives_errors_where_blur_is_linear():
    """Bansal et al., Sec. 3.3: on a linear path any x̂₀ gives the exact states; here an error counts by a′ − a only."""
    x, x0, wrong = torch.randn(3, 1, 1, 8, 8, dtype=torch.float64)
    here, there = (ColdProcess().at(level(s), 8) for s in (30, 29))
    difference = restoration_step(x, x0 + wrong, here, there) - restoration_step(x, x0, here, there)
    torch.testing.assert_close(dct2(difference), (there.signal - here.signal) * dct2(wrong))


def test_cold_has_no_other_randomness_than_its_start():
    """From constant colours the covariance of the samples is the start's, whatever the data's: rank one."""
    process = ColdProcess('strong')
    net = LevelOracle(lambda s: process.at(s, 8).signal * S / (process.at(s, 8).signal ** 2 * S + 1e-8),
                      process=process)
    colours = torch.randn(500, 1, 1, 1, dtype=torch.float64).expand(500, 1, 8, 8)
    out = cold_sampler(net, colours, start=lambda latents, *_: latents)
    power = dct2(out).square().mean(dim=(0, 1))
    assert power[0, 0] == pytest.approx(dct2(colours).square().mean(dim=(0, 1))[0, 0].item(), rel=1e-6)
    power[0, 0] = 0
    assert power.max() < 1e-12


def test_cold_loss_is_absolute():
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1

    class Net:
        process = ColdProcess()

        def __call__(self, x, s, labels=None, augment_labels=None):
            expected = diffuse(images, torch.zeros_like(images), self.process.at(s, 8))
            torch.testing.assert_close(x, expected)
            return images - 0.3

    torch.testing.assert_close(cold_loss(Net(), images), torch.full_like(images, 0.3))


@pytest.mark.parametrize('loss, process', [(ihdm_loss, HeatLevels(num_levels=3)),
                                           (cold_loss, ColdProcess(num_steps=3))])
def test_losses_draw_every_level_but_0(loss, process):
    """From level 0 there is nothing to learn; at the last, sampling starts."""
    drawn = []

    class Net:
        def __call__(self, x, k, labels=None, augment_labels=None):
            drawn.extend(k.flatten().tolist())
            return x
    Net.process = process
    loss(Net(), torch.zeros(200, 1, 8, 8))
    assert set(drawn) == {1, 2, 3}


def test_colour_start_has_the_covariance_of_the_channels(tmp_path):
    """Red and green rise together in these images, and blue is nearly constant."""
    rng = np.random.default_rng(0)
    for i, (shared, own) in enumerate(rng.normal(size=[100, 2])):
        colour = np.clip([128 + 40 * shared, 128 + 20 * shared + 5 * own, 60 + own], 0, 255).astype(np.uint8)
        PIL.Image.fromarray(np.broadcast_to(colour, [8, 8, 3]).copy()).save(tmp_path / f'{i}.png')
    images = TrainingImages(tmp_path, stub(channels=3))
    generator = torch.Generator().manual_seed(0)
    x = colour_start(images, None)(torch.zeros(20000, 3, 8, 8), None,
                                   lambda t: torch.randn(t.shape, dtype=t.dtype, generator=generator))
    torch.testing.assert_close(x.mean(dim=(2, 3)).T.cov(), images.colours()[1], rtol=0.05, atol=1e-4)


def test_colour_start_of_grey_images_in_three_channels():
    """Their covariance has rank one, so that rounding may leave an eigenvalue just below 0."""
    covariance = torch.full([3, 3], 0.02, dtype=torch.float64) - 1e-17 * torch.eye(3, dtype=torch.float64)
    images = types.SimpleNamespace(colours=lambda: (torch.zeros(3, dtype=torch.float64), covariance))
    assert torch.linalg.eigvalsh(covariance).min() < 0
    assert colour_start(images, None)(torch.zeros(4, 3, 8, 8), None, torch.randn_like).isfinite().all()


# -- starts

def normals(*values):
    it = iter(values)
    return lambda x: torch.full_like(x, next(it))


def test_starting_images_are_uniform_and_depend_on_the_seed_alone():
    images = TrainingImages(EMBEDDED, stub())
    latents = torch.zeros(5, 1, 8, 8)
    z = torch.tensor([-9.0, -0.3, 0.0, 0.5, 9.0], dtype=torch.float64).reshape(5, 1, 1, 1)
    drawn = images.draw(latents, None, lambda x: z.to(x.dtype))
    single = torch.cat([images.draw(latents[:1], None, lambda x, i=i: z[i:i + 1]) for i in range(5)])
    assert torch.equal(drawn, single)
    data = ImageFolderDataset(EMBEDDED)
    for i, index in ((0, 0), (2, len(data) // 2), (4, len(data) - 1)):
        torch.testing.assert_close(drawn[i], torch.tensor(data[index][0]) / 127.5 - 1.0, check_dtype=False)


def test_starting_images_are_of_the_class():
    images = TrainingImages(EMBEDDED, stub(label_dim=10))
    data = ImageFolderDataset(EMBEDDED, use_labels=True)
    for z in (-2.0, 0.1, 3.0):
        drawn = images.draw(torch.zeros(1, 1, 8, 8), torch.eye(10)[[7]], normals(z))
        pixels = ((drawn[0] + 1) * 127.5).round().to(torch.uint8).numpy()
        assert any((pixels == data[i][0]).all() for i in range(len(data)) if data.get_label(i)[7])


def labelled(folder, labels):
    """A folder of grey 8×8 images, the i-th of the value i, with these labels."""
    names = [f'{i}.png' for i in range(len(labels))]
    for i, name in enumerate(names):
        PIL.Image.fromarray(np.full([8, 8], i, np.uint8)).save(folder / name)
    (folder / 'dataset.json').write_text(json.dumps({'labels': list(zip(names, labels))}))
    return folder


def test_classes_without_images_are_refused(tmp_path):
    """Class numbers with gaps would give the network classes that no sample can start from."""
    with pytest.raises(UserError, match='no images of class 1, 3 from which.*without gaps.*--cond=0'):
        TrainingImages(labelled(tmp_path, [0, 2, 4, 4]), stub(label_dim=5))
    TrainingImages(labelled(tmp_path, [0, 2, 4, 4]), stub())


def test_label_vectors_start_from_the_images_nearest_to_a_class(tmp_path):
    images = TrainingImages(labelled(tmp_path, [[0.9, 0.1, 0.0], [0.0, 0.2, 0.8]]), stub(label_dim=3))
    for label, z, value in ((0, 2.0, 0), (2, -2.0, 1), (1, -2.0, 0), (1, 2.0, 1)):  # class 1 leads in no image
        drawn = images.draw(torch.zeros(1, 1, 8, 8), torch.eye(3)[[label]], normals(z))
        torch.testing.assert_close(drawn, torch.full_like(drawn, value / 127.5 - 1))


def test_colour_start_has_the_datas_mean_and_spread():
    images, data = TrainingImages(EMBEDDED, stub()), ImageFolderDataset(EMBEDDED)
    means = np.array([data[i][0].mean() for i in range(len(data))]) / 127.5 - 1
    start = colour_start(images, None)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4000, 1, 8, 8, generator=generator)
    x = start(latents, None, lambda t: torch.randn(t.shape, dtype=t.dtype, generator=generator))
    assert x.mean().item() == pytest.approx(means.mean(), abs=4 * means.std() / 4000 ** 0.5)
    assert x.mean(dim=(1, 2, 3)).std().item() == pytest.approx(means.std(), rel=0.05)
    assert (x - x.mean(dim=(2, 3), keepdim=True)).std().item() == pytest.approx(0.002, rel=0.05)


@pytest.mark.parametrize('system, options, expected', [
    ('ihdm', {}, dict(prior='blurred training images')),
    ('cold', {}, dict(prior='blurred training images', cold_blur='strong', cold_start='blurred')),
    ('cold', dict(cold_start='colours'),
     dict(prior='mean colours of training images', cold_blur='strong', cold_start='colours'))])
def test_records_say_what_samples_start_from(system, options, expected):
    """They do so beside every score and in generation.json, with choices that are defaults too."""
    size = dict(img_resolution=8, img_channels=1, model_channels=8, channel_mult=[1], num_blocks=1)
    net = IHDMPrecond(ihdm_levels=2, **size) if system == 'ihdm' else ColdPrecond(cold_blur='strong', cold_steps=2,
                                                                                  **size)
    system, options = SYSTEMS[system], {**options, 'data': EMBEDDED}
    assert system.describe(net, options) == expected
    recorded = sampling_facts(net, system, options, system.make_sampler(net, options))
    assert recorded == dict(nfe=2, solver=None, precision='fp32', **expected, sampler=options)
    json.dumps(recorded)


def test_every_start_has_its_prior():
    assert PRIORS.keys() == STARTS.keys()


def facts(**changed):
    return types.SimpleNamespace(path='x.safetensors', dataset={'name': 'digits-8x8', 'resolution': 8,
                                                                'num_images': 1797, **changed})


def test_data_for(tmp_path, capsys):
    assert data_for(facts()) == EMBEDDED and not capsys.readouterr().out
    assert data_for(facts(name='other'), EMBEDDED) == EMBEDDED
    assert 'was trained on other, and its samples start from' in capsys.readouterr().out
    snapshot = facts(name='mine', num_images=1797, resolution=4)
    snapshot.path = tmp_path / 'network-snapshot-000001.safetensors'
    data = tmp_path / 'mine.zip'
    for content, exists in (('{}', True), ('[]', True), ('{"dataset_kwargs": {"path": 3}}', True),
                            (json.dumps(dict(dataset_kwargs=dict(path=str(data)))), False),
                            (json.dumps(dict(dataset_kwargs=dict(path=str(EMBEDDED)))), True)):
        (tmp_path / 'training_options.json').write_text(content)
        with pytest.raises(UserError, match='the data set it was trained on .mine. with --data'):
            data_for(snapshot)
    shutil.copy(EMBEDDED, data)
    (tmp_path / 'training_options.json').write_text(json.dumps(dict(dataset_kwargs=dict(path=str(data)))))
    assert data_for(snapshot) == str(data) and not capsys.readouterr().out
    assert data_for(facts(num_images=2 * 1797), EMBEDDED) == EMBEDDED
    with pytest.raises(UserError, match='cifar10-32x32.*--data'):
        data_for(facts(name='cifar10-32x32', resolution=32))
    with pytest.raises(UserError, match='1797 images.*50000.*--data'):
        data_for(facts(num_images=50000), EMBEDDED)


@pytest.mark.parametrize('make, named', [
    (lambda: HeatLevels(num_levels=1), '--ihdm-levels'),
    (lambda: HeatLevels(num_levels=10 ** 8), '--ihdm-levels.*2 to 10000'),
    (lambda: HeatLevels(blur_max=1e300), '--ihdm-blur-max'),
    (lambda: ColdProcess(num_steps=10 ** 8), '--cold-steps.*2 to 10000'),
    (lambda: HeatLevels(blur_max=0.1), '--ihdm-blur-max'),
    (lambda: ColdProcess(blur='weak'), '--cold-blur'),
    (lambda: ColdProcess(num_steps=0), '--cold-steps'),
    (lambda: make_ihdm_sampler(stub(HeatLevels()), ihdm_delta=-1), '--ihdm-delta'),
    (lambda: make_ihdm_sampler(stub(HeatLevels())), '--data'),
    (lambda: make_ihdm_sampler(stub(HeatLevels(), channels=3), data=EMBEDDED), '1 channels.*--data'),
    (lambda: make_cold_sampler(stub(ColdProcess()), num_steps=51, data=EMBEDDED), '--steps=50'),
    (lambda: make_cold_sampler(stub(ColdProcess()), data=EMBEDDED, cold_start='noise'), '--cold-start'),
    (lambda: make_cold_sampler(stub(ColdProcess()), data=EMBEDDED, cold_start='colours'), '--cold-blur=strong'),
])
def test_bad_input(make, named):
    with pytest.raises(UserError, match=named):
        make()
