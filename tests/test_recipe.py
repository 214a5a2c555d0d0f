"""EDM's training recipe (Karras et al. 2022, Table 7): a run equals a replay of its formulas, and what a run leaves.

The replay is written without the training loop: it shares only the network, the images and the augmentation with it.
"""

import copy
import itertools
import json

import numpy as np
import torch

from tests.commands import SMALL, succeed, torchrun
from tests.small_networks import distance
from training.augment import AugmentPipe
from training.dataset import load_embedded
from training.networks import EDMPrecond
from training.snapshot import read_snapshot
from training.state import load_state

SEED, STEPS, RANKS, ROUNDS, BATCH = 5, 9, 2, 2, 32
LR, RAMPUP, HALFLIFE = 0.01, 200, 11  # the last two in images; both limits are passed within the run
RUN = ['--cbase=8', '--cres=1', '--cond=1', f'--seed={SEED}', f'--batch={BATCH}',
       f'--batch-gpu={BATCH // RANKS // ROUNDS}', f'--duration={STEPS * BATCH / 1e6}', f'--lr={LR}',
       f'--lr-rampup={RAMPUP / 1e6}', f'--ema={HALFLIFE / 1e6}', '--nosubdir', '--grid=0', '--workers=0']


def training_order(n, rank):
    """Indices of a rank's images, without end (half the set is the window of reshuffling)."""
    rnd = np.random.RandomState(SEED)
    order, window = np.arange(n), round(n * 0.5)
    rnd.shuffle(order)
    for idx in itertools.count():
        i = idx % n
        if idx % RANKS == rank:
            yield order[i]
        j = (i - rnd.randint(window)) % n
        order[i], order[j] = order[j], order[i]


def edm_loss(net, pipe, images, labels):
    """λ(σ)·‖D(y + n; σ) − y‖² with ln σ ~ N(−1.2, 1.2²) and λ = (σ² + 0.5²)/(0.5σ)², summed over the batch."""
    sigma = (torch.randn([len(images), 1, 1, 1]) * 1.2 - 1.2).exp()
    y, augment_labels = pipe(images)
    D_yn = net(y + sigma * torch.randn(y.shape), sigma, labels, augment_labels=augment_labels)
    return ((sigma ** 2 + 0.25) / (sigma * 0.5) ** 2 * (D_yn - y) ** 2).sum()


def replay(network_kwargs):
    """State dicts after STEPS steps, all ranks in turn, each with its own random numbers.

    Returns:
        (initial weights, weights, EMA of the weights).
    """
    data = load_embedded()
    pipe = AugmentPipe(0.12, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)
    orders, noise = [training_order(len(data), rank) for rank in range(RANKS)], []
    for rank in range(RANKS):  # our choice of seeds: EDM leaves them open
        torch.manual_seed(int(np.random.SeedSequence([SEED, rank, 0]).generate_state(1)[0]))
        noise.append(torch.get_rng_state())
    torch.manual_seed(SEED)
    net = EDMPrecond(img_resolution=8, img_channels=1, label_dim=10, augment_dim=9, **network_kwargs).train()
    start, ema, params = copy.deepcopy(net).state_dict(), copy.deepcopy(net), list(net.parameters())
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    for step in range(STEPS):
        net.zero_grad()
        for rank in range(RANKS):
            torch.set_rng_state(noise[rank])
            for _ in range(ROUNDS):
                chosen = [data[i] for i in itertools.islice(orders[rank], BATCH // RANKS // ROUNDS)]
                images, labels = (torch.from_numpy(np.stack(column)) for column in zip(*chosen))
                (edm_loss(net, pipe, images / 127.5 - 1, labels) / BATCH).backward()
            noise[rank] = torch.get_rng_state()
        nimg = step * BATCH  # before this batch
        lr = LR * min(nimg / RAMPUP, 1)
        beta = 0.5 ** (BATCH / min(HALFLIFE, 0.05 * nimg)) if nimg else 0
        with torch.no_grad():
            for p, m_p, v_p, ema_p in zip(params, m, v, ema.parameters()):
                grad = p.grad.nan_to_num(nan=0, posinf=1e5, neginf=-1e5)
                m_p.lerp_(grad, 1 - 0.9)
                v_p.lerp_(grad ** 2, 1 - 0.999)
                m_hat, v_hat = m_p / (1 - 0.9 ** (step + 1)), v_p / (1 - 0.999 ** (step + 1))
                p.sub_(lr * m_hat / (v_hat.sqrt() + 1e-8))
                ema_p.copy_(beta * ema_p + (1 - beta) * p)
    return start, net.state_dict(), ema.state_dict()


def test_a_run_equals_the_replay_of_the_recipe(tmp_path):
    """Two ranks of two accumulation rounds each: how far the weights moved, and how far their EMA lags behind.

    The biases of queries, keys and values are left out: the softmax does not see those of the keys, whose gradients
    are round-off alone, and Adam takes steps of full size in whatever direction.
    """
    torchrun('train.py', *RUN, f'--outdir={tmp_path}', ranks=RANKS)
    start, weights, ema = replay(json.loads((tmp_path / 'training_options.json').read_text())['network_kwargs'])
    state = load_state(tmp_path / 'training-state-000000.pt')
    names = [name for name in weights if not name.endswith('qkv.bias')]
    assert len(names) > 100 and state['net'].keys() == state['ema'].keys() == weights.keys()
    for pair, expected in (((state['net'], start), (weights, start)), ((state['net'], state['ema']), (weights, ema))):
        assert distance(*([a[name] - b[name] for name in names] for a, b in (pair, expected))) < 5e-4
    saved = read_snapshot(tmp_path / 'network-snapshot-000000.safetensors').state_dict
    assert saved.keys() == ema.keys() and all(torch.equal(saved[name], state['ema'][name]) for name in ema)


def test_the_defaults_are_the_recipes(tmp_path):
    shown = succeed('train.py', '-n', f'--outdir={tmp_path}')
    options, _ = json.JSONDecoder().raw_decode(shown[shown.index('{'):])
    assert options['optimizer_kwargs'] == {'lr': 1e-3, 'betas': [0.9, 0.999], 'eps': 1e-8}
    numbers = ('batch_size', 'batch_gpu', 'total_kimg', 'ema_halflife_kimg', 'lr_rampup_kimg', 'loss_scaling',
               'kimg_per_tick', 'snapshot_ticks', 'state_dump_ticks')
    assert [options[name] for name in numbers] == [512, None, 200_000, 500, 10_000, 1, 50, 50, 500]
    assert options['network_kwargs']['dropout'] == 0.13 and options['augment_kwargs']['p'] == 0.12


def test_what_is_written_at_which_tick(tmp_path):
    """Steps of 1 kimg, each a tick: a snapshot at tick 0 too, a training state not."""
    succeed('train.py', *SMALL, f'--outdir={tmp_path}', '--nosubdir', '--cbase=4', '--cres=1', '--batch=1000',
            '--tick=1', '--snap=1', '--dump=1', '--duration=0.003', '--grid=0', '--augment=0')
    snapshots, states = ({path.stem.split('-')[-1] for path in tmp_path.glob(f'{kind}-*')}
                         for kind in ('network-snapshot', 'training-state'))
    assert snapshots == {'000001', '000002', '000003'} and states == {'000002', '000003'}
