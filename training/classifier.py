"""Train a small classifier to score images where Inception is not available; its scores are FD and IS, never FID.

    python -m training.classifier --data=datasets/cifar10-32x32.zip --test=datasets/cifar10-test-32x32.zip \\
        --dest=detectors/cifar.ts
    python fid.py ref --data=datasets/cifar10-32x32.zip --dest=cifar.npz --detector=detectors/cifar.ts --metrics=fid,is

With this detector and reference, `fid.py calc` prints FD-cifar and IS-cifar, after the name of the file.
"""

import copy
import dataclasses
import hashlib
import json
import math
import os
import platform
import shlex
import time

import click
import numpy as np
import torch

from dnnlib import UserError
from dnnlib.files import atomic_write, check_appendable, file_sha256, make_dirs
from dnnlib.flags import NumberRange, Tool
from dnnlib.text import format_time
from training.acceleration import check_compiler
from training.classifier_net import MIN_RESOLUTION, Classifier, script_bytes
from training.dataset import ImageFolderDataset
from training.metric_images import image_batches
from training.provenance import code_version, hardware

DEVICES = ('auto', 'cpu', 'cuda')
ENDINGS = ('.ts', '.pt')
LR_PER_IMAGE = 0.4 / 512  # peak learning rate, per image of a batch
RAMP = 0.2  # share of the training that is learning-rate warm-up
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.1
CROP = 1 / 8  # largest shift of a random crop, as a share of the resolution
STATISTICS_IMAGES = 2000  # from which the pixels' mean and standard deviation are taken
EVAL_BATCH = 1000
LOAD_BATCH = 500


# -- data

@dataclasses.dataclass
class LabelledImages:
    """A data set in memory.

    Attributes:
        images: uint8 [N, H, W, C]: channels last, since a pixel's channels always move together.
        labels: Class numbers, int64 [N].
    """
    images: torch.Tensor
    labels: torch.Tensor

    def to(self, device):
        """The same data on a device."""
        return LabelledImages(self.images.to(device), self.labels.to(device))


def open_labelled(path):
    """Open an ImageFolderDataset of images with class numbers.

    Raises:
        UserError: no labels, label vectors, images too small, or whatever ImageFolderDataset finds wrong.
    """
    dataset = ImageFolderDataset(path, use_labels=True)
    if not dataset.has_labels:
        raise UserError(f'{path} has no labels, which a classifier learns from; recreate it with dataset_tool.py from '
                        'a labelled source')
    if not dataset.has_onehot_labels:
        raise UserError(f'the labels of {path} are vectors, not class numbers; give a data set whose dataset.json has '
                        'a class number for every image')
    if dataset.resolution < MIN_RESOLUTION:
        raise UserError(f'the images of {path} are {dataset.resolution}x{dataset.resolution} pixels, too small for a '
                        f'classifier; give images of at least {MIN_RESOLUTION}x{MIN_RESOLUTION}')
    return dataset


def check_alike(train, test):
    """Raise UserError unless two data sets have the same kind of images and the same classes, at least two."""
    kinds = [f'{d.num_channels}x{d.resolution}x{d.resolution}' for d in (train, test)]
    if kinds[0] != kinds[1]:
        raise UserError(f'the images of {train.path} are {kinds[0]} (channels, height, width) but those of {test.path} '
                        f'are {kinds[1]}; convert both alike with dataset_tool.py')
    classes = [np.unique(class_numbers(d)) for d in (train, test)]
    if len(classes[0]) < 2:
        raise UserError(f'all images of {train.path} are of class {classes[0][0]}, so there is nothing to tell apart; '
                        'give a data set with at least two classes')
    if not np.array_equal(*classes):
        raise UserError(f'{test.path} has different classes from {train.path} (such as class '
                        f'{np.setxor1d(*classes)[0]}, which only one of them has); give the test half of the same '
                        'data set')


def class_numbers(dataset):
    """Class numbers int64 [N] of a dataset with one-hot labels."""
    raw_idx, _ = dataset.locate(range(len(dataset)))
    return dataset.labels_of_files(raw_idx).argmax(axis=1)


def load_labelled(dataset):
    """`LabelledImages` of a dataset, on the CPU."""
    images = torch.empty([len(dataset), dataset.resolution, dataset.resolution, dataset.num_channels],
                         dtype=torch.uint8)
    start = 0
    for batch in image_batches(dataset, range(len(dataset)), LOAD_BATCH):
        images[start:start + len(batch)] = batch.permute(0, 2, 3, 1)
        start += len(batch)
    return LabelledImages(images, torch.from_numpy(class_numbers(dataset)))


def augmented(images, indices, generator, flip, cutout):
    """Randomly shifted and flipped images with a random square painted over: uint8 [B, C, H, W], channels last.

    Beyond its edge an image is mirrored. The square is mid-grey, and its centre is anywhere in the image.

    Args:
        images: uint8 [N, H, W, C].
        indices: int64 [B], which images; on the same device, as is `generator`.
        flip: Whether to flip each with probability ½.
        cutout: Side of the square in pixels, 0 for none.
    """
    b, size, device = len(indices), images.shape[1], images.device
    reach = max(int(size * CROP), 1)
    where = torch.arange(size, device=device)

    def integers(low, high):
        return torch.randint(low, high, [b, 1], generator=generator, device=device)

    def moved(shift):
        position = (where + shift).abs()
        return size - 1 - (size - 1 - position).abs()

    rows, columns = moved(integers(-reach, reach + 1)), moved(integers(-reach, reach + 1))
    if flip:
        columns = torch.where(integers(0, 2).bool(), columns.flip(1), columns)
    x = images[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
    if cutout:
        low, high = (cutout - 1) // 2, cutout // 2
        near = [((where >= centre - low) & (where <= centre + high)) for centre in
                (integers(0, size), integers(0, size))]
        x = x.masked_fill((near[0][:, :, None] & near[1][:, None, :])[..., None], 127)
    return x.permute(0, 3, 1, 2)


# -- training

def one_cycle(t):
    """Learning rate as a share of its peak at t ∈ [0, 1] of the training: linearly up, then linearly down."""
    return min(t / RAMP, (1 - t) / (1 - RAMP))


def new_classifier(data, num_classes, width, seed):
    """A `Classifier` for `LabelledImages`, its weights drawn with `seed`; still on the CPU."""
    stride = math.ceil(len(data.images) / STATISTICS_IMAGES)
    pixels = data.images[::stride].flatten(0, 2).to('cpu', torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(data.images.shape[1], data.images.shape[3], num_classes, width, pixels.mean(dim=0),
                          pixels.std(dim=0).clamp(min=1))


@torch.no_grad()
def accuracy(net, data):
    """Share of `LabelledImages` that a `Classifier` on the same device, set to evaluation mode, gets right."""
    net.eval()
    right = 0
    for start in range(0, len(data.labels), EVAL_BATCH):
        images = data.images[start:start + EVAL_BATCH].permute(0, 3, 1, 2)
        right += (net.logits(images).argmax(dim=1) == data.labels[start:start + EVAL_BATCH]).sum().item()
    return right / len(data.labels)


def train(net, data, test, epochs, batch, lr, flip=True, cutout=0, seed=0):
    """Train a `Classifier` on its device; on the CPU the same seed and number of threads give the same weights.

    SGD with Nesterov momentum and a one-cycle learning rate (Smith 2018); on a GPU in bfloat16 and compiled. A line
    per epoch shows the loss and running accuracy on the augmented images, and the accuracy on the test images.

    Args:
        net: On the same device as the data.
        data, test: `LabelledImages`; `test` is only scored.
        batch: Images per step, at most all; an epoch's incomplete last batch is dropped.
        lr: Peak learning rate.
        flip, cutout: As for `augmented`.

    Raises:
        UserError: the loss is no longer finite.
    """
    device = data.images.device
    cuda = device.type == 'cuda'
    steps = len(data.labels) // batch
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator(device).manual_seed(seed)
    logits_of = compiled(net) if cuda else net.logits
    began = time.monotonic()
    for epoch in range(epochs):
        epoch_began = time.monotonic()
        net.train()
        order = torch.randperm(len(data.labels), generator=generator, device=device)
        total_loss, right = torch.zeros([], device=device), torch.zeros([], device=device)
        for step in range(steps):
            for group in optimizer.param_groups:
                group['lr'] = lr * one_cycle((epoch * steps + step + 1) / (epochs * steps + 1))
            indices = order[step * batch:(step + 1) * batch]
            images, labels = augmented(data.images, indices, generator, flip, cutout), data.labels[indices]
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                logits = logits_of(images)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total_loss += loss.detach()
            right += (logits.detach().argmax(dim=1) == labels).sum()
        mean_loss = total_loss.item() / steps
        if not math.isfinite(mean_loss):
            raise UserError(f'the loss was not finite in epoch {epoch + 1}; give a lower --lr than {lr:g}')
        speed = steps * batch / (time.monotonic() - epoch_began)
        print(f'epoch {epoch + 1:>3d}/{epochs}  loss {mean_loss:.4f}  train {right.item() / steps / batch:7.2%}  '
              f'test {accuracy(net, test):7.2%}  {speed:8.0f} images/s  time {format_time(time.monotonic() - began)}',
              flush=True)


def compiled(net):
    """`net.logits` compiled, or uncompiled where that is impossible."""
    try:
        check_compiler(next(net.parameters()).device)
    except UserError:
        print('Training without torch.compile, which does not work here.')
        return net.logits
    return torch.compile(net.logits, dynamic=False)


# -- the command

def find_device(name):
    """The torch.device for a name in DEVICES."""
    if name == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device=cuda needs a GPU, and PyTorch finds none here; give --device=cpu')
    return torch.device('cuda' if name != 'cpu' and torch.cuda.is_available() else 'cpu')


def prepare_destination(dest):
    """Create the folder of the detector `dest`; returns the path of the record beside it.

    Raises:
        UserError: an ending that is not in ENDINGS, or one of the two files cannot be written.
    """
    stem, ending = os.path.splitext(dest)
    if ending not in ENDINGS:
        raise UserError(f"--dest={dest} doesn't end in {' or '.join(ENDINGS)}; give the name of a TorchScript file, "
                        'such as detectors/cifar.ts')
    record = f'{stem}.json'
    make_dirs(os.path.dirname(os.path.abspath(dest)))
    for path in (dest, record):
        check_appendable(path)
    return record


def describe_data(dataset):
    """What the record says about a data set."""
    return dict(name=dataset.name, images=len(dataset), resolution=dataset.resolution, channels=dataset.num_channels,
                classes=dataset.label_dim, sha256=file_sha256(dataset.path) if os.path.isfile(dataset.path) else None)


def write_detector(dest, record_path, net, record):
    """Write the detector and its record, or neither."""
    content = script_bytes(copy.deepcopy(net).to('cpu', memory_format=torch.contiguous_format))
    record = {**record, 'sha256': hashlib.sha256(content).hexdigest()}
    with atomic_write(record_path, 'w') as r, atomic_write(dest) as f:
        f.write(content)
        r.write(json.dumps(record, indent=2) + '\n')
        r.flush()  # so that a full disk shows before either file is renamed


@click.command(cls=Tool)
@click.option('--data', metavar='PATH|ZIP', required=True, help='Labelled images to learn from')
@click.option('--test', metavar='PATH|ZIP', required=True, help='Labelled images to test on')
@click.option('--dest', metavar='TS', required=True, help='TorchScript file to write, with a record beside it as .json')
@click.option('--epochs', metavar='INT', type=click.IntRange(min=1), default=30, help='Passes over the images')
@click.option('--batch', metavar='INT', type=click.IntRange(min=2), default=512, help='Images per step')
@click.option('--lr', metavar='FLOAT', type=NumberRange(min=0, min_open=True), default=None,
              help=f'Peak learning rate  [default: {LR_PER_IMAGE * 512:g}·batch/512]')
@click.option('--width', metavar='INT', type=click.IntRange(min=1), default=64,
              help='Channels of the first layer; there are 8 times as many features')
@click.option('--flip', metavar='BOOL', type=bool, default=True, help='Flip images at random; not for digits')
@click.option('--cutout', metavar='INT', type=click.IntRange(min=0), default=None,
              help="Side of the random square that is painted over; 0: none  [default: a quarter of the image's]")
@click.option('--seed', metavar='INT', type=click.IntRange(min=0), default=0, help='Random seed')
@click.option('--device', type=click.Choice(DEVICES), default=DEVICES[0], help='Where to train')
def main(data, test, dest, device, seed, width, batch, lr, cutout, **options):
    """Train a small image classifier and write it as a detector for fid.py --detector=TS.

    For 16x16 images on the CPU: --width=24 --epochs=10 --batch=128 --cutout=0 (a quarter of an hour).
    """
    began = time.monotonic()
    sets = [open_labelled(path) for path in (data, test)]
    check_alike(*sets)
    found = find_device(device)
    record_path = prepare_destination(dest)
    batch = min(batch, len(sets[0]))
    options.update(batch=batch, lr=lr or LR_PER_IMAGE * batch, seed=seed,
                   cutout=sets[0].resolution // 4 if cutout is None else cutout)
    print(f'Loading {len(sets[0])} images of {data} and {len(sets[1])} of {test} ...', flush=True)
    loaded = [load_labelled(dataset).to(found) for dataset in sets]
    net = new_classifier(loaded[0], sets[0].label_dim, width, seed).to(found, memory_format=torch.channels_last)
    try:
        train(net, *loaded, **options)
    except torch.OutOfMemoryError as e:
        raise UserError(f'the GPU has too little free memory for --batch={batch} and --width={width}; give smaller '
                        'ones') from e
    scores = {half: round(accuracy(net, d), 6) for half, d in zip(('train', 'test'), loaded)}
    given = dict(data=data, test=test, dest=dest, width=width, **options, device=device)
    record = dict(accuracy=scores, data=describe_data(sets[0]), test=describe_data(sets[1]),
                  features=net.fc.in_features, width=width, **options, command=command_line(given),
                  device=hardware(found), threads=torch.get_num_threads(), seconds=round(time.monotonic() - began, 1),
                  torch=torch.__version__, python=platform.python_version(), commit=code_version())
    write_detector(dest, record_path, net, record)
    print(f'Wrote {dest}: {scores["test"]:.2%} of the test images right, {scores["train"]:.2%} of the training images.')


def command_line(options):
    """The command with all its options, as typed."""
    return 'python -m training.classifier ' + shlex.join(f'--{name}={value}' for name, value in options.items())


if __name__ == '__main__':
    main()
