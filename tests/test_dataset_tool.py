"""dataset_tool.py: every source, both destinations, and that nothing half-made is left."""

import functools
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import numpy as np
import PIL.Image
import psutil
import pytest
from click.testing import CliRunner

import dataset_tool
from dnnlib import UserError, download
from dnnlib.files import sigterm_exits
from tests.commands import refused, torchrun
from torch_utils.signals import defer_signals
from training import dataset_sources, image_codec
from training.dataset import ImageFolderDataset
from training.dataset_convert import ARCHIVES, TRANSFORMS, check_apart, convert, open_dest
from training.dataset_sources import open_source
from training.workers import Workers


def pixels(seed, w=8, h=8, channels=3):
    shape = [h, w, 3] if channels == 3 else [h, w]
    return np.random.RandomState(seed).randint(256, size=shape, dtype=np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(array).save(path, **options)
    return path


def tool(*args, ok=True):
    """Run the command in this process; returns its output, which must be a single line."""
    result = CliRunner().invoke(dataset_tool.main, [str(a) for a in args])
    assert result.exit_code == (0 if ok else 1), result.output
    assert result.output.count('\n') == 1, result.output
    return result.output


def run(source, dest, *args):
    """Convert in one process and read the dataset back."""
    tool(f'--source={source}', f'--dest={dest}', '--workers=1', *args)
    return ImageFolderDataset(dest)


def fails(source, dest, *args, words=()):
    """Assert that the command ends with a one-line error that contains these words, and leaves no destination."""
    output = tool(f'--source={source}', f'--dest={dest}', '--workers=1', *args, ok=False)
    assert output.startswith('Error: ')
    for word in words:
        assert word in output, output
    assert not os.path.exists(dest)
    assert not [p for p in os.listdir(os.path.dirname(dest) or '.') if p.startswith('.tmp-')]


def labels_of(dest):
    if str(dest).endswith('.zip'):
        with zipfile.ZipFile(dest) as z:
            content = json.loads(z.read('dataset.json'))
    else:
        content = json.loads((dest / 'dataset.json').read_text())
    assert list(content) == ['labels']
    return content['labels']


@pytest.fixture
def folder(tmp_path):
    """Six images in three classes."""
    for i in range(6):
        save(tmp_path / 'src' / 'cab'[i % 3] / f'{i}.png', pixels(i))
    return tmp_path / 'src'


ORDER = [1, 4, 2, 5, 0, 3]  # of the six images above, sorted by name


# Layout of the output


@pytest.mark.parametrize('dest', ['out', 'out.zip', 'deep/er/out.ZIP'])
def test_layout_and_labels_by_folder(folder, tmp_path, dest):
    ds = run(folder, tmp_path / dest)
    for k, i in enumerate(ORDER):
        np.testing.assert_array_equal(ds[k][0], pixels(i).transpose(2, 0, 1))
    names = [f'00000/img{k:08d}.png' for k in range(6)]
    if dest == 'out':
        assert labels_of(tmp_path / dest) == [[n, k // 2] for k, n in enumerate(names)]
    else:
        with zipfile.ZipFile(tmp_path / dest) as z:
            assert z.namelist() == [*names, 'dataset.json']
            assert json.loads(z.read('dataset.json'))['labels'] == [[n, k // 2] for k, n in enumerate(names)]
            for info in z.infolist():
                assert info.compress_type == zipfile.ZIP_STORED and info.external_attr >> 16 == 0o644
                assert info.date_time == (1980, 1, 1, 0, 0, 0)
            png = z.read(names[0])
            assert len(png) > 8 * (8 * 3 + 1)  # stored, not compressed
            assert PIL.Image.open(io.BytesIO(png)).mode == 'RGB'


def test_names_after_a_thousand(tmp_path):
    with zipfile.ZipFile(tmp_path / 'in.zip', 'w') as z:
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels(0, 1, 1, 1)).save(buffer, 'PNG')
        for i in range(1002):
            z.writestr(f'{i}.png', buffer.getvalue())
    run(tmp_path / 'in.zip', tmp_path / 'out')
    assert (tmp_path / 'out' / '00000' / 'img00000999.png').is_file()
    assert sorted(os.listdir(tmp_path / 'out' / '00001')) == ['img00001000.png', 'img00001001.png']
    assert labels_of(tmp_path / 'out') is None
    # Its folders are no classes: its own dataset.json says that it has none.
    run(tmp_path / 'out', tmp_path / 'again.zip')
    assert labels_of(tmp_path / 'again.zip') is None


def test_source_labels_come_first(folder, tmp_path):
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob('*.png'))
    (folder / 'dataset.json').write_text(json.dumps({'labels': [[n, [k, 0.5]] for k, n in enumerate(names)]}))
    run(folder, tmp_path / 'out.zip', '--max-images=4')
    assert [v for _, v in labels_of(tmp_path / 'out.zip')] == [[k, 0.5] for k in range(4)]
    run(tmp_path / 'out.zip', tmp_path / 'again.zip')
    assert (tmp_path / 'again.zip').read_bytes() == (tmp_path / 'out.zip').read_bytes()


def test_one_folder_is_no_class(tmp_path):
    save(tmp_path / 'src' / 'only' / 'a.png', pixels(0))
    assert 'no labels' in tool(f'--source={tmp_path}/src', f'--dest={tmp_path}/out.zip', '--workers=1')
    assert labels_of(tmp_path / 'out.zip') is None


@pytest.mark.parametrize('limit, said', [(2, 'of 1 class\n'), (3, 'of 2 classes\n')])
def test_classes_are_counted(folder, tmp_path, limit, said):
    """--max-images takes the first images in order of their names, perhaps those of one class alone."""
    shown = tool(f'--source={folder}', f'--dest={tmp_path}/out.zip', '--workers=1', f'--max-images={limit}')
    assert shown.endswith(f', with labels {said}')


def test_label_vectors_are_no_classes(tmp_path):
    save(tmp_path / 'src' / 'a.png', pixels(0))
    (tmp_path / 'src' / 'dataset.json').write_text('{"labels": [["a.png", [0.5, 1]]]}')
    assert tool(f'--source={tmp_path}/src', f'--dest={tmp_path}/out.zip', '--workers=1').endswith(', with labels\n')


@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_files_of_other_types_are_counted(tmp_path, kind):
    """Photographs in a format that cannot be read are not left out silently; what is no image goes without saying."""
    src = tmp_path / 'src'
    save(src / 'a.png', pixels(0))
    for name in ('a.HEIC', 'deep/b.heic', 'c.svg', 'notes.txt', 'Thumbs.db', 'LICENSE', 'dataset.json', '.hidden.heic',
                 '__MACOSX/a.heic', '.cache/x.heic', 'odd.j\u00e9', 'a.heic (2)'):
        (src / name).parent.mkdir(exist_ok=True)
        (src / name).write_text('{"labels": null}')
    if kind == 'zip':
        shutil.make_archive(tmp_path / 'src', 'zip', src)
        src = tmp_path / 'src.zip'
    assert tool(f'--source={src}', f'--dest={tmp_path}/out.zip', '--workers=1').endswith(
        ': 1 images of 8x8, 3 channel(s), no labels; 3 file(s) of other types left out (.heic, .svg)\n')


def test_workers_do_not_change_a_byte(tmp_path):
    for i in range(150):
        save(tmp_path / 'src' / f'{i % 2}' / f'{i}.jpg', pixels(i, 20, 16))
    source = open_source(tmp_path / 'src')
    for count in (1, 2, 3):
        with Workers(count) as workers:
            convert(source, tmp_path / f'{count}.zip', 'center-crop', (16, 16), workers=workers)
    assert (tmp_path / '1.zip').read_bytes() == (tmp_path / '2.zip').read_bytes() == (tmp_path / '3.zip').read_bytes()
    (tmp_path / 'src' / '1' / '41.jpg').write_bytes(b'damaged')
    save(tmp_path / 'src' / '0' / '80.jpg', pixels(0, 32, 32))
    messages = []
    for count in (1, 2):
        with pytest.raises(UserError) as e, Workers(count) as workers:
            convert(source, tmp_path / 'bad.zip', workers=workers)
        messages.append(e.value.message)
    assert messages[0] == messages[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ['1.zip', '2.zip', '3.zip', 'src']


def exit_in_a_worker(item):
    """Ends every process but the main one, which is a worker too."""
    if multiprocessing.parent_process() is not None:
        os._exit(3)
    return PIL.Image.new('L', (8, 8), item)


def test_worker_that_dies(tmp_path):
    source = dataset_sources.Source('src', [3] * 200, exit_in_a_worker)
    with pytest.raises(UserError, match='--workers=1'), Workers(2) as workers:
        convert(source, tmp_path / 'out.zip', workers=workers)
    assert os.listdir(tmp_path) == []


def test_without_shared_memory(tmp_path, monkeypatch):
    """A pool of processes needs some for its locks, which not every container has."""
    monkeypatch.setattr('multiprocessing.synchronize.SemLock.__init__', lambda *_, **__: os.stat(tmp_path / 'shm'))
    save(tmp_path / 'src' / 'a.png', pixels(0))
    output = tool(f'--source={tmp_path}/src', f'--dest={tmp_path}/out.zip', '--workers=2', ok=False)
    assert 'could not start worker processes' in output and 'run again with --workers=1' in output


@pytest.mark.skipif(sys.platform != 'linux', reason='names that are no text')
def test_a_destination_that_is_no_utf8(tmp_path):
    """Its name is shown with an escape: an error in the end would pass for a failed conversion."""
    save(tmp_path / 'src' / 'a.png', pixels(0))
    dest = tmp_path / os.fsdecode(b'\xe9.zip')
    assert tool(f'--source={tmp_path}/src', f'--dest={dest}', '--workers=1').startswith(f'{tmp_path}/\\udce9.zip: 1 ')


# Transforms


def test_resize_is_lanczos_of_the_whole_image(tmp_path):
    save(tmp_path / 'src' / 'a.png', pixels(0, 20, 12))
    ds = run(tmp_path / 'src', tmp_path / 'out', '--resolution=16x16')
    expected = PIL.Image.fromarray(pixels(0, 20, 12)).resize((16, 16), PIL.Image.LANCZOS)
    np.testing.assert_array_equal(ds[0][0], np.asarray(expected).transpose(2, 0, 1))


def test_center_crop(tmp_path):
    save(tmp_path / 'src' / 'a.png', pixels(0, 20, 12))
    save(tmp_path / 'src' / 'b.png', pixels(1, 8, 9))
    save(tmp_path / 'src' / 'c.png', pixels(2, 8, 8, 1))
    ds = run(tmp_path / 'src', tmp_path / 'out', '--resolution=8x8', '--transform=center-crop')
    expected = PIL.Image.fromarray(pixels(0, 20, 12)[:, 4:16]).resize((8, 8), PIL.Image.LANCZOS)
    np.testing.assert_array_equal(ds[0][0], np.asarray(expected).transpose(2, 0, 1))
    np.testing.assert_array_equal(ds[1][0], pixels(1, 8, 9)[:8].transpose(2, 0, 1))
    np.testing.assert_array_equal(ds[2][0], np.repeat(pixels(2, 8, 8, 1)[None], 3, 0))


def test_center_crop_wide(tmp_path):
    save(tmp_path / 'src' / 'a.png', pixels(0, 8, 7))      # cut to 8×4, no resizing
    save(tmp_path / 'src' / 'b.png', pixels(1, 6, 8))      # too narrow
    save(tmp_path / 'src' / 'c.png', pixels(2, 16, 7))     # too wide for 2:1
    save(tmp_path / 'src' / 'd.png', pixels(3, 16, 10))    # cut to 16×8, halved
    save(tmp_path / 'src' / 'e.png', pixels(4, 8, 4, 1))   # grey, fits as it is
    args = '--resolution=8x4', '--transform=center-crop-wide'
    ds = run(tmp_path / 'src', tmp_path / 'out', *args)
    assert len(ds) == 3 and ds.image_shape == [3, 8, 8]
    expected = np.zeros([3, 3, 8, 8], np.uint8)
    expected[0, :, 2:6] = pixels(0, 8, 7)[1:5].transpose(2, 0, 1)
    halved = PIL.Image.fromarray(pixels(3, 16, 10)[1:9]).resize((8, 4), PIL.Image.LANCZOS)
    expected[1, :, 2:6] = np.asarray(halved).transpose(2, 0, 1)
    expected[2, :, 2:6] = pixels(4, 8, 4, 1)
    np.testing.assert_array_equal([ds[i][0] for i in range(3)], expected)
    assert '2 too small and left out' in tool(f'--source={tmp_path}/src', f'--dest={tmp_path}/o.zip', *args,
                                              '--workers=1')
    fails(tmp_path / 'src', tmp_path / 'x.zip', '--resolution=64x32', args[1], words=['none of the 5', 'smaller'])


def test_images_that_are_stretched_are_counted(tmp_path):
    """A size without a crop changes the proportions of what is not square; --workers does not matter."""
    for name, size in (('a', (8, 8)), ('b', (16, 8)), ('c', (8, 12))):
        save(tmp_path / 'src' / f'{name}.png', pixels(0, *size))
    said_of = {(): ', 2 of them stretched to a square (--transform=center-crop keeps', ('center-crop',): ''}
    for crop, words in said_of.items():
        said = tool(f'--source={tmp_path}/src', f'--dest={tmp_path}/out.zip', '--resolution=8x8', '--workers=1',
                    *(f'--transform={name}' for name in crop)).split('out.zip: ')[1]
        assert '3 images of 8x8' in said and words in said and bool(words) == ('stretched' in said)


def test_kinds_of_pixels(tmp_path):
    src = tmp_path / 'src'
    grey = pixels(0, channels=1)
    save(src / 'a.png', grey)
    save(src / 'b.png', np.dstack([grey, np.full_like(grey, 255)]))  # LA, opaque
    save(src / 'c.png', np.dstack([grey, np.zeros_like(grey)]))      # LA, transparent
    save(src / 'd.png', grey.astype(np.uint16) * 257)
    ds = run(src, tmp_path / 'out')
    for i, expected in enumerate([grey, grey, np.full_like(grey, 255), grey]):
        np.testing.assert_array_equal(ds[i][0][0], expected)
    rgb = pixels(1)
    alpha = np.zeros([8, 8], np.uint8)
    alpha[:4] = 255
    save(tmp_path / 'rgb' / 'a.png', np.dstack([rgb, alpha]))
    PIL.Image.fromarray(rgb).quantize(8).save(tmp_path / 'rgb' / 'b.png')
    PIL.Image.fromarray(rgb).convert('CMYK').save(tmp_path / 'rgb' / 'c.jpg')
    ds = run(tmp_path / 'rgb', tmp_path / 'out2')
    assert len(ds) == 3 and ds.num_channels == 3
    rgb[4:] = 255
    np.testing.assert_array_equal(ds[0][0], rgb.transpose(2, 0, 1))


# What is refused


@pytest.mark.parametrize('arrays, words', [
    ([pixels(0, 8, 4)], ['b0.png', '8x4', 'not square', '--transform=center-crop']),
    ([pixels(0, 12, 12)], ['b0.png', '12x12', 'power of two', '--resolution']),
    ([pixels(0), pixels(1, 16, 16)], ['b0.png', 'b1.png', '16x16', '--resolution']),
    ([pixels(0), pixels(1, channels=1)], ['b0.png', 'b1.png', 'channel', '--transform']),
])
def test_images_that_do_not_fit(tmp_path, arrays, words):
    for i, array in enumerate(arrays):
        save(tmp_path / 'src' / f'b{i}.png', array)
    fails(tmp_path / 'src', tmp_path / 'out.zip', words=words)
    fails(tmp_path / 'src', tmp_path / 'out', words=words)


@pytest.mark.parametrize('args, words', [
    (['--resolution=0x0'], ['power of two']),
    (['--resolution=24x24'], ['power of two']),
    (['--resolution=32x16'], ['square']),
    (['--resolution=32x16', '--transform=center-crop'], ['square']),
    (['--resolution=16x32', '--transform=center-crop-wide'], ['width']),
    *[([f'--transform={name}'], ['--resolution']) for name in TRANSFORMS],
])
def test_bad_options(folder, tmp_path, args, words):
    fails(folder, tmp_path / 'out.zip', *args, words=words)


@pytest.mark.parametrize('text', ['64', 'axb', '64x', ''])
def test_bad_resolution(folder, tmp_path, text):
    args = f'--source={folder}', f'--dest={tmp_path / "out.zip"}', f'--resolution={text}'
    refused(CliRunner().invoke(dataset_tool.main, args), "'--resolution'", f"'{text}' is not of the form WxH")


def test_bad_sources(tmp_path):
    fails(tmp_path / 'none', tmp_path / 'out', words=['none', '--source'])
    (tmp_path / 'a.tar').write_bytes(b'')
    fails(tmp_path / 'a.tar', tmp_path / 'out', words=['a.tar', 'cifar-10-python.tar.gz', 'zip'])
    (tmp_path / 'b.zip').write_bytes(b'PK')
    fails(tmp_path / 'b.zip', tmp_path / 'out', words=['b.zip', 'not a readable zip'])
    (tmp_path / 'empty').mkdir()
    fails(tmp_path / 'empty', tmp_path / 'out', words=['no images'])


def test_images_beside_class_folders(folder, tmp_path):
    save(folder / 'stray.png', pixels(0))
    fails(folder, tmp_path / 'out', words=['stray.png', 'dataset.json'])


def test_partly_labelled_source(folder, tmp_path):
    (folder / 'dataset.json').write_text('{"labels": [["a/1.png", 0]]}')
    fails(folder, tmp_path / 'out', words=['a/4.png', 'dataset.json'])


def test_destination_in_the_way(folder, tmp_path):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'x').write_bytes(b'x')
    (tmp_path / 'file').write_bytes(b'x')
    (tmp_path / 'dir.zip').mkdir()
    for dest, word in (('full', 'not empty'), ('file', 'is a file'), ('dir.zip', 'is a folder'),
                       ('file/out', 'could not create')):
        assert word in tool(f'--source={folder}', f'--dest={tmp_path / dest}', '--workers=1', ok=False)
    assert os.listdir(tmp_path / 'full') == ['x'] and (tmp_path / 'file').read_bytes() == b'x'
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    assert 'or a broken link' in tool(f'--source={folder}', f'--dest={tmp_path}/link', '--workers=1', ok=False)


def test_an_empty_folder_is_filled(folder, tmp_path):
    """One that is a link as well: it stays one, as a mount point would."""
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'empty')
    assert len(run(folder, tmp_path / 'link')) == 6
    assert (tmp_path / 'link').is_symlink() and sorted(os.listdir(tmp_path / 'empty')) == ['00000', 'dataset.json']
    assert os.listdir(tmp_path / 'empty' / '00000')[0] in [name[6:] for name, _ in labels_of(tmp_path / 'link')]


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError(28, 'No space left on device')])
def test_an_empty_folder_stays_empty_after_a_failure(tmp_path, error):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'empty')
    for name in ('empty', 'link'):
        with pytest.raises(UserError if isinstance(error, OSError) else error), open_dest(tmp_path / name) as add:
            add('00000/a.png', b'x')
            raise error
        assert os.listdir(tmp_path / name) == [] and sorted(os.listdir(tmp_path)) == ['empty', 'link']


@pytest.mark.parametrize('kind', ['zip', 'link', 'folder', 'inside', 'deep inside'])
def test_destination_that_is_the_source(folder, tmp_path, kind):
    """Nothing is replaced by a smaller copy of itself, and no folder is converted twice over."""
    source = {'zip': tmp_path / 'set.zip', 'link': tmp_path / 'set.zip'}.get(kind, folder)
    run(folder, tmp_path / 'set.zip')
    (tmp_path / 'link.zip').symlink_to(tmp_path / 'set.zip')
    dest = {'zip': source, 'link': tmp_path / 'link.zip', 'folder': folder, 'inside': folder / 'out.zip',
            'deep inside': folder / 'a' / 'new' / 'out'}[kind]
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    said = tool(f'--source={source}', f'--dest={dest}', '--workers=1', '--max-images=2', ok=False)
    assert ('inside the source' if 'inside' in kind else 'is the source itself') in said and '--dest' in said
    assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == before


@pytest.mark.parametrize('ending', ARCHIVES)
def test_other_archives_are_not_written(folder, tmp_path, ending):
    fails(folder, tmp_path / f'out{ending.upper()}', words=['kind of archive', '.zip'])


def test_links_to_nothing(folder, tmp_path):
    (folder / 'a' / 'gone.png').symlink_to(tmp_path / 'nowhere.png')
    fails(folder, tmp_path / 'out', words=['a/gone.png', 'is a broken link; remove it'])


def test_old_zip_survives_a_failure(folder, tmp_path):
    dest = tmp_path / 'out.zip'
    run(folder, dest)
    old = dest.read_bytes()
    (folder / 'a' / '7.png').write_bytes(b'damaged')
    assert '7.png' in tool(f'--source={folder}', f'--dest={dest}', '--workers=1', ok=False)
    assert dest.read_bytes() == old


@pytest.mark.parametrize('dest', ['out', 'out.zip'])
@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError(28, 'No space left on device')])
def test_interrupted_writing_leaves_nothing(tmp_path, dest, error):
    with pytest.raises(UserError if isinstance(error, OSError) else error), open_dest(tmp_path / dest) as add:
        add('a.png', b'x')
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform == 'win32', reason='Unix signals')
@pytest.mark.parametrize('end', [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_nothing(tmp_path, root, end):
    for i in range(50):
        save(tmp_path / 'src' / f'{i}.bmp', pixels(i, 1024, 1024))
    process = subprocess.Popen([sys.executable, root / 'dataset_tool.py', f'--source={tmp_path}/src', '--workers=2',
                                f'--dest={tmp_path}/out.zip'], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               # A shell's background jobs ignore SIGINT, and their children inherit that.
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    for _ in range(1000):
        if list(tmp_path.glob('.tmp-*')):
            break
        time.sleep(0.01)
    process.send_signal(end)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + end
    if end == signal.SIGINT:
        assert f'Error: interrupted; nothing was changed at {tmp_path}/out.zip' in errors.decode(), errors
        assert b'Aborted' not in errors and b'Traceback' not in errors
    assert os.listdir(tmp_path) == ['src']


@pytest.mark.skipif(sys.platform == 'win32', reason='Unix signals')
def test_workers_end_with_a_killed_parent(root):
    """`kill -9` leaves no process behind: neither a worker, nor multiprocessing's own, which end with the last one."""
    script = 'import sys, time; from training.workers import Workers; w = Workers(3).__enter__(); ' \
             'next(w.map(len, [[]] * 3)); print("ready", flush=True); time.sleep(600)'
    with subprocess.Popen([sys.executable, '-c', f'if __name__ == "__main__":\n {script}'], cwd=root,
                          stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b'ready\n'
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        assert len(children) == 3 and psutil.wait_procs(children, timeout=30)[1] == []
        assert process.stdout.read() == b''


@pytest.mark.parametrize('number, error', [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_signals_wait_while_a_worker_starts(number, error):
    """They take effect right afterwards; a pool that is interrupted while it starts a process may wait for ever."""
    steps = []
    with sigterm_exits(143), pytest.raises(error):
        with defer_signals():
            signal.raise_signal(number)
            steps.append('started')
        steps.append('went on')
    assert steps == ['started'] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def blocked_signals():
    return signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_signals_do_not_wait_for_ever_after_an_error():
    before = blocked_signals()
    with pytest.raises(RuntimeError), defer_signals():
        raise RuntimeError('no more processes can be started')
    assert signal.pthread_sigmask(signal.SIG_SETMASK, before) == before


def test_signals_wait_outside_the_main_thread():
    """There only the mask can be changed, not the handlers."""
    def inside():
        with defer_signals():
            found.append(blocked_signals())
    found = []
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert signal.SIGINT in found[0]


def test_workers_never_see_ctrl_c_and_end_with_the_block():
    """A terminal sends it to them, too, and each would print a traceback."""
    with Workers(2) as workers:
        ask = functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK)
        blocked = next(workers.map(ask, [[]] * 3))  # the first chunk is another process's
    assert signal.SIGINT in blocked and signal.SIGINT not in blocked_signals()
    assert not multiprocessing.active_children()


def test_few_chunks_are_read_while_one_takes_long():
    """Otherwise a large set would fill the memory."""
    read = []
    chunks = (read.append(i) or (0.3 if i == 0 else 0) for i in range(10_000))
    with Workers(2) as workers:
        next(workers.map(time.sleep, chunks))
    assert len(read) <= 12


# Other sources


def python2_pickle(images, labels):
    """A CIFAR-10 batch as Python 2 wrote it: byte strings and a NumPy array, protocol 2."""
    def text(s):
        return b'U' + bytes([len(s)]) + s

    def binary(b):
        return b'T' + struct.pack('<i', len(b)) + b
    dtype = b'cnumpy\ndtype\n(' + text(b'u1') + b'K\x00K\x01tR(K\x03' + text(b'|') + b'NNNJ\xff\xff\xff\xff' \
        + b'J\xff\xff\xff\xffK\x00tb'
    array = b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t' + text(b'b') + b'tR(K\x01(' \
        + b'M' + struct.pack('<H', len(images)) + b'M\x00\x0ct' + dtype + b'\x89' + binary(images.tobytes()) + b'tb'
    entries = [(b'data', array), (b'labels', b'](' + b''.join(b'K' + bytes([v]) for v in labels) + b'e'),
               (b'batch_label', text(b'training batch 1 of 5'))]
    return b'\x80\x02}(' + b''.join(text(k) + v for k, v in entries) + b'u.'


def cifar_tar(path, batches):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w:gz') as tar:
        for name, data in batches.items():
            info = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def cifar_batches(dump=python2_pickle):
    rnd = np.random.RandomState(0)
    images = rnd.randint(256, size=[5, 3, 3072], dtype=np.uint8)
    labels = rnd.randint(10, size=[5, 3]).tolist()
    files = {f'data_batch_{i + 1}': dump(images[i], labels[i]) for i in range(5)}
    return images.reshape(15, 3, 32, 32), sum(labels, []), {**files, 'test_batch': b'not read', 'readme.html': b''}


def test_hand_made_batch_is_what_python_reads():
    images = np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072)
    batch = pickle.loads(python2_pickle(images, [3, 4]), encoding='bytes')
    np.testing.assert_array_equal(batch[b'data'], images)
    assert batch[b'labels'] == [3, 4]


@pytest.mark.parametrize('dump', [
    python2_pickle,
    *[lambda d, v, p=p: pickle.dumps({b'data': d, b'labels': v}, protocol=p) for p in (2, 3, 4, 5)],
    lambda d, v: pickle.dumps({'data': d, 'labels': v}, protocol=4),
], ids=['python2', 'protocol2', 'protocol3', 'protocol4', 'protocol5', 'text keys'])
def test_cifar10(tmp_path, dump):
    images, labels, files = cifar_batches(dump)
    path = cifar_tar(tmp_path / 'cifar-10-python.tar.gz', dict(reversed(files.items())))
    ds = run(path, tmp_path / 'out.zip')
    np.testing.assert_array_equal([ds[i][0] for i in range(15)], images)
    assert [v for _, v in labels_of(tmp_path / 'out.zip')] == labels


class Evil:
    def __reduce__(self):
        return os.mkdir, ('evil',)


@pytest.mark.parametrize('bad, words', [
    (pickle.dumps(Evil()), ['data_batch_2', 'posix.mkdir']),
    (pickle.dumps({'data': Evil(), 'labels': []}), ['data_batch_2', 'posix.mkdir']),
    (b'cos\nsystem\n(Vecho\ntR.', ['os.system']),
    (pickle.dumps({'data': 3, 'labels': []}), ['not a batch']),
    (pickle.dumps({'data': np.zeros([1, 3072], np.uint8), 'labels': [0, 1]}, protocol=4), ['do not match']),
    (pickle.dumps({'data': np.zeros([1, 3072], np.uint8), 'labels': [10]}, protocol=4), ['do not match']),
    *[(pickle.dumps({'data': np.zeros([8, 3072], np.uint8, order='F'), 'labels': [0] * 8}, protocol=p), ['column'])
      for p in (4, 5)],
    # A text of 1 MB that a short program turns into bytes again and again.
    (b'\x80\x02c_codecs\nencode\nq\0X' + struct.pack('<I', 1 << 20) + b'a' * (1 << 20) +
     b'X\6\0\0\0latin1\x86q\1](' + b'h\0h\1R' * 1500 + b'e.', ['repeats its own content']),
    (b'', ['not a batch']),
    (None, ['lacks', 'data_batch_2']),
])
@pytest.mark.skipif(sys.platform == 'win32', reason='names of functions in os')
def test_cifar10_damaged_or_hostile(tmp_path, monkeypatch, bad, words):
    monkeypatch.chdir(tmp_path)
    _, _, files = cifar_batches()
    files['data_batch_2'] = bad
    path = cifar_tar(tmp_path / 'cifar-10-python.tar.gz', {k: v for k, v in files.items() if v is not None})
    fails(path, tmp_path / 'out', words=[*words, 'cifar-10-python.tar.gz', 'again from https'])
    assert not os.path.exists('evil')


def test_cifar10_cut_off_or_oversized(tmp_path, monkeypatch):
    path = cifar_tar(tmp_path / 'cifar-10-python.tar.gz', cifar_batches()[2])
    with monkeypatch.context() as m:
        m.setattr(dataset_sources, 'MAX_BATCH_BYTES', 1000)
        fails(path, tmp_path / 'out', words=['data_batch_1', 'larger than'])
    path.write_bytes(path.read_bytes()[:20_000])
    fails(path, tmp_path / 'out', words=['not a readable tar.gz'])


def test_cifar10_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    url = 'http://127.0.0.1:9/cifar-10-python.tar.gz'  # nobody listens there
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setattr(dataset_sources, 'CIFAR10_URL', url)
    cached = download.cached_path(url)
    fails('cifar10', tmp_path / 'out.zip', words=[url, 'save it as', str(cached)])
    cifar_tar(cached, cifar_batches()[2])
    fails('cifar10', tmp_path / 'out.zip', words=[str(cached), 'sha256'])
    for name in ('sha256', 'md5'):
        monkeypatch.setattr(dataset_sources, f'CIFAR10_{name.upper()}',
                            hashlib.new(name, cached.read_bytes()).hexdigest())
    assert len(run('cifar10', tmp_path / 'out.zip')) == 15


def test_the_test_half_of_cifar10(tmp_path, monkeypatch):
    """--source=cifar10-test takes test_batch alone, --source=cifar10 all others."""
    images, labels, files = cifar_batches()
    files['test_batch'] = files['data_batch_2']
    path = cifar_tar(tmp_path / 'cifar-10-python.tar.gz', files)
    monkeypatch.setattr(dataset_sources, 'fetch', lambda *args, **kwargs: path)
    assert len(run('cifar10', tmp_path / 'train.zip')) == len(images)
    test = run('cifar10-test', tmp_path / 'test.zip')
    per_batch = len(images) // 5
    np.testing.assert_array_equal([test[i][0] for i in range(len(test))], images[per_batch:2 * per_batch])


def idx(array):
    return gzip.compress(struct.pack(f'>{1 + array.ndim}I', 0x800 + array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def mnist(tmp_path):
    images = np.random.RandomState(0).randint(256, size=[7, 28, 28], dtype=np.uint8)
    labels = np.array([5, 0, 4, 1, 9, 2, 1], np.uint8)
    (tmp_path / 'train-images-idx3-ubyte.gz').write_bytes(idx(images))
    (tmp_path / 'train-labels-idx1-ubyte.gz').write_bytes(idx(labels))
    return tmp_path / 'train-images-idx3-ubyte.gz', images, labels


def test_mnist(mnist, tmp_path):
    path, images, labels = mnist
    ds = run(path, tmp_path / 'out.zip')
    assert ds.image_shape == [1, 32, 32]
    for i in range(7):
        np.testing.assert_array_equal(ds[i][0][0], np.pad(images[i], 2))
    assert [v for _, v in labels_of(tmp_path / 'out.zip')] == labels.tolist()


def test_mnist_damaged(mnist, tmp_path):
    path, images, labels = mnist
    labels_path = tmp_path / 'train-labels-idx1-ubyte.gz'
    for bad, word in ((idx(labels[:5]), '5 labels'), (b'x', 'train-labels'), (idx(images), 'header'), (None, 'beside')):
        if bad is None:
            labels_path.unlink()
        else:
            labels_path.write_bytes(bad)
        fails(path, tmp_path / 'out', words=[word, 'download'])
    labels_path.write_bytes(idx(labels))
    for bad, word in ((idx(images)[:-500], 'train-images'), (idx(images[:, :20]), '28x20'), (b'', 'train-images'),
                      (gzip.compress(gzip.decompress(idx(images))[:-10]), 'ends after'),
                      (gzip.compress(struct.pack('>4I', 0x803, 2**32 - 1, 28, 28)), 'header')):
        path.write_bytes(bad)
        fails(path, tmp_path / 'out', words=[word, 'download'])


def test_lsun(tmp_path):
    lmdb = pytest.importorskip('lmdb')
    path = tmp_path / 'bedroom_train_lmdb'
    with lmdb.open(str(path), map_size=1 << 24) as env, env.begin(write=True) as txn:
        for i, kind in enumerate(['WEBP', 'JPEG', 'WEBP']):
            buffer = io.BytesIO()
            PIL.Image.fromarray(pixels(i, 24, 16)).save(buffer, kind, **({'lossless': True} if i != 1 else {}))
            txn.put(f'key{i}'.encode(), buffer.getvalue())
    ds = run(f'{path}/', tmp_path / 'out.zip', '--transform=center-crop', '--resolution=16x16')
    assert len(ds) == 3 and labels_of(tmp_path / 'out.zip') is None
    np.testing.assert_array_equal(ds[2][0], pixels(2, 24, 16)[:, 4:20].transpose(2, 0, 1))
    with lmdb.open(str(path)) as env, env.begin(write=True) as txn:
        txn.put(b'key3', b'damaged')
    fails(path, tmp_path / 'bad.zip', '--transform=center-crop', '--resolution=16x16',
          words=['key3', 'does not decode'])
    (tmp_path / 'no_lmdb').mkdir()
    fails(tmp_path / 'no_lmdb', tmp_path / 'bad.zip', words=['no_lmdb', 'not a readable LMDB'])


def test_lsun_without_the_package(tmp_path, monkeypatch):
    (tmp_path / 'x_lmdb').mkdir()
    monkeypatch.setitem(sys.modules, 'lmdb', None)
    fails(tmp_path / 'x_lmdb', tmp_path / 'out', words=['pip install lmdb'])


def test_the_command_itself(folder, tmp_path, root):
    """As a script, from another folder, with its default number of processes and no progress bar in a pipe."""
    result = subprocess.run([sys.executable, root / 'dataset_tool.py', '--source=src', '--dest=out.zip'], cwd=tmp_path,
                            capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, '')
    assert result.stdout == 'out.zip: 6 images of 8x8, 3 channel(s), with labels of 3 classes\n'
    assert len(ImageFolderDataset(tmp_path / 'out.zip', use_labels=True)) == 6


def test_part_of_torchruns_environment(folder, tmp_path, monkeypatch):
    """As for the other commands, a rank without a number of ranks is none."""
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    for rank in ('1', ''):
        monkeypatch.setenv('RANK', rank)
        assert 'images of' in tool(f'--source={folder}', f'--dest={tmp_path}/out.zip', '--workers=1')


def test_under_torchrun(folder, tmp_path):
    """The first of two ranks converts, into a folder too; if it fails, so does the job."""
    done = torchrun('dataset_tool.py', f'--source={folder}', f'--dest={tmp_path / "out"}', '--workers=1')
    assert done.stdout.count('6 images of 8x8') == 1
    assert len(ImageFolderDataset(tmp_path / 'out', use_labels=True)) == 6
    done = torchrun('dataset_tool.py', f'--source={folder}', f'--dest={tmp_path / "out"}', '--workers=1', ok=False)
    assert done.returncode != 0 and done.stderr.count('Error: the folder') == 1 and 'is not empty' in done.stderr


@pytest.mark.parametrize('option', ['--source', '--dest'])
def test_empty_paths(option, folder, tmp_path):
    """An empty --source would be the root of the file system."""
    args = f'--source={folder}', f'--dest={tmp_path / "x.zip"}', f'{option}='
    refused(CliRunner().invoke(dataset_tool.main, args), f"'{option}': it is empty")


def test_pixels_of_many_bytes_are_limited_to_half(monkeypatch):
    monkeypatch.setattr(image_codec, 'MAX_PIXELS', 100)
    image_codec.open_image(image_codec.encode_png(PIL.Image.new('RGB', (10, 10))), 'x.png')
    with pytest.raises(UserError, match='10x10 pixels, more than the 50 accepted'):
        image_codec.open_image(image_codec.encode_png(PIL.Image.new('RGBA', (10, 10))), 'x.png')


def test_16_bits_are_rounded_to_the_nearest_8():
    image = PIL.Image.fromarray(np.array([[128, 129, 200, 65535]], np.uint16))
    assert np.asarray(image_codec.open_image(image_codec.encode_png(image), 'x')).tolist() == [[0, 1, 1, 255]]


def test_the_height_of_a_wide_crop_is_rounded():
    """73 pixels wide, 4:3 is 54.75 high: 54 are too few, as in EDM's tool."""
    crop = TRANSFORMS['center-crop-wide']
    assert crop(PIL.Image.new('RGB', (73, 54)), (64, 48)) is None
    assert crop(PIL.Image.new('RGB', (73, 55)), (64, 48)).size == (64, 64)


def test_a_destination_beside_the_source_may_begin_like_it(tmp_path):
    (tmp_path / 'set').mkdir()
    check_apart(tmp_path / 'set', tmp_path / 'set-64x64')
    with pytest.raises(UserError, match='lies inside the source'):
        check_apart(tmp_path / 'set', tmp_path / 'set' / '64x64')


def test_signals_that_wait_already_go_on_waiting():
    with defer_signals():
        with defer_signals():
            pass
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
