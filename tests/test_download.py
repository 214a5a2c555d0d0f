"""dnnlib.download against a server on this machine, and dnnlib.files on a full disk."""

import errno
import gzip
import hashlib
import http.server
import io
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from dnnlib import UserError, download
from dnnlib.download import cache_dir, fetch, is_url, local_path
from dnnlib.files import ABANDONED_SEC, Tee, atomic_write, check_writable, make_dirs, remove_temporary_files

BODY = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(BODY).hexdigest()
MD5 = hashlib.md5(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers according to the path that is asked for."""

    requests = []

    def do_GET(self):
        Handler.requests.append(self.path)
        getattr(self, 'answer_' + self.path.split('/')[1].split('.')[0])()

    def log_message(self, *args):
        pass

    def send(self, code=200, body=BODY, **headers):
        self.send_response(code)
        for name, value in {'Content_Length': str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        self.wfile.write(body)

    def answer_ok(self):
        self.send()

    def answer_slow(self):
        time.sleep(0.2)
        self.send()

    def answer_missing(self):
        self.send(404)

    def answer_cut(self):
        self.send(body=BODY[:5000], Content_Length=str(len(BODY)))

    def answer_html(self):
        self.send(body=b'<html></html>', Content_Type='text/html; charset=utf-8')

    def answer_unsized(self):
        self.send(Content_Length=None)

    def answer_oddsized(self):
        self.send(Content_Length='many')

    def answer_encoded(self):  # as some servers describe a .gz file
        self.send(body=gzip.compress(BODY, mtime=0), Content_Encoding='x-gzip')

    def answer_away(self):
        self.send(302, b'', Location='http://example.invalid/ok.bin')

    def answer_hop(self):
        self.send(302, b'', Location='/ok.bin')


@pytest.fixture(scope='module')
def server():
    """Address of the server."""
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as s:
        thread = threading.Thread(target=s.serve_forever, kwargs={'poll_interval': 0.02})
        thread.start()
        yield f'http://127.0.0.1:{s.server_port}'
        s.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of its own for each test; proxies do not apply to this machine."""
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setenv('NO_PROXY', '127.0.0.1,localhost')
    Handler.requests.clear()
    return tmp_path / 'cache'


def refused(url, cache, *words, **kwargs):
    """Assert that fetching fails with a one-line UserError that contains these words, and leaves no file."""
    with pytest.raises(UserError) as e:
        fetch(url, timeout=5, **kwargs)
    assert '\n' not in e.value.message
    for word in (url, *words):
        assert word in e.value.message, e.value.message
    assert not cache.exists() or list(cache.iterdir()) == []


def test_fetches_once(server, cache):
    url = f'{server}/ok.bin'
    path = fetch(url, sha256=SHA256.upper(), md5=MD5)
    assert path.read_bytes() == BODY and path.name.endswith('-ok.bin')
    assert fetch(url) == local_path(url) == path
    assert Handler.requests == ['/ok.bin']
    assert os.listdir(cache) == [path.name]
    assert fetch(f'{server}/ok.bin?v=2') != path


@pytest.mark.parametrize('name', ['unsized.bin', 'oddsized.bin', 'hop.bin'])
def test_unusual_but_complete_answers(server, name):
    assert fetch(f'{server}/{name}', sha256=SHA256).read_bytes() == BODY


def test_a_gz_file_stays_as_it_is(server):
    assert gzip.decompress(fetch(f'{server}/encoded.gz').read_bytes()) == BODY


def test_bad_answers(server, cache):
    refused(f'{server}/missing.bin', cache, '404', str(cache))
    refused(f'{server}/cut.bin', cache, 'cut off', 'try again')
    refused(f'{server}/html.bin', cache, 'web page')
    refused(f'{server}/ok.bin', cache, 'sha256', SHA256, '0' * 64, sha256='0' * 64)
    refused(f'{server}/ok.bin', cache, 'md5', MD5, md5='0' * 32)
    refused(f'{server}/ok.bin', cache, 'larger than', max_bytes=len(BODY) - 1)
    refused(f'{server}/unsized.bin', cache, 'larger than', max_bytes=len(BODY) - 1)


def test_no_server(server, cache):
    refused('http://127.0.0.1:9/x.bin', cache, 'could not download', 'check the connection', str(cache))


@pytest.mark.parametrize('url', ['http://example.com/x', 'http://127.0.0.1.example.com/x', 'ftp://127.0.0.1/x',
                                 'file:///etc/passwd', 'http://127.0.0.1@example.com/x', 'https://[bad/x'])
def test_addresses_that_are_not_asked(url, cache):
    refused(url, cache, 'https')


def test_redirect_to_plain_http_is_not_followed(server, cache):
    with pytest.raises(UserError, match='^http://example.invalid/ok.bin is not an https address'):
        fetch(f'{server}/away.bin', timeout=5)
    assert list(cache.iterdir()) == []


def test_cached_file_is_checked_too(server):
    path = fetch(f'{server}/ok.bin', sha256=SHA256)
    path.write_bytes(b'put here by hand')
    with pytest.raises(UserError, match='delete it') as e:
        fetch(f'{server}/ok.bin', sha256=SHA256)
    assert str(path) in e.value.message
    assert fetch(f'{server}/ok.bin').read_bytes() == b'put here by hand'  # nothing to check it by


def test_threads_and_processes_race(server, cache):
    url = f'{server}/slow.bin'
    code = f'from dnnlib.download import fetch; print(fetch({url!r}, sha256={SHA256!r}))'
    processes = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True,
                                  cwd=os.path.dirname(os.path.dirname(download.__file__))) for _ in range(2)]
    results = []
    threads = [threading.Thread(target=lambda: results.append(fetch(url, sha256=SHA256))) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    outputs = [p.communicate(timeout=60)[0].strip() for p in processes]
    assert {*map(str, results), *outputs} == {str(download.cached_path(url))} and len(results) == 3
    assert [p.read_bytes() for p in cache.iterdir()] == [BODY]


def test_local_path(tmp_path):
    file = tmp_path / 'a.bin'
    with pytest.raises(UserError, match='there is no file'):
        local_path(file)
    file.write_bytes(b'x')
    assert local_path(str(file)) == file
    with pytest.raises(UserError, match=f'{tmp_path} is a folder; give a file$'):
        local_path(tmp_path)
    assert is_url('https://a/b') and is_url('gs://x') and not is_url('C:\\x') and not is_url('/a/b')


# Writing files


def test_atomic_write_replaces_and_keeps(tmp_path):
    path = tmp_path / 'a.txt'
    with atomic_write(path, 'w') as f:
        f.write('één')
    assert path.read_bytes() == 'één'.encode()
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), atomic_write(path) as f:
            f.write(b'half')
            raise error
    assert path.read_bytes() == 'één'.encode()
    assert os.listdir(tmp_path) == ['a.txt']


@pytest.mark.skipif(sys.platform == 'win32', reason='umask is a Unix matter')
def test_atomic_write_leaves_the_umask_to_the_process(tmp_path, monkeypatch):
    """Setting it, even for a moment, would affect the files that other threads create."""
    former = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.delattr(os, 'umask')
            with atomic_write(tmp_path / 'a', 'w') as f:
                f.write('x')
    finally:
        os.umask(former)
    assert (tmp_path / 'a').stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize('error, last', [(UserError('the disk is full; free some space'),
                                          'Error: the disk is full; free some space'),
                                         (ValueError('a mistake'), 'ValueError: a mistake')])
def test_the_log_tells_what_ended_the_program(tmp_path, error, last):
    with pytest.raises(type(error)), Tee() as log:
        log.open(tmp_path / 'log.txt')
        print('tick 0')
        raise error
    lines = (tmp_path / 'log.txt').read_text().splitlines()
    assert lines[0] == 'tick 0' and lines[-1] == last


def test_the_log_begins_before_there_is_a_file(tmp_path, capsys):
    (tmp_path / 'log.txt').write_text('an earlier start\n')
    with Tee() as log:
        print('No --data given')
        print('1 of 2\r', end='', file=sys.stderr)
        log.open(tmp_path / 'log.txt')
        print('tick 0')
    print('after it')
    assert (tmp_path / 'log.txt').read_text() == 'an earlier start\nNo --data given\ntick 0\n'
    assert capsys.readouterr() == ('No --data given\ntick 0\nafter it\n', '1 of 2\r')


def test_streams_of_few_characters_or_none(tmp_path, monkeypatch):
    """A terminal that is gone or knows only ASCII does not end the program; the log has everything."""
    few = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    monkeypatch.setattr(sys, 'stdout', few)
    monkeypatch.setattr(sys, 'stderr', None)
    with Tee() as log:
        log.open(tmp_path / 'log.txt')
        print('1 → 2')
        print('and to stderr', file=sys.stderr, flush=True)
    few.flush()
    assert few.buffer.getvalue() == b'1 ? 2\n' and sys.stdout is few and sys.stderr is None
    assert (tmp_path / 'log.txt').read_text(encoding='utf-8') == '1 → 2\nand to stderr\n'


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a device that is full')
@pytest.mark.parametrize('buffering', [1, -1])
def test_a_full_disk_behind_stdout_ends_nothing(buffering, tmp_path, monkeypatch):
    """What does not fit there is in the log; nor does anything fail later, when the file is flushed or closed."""
    with open('/dev/full', 'w', buffering=buffering) as full:
        monkeypatch.setattr(sys, 'stdout', full)
        with Tee() as log:
            log.open(tmp_path / 'log.txt')
            for i in range(3):
                print('line', i, flush=True)
        monkeypatch.undo()
    assert (tmp_path / 'log.txt').read_text() == 'line 0\nline 1\nline 2\n'


def test_a_user_without_a_home(monkeypatch):
    def no_home():
        raise RuntimeError('Could not determine home directory.')
    monkeypatch.setattr(pathlib.Path, 'home', no_home)
    monkeypatch.setenv('DNNLIB_CACHE_DIR', '/somewhere')
    assert cache_dir() == pathlib.Path('/somewhere')
    monkeypatch.delenv('DNNLIB_CACHE_DIR')
    with pytest.raises(UserError, match='no home folder, .* set DNNLIB_CACHE_DIR'):
        cache_dir()


@pytest.mark.parametrize('name, said', [('', "'' names no file"), ('new/', 'names no file'), ('.', 'is a folder')])
def test_places_that_are_no_files(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        check_writable(name)
    assert os.listdir(tmp_path) == []


def test_atomic_write_without_a_folder(tmp_path):
    with pytest.raises(UserError, match='could not write'), atomic_write(tmp_path / 'none' / 'a'):
        pass
    with pytest.raises(UserError, match='could not write'), atomic_write(tmp_path):
        pass
    assert os.listdir(tmp_path) == [] and not list(tmp_path.parent.glob('.tmp-*'))


def test_atomic_write_on_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / 'a.bin'
    path.write_bytes(b'old')

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='No space left on device'), atomic_write(path) as f:
        f.write(b'new')
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['a.bin']


@pytest.mark.skipif(sys.platform == 'win32', reason='limits of processes are a Unix matter')
def test_atomic_write_beyond_the_file_size_limit(tmp_path):
    path = tmp_path / 'a.bin'
    path.write_bytes(b'old')
    code = f'''
import resource
from dnnlib.files import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with atomic_write({str(path)!r}) as f:
    for _ in range(100):
        f.write(bytes(10_000))
'''
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60,
                            cwd=os.path.dirname(os.path.dirname(download.__file__)))
    assert result.returncode == 1 and 'UserError' in result.stderr and 'could not write' in result.stderr
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['a.bin']


def test_make_dirs_over_a_file(tmp_path):
    (tmp_path / 'f').write_bytes(b'')
    make_dirs(tmp_path / 'a' / 'b')
    make_dirs(tmp_path / 'a' / 'b')
    with pytest.raises(UserError, match='could not create the folder .*f: a file has that name; choose another one'):
        make_dirs(tmp_path / 'f')


@pytest.mark.parametrize('name', ['ok.bin', 'unsized.bin'])
def test_a_file_may_be_as_large_as_allowed(server, name):
    assert fetch(f'{server}/{name}', max_bytes=len(BODY)).read_bytes() == BODY


def test_atomic_write_of_a_long_name(tmp_path):
    """The temporary file's name is no longer than the 255 bytes that file systems allow."""
    with atomic_write(tmp_path / ('x' * 250)) as f:
        f.write(b'1')
    assert [len(path.name) for path in tmp_path.glob('x*')] == [250]


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path):
    """Not before: another process may be writing it."""
    for name, age in (('.tmp-old.bin', 25 * 3600), ('.tmp-new.bin', 3600), ('kept.bin', 99 * 3600)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    remove_temporary_files(tmp_path, ABANDONED_SEC)
    assert {path.name for path in tmp_path.iterdir()} == {'.tmp-new.bin', 'kept.bin'}
