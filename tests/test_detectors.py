"""Detectors: the Inception graph against its record, the files a detector may come from, the labels."""

import zlib

import numpy as np
import pytest
import torch

from training import inception


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
        assert relative(features, g[f'2048_{size}']) < 1e-4
        assert relative(net(images), g[f'logits_{size}']) < 1e-4
        assert relative(net.logits(features, no_output_bias=True), g[f'logits_unbiased_{size}']) < 1e-4
