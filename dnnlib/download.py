"""Files from the network: https, cached, atomic, checked.

`requests` is imported only to download: its 40 ms would be a sixth of dataset_tool.py's start-up time.
"""

import hashlib
import os
import pathlib
import re
import urllib.parse

from dnnlib.errors import UserError
from dnnlib.files import ABANDONED_SEC, atomic_write, make_dirs, remove_temporary_files

LOOPBACK = {'localhost', '127.0.0.1', '::1'}
CHUNK = 1 << 20


def is_url(path):
    """Whether `path` is written as a web address (any scheme with ://)."""
    return re.match(r'[A-Za-z][A-Za-z0-9+.-]*://', str(path)) is not None


def cache_dir():
    """Folder of downloaded files: $DNNLIB_CACHE_DIR, or ~/.cache/warm-diffusion.

    Raises:
        UserError: the variable is not set, and this user has no home folder (as in some containers).
    """
    try:
        return pathlib.Path(os.environ.get('DNNLIB_CACHE_DIR') or pathlib.Path.home() / '.cache' / 'warm-diffusion')
    except RuntimeError as e:
        raise UserError('this user has no home folder, so cached files have no place; set DNNLIB_CACHE_DIR to a folder '
                        'for them') from e


def local_path(path_or_url):
    """A file on this machine: the path itself, or the cached download of an address (see `fetch`).

    Raises:
        UserError: there is no such file, or it is a folder, or the download failed.
    """
    if is_url(path_or_url):
        return fetch(path_or_url)
    path = pathlib.Path(path_or_url)
    if path.is_dir():
        raise UserError(f'{path_or_url} is a folder; give a file')
    if not path.is_file():
        raise UserError(f'there is no file {path_or_url}; check the path')
    return path


def cached_path(url):
    """Where `fetch` keeps the file of `url`: a digest of the address, then its file name."""
    name = re.sub(r'[^A-Za-z0-9._-]', '_', pathlib.PurePosixPath(urllib.parse.urlsplit(url).path).name)
    return cache_dir() / f'{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name or "file"}'


def fetch(url, sha256=None, md5=None, max_bytes=8 << 30, timeout=30):
    """Download `url` once and return the path of the cached copy.

    The file appears under its final name only when it is complete and its digest is right, so
    several processes may ask for the same address at once: the last rename wins, with equal content.

    Args:
        url: An https address; plain http is accepted for this machine's own (loopback) addresses only.
        sha256, md5: Expected hexadecimal digests, checked when given.
        max_bytes: Larger files are refused.
        timeout: Seconds without a response after which the download fails.

    Raises:
        UserError: refused scheme, failed or cut-off transfer, wrong digest, an HTML page in place of a file.
    """
    import requests
    _check_scheme(url)
    digests = {name: digest.lower() for name, digest in {'sha256': sha256, 'md5': md5}.items() if digest}
    path = cached_path(url)
    if path.is_file():
        _check_cached(path, digests)
        return path
    make_dirs(path.parent)
    remove_temporary_files(path.parent, ABANDONED_SEC)
    remedy = f'download it by other means and save it as {path}'
    try:
        # Ask for the raw bytes: a .gz file that a server calls "encoded" would otherwise be unpacked in transit.
        with requests.get(url, stream=True, timeout=timeout, headers={'Accept-Encoding': 'identity'},
                          hooks={'response': _check_redirect}) as response:
            _check_response(url, response, max_bytes, remedy)
            with atomic_write(path) as f:
                _receive(url, response, f, digests, max_bytes, remedy)
    except requests.RequestException as e:
        raise UserError(f'could not download {url} ({type(e).__name__}); check the connection, or {remedy}') from e
    return path


def _check_cached(path, digests):
    """Compare a cached file, which may have been put there by hand, with the digests expected."""
    for name, expected in digests.items():
        with open(path, 'rb') as f:
            h = hashlib.new(name)
            for chunk in iter(lambda: f.read(CHUNK), b''):
                h.update(chunk)
        if h.hexdigest() != expected:
            raise UserError(f'{path} has the {name} {h.hexdigest()} where {expected} was expected; '
                            'delete it and run the command again')


def _check_scheme(url):
    try:
        parts = urllib.parse.urlsplit(url)
        accepted = parts.scheme == 'https' or (parts.scheme == 'http' and parts.hostname in LOOPBACK)
    except ValueError:
        accepted = False
    if not accepted:
        raise UserError(f'{url} is not an https address; use https or a local path')


def _check_redirect(response, **kwargs):
    """Refuse a redirect to an address that `fetch` would not take, before following it."""
    if response.is_redirect:
        _check_scheme(urllib.parse.urljoin(response.url, response.headers['Location']))


def _check_response(url, response, max_bytes, remedy):
    if response.status_code != 200:
        raise UserError(f'could not download {url}: the server answered {response.status_code}; '
                        f'check the address, or {remedy}')
    if 'text/html' in response.headers.get('Content-Type', ''):
        raise UserError(f'{url} is a web page, not a file; give the address of the file itself, or {remedy}')
    if (_announced(response) or 0) > max_bytes:
        raise UserError(f'{url} is larger than the {max_bytes} bytes allowed for it; check the address')


def _announced(response):
    """Length of the body in bytes as the server states it; None if it does not."""
    length = response.headers.get('Content-Length', '')
    return int(length) if length.isdecimal() else None


def _chunks(url, response, remedy):
    """Yield the body piece by piece. A broken connection is an OSError, too: here it is told apart from disk errors."""
    import urllib3
    try:
        yield from response.raw.stream(CHUNK, decode_content=False)
    except (urllib3.exceptions.HTTPError, OSError) as e:
        raise UserError(f'{url} was cut off ({type(e).__name__}); try again, or {remedy}') from e


def _receive(url, response, file, digests, max_bytes, remedy):
    """Copy the body to `file`, then compare its length and digests with what was announced."""
    hashes = {name: hashlib.new(name) for name in digests}
    received = 0
    for chunk in _chunks(url, response, remedy):
        received += len(chunk)
        if received > max_bytes:
            raise UserError(f'{url} is larger than the {max_bytes} bytes allowed for it; check the address')
        file.write(chunk)
        for h in hashes.values():
            h.update(chunk)
    announced = _announced(response)
    if announced is not None and received != announced:
        raise UserError(f'{url} was cut off after {received} of {announced} bytes; try again, or {remedy}')
    for name, h in hashes.items():
        if h.hexdigest() != digests[name]:
            raise UserError(f'{url} has the {name} {h.hexdigest()} where {digests[name]} was expected; '
                            f'try again later, or {remedy}')
