"""The classifier behind --detector=FILE: it learns, its file does what the network does, bad input is named."""

import hashlib
import json
import math
import zipfile

import click.testing
import numpy as np
import PIL.Image
import pytest
import torch

import fid
from dnnlib import UserError
from tests.commands import refused
from training import classifier, classifier_net
from training.dataset import EMBEDDED, ImageFolderDataset
from training.detectors import load_detector

pytestmark = pytest.mark.usefixtures('cache')

SMALL = {'width': 4, 'epochs': 5, 'batch': 32, 'lr': 0.1, 'flip': 0, 'cutout': 0, 'device': 'cpu'}


def write_zip(path, indices, relabel=lambda labels: labels, keep_labels=True):
    """A data set of some embedded digits; `relabel` changes the list of their labels."""
    with zipfile.ZipFile(EMBEDDED) as digits, zipfile.ZipFile(path, 'w') as out:
        chosen = [json.loads(digits.read('dataset.json'))['labels'][i] for i in indices]
        for name, _ in chosen:
            out.writestr(name, digits.read(name))
        if keep_labels:
            labels = relabel([label for _, label in chosen])
            out.writestr('dataset.json', json.dumps({'labels': [[n, k] for (n, _), k in zip(chosen, labels)]}))
    return path


@pytest.fixture(scope='module')
def halves(tmp_path_factory):
    """(train, test) zips: the embedded digits, every fifth held out."""
    folder = tmp_path_factory.mktemp('digits')
    return (write_zip(folder / 'train.zip', [i for i in range(1797) if i % 5]),
            write_zip(folder / 'test.zip', range(0, 1797, 5)))


def run(data, test, dest, **options):
    """Run the command in this process; returns click's result."""
    flags = {'data': data, 'test': test, 'dest': dest, **SMALL, **options}
    return click.testing.CliRunner().invoke(classifier.main, [f'--{k}={v}' for k, v in flags.items()])


def learn(data, test, dest, **options):
    """Run the command, which must succeed; returns its record."""
    result = run(data, test, dest, **options)
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(dest.with_suffix('.json').read_text())


@pytest.fixture(scope='module')
def trained(halves, tmp_path_factory):
    """(path of a detector of digits, its record)."""
    dest = tmp_path_factory.mktemp('detectors') / 'deep' / 'digits.ts'
    return dest, learn(*halves, dest)


def eager(path):
    """A `Classifier` with the weights of a detector's file."""
    module = load_detector(str(path)).module
    state = module.state_dict()
    net = classifier_net.Classifier(module.resolution, module.channels, len(state['fc.weight']),
                                    len(state['trunk.0.0.weight']), state['mean'].flatten(), state['std'].flatten())
    net.load_state_dict(state)
    return net.eval()


def images_of(path, n=20):
    """uint8 [n, C, H, W]."""
    dataset = ImageFolderDataset(path)
    return torch.from_numpy(np.stack([dataset[i][0] for i in range(n)]))


# -- it learns

def test_it_learns_what_there_is_to_learn(halves, trained, tmp_path):
    """Held-out digits are told apart; with labels dealt out at random, there is nothing to learn."""
    rng = np.random.default_rng(0)
    shuffled = write_zip(tmp_path / 'shuffled.zip', [i for i in range(1797) if i % 5],
                         lambda labels: rng.permutation(labels).tolist())
    chance = learn(shuffled, halves[1], tmp_path / 'chance.ts', epochs=2)
    accuracy = trained[1]['accuracy']
    assert accuracy['test'] > 0.9 and accuracy['train'] > 0.9
    assert chance['accuracy']['test'] < 0.3


def test_the_same_seed_gives_the_same_weights(halves):
    def weights(seed):
        sets = [classifier.load_labelled(classifier.open_labelled(path)) for path in halves]
        sets[0].images, sets[0].labels = sets[0].images[:200], sets[0].labels[:200]
        net = classifier.new_classifier(sets[0], 10, 4, seed)
        classifier.train(net, *sets, epochs=2, batch=50, lr=0.05, cutout=2, seed=seed)
        return {name: tensor.numpy().tobytes() for name, tensor in net.state_dict().items()}
    first = weights(3)
    torch.rand(7)  # whatever else draws random numbers
    assert weights(3) == first
    assert weights(4) != first


def test_learning_rate():
    rates = [classifier.one_cycle(t) for t in np.linspace(0, 1, 101)]
    assert rates[0] == 0 and rates[-1] == 0 and max(rates) == 1 and np.argmax(rates) == 100 * classifier.RAMP
    kinks = np.abs(np.diff(rates, 2)) > 1e-9
    assert kinks.sum() == 1


@pytest.mark.parametrize('flip', [False, True])
def test_augmented_images_are_mirrored_crops(flip):
    """Every result is a crop of the image padded by reflection, or of its mirror image, and all of them occur."""
    size = 8
    image = torch.randint(256, [1, size, size, 3], dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    padded = np.pad(image[0].numpy(), [(1, 1), (1, 1), (0, 0)], mode='reflect')
    crops = {padded[i:i + size, j:j + size].tobytes() for i in range(3) for j in range(3)}
    mirrored = {padded[i:i + size, j:j + size][:, ::-1].tobytes() for i in range(3) for j in range(3)}
    generator = torch.Generator().manual_seed(1)
    x = classifier.augmented(image, torch.zeros([400], dtype=torch.int64), generator, flip, cutout=0)
    assert x.shape == (400, 3, size, size) and x.dtype == torch.uint8
    got = {one.permute(1, 2, 0).numpy().tobytes() for one in x}
    assert got == (crops | mirrored if flip else crops)


def test_cutout_paints_squares():
    white = torch.full([1, 8, 8, 1], 255, dtype=torch.uint8)
    x = classifier.augmented(white, torch.zeros([300], dtype=torch.int64), torch.Generator().manual_seed(0), False, 3)
    painted = x[:, 0] != 255
    rows, columns = painted.any(dim=2).sum(dim=1), painted.any(dim=1).sum(dim=1)
    assert torch.equal(painted.sum(dim=[1, 2]), rows * columns)  # rectangles: squares, cut off at the edge
    assert {*rows.tolist()} == {*columns.tolist()} == {2, 3}
    assert painted.any(dim=0).all()


# -- its file

def test_the_file_gives_what_the_network_gives(halves, trained):
    path, record = trained
    net, detector, images = eager(path), load_detector(str(path)), images_of(halves[1])
    features, probs = detector(images, probs=True)
    with torch.inference_mode():
        torch.testing.assert_close(features, net(images, return_features=True))
        torch.testing.assert_close(probs, net(images))
        torch.testing.assert_close(probs, net(images, no_output_bias=True))
        torch.testing.assert_close(probs.log(), net.logits(images).log_softmax(dim=1))
    assert features.dtype == torch.float32 and features.shape == (len(images), record['features'])
    assert (detector.suffix, detector.has_probs) == ('-digits', True)


def test_the_record_tells_the_file(halves, trained):
    path, record = trained
    assert record['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    test = ImageFolderDataset(halves[1], use_labels=True)
    images, labels = (torch.from_numpy(a) for a in test.batch(range(len(test))))
    right = (load_detector(str(path))(images, probs=True)[1].argmax(dim=1) == labels.argmax(dim=1)).float().mean()
    assert record['accuracy']['test'] == pytest.approx(right.item(), abs=1e-5)
    assert (record['data']['name'], record['data']['images'], record['data']['classes']) == ('train', 1437, 10)
    assert record['test']['sha256'] == hashlib.sha256(halves[1].read_bytes()).hexdigest()
    assert {**record, **{k: SMALL[k] for k in ('width', 'epochs', 'batch', 'lr', 'cutout')}, 'seed': 0} == record
    words = record['command'].split()
    assert words[:3] == ['python', '-m', 'training.classifier']
    options = classifier.main.make_context('classifier', words[3:]).params
    assert {**options, **{k: record[k] for k in ('lr', 'batch', 'seed', 'cutout')}, 'dest': str(path)} == options


def test_the_file_names_no_folder_of_this_machine(trained, root):
    with zipfile.ZipFile(trained[0]) as z:
        assert not any(str(root).encode() in z.read(name) for name in z.namelist())


def test_scores_carry_its_name(halves, trained, tmp_path):
    common = [f'--detector={trained[0]}', '--metrics=fid,is', '--batch=100']
    refs = tmp_path / 'ref.npz'
    runner = click.testing.CliRunner()
    assert runner.invoke(fid.main, ['ref', f'--data={halves[0]}', f'--dest={refs}', *common]).exit_code == 0
    result = runner.invoke(fid.main, ['calc', f'--images={halves[1]}', f'--ref={refs}', '--num=360',
                                      f'--log={tmp_path / "log.jsonl"}', *common])
    assert result.exit_code == 0, result.output
    scores = dict(line.split(': ') for line in result.output.splitlines() if ': ' in line and '-digits' in line)
    assert 'FID' not in result.output and {'FD-digits', 'IS-digits'} <= {*scores}
    assert float(scores['FD-digits']) > 0 and 1 < float(scores['IS-digits']) <= 10


def small_net(channels=3, resolution=16, seed=0):
    """A `Classifier` with random weights and random statistics of its batch norms."""
    torch.manual_seed(seed)
    net = classifier_net.Classifier(resolution, channels, 5, 4, [100.0] * channels, [50.0] * channels)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.eval().requires_grad_(False)


def random_images(n, channels=3, size=16):
    return torch.randint(256, [n, channels, size, size], dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(0))


def test_features_do_not_depend_on_the_batch():
    net, images = small_net(), random_images(7)
    together = net(images, return_features=True)
    apart = torch.cat([net(image[None], return_features=True) for image in images])
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(net(images.flip(0), return_features=True), together.flip(0))


def test_grey_and_colour():
    """A grey image is the same with one channel and three, whichever the network was trained with."""
    grey = random_images(3, channels=1)
    for channels in (1, 3):
        net = small_net(channels)
        torch.testing.assert_close(net.features(grey), net.features(grey.repeat(1, 3, 1, 1)))
    colour = random_images(3)
    same_mean = colour.float().mean(dim=1, keepdim=True)
    torch.testing.assert_close(small_net(1).features(colour), small_net(1).features(same_mean))
    assert not torch.allclose(small_net(3).features(colour), small_net(3).features(colour.flip(1)))


def test_other_sizes():
    net, images = small_net(), random_images(3)
    torch.testing.assert_close(net.fit(images), images.float())
    large = images.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    torch.testing.assert_close(net.fit(large), images.float())
    x = random_images(2, size=32)
    torch.testing.assert_close(net.fit(x), x.float().reshape(2, 3, 16, 2, 16, 2).mean(dim=[3, 5]))
    ramp = (torch.arange(8) * 20).to(torch.uint8).expand(1, 3, 8, 8)  # bilinear keeps a ramp, but for its ends
    torch.testing.assert_close(net.fit(ramp)[0, 0, 5, 1:-1], torch.arange(14) * 10 + 5.0)
    for size in (5, 8, 17, 24, 40):
        assert net.features(random_images(2, size=size)).shape == (2, 32)


@pytest.mark.parametrize('resolution, last', [(8, 4), (12, 6), (15, 7), (16, 4), (28, 7), (32, 4), (64, 8)])
def test_any_resolution(resolution, last):
    x = torch.zeros([1, 3, resolution, resolution])
    assert classifier_net.trunk(3, resolution, 2).eval()(x).shape == (1, 16, last, last)


# -- bad input

def fails(folder, message, *args, **options):
    """Assert that the command ends with one error message and leaves no file in `folder`."""
    result = run(*args, **options)
    refused(result, message)
    assert result.output.count('Error: ') == 1
    assert not [path for path in folder.rglob('*') if path.is_file()] if folder.exists() else True


def one_class(labels):
    return [3] * len(labels)


def vectors(labels):
    return [[float(k)] for k in labels]


@pytest.mark.parametrize('relabel, message', [
    (None, 'bad.zip has no labels, which a classifier learns from; recreate it with dataset_tool.py'),
    (one_class, 'all images of {} are of class 3'),
    (vectors, 'are vectors, not class numbers'),
])
def test_unsuitable_labels(relabel, message, halves, tmp_path):
    bad = write_zip(tmp_path / 'bad.zip', range(40), relabel or one_class, keep_labels=relabel is not None)
    fails(tmp_path / 'out', message.format(bad), bad, halves[1], tmp_path / 'out' / 'a.ts')


def test_null_labels(halves, tmp_path):
    bad = write_zip(tmp_path / 'bad.zip', range(40), keep_labels=False)
    with zipfile.ZipFile(bad, 'a') as z:
        z.writestr('dataset.json', '{"labels": null}')
    fails(tmp_path / 'out', 'bad.zip has no labels', halves[0], bad, tmp_path / 'out' / 'a.ts')


def test_other_classes(halves, tmp_path):
    other = write_zip(tmp_path / 'other.zip', range(100), lambda labels: [label + 1 for label in labels])
    fails(tmp_path / 'out', 'has different classes from', halves[0], other, tmp_path / 'out' / 'a.ts')


def write_images(path, size, channels=3):
    """A labelled folder of two images."""
    path.mkdir()
    for i in range(2):
        PIL.Image.new('RGB' if channels == 3 else 'L', (size, size), i).save(path / f'{i}.png')
    (path / 'dataset.json').write_text(json.dumps({'labels': [['0.png', 0], ['1.png', 1]]}))
    return path


@pytest.mark.parametrize('size, channels, message', [
    (16, 1, 'are 1x8x8 (channels, height, width) but those of'),
    (8, 3, 'are 3x8x8; convert both alike with dataset_tool.py'),
    (4, 1, 'are 4x4 pixels, too small for a classifier; give images of at least 8x8'),
])
def test_other_images(size, channels, message, halves, tmp_path):
    other = write_images(tmp_path / 'other', size, channels)
    fails(tmp_path / 'out', message, halves[0], other, tmp_path / 'out' / 'a.ts')


def test_missing_data(halves, tmp_path):
    fails(tmp_path / 'out', 'there is no folder or zip', tmp_path / 'no.zip', halves[1], tmp_path / 'out' / 'a.ts')


def test_unwritable_destinations(halves, tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'folder.ts').mkdir()
    for dest, message in ((tmp_path / 'file' / 'a.ts', 'could not create the folder'),
                          (tmp_path / 'folder.ts', 'folder.ts cannot be written'),
                          (tmp_path / 'a.json', "a.json doesn't end in .ts or .pt"),
                          (halves[0], "train.zip doesn't end in .ts or .pt")):
        fails(tmp_path / 'folder.ts', message, *halves, dest)


def test_divergence(halves, tmp_path):
    fails(tmp_path / 'out', 'the loss was not finite in epoch 1; give a lower --lr than 1e+30', *halves,
          tmp_path / 'out' / 'a.ts', lr=1e30)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_no_gpu(halves, tmp_path):
    fails(tmp_path / 'out', 'give --device=cpu', *halves, tmp_path / 'out' / 'a.ts', device='cuda')


def test_an_interrupted_training_writes_nothing(halves, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(classifier, 'train', interrupt)
    result = run(*halves, tmp_path / 'a.ts')
    assert result.exit_code != 0 and not [*tmp_path.iterdir()]


def test_a_failed_write_leaves_neither_file(halves, tmp_path, monkeypatch):
    """If something takes the detector's place while it is trained, neither its file nor its record is written."""
    monkeypatch.setattr(classifier, 'train', lambda *args, **kwargs: (tmp_path / 'a.ts').mkdir())
    refused(run(*halves, tmp_path / 'a.ts'), 'could not write', 'a.ts')
    assert [path.name for path in tmp_path.iterdir()] == ['a.ts']


def test_a_loss_that_is_no_number_ends_the_training():
    data = classifier.LabelledImages(random_images(8, 1, 8).permute(0, 2, 3, 1), torch.arange(8) % 2)
    net = classifier.new_classifier(data, 2, 2, seed=0)
    with torch.no_grad():
        net.fc.weight.fill_(math.nan)
    with pytest.raises(UserError, match='not finite in epoch 1'):
        classifier.train(net, data, data, epochs=1, batch=4, lr=0.1)
