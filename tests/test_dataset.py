"""ImageFolderDataset, the embedded set and the endless training order."""

import io
import itertools
import json
import os
import pickle
import re
import shlex
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib import UserError
from tests.commands import invoke
from torch_utils import misc
from torch_utils.misc import InfiniteSampler
from training import image_codec
from training.dataset import EMBEDDED, ImageFolderDataset, load_embedded
from training.image_archive import image_names, open_archive


def picture(seed, size=8, mode='RGB'):
    """A random Pillow image, `size` an int or (width, height)."""
    w, h = (size, size) if isinstance(size, int) else size
    values = np.random.RandomState(seed).randint(256, size=[h, w, 3], dtype=np.uint8)
    return PIL.Image.fromarray(values).convert(mode)


def encoded(image, kind='PNG', **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chw(image):
    return np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)


def write(path, files):
    """Write files {name: bytes} as a zip or, without that ending, as a folder; returns the path."""
    if path.suffix == '.zip':
        with zipfile.ZipFile(path, 'w') as z:
            for name, data in files.items():
                z.writestr(name, data)
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def small_set(count=6, labels=None, **kwargs):
    """{name: bytes} of `count` PNG files, with dataset.json if labels are given."""
    names = [f'00000/img{i:08d}.png' for i in range(count)]
    files = {name: encoded(picture(i, **kwargs)) for i, name in enumerate(names)}
    if labels is not None:
        files['dataset.json'] = json.dumps({'labels': [[n, v] for n, v in zip(names, labels)]}).encode()
    return files


@pytest.fixture(params=['folder', 'set.zip'])
def place(request, tmp_path):
    return tmp_path / request.param


# Items, labels, order


@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_items_are_the_pixels_in_name_order(place, mode):
    files = small_set(mode=mode, labels=[3, 0, 1, 1, 0, 2])
    write(place, dict(reversed(files.items())))
    ds = ImageFolderDataset(place, use_labels=True, cache=True)  # all of EDM's arguments
    c = len(mode)
    assert (len(ds), ds.image_shape, ds.num_channels, ds.resolution) == (6, [c, 8, 8], c, 8)
    assert (ds.label_shape, ds.label_dim, ds.has_labels, ds.has_onehot_labels) == ([4], 4, True, True)
    assert ds.name == place.stem
    for i, label in enumerate([3, 0, 1, 1, 0, 2]):
        image, onehot = ds[i]
        assert image.dtype == np.uint8 and onehot.dtype == np.float32
        np.testing.assert_array_equal(image, chw(picture(i, mode=mode)))
        np.testing.assert_array_equal(onehot, np.eye(4)[label])
        np.testing.assert_array_equal(ds.get_label(i), onehot)
        assert ds.get_details(i).raw_label == label


def test_many_classes_take_no_table_of_all_of_them(tmp_path):
    """An identity matrix of 20,000 classes would be 1.6 GB."""
    ds = ImageFolderDataset(write(tmp_path, small_set(3, labels=[19_999, 0, 7])), use_labels=True)
    tracemalloc.start()
    labels = ds.labels_of_files(np.arange(3))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert labels.shape == (3, 20_000) and labels.dtype == np.float32
    assert labels.argmax(axis=1).tolist() == [19_999, 0, 7] and labels.sum() == 3


def test_labels_off_and_float_labels(place):
    write(place, small_set(3, labels=[[0.5, 1], [2, -1], [0, 0]]))
    ds = ImageFolderDataset(place)
    assert ds.label_dim == 0 and not ds.has_labels and not ds.has_onehot_labels
    assert ds[0][1].shape == (0,) and ds[0][1].dtype == np.float32
    ds = ImageFolderDataset(place, use_labels=True)
    assert ds.label_shape == [2] and not ds.has_onehot_labels
    np.testing.assert_array_equal(ds[1][1], np.float32([2, -1]))


def test_labels_need_not_be_valid_when_unused(place):
    write(place, {**small_set(2), 'dataset.json': b'{'})
    assert len(ImageFolderDataset(place)) == 2


@pytest.mark.parametrize('seed', [5, 5 + (1 << 30)])
def test_max_size_is_the_sorted_random_subset(place, seed):
    """The seed counts modulo 2³¹."""
    write(place, small_set(20, labels=list(range(20))))
    ds = ImageFolderDataset(place, use_labels=True, max_size=7, random_seed=seed + (1 << 31))
    expected = np.arange(20)
    np.random.RandomState(seed).shuffle(expected)
    assert [ds.get_details(i).raw_idx for i in range(len(ds))] == sorted(expected[:7])
    assert ds.label_dim == 20  # of the whole set, whatever the subset
    for i, raw in enumerate(sorted(expected[:7])):
        np.testing.assert_array_equal(ds[i][0], chw(picture(raw)))
        assert ds[i][1].argmax() == raw
    assert len(ImageFolderDataset(place, max_size=50)) == 20


def test_xflip_appends_mirrored_copies(place):
    write(place, small_set(5, labels=[0, 1, 2, 3, 4]))
    ds = ImageFolderDataset(place, use_labels=True, max_size=3, xflip=True)
    assert len(ds) == 6
    for i in range(3):
        np.testing.assert_array_equal(ds[i + 3][0], ds[i][0][:, :, ::-1])
        np.testing.assert_array_equal(ds[i + 3][1], ds[i][1])
        assert (ds.get_details(i).xflip, ds.get_details(i + 3).xflip) == (False, True)
        assert ds.get_details(i).raw_idx == ds.get_details(i + 3).raw_idx
    np.testing.assert_array_equal(ds[-1][0], ds[5][0])
    with pytest.raises(IndexError):
        ds[6]


def test_decoded_images_are_handed_out_as_copies(place, monkeypatch):
    write(place, small_set(4))
    ds = ImageFolderDataset(place, xflip=True)
    ds.use_decoded(np.stack([ds.decode_file(i) for i in range(4)]))
    monkeypatch.setattr(ds._archive, 'read', None)  # nothing is read any more
    for i in range(len(ds)):
        ds[i][0][:] = 0
    np.testing.assert_array_equal(ds[2][0], chw(picture(2)))


def test_other_files_are_ignored(place):
    files = small_set(2)
    noise = {name: b'?' for name in ('__MACOSX/a.png', '.hidden.png', '.git/b.png', 'a.txt', 'c.eps', 'x/.y/d.jpg')}
    write(place, {**files, **noise})
    assert len(ImageFolderDataset(place)) == 2


def test_linked_folders_are_entered(tmp_path):
    """Data sets may be put together from links to folders; a link that leads back to the set does not loop."""
    write(tmp_path / 'far', {'1.png': encoded(picture(1)), 'deep/2.png': encoded(picture(2))})
    write(tmp_path / 'set', {'a/0.png': encoded(picture(0))})
    (tmp_path / 'set' / 'b').symlink_to(tmp_path / 'far')
    (tmp_path / 'far' / 'deep' / 'back').symlink_to(tmp_path / 'set')
    names = image_names(open_archive(tmp_path / 'set'))
    assert names == ['a/0.png', 'b/1.png', 'b/deep/2.png']
    assert ImageFolderDataset(str(tmp_path / 'set')).num_files == 3


def test_name_of_folder_keeps_dots(tmp_path):
    write(tmp_path / 'set-v1.5', small_set(1))
    assert ImageFolderDataset(f'{tmp_path}/set-v1.5/').name == 'set-v1.5'


def test_other_formats_and_kinds(place):
    jpeg = encoded(picture(0), 'JPEG')
    palette = picture(2).quantize(16)
    write(place, {'a.JPG': jpeg, 'b.bmp': encoded(picture(1), 'BMP'), 'c.png': encoded(palette)})
    ds = ImageFolderDataset(place)
    np.testing.assert_array_equal(ds[0][0], chw(PIL.Image.open(io.BytesIO(jpeg))))
    np.testing.assert_array_equal(ds[1][0], chw(picture(1)))
    np.testing.assert_array_equal(ds[2][0], chw(palette.convert('RGB')))


def test_decoders_agree(monkeypatch):
    pytest.importorskip('pyspng')
    for mode in ('L', 'RGB'):
        for options in ({}, {'transparency': 0 if mode == 'L' else (1, 2, 3)}):
            data = encoded(picture(3, (16, 8), mode), **options)
            fast = image_codec.decode(data, 'x.png')
            with monkeypatch.context() as m:
                m.setattr(image_codec, 'pyspng', None)
                np.testing.assert_array_equal(fast, image_codec.decode(data, 'x.png'))
            np.testing.assert_array_equal(fast, chw(picture(3, (16, 8), mode)))


def _batches(ds, context):
    loader = torch.utils.data.DataLoader(ds, batch_size=4, num_workers=2, multiprocessing_context=context)
    return [images for images, _ in loader]


@pytest.mark.filterwarnings('ignore:This process:DeprecationWarning')  # Python 3.12 on forking with threads
@pytest.mark.filterwarnings('ignore:This DataLoader will create:UserWarning')  # on a machine with one core
def test_pickles_and_forks(place):
    write(place, small_set(12, labels=list(range(12))))
    ds = ImageFolderDataset(place, use_labels=True)
    ds[0]
    copy = pickle.loads(pickle.dumps(ds))
    assert len(pickle.dumps(ds)) < 10_000
    np.testing.assert_array_equal(copy[3][0], ds[3][0])
    for context in ('fork', 'spawn') if place.suffix else ('fork',):
        images = torch.cat(_batches(ds, context))
        np.testing.assert_array_equal(images, np.stack([ds[i][0] for i in range(12)]))


# Bad input: one sentence that names the thing and the remedy


def refused(path, *words, **kwargs):
    """Assert that opening or reading the whole set fails with a one-line UserError that contains these words."""
    with pytest.raises(UserError) as e:
        ds = ImageFolderDataset(path, **kwargs)
        for i in range(len(ds)):
            ds[i]
    message = str(e.value.message)
    assert '\n' not in message
    for word in (str(path), *words):
        assert word in message, message
    return message


def test_missing_path(tmp_path):
    refused(tmp_path / 'none.zip', 'there is no', 'dataset_tool.py')


def test_not_a_zip_and_truncated_zip(tmp_path):
    refused(write(tmp_path, {'a.zip': b'hello'}) / 'a.zip', 'not a readable zip', 'dataset_tool.py')
    path = write(tmp_path / 'set.zip', small_set(5))
    path.write_bytes(path.read_bytes()[:-200])
    refused(path, 'not a readable zip')


def test_damaged_member(tmp_path):
    files = small_set(3)
    path = write(tmp_path / 'set.zip', files)
    data = bytearray(path.read_bytes())
    at = data.index(files['00000/img00000001.png']) + 60
    data[at] ^= 0xff
    path.write_bytes(data)
    refused(path, 'img00000001.png', 'CRC')


def test_no_images(place):
    refused(write(place, {'a.txt': b'x'}), 'no images', 'PNG or JPEG')


@pytest.mark.parametrize('odd', [{'size': 16}, {'mode': 'L'}])
@pytest.mark.parametrize('kind', ['PNG', 'BMP'])
def test_mixed_sizes_or_channels_name_both(place, odd, kind):
    end = kind.lower()
    files = {f'a.{end}': encoded(picture(0), kind), f'b.{end}': encoded(picture(1, **odd), kind)}
    refused(write(place, files), f'a.{end}', f'b.{end}', 'dataset_tool.py')


@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_mixed_png_in_zip_is_found_at_construction(tmp_path, compression):
    """Uncompressed files without zipfile's checks: they take most of the time to open a large zip."""
    path = tmp_path / 'set.zip'
    path.write_bytes(b'in front of the zip')
    with zipfile.ZipFile(path, 'a', compression) as z:
        for name, data in {**small_set(5), 'z.png': encoded(picture(0, 16))}.items():
            z.writestr(name, data)
    archive = open_archive(path)
    assert archive.head('z.png', 24) == archive.read('z.png')[:24]
    with pytest.raises(UserError, match='z.png'):
        ImageFolderDataset(path)


def test_not_square_and_wrong_resolution(place):
    refused(write(place, small_set(1, size=(8, 4))), '8x4', 'center-crop')
    place = write(place.with_name('b' + place.name), small_set(1))
    refused(place, '8x8', '--resolution=16x16', resolution=16)
    assert ImageFolderDataset(place, resolution=8).resolution == 8


def test_the_command_that_crops_is_complete(tmp_path):
    """The command that the message quotes runs as it is, and its images can be trained on."""
    folder = tmp_path / 'my photos'
    for i, (w, h) in enumerate(((40, 25), (30, 50))):
        folder.mkdir(exist_ok=True)
        PIL.Image.new('RGB', (w, h)).save(folder / f'{i}.jpg')
    with pytest.raises(UserError) as e:
        ImageFolderDataset(folder)
    program, script, *words = shlex.split(re.search('`(.*)`', str(e.value))[1])
    assert (program, script) == ('python', 'dataset_tool.py')
    out = invoke(script, *words)
    assert out.exit_code == 0, out.output
    assert ImageFolderDataset(tmp_path / 'my photos-16x16.zip').image_shape == [3, 16, 16]


@pytest.mark.parametrize('more', [{}, {'dataset.json': b'{"labels": null}'}])
def test_labels_missing(place, more):
    """Asking for labels that are not there gives none, as in EDM; train.py --cond=1 refuses such a set."""
    ds = ImageFolderDataset(write(place, {**small_set(2), **more}), use_labels=True)
    assert not ds.has_labels and ds.label_dim == 0 and ds[1][1].shape == (0,)


def test_label_missing_for_one_image(place):
    refused(write(place, {**small_set(3), **{'x.png': encoded(picture(9))},
                          'dataset.json': small_set(3, labels=[0, 1, 2])['dataset.json']}), 'x.png', use_labels=True)


NAME = '00000/img00000000.png'


@pytest.mark.parametrize('content, words', [
    (b'{"labels": ', 'not valid JSON'),
    (b'\xff\xfe\x00', 'not valid JSON'),
    (b'[' * 200_000, 'not valid JSON'),
    (b'[]', '"labels"'),
    (b'{}', '"labels"'),
    (b'{"labels": 3}', 'neither a list nor null'),
    (b'{"labels": [3]}', 'entry 0'),
    (f'{{"labels": [["{NAME}"]]}}'.encode(), 'entry 0'),
    (f'{{"labels": [["{NAME}", 0, 1]]}}'.encode(), 'entry 0'),
    *[(f'{{"labels": [["{NAME}", {bad}]]}}'.encode(), NAME) for bad in (
        '-1', '1.5', 'true', 'null', '"0"', '[]', '[[0]]', '[NaN]', '[1e39]', '99999999999', '{"a": 1}')],
    (f'{{"labels": [["{NAME}", 1], ["00000/img00000001.png", [1.0]]]}}'.encode(), 'differ in length or kind'),
    (f'{{"labels": [["{NAME}", [1, 2]], ["00000/img00000001.png", [1.0]]]}}'.encode(), 'differ in length or kind'),
])
def test_bad_labels(tmp_path, content, words):
    path = write(tmp_path / 'set.zip', {**small_set(2), 'dataset.json': content})
    refused(path, 'dataset.json', words, 'dataset_tool.py', use_labels=True)


@pytest.mark.parametrize('data', [
    b'', b'not an image', encoded(picture(0))[:-30], encoded(picture(0), 'JPEG')[:300], b'%!PS-Adobe-3.0 EPSF-3.0\n',
    encoded(picture(0))[:20]], ids=['empty', 'text', 'short png', 'short jpeg', 'postscript', 'no header'])
@pytest.mark.parametrize('end', ['png', 'jpg'])
def test_undecodable_image(place, data, end):
    write(place, {'a.png': encoded(picture(1)), f'b.{end}': data})
    refused(place, f'b.{end}', 'does not decode', 'remove it')


def _huge_png(width, height):
    def chunk(kind, body):
        return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b''))


@pytest.mark.parametrize('spng', [True, False])
@pytest.mark.parametrize('size', [(10_000, 10_000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_image_of_insane_size_is_refused_by_its_header(tmp_path, monkeypatch, spng, size):
    if not spng:
        monkeypatch.setattr(image_codec, 'pyspng', None)
    refused(write(tmp_path / 'set', {'a.png': _huge_png(*size)}), 'a.png', 'accepted', 'remove it')


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'I;16', 'P'])
def test_kinds_that_would_lose_something(place, mode):
    options = {}
    if mode == 'I;16':
        image = PIL.Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    elif mode == 'P':
        image, options = picture(0).quantize(16), {'transparency': 3}
    else:
        image = picture(0, mode=mode)
    refused(write(place, {'a.png': encoded(image, **options)}), 'a.png', mode[0], 'dataset_tool.py')


def test_empty_subset(place):
    with pytest.raises(UserError, match='at least 1'):
        ImageFolderDataset(write(place, small_set(2)), max_size=0)


# The embedded set


def test_embedded_digits():
    ds = load_embedded()
    assert (len(ds), ds.image_shape, ds.label_dim, ds.name) == (1797, [1, 8, 8], 10, 'digits-8x8')
    classes = [int(ds.get_label(i).argmax()) for i in range(len(ds))]
    assert np.bincount(classes).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    levels = {round(v * 255 / 16) for v in range(17)}
    assert set(np.unique(np.stack([ds[i][0] for i in range(0, 1797, 20)])).tolist()) == levels
    assert ImageFolderDataset(EMBEDDED).label_dim == load_embedded(use_labels=False).label_dim == 0


def test_embedded_digits_are_scikit_learns():
    datasets = pytest.importorskip('sklearn.datasets')
    digits = datasets.load_digits()
    ds = load_embedded()
    images = np.stack([ds[i][0][0] for i in range(len(ds))])
    np.testing.assert_array_equal(images, np.rint(digits.images * 255 / 16))
    assert [int(ds.get_label(i).argmax()) for i in range(len(ds))] == digits.target.tolist()


# The endless order


def test_sampler_gives_the_recorded_order(root):
    records = json.loads((root / 'tests' / 'golden' / 'infinite_sampler.json').read_text())
    assert len(records) >= 8
    for key, expected in records.items():
        n, rep, rank, seed, win = [part.lstrip('nrepakswdi') for part in key.split('-')]
        sampler = InfiniteSampler(range(int(n)), rank=int(rank), num_replicas=int(rep), seed=int(seed),
                                  window_size=float(win))
        assert list(itertools.islice(sampler, len(expected))) == expected, key
        for start in (1, 17, 40):
            sampler.start_idx = start
            assert list(itertools.islice(sampler, len(expected) - start)) == expected[start:], (key, start)


def test_sampler_ranks_share_one_order():
    def take(count, **kwargs):
        return list(itertools.islice(InfiniteSampler(range(101), seed=4, **kwargs), count))
    whole = take(600)
    for rank in range(3):
        assert take(200, rank=rank, num_replicas=3) == whole[rank::3]
    assert take(100, rank=1, num_replicas=3, start_idx=100) == whole[301::3]  # each rank is 100 samples in
    assert take(300, start_idx=300) == whole[300:]


def test_sampler_without_shuffling():
    sampler = InfiniteSampler(range(5), shuffle=False, start_idx=3)
    assert list(itertools.islice(sampler, 8)) == [3, 4, 0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize('n', [2, 7, 1000])
def test_sampler_is_the_plain_one_drawn_in_bulk(n, monkeypatch):
    monkeypatch.setattr(misc, 'CHUNK', 10)

    def plain(seed):
        rnd = np.random.RandomState(seed)
        order, window = np.arange(n), round(n * 0.5)
        rnd.shuffle(order)
        for idx in itertools.count():
            i = idx % n
            yield order[i]
            if window >= 2:
                j = (i - rnd.randint(window)) % n
                order[i], order[j] = order[j], order[i]
    expected = list(itertools.islice(plain(9), 2500))
    for start in (0, 9, 10, 11, 2345):
        sampler = InfiniteSampler(range(n), seed=9, start_idx=start)
        assert list(itertools.islice(sampler, 2500 - start)) == expected[start:]


@pytest.mark.parametrize('kwargs', [{'rank': 1}, {'rank': -1}, {'window_size': 1.5}, {'start_idx': -1}])
def test_sampler_refuses_bad_arguments(kwargs):
    with pytest.raises(ValueError):
        InfiniteSampler(range(3), **kwargs)
    with pytest.raises(ValueError):
        InfiniteSampler([])


@pytest.mark.parametrize('offset', [2 ** 32, 2 ** 63])
def test_a_zip_whose_directory_points_nowhere(tmp_path, offset):
    path = tmp_path / 'set.zip'
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('a.png', encoded(picture(0)))
        z.filelist[0].header_offset = offset
    refused(path, 'could not read a.png in', 'copy the zip again')


def test_a_forked_process_opens_the_zip_for_itself(monkeypatch):
    """With one file position for both, one would read in the middle of what the other asked for.

    The directory stays: of a million images, reading it takes a minute and 0.6 GB in each data worker.
    """
    archive = open_archive(EMBEDDED)
    directory = archive._open().NameToInfo
    with archive._open().fp as inherited:
        assert archive._open().fp is inherited
        monkeypatch.setattr(os, 'getpid', lambda: 1)
        assert archive._open().fp is not inherited and archive._open().NameToInfo is directory


def test_indices_may_be_tensors():
    """As from torch.randperm, which PyTorch's Subset passes on."""
    embedded = load_embedded()
    image, label = embedded[torch.tensor(-1)]
    assert np.array_equal(image, embedded[len(embedded) - 1][0]) and np.array_equal(label, embedded.get_label(-1))
    subset = torch.utils.data.Subset(embedded, torch.tensor([5, 3]))
    assert np.array_equal(subset[1][0], embedded[3][0])
    assert np.array_equal(embedded.get_label(torch.tensor(3)), embedded[3][1])
