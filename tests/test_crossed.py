"""Networks with D or R of another (warm.crossed)."""

import dataclasses
import errno
import json

import click
import pytest
import torch
from click.testing import CliRunner

from dnnlib import UserError
from tests.commands import invoke
from tests.small_networks import tiny_network
from training.dataset import EMBEDDED
from training.snapshot import save_snapshot
from warm import crossed
from warm.crossed import TAKEN, Crossed
from warm.report.data import measurements_of, read_run
from warm.samplers import warm_sampler
from warm.study.answers import where_networks_err
from warm.study.data import Scores
from warm.study.plan import SCALES


def moved(net):
    """The same network with other weights."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7)))
    return net


@pytest.fixture
def pair():
    return tiny_network('warm'), moved(tiny_network('warm', rest_loss='unit'))


@pytest.mark.parametrize('take', TAKEN)
def test_parts_are_whose_they_should_be(pair, take):
    """At low ≤ β < high; elsewhere both are the network's own."""
    net, other = pair
    own = Crossed(net, other, take, low=0.5, high=2)
    x = torch.randn([2, 1, 8, 8])
    for beta in (0.4, 0.5, 1.9, 2.0):
        at = x, torch.tensor(beta), None
        both = [one.denoise_deblur(*at, alpha=beta / 2) for one in (net, other)]
        assert not torch.equal(both[0][0], both[1][0]) and not torch.equal(both[0][1], both[1][1])
        for i, part in enumerate(own.denoise_deblur(*at, alpha=beta / 2)):
            theirs = 0.5 <= beta < 2 and (take == 'both' or take == 'DR'[i])
            assert torch.equal(part, both[theirs][i])


def test_images(pair):
    """Nothing taken draws the network's images, both parts taken draw the other's, one draws neither's."""
    latents = torch.randn([2, 1, 8, 8])
    own, theirs = (warm_sampler(net, latents, num_steps=4) for net in pair)
    drawn = {take: warm_sampler(Crossed(*pair, take), latents, num_steps=4) for take in TAKEN}
    assert torch.equal(drawn['none'], own) and torch.equal(drawn['both'], theirs)
    assert not any(torch.equal(drawn[take], images) for take in 'DR' for images in (own, theirs))


@pytest.mark.parametrize('name, options, words', [
    ('edm', {}, 'is of EDMPrecond, which has no D and R'), ('warm', dict(bnr='1'), 'not have the same path'),
    ('warm', dict(blur='natural'), 'not have the same kind of blur')])
def test_networks_that_do_not_go_together(name, options, words):
    net = tiny_network('warm')
    for two in ((net, tiny_network(name, **options)), (tiny_network(name, **options), net)):
        with pytest.raises(UserError, match=words):
            Crossed(*two)


@pytest.mark.parametrize('name', ['img_channels', 'img_resolution', 'label_dim'])
def test_networks_for_other_images(pair, name):
    setattr(pair[1], name, 3)
    with pytest.raises(UserError, match='not have the same'):
        Crossed(*pair)


def test_labels_reach_both_networks(pair):
    told = []
    for net in pair:
        net.denoise_deblur = lambda x, sigma, labels, alpha: (told.append(labels), (x, x))[1]
    labels = torch.eye(2)
    Crossed(*pair).denoise_deblur(torch.zeros([2, 1, 8, 8]), torch.tensor(1.0), labels, alpha=0.5)
    assert len(told) == 2 and told[0] is told[1] is labels


@pytest.fixture
def files(tmp_path, pair):
    for name, net in zip(('net', 'other'), pair):
        save_snapshot(tmp_path / f'{name}.safetensors', net, 'warm', kimg=1, dataset=dict(name='digits-8x8'))
    ref = tmp_path / 'ref.npz'
    assert invoke('fid.py', 'ref', f'--data={EMBEDDED}', f'--dest={ref}', '--detector=pixels').exit_code == 0
    return [f'--network={tmp_path}/net.safetensors', f'--other={tmp_path}/other.safetensors', f'--ref={ref}',
            '--detector=pixels', '--num=6', '--batch=4']


def test_command(tmp_path, files):
    """Taking both scores as fid.py scores the other network, and the record says what was taken."""
    log = tmp_path / 'crossed.jsonl'
    for options in (['--take=both'], ['--take=R', '--low=0.3'], ['--take=D', '--low=0.3', '--high=2']):
        result = CliRunner().invoke(crossed.main, [*files, *options, f'--log={log}'], catch_exceptions=False)
        assert result.exit_code == 0 and 'FD-pixels: ' in result.output
    assert result.output.startswith(f'D of {tmp_path}/other.safetensors at 3 of 18 noise levels')
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line['take'], line['low'], line['high'], line['levels']) for line in lines] == [
        ('both', 0, None, 18), ('R', 0.3, None, 12), ('D', 0.3, 2, 3)]
    assert len({line['value'] for line in lines}) == 3 and {line['nfe'] for line in lines} == {35}
    assert {line['ref'] for line in lines} == {'ref.npz'}
    assert lines[0]['other']['network_options']['rest_loss'] == 'unit' != lines[0]['network_options'].get('rest_loss')
    scored = invoke('fid.py', 'calc', *files[2:4], '--seeds=0-5', '--batch=4', f'--log={tmp_path}/own.jsonl',
                    f'--network={tmp_path}/other.safetensors')
    own = json.loads((tmp_path / 'own.jsonl').read_text())
    assert scored.exit_code == 0 and own['value'] == lines[0]['value'] and own['network_sha256'] == \
        lines[0]['other']['network_sha256']


def test_no_table_takes_them_for_a_networks_own(tmp_path, files):
    """The page of results shows what was taken, each once; warm.report leaves them out."""
    log = tmp_path / 'crossed-digits.jsonl'
    for options in ([], ['--take=both', '--low=0.3'], ['--take=D', '--high=0.3'], ['--low=0.1', '--high=1'],
                    ['--take=none'], []):
        assert CliRunner().invoke(crossed.main, [*files, *options, f'--log={log}']).exit_code == 0
    scale = dataclasses.replace(SCALES['digits'], num=6)
    line = dict(run='warm-uncond-s0', seed=0, point=40, options=[], metric='FD-pixels', value=1.0, num_images=6)
    (tmp_path / 'digits.jsonl').write_text(json.dumps(line) + '\n')
    (tmp_path / 'both.jsonl').write_text(log.read_text() + json.dumps(line) + '\n')
    assert [m.values for m in measurements_of([read_run(tmp_path / 'both.jsonl')])] == [{'FD-pixels': 1.0}]
    with open(log, 'a') as f:  # of another detector, of another number of images, incomplete
        f.write('{"metric": "FD-corners", "num_images": 6}\n{"metric": "FD-pixels", "num_images": 5}\n'
                '{"metric": "FD-pixels", "num_images": 6, "value": 2.0}\n')
    text = where_networks_err(Scores.read(scale, tmp_path / 'digits.jsonl'), None)
    rows = [[cell.strip() for cell in row.strip('|').split('|')] for row in text.splitlines() if row.startswith('|')]
    own, other = '`--bnr=0.5`, 1 kimg', '`--bnr=0.5 --rest-loss=unit`, 1 kimg'
    assert rows[0] == ['the network', 'taken', 'from', 'at noise levels', 'FD-pixels']
    assert [row[:4] for row in rows[2:]] == [
        [own, 'R', other, 'all'], [own, 'D and R', other, '0.3 ≤ β'], [own, 'D', other, 'β < 0.3'],
        [own, 'R', other, '0.1 ≤ β < 1'], [own, 'nothing', '–', '–']]
    assert rows[2][4] == f"{json.loads(log.read_text().splitlines()[0])['value']:.3g}"


def test_a_network_by_itself_needs_no_other(tmp_path, files):
    """With --take=none; with anything else taken, the sentence says what is missing."""
    options = [option for option in files if not option.startswith('--other=')]
    scores = []
    for given in (options, files):
        result = CliRunner().invoke(crossed.main, [*given, '--take=none', '--num=20'], catch_exceptions=False)
        assert result.exit_code == 0 and result.output.startswith('nothing taken'), result.output
        scores.append(result.output.splitlines()[-1])
    assert scores[0] == scores[1]
    result = CliRunner().invoke(crossed.main, [*options, '--take=both'])
    assert result.exit_code == 1 and 'takes D and R from another network; give it as --other' in result.output


def test_scores_are_recorded_before_they_are_printed(tmp_path, files, monkeypatch):
    """What reads them may be gone by then."""
    def gone(text):
        if 'FD-' in text:
            raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(click, 'echo', gone)
    result = CliRunner().invoke(crossed.main, [*files, '--take=D', '--num=20', f'--log={tmp_path}/crossed.jsonl'])
    assert 'FD-pixels' in (tmp_path / 'crossed.jsonl').read_text()
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)  # a sentence (dnnlib.flags.Tool)


@pytest.mark.parametrize('options, words', [
    (['--low=2', '--high=1'], 'visits no noise level from --low=2 to below --high=1; it visits 80, 57.6'),
    (['--low=0.3', '--high=0.5'], 'visits no noise level from --low=0.3'),
    (['--other=net.safetensors'], '--other=net.safetensors are the same network'), (['--take=X'], "'X' is not one of"),
    (['--other=missing.safetensors'], 'missing.safetensors'), (['--log=net.safetensors'], 'not a file of JSON lines'),
    (['--ref=missing.npz'], 'missing.npz'), (['--metrics=none'], 'none'), (['--num=1'], '1 is not in the range')])
def test_bad_input_is_found_before_any_work(tmp_path, files, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(crossed, 'NetworkImages', None)
    result = CliRunner().invoke(crossed.main, [*files, '--log=crossed.jsonl', *options])
    assert result.exit_code and words in result.output and isinstance(result.exception, SystemExit), result.output
    assert sorted(tmp_path.iterdir()) == before
