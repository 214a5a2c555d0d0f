"""Detectors: the Inception graph against its record, the files a detector may come from, the labels."""

import pickle
import zipfile
import zlib

import numpy as np
import pytest
import requests
import torch

from dnnlib import UserError
from dnnlib.download import cached_path
from dnnlib.files import file_sha256
from training import detectors, inception


def formula_state_dict(meta):
    """The record's weights: per tensor a generator seeded by the CRC of its name (rule in the meta)."""
    state = {}
    for key, shape in meta['tensors'].items():
        if key.endswith('num_batches_tracked'):
            state[key] = torch.zeros(shape, dtype=torch.int64)
            continue
        r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        if r.ndim > 1:
            state[key] = r * (2 / r[0].numel()) ** 0.5
        elif key.endswith(('bn.weight', 'running_var')):
            state[key] = 1 + 0.1 * r.abs()
        else:
            state[key] = 0.1 * r
    return state


@pytest.fixture(scope='module')
def weights(golden):
    return formula_state_dict(golden('inception').meta)


@pytest.fixture(scope='module')
def net(weights):
    with torch.device('meta'):
        net = inception.InceptionV3()
    net.load_state_dict(weights, assign=True)
    return net


def relative(a, b):
    return np.abs(np.asarray(a) - b).max() / np.abs(b).max()


@pytest.mark.parametrize('size', [32, 64, 299])
def test_inception_equals_record(golden, net, size):
    g = golden('inception').arrays
    images = torch.from_numpy(g[f'images_{size}'])
    with torch.inference_mode():
        features = net(images, return_features=True)
        assert features.shape == (len(images), inception.NUM_FEATURES) and features.dtype == torch.float32
        assert relative(features, g[f'2048_{size}']) < 2e-5
        assert relative(net(images), g[f'logits_{size}']) < 2e-5
        assert relative(net.logits(features, no_output_bias=True), g[f'logits_unbiased_{size}']) < 2e-5


def test_forward_leaves_the_bias_out_when_asked(net):
    with torch.inference_mode():
        images = torch.zeros([1, 3, 32, 32], dtype=torch.uint8)
        difference = net(images) - net(images, no_output_bias=True)
    assert relative(difference[0], net.fc.bias.detach().numpy()) < 1e-3


def test_inception_stays_in_evaluation_mode(net):
    assert not any(m.training for m in net.train().modules())


@pytest.mark.parametrize('size, target', [(32, 299), (64, 299), (700, 299), (5, 8)])
def test_resize_equals_the_plain_form(size, target):
    x = torch.rand([1, 1, size, size + 3], generator=torch.Generator().manual_seed(0))
    got = inception.resize_bilinear(x, target)[0, 0]
    for i, j in ((0, 0), (1, target - 1), (target // 2, 3), (target - 1, target - 1)):
        u, v = i * size / target, j * (size + 3) / target
        a, b = int(u), int(v)
        a1, b1 = min(a + 1, size - 1), min(b + 1, size + 2)
        plain = sum(w * x[0, 0, r, c].item() for r, c, w in (
            (a, b, (1 - u + a) * (1 - v + b)), (a, b1, (1 - u + a) * (v - b)),
            (a1, b, (u - a) * (1 - v + b)), (a1, b1, (u - a) * (v - b))))
        assert got[i, j].item() == pytest.approx(plain, abs=1e-6)


# -- detectors

def test_features_are_of_full_float32():
    """TF32 is off within, even if the caller has allowed it; it is allowed again afterwards, also after an error."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    former = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        with pytest.raises(KeyError), detectors.full_float32(torch.device('cpu')):
            assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic) == (False, False, True)
            raise KeyError
        assert matmul.allow_tf32 and cudnn.allow_tf32
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = former


def random_images(n, channels=3, size=16):
    return torch.randint(256, [n, channels, size, size], dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(0))


def test_pixels_are_area_means():
    images = random_images(3)
    features, probs = detectors.load_detector('pixels')(images)
    plain = (images.double() / 127.5 - 1).reshape(3, 3, 8, 2, 8, 2).mean(dim=[3, 5]).reshape(3, 192)
    assert probs is None and features.dtype == torch.float32
    np.testing.assert_allclose(features, plain, atol=1e-6)


def test_grey_is_repeated():
    grey = random_images(2, channels=1)
    detector = detectors.load_detector('pixels')
    assert torch.equal(detector(grey)[0], detector(grey.repeat(1, 3, 1, 1))[0])


@pytest.mark.parametrize('images', [torch.zeros([2, 4, 8, 8], dtype=torch.uint8), torch.zeros([2, 3, 8, 8])])
def test_other_images_are_refused(images):
    with pytest.raises(UserError, match='must be uint8 with 1 or 3 channels'):
        detectors.load_detector('pixels')(images)


def test_state_dict_file(tmp_path, weights, net):
    """The detector bears the file's name, unless it is the public file; probabilities are those without the bias."""
    path = tmp_path / 'mine.pth'
    torch.save({k: v for k, v in weights.items() if not k.endswith('num_batches_tracked')}, path,
               _use_new_zipfile_serialization=False)  # the format of the public file
    detector = detectors.load_detector(str(path))
    assert (detector.name, detector.suffix, detector.has_probs) == ('file:mine', '-mine', True)
    images = random_images(2)
    features, probs = detector(images, probs=True)
    with torch.inference_mode():
        assert torch.equal(features, net(images, return_features=True))
        np.testing.assert_allclose(probs, net(images, no_output_bias=True).softmax(dim=1), rtol=1e-5, atol=1e-12)
    assert detector.made('renamed', detector.digest) and not detector.made('file:mine', 'other')


def test_the_public_file_is_recognised_by_its_digest(tmp_path, weights, monkeypatch):
    path = tmp_path / 'copy.pth'
    torch.save(weights, path)
    monkeypatch.setattr(detectors, 'WEIGHTS_SHA256_PREFIX', file_sha256(path)[:8])
    assert detectors.load_detector(str(path)).suffix == ''


class Scripted(torch.nn.Module):
    def forward(self, x, return_features: bool = False, no_output_bias: bool = False):
        y = x.float().mean(dim=[2, 3])
        return y if return_features else y.softmax(dim=1)


class ScriptedLogits(torch.nn.Module):
    def forward(self, x, return_features: bool = False, no_output_bias: bool = False):
        return x.float().mean(dim=[2, 3])


class ScriptedFailing(torch.nn.Module):
    def forward(self, x, return_features: bool = False):
        return x.reshape(-1, 7)


class ScriptedPlain(torch.nn.Module):
    def forward(self, x):
        return x.float().mean(dim=[2, 3])


def script(module, path):
    torch.jit.script(module()).save(str(path))
    return str(path)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_torchscript_file(tmp_path):
    detector = detectors.load_detector(script(Scripted, tmp_path / 'tiny.pt'))
    images = random_images(4)
    features, probs = detector(images, probs=True)
    np.testing.assert_allclose(features, images.float().mean(dim=[2, 3]), rtol=1e-6)
    np.testing.assert_allclose(probs.sum(dim=1), 1, rtol=1e-6)
    assert detector.suffix == '-tiny' and len(detector.digest) == 64


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('module, message', [
    (ScriptedPlain, "takes no 'return_features' argument"),
    (ScriptedLogits, 'returns no class probabilities'),
    (ScriptedFailing, 'failed on uint8 images of shape \\[4, 3, 16, 16\\]'),
])
def test_unsuitable_torchscript(tmp_path, module, message):
    with pytest.raises(UserError, match=message):
        detector = detectors.load_detector(script(module, tmp_path / 'odd.pt'))
        detector(random_images(4), probs=detector.has_probs)


class Tripwire:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


def test_loading_executes_nothing(tmp_path):
    """Pickles that call something do not run: as a plain file, in a torch zip, in one dressed up as TorchScript."""
    sprung = tmp_path / 'sprung'
    (tmp_path / 'a.pth').write_bytes(pickle.dumps(Tripwire(sprung), protocol=2))
    torch.save({'fc.weight': Tripwire(sprung)}, tmp_path / 'b.pth')
    with zipfile.ZipFile(tmp_path / 'b.pth') as old, zipfile.ZipFile(tmp_path / 'c.pt', 'w') as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        folder = old.namelist()[0].split('/')[0]
        new.writestr(f'{folder}/constants.pkl', pickle.dumps(Tripwire(sprung), protocol=2))
        new.writestr(f'{folder}/code/__torch__.py', '')
    for name in ('a.pth', 'b.pth', 'c.pt'):
        with pytest.raises(UserError, match=f'{name} is '):
            detectors.load_detector(str(tmp_path / name))
    assert not sprung.exists()


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_damaged_files(tmp_path, weights):
    torch.save({'a': torch.zeros(1000)}, tmp_path / 'a.pth')
    script(Scripted, tmp_path / 'a.pt')
    for name in ('a.pth', 'a.pt'):
        content = (tmp_path / name).read_bytes()
        for bad in (b'', content[:len(content) // 2], b'<html>'):
            (tmp_path / name).write_bytes(bad)
            with pytest.raises(UserError, match=f'{name} is neither a TorchScript archive nor a state dict'):
                detectors.load_detector(str(tmp_path / name))


def test_state_dict_of_another_layout(tmp_path, weights):
    for state, wrong in (({**weights, 'fc.bias': torch.zeros(1000)}, r"'fc.bias' is \(1000,\)"),
                         ({**weights, 'more': torch.zeros(2)}, r"'more' is \(2,\)"),
                         ({'a': torch.zeros(1)}, "'Conv2d_1a_3x3.conv.weight' is missing"),
                         ([torch.zeros(1)], "'Conv2d_1a_3x3.conv.weight' is missing")):
        torch.save(state, tmp_path / 'x.pth')
        with pytest.raises(UserError, match=f'not laid out like the public Inception weights: {wrong}'):
            detectors.load_detector(str(tmp_path / 'x.pth'))


def test_unknown_detector():
    with pytest.raises(UserError, match="no detector 'inceptoin'; choose inception, inception-pth, pixels, or"):
        detectors.load_detector('inceptoin')
    with pytest.raises(UserError, match='there is no file nowhere/inception.pt'):
        detectors.load_detector('nowhere/inception.pt')


@pytest.mark.parametrize('name, url', [('inception', detectors.SCRIPT_URL), ('inception-pth', detectors.WEIGHTS_URL)])
def test_without_network_the_place_for_the_file_is_named(name, url, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise requests.ConnectionError()
    monkeypatch.setattr(requests, 'get', refuse)
    monkeypatch.setattr(requests.Session, 'request', refuse)
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path))
    with pytest.raises(UserError) as error:
        detectors.load_detector(name)
    assert url in str(error.value) and str(cached_path(url)) in str(error.value)


def test_a_file_in_the_cache_serves_without_network(tmp_path, weights, monkeypatch):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path))
    path = cached_path(detectors.WEIGHTS_URL)
    torch.save(weights, path)
    monkeypatch.setattr(detectors, 'WEIGHTS_SHA256_PREFIX', file_sha256(path)[:8])
    assert detectors.load_detector('inception-pth').name == detectors.INCEPTION
    monkeypatch.setattr(detectors, 'WEIGHTS_SHA256_PREFIX', 'x')
    with pytest.raises(UserError, match='should begin with x'):
        detectors.load_detector('inception-pth')
    assert not path.exists()
