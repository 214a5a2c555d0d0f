"""Detectors turn images into the features and class probabilities that the scores compare.

`load_detector` takes 'inception', another name in `DETECTORS`, or a file. Loading a file executes no
pickled code: TorchScript archives carry none, state dicts are read with weights-only loading.
"""

import contextlib
import pathlib
import pickle
import urllib.parse
import warnings
import zipfile

import torch

from dnnlib import UserError
from dnnlib.download import cache_dir, cached_path, fetch, is_url, local_path
from dnnlib.files import file_sha256
from torch_utils.precision import float32_products
from training.inception import NUM_FEATURES, InceptionV3
from training.pixels import to_float

SCRIPT_URL = ('https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/'
              'inception-2015-12-05.pt')
WEIGHTS_URL = ('https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
               'pt_inception-2015-12-05-6726825d.pth')
WEIGHTS_SHA256_PREFIX = '6726825d'

INCEPTION = 'inception-2015-12-05'  # in either of its files; the only detector whose distance is called FID
FILE_PREFIX = 'file:'  # begins the names of user-supplied detectors, which are identified by digest, not by name


def scoring_batch(device):
    """How many images a detector on this device takes at a time; more are no faster."""
    return 256 if torch.device(device).type == 'cuda' else 64


class Detector:
    """Images in, features and class probabilities out.

    Attributes:
        name: What the detector is, as stored in statistics: `INCEPTION`, 'pixels' or 'file:<stem>'.
        digest: SHA-256 of its file, or a fixed word for an embedded one.
        num_features: D, or None while unknown.
        has_probs: Whether it gives class probabilities.
    """

    def __init__(self, name, digest, device, num_features=None, has_probs=False):
        self.name = name
        self.digest = digest
        self.device = torch.device(device)
        self.num_features = num_features
        self.has_probs = has_probs

    @property
    def suffix(self):
        """What is appended to a score's name: nothing for Inception, else the detector's own name."""
        return '' if self.name == INCEPTION else '-' + self.name.removeprefix(FILE_PREFIX)

    def made(self, name, digest):
        """Whether statistics that record a detector's `name` and `digest` were made by this detector."""
        return digest == self.digest or (name == self.name and not name.startswith(FILE_PREFIX))

    @torch.inference_mode()
    def __call__(self, images, features=True, probs=False):
        """(features [B, D] or None, class probabilities [B, K] or None) of a batch, float32, on the device.

        Args:
            images: uint8 [B, 1 or 3, H, W]; grey is repeated to three channels.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != torch.uint8:
            raise UserError(f'images of shape {list(images.shape)} and type {images.dtype} cannot be scored; '
                            'they must be uint8 with 1 or 3 channels')
        rgb = images.to(self.device).expand(-1, 3, -1, -1).contiguous()
        with full_float32(self.device):
            return self.run(rgb, features, probs)

    def run(self, rgb, features, probs):
        """As `__call__`, for uint8 [B, 3, H, W] on the detector's device."""
        raise NotImplementedError


@contextlib.contextmanager
def full_float32(device):
    """Context without TF32 or autocast, with deterministic convolutions: a score must not depend on its caller."""
    with (torch.autocast(device.type, enabled=False), float32_products(tf32=False),
          torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)):
        yield


class PixelDetector(Detector):
    """Plain pixels: RGB in [−1, 1], averaged by area to 8×8; 192 features.

    For small images and machines without internet; the distance of these features is not FID.
    """

    SIZE = 8

    def __init__(self, device):
        super().__init__('pixels', 'embedded-1', device, num_features=3 * self.SIZE ** 2)

    def run(self, rgb, features, probs):
        return torch.nn.functional.interpolate(to_float(rgb), (self.SIZE, self.SIZE), mode='area').flatten(1), None


class InceptionDetector(Detector):
    """`training.inception.InceptionV3` with a state dict in the public layout."""

    def __init__(self, name, digest, device, state_dict):
        super().__init__(name, digest, device, num_features=NUM_FEATURES, has_probs=True)
        with torch.device('meta'):
            self.network = InceptionV3()
        self.network.load_state_dict(state_dict, assign=True)
        self.network.to(self.device).requires_grad_(False)

    def run(self, rgb, features, probs):
        f = self.network.features(rgb)
        p = self.network.logits(f, no_output_bias=True).softmax(dim=1) if probs else None
        return f, p


class ScriptDetector(Detector):
    """A TorchScript module called on uint8 [B, 3, H, W] with `return_features=True` or `no_output_bias=True`.

    For features and probabilities it runs twice: a scripted module returns one of the two at a time.
    """

    def __init__(self, name, digest, device, path, module):
        arguments = {a.name for a in module.forward.schema.arguments}
        if 'return_features' not in arguments:
            raise UserError(f"the TorchScript module {path} takes no 'return_features' argument; script one that "
                            'returns features for it, as NVIDIA\'s Inception file does')
        super().__init__(name, digest, device, num_features=NUM_FEATURES if name == INCEPTION else None,
                         has_probs='no_output_bias' in arguments)
        self.path = path
        self.module = module.eval()

    def run(self, rgb, features, probs):
        f = self._call(rgb, return_features=True) if features else None
        p = self._call(rgb, no_output_bias=True) if probs else None
        if p is not None and not ((p >= 0).all() and (p.sum(dim=1) - 1).abs().max() < 1e-3):
            raise UserError(f'with no_output_bias=True {self.path} returns no class probabilities (rows that are '
                            'not ≥ 0 with sum 1); apply a softmax in the scripted module')
        return f, p

    def _call(self, rgb, **kwargs):
        try:
            out = self.module(rgb, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            reason = str(e).strip().splitlines()[-1]
            raise UserError(f'the TorchScript module {self.path} failed on uint8 images of shape '
                            f'{list(rgb.shape)} ({reason}); give a detector that takes these') from e
        if not isinstance(out, torch.Tensor) or out.ndim != 2 or len(out) != len(rgb):
            raise UserError(f'the TorchScript module {self.path} does not return a row per image for '
                            f'{next(iter(kwargs))}=True; give a detector that returns [B, D]')
        return out.to(torch.float32)


# -- loading

def _fetch(url):
    """`fetch`, whose error also names the detectors that need no download."""
    try:
        return fetch(url)
    except UserError as e:
        raise UserError(f'{e.message}; or choose another detector: a local copy by its PATH, or pixels, with '
                        '--detector of fid.py, --eval-detector of train.py') from e


def _inception_script(device):
    """The default: NVIDIA's TorchScript file, downloaded once."""
    return detector_from_file(_fetch(SCRIPT_URL), device, INCEPTION)


def _inception_weights(device):
    """The public state dict, loaded into our own graph."""
    path = _fetch(WEIGHTS_URL)
    digest = file_sha256(path)
    if not digest.startswith(WEIGHTS_SHA256_PREFIX):
        path.unlink(missing_ok=True)
        raise UserError(f'{WEIGHTS_URL} has the SHA-256 {digest}, which should begin with {WEIGHTS_SHA256_PREFIX}; '
                        f'try again, or save the right file as {path}')
    return detector_from_file(path, device, INCEPTION)


DETECTORS = {'inception': _inception_script, 'inception-pth': _inception_weights, 'pixels': PixelDetector}


def needs_download(spec):
    """Whether `load_detector` downloads what this names, if it is not in the cache."""
    return is_url(spec) or (spec in DETECTORS and DETECTORS[spec] is not PixelDetector)  # pixels need no file


def load_detector(spec='inception', device='cpu'):
    """The detector with that name, or the one in a file.

    Args:
        spec: A name in `DETECTORS`, or a path or https address of a TorchScript archive or of a state dict
            in the layout of the public Inception weights.

    Raises:
        UserError: an unknown name, a missing or damaged file, a failed download.
    """
    if spec in DETECTORS:
        return DETECTORS[spec](device)
    looks_like_file = is_url(spec) or any(c in spec for c in '/\\.') or pathlib.Path(spec).exists()
    if not looks_like_file:
        raise UserError(f"there is no detector '{spec}'; choose {', '.join(DETECTORS)}, or give the path or "
                        'address of a TorchScript or .pth file')
    stem = pathlib.PurePath(urllib.parse.urlsplit(spec).path if is_url(spec) else spec).stem
    return detector_from_file(local_path(spec), device, FILE_PREFIX + stem)


def detector_from_file(path, device, name):
    """The detector in a file of either kind, told apart by content.

    The public weights are recognised as Inception by their digest, NVIDIA's script by its place in the cache.

    Raises:
        UserError: the file is neither kind, or damaged, or its tensors don't fit.
    """
    digest = file_sha256(path)
    if digest.startswith(WEIGHTS_SHA256_PREFIX) or is_default_script(path):
        name = INCEPTION
    if is_torchscript(path):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore', DeprecationWarning)  # NVIDIA's file exists in this form only
                module = torch.jit.load(str(path), map_location=device)
        except (RuntimeError, ValueError) as e:
            raise UserError(f'the TorchScript file {path} is damaged or not for this PyTorch; '
                            f'{_remedy(path)}') from e
        return ScriptDetector(name, digest, device, path, module)
    return InceptionDetector(name, digest, device, load_inception_state(path))


def _remedy(path):
    """What to do about a file that is no detector. It may be any file of the user's, unless it lies in our cache."""
    if pathlib.Path(path).absolute().is_relative_to(cache_dir().absolute()):
        return 'delete it there, and it is downloaded again'
    return 'check that it is the file of a detector, or get it again'


def is_default_script(path):
    """Whether a file is the cached download of SCRIPT_URL, for which no digest is published."""
    return pathlib.Path(path).absolute() == cached_path(SCRIPT_URL).absolute()


def is_torchscript(path):
    """Whether a file is a zip archive laid out as by `torch.jit.save`: code beside constants.pkl."""
    try:
        with zipfile.ZipFile(path) as z:
            names = z.namelist()
    except (zipfile.BadZipFile, OSError):
        return False
    return any(n.endswith('/constants.pkl') for n in names) and any('/code/' in n for n in names)


def load_inception_state(path):
    """State dict of `InceptionV3` from a .pth file, read without executing any pickled code.

    Raises:
        UserError: not such a file, or a tensor that is missing, unexpected or of the wrong shape.
    """
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except (RuntimeError, ValueError, EOFError, KeyError, OSError, AttributeError, pickle.UnpicklingError) as e:
        raise UserError(f'{path} is neither a TorchScript archive nor a state dict of plain tensors, or it is '
                        f'damaged; {_remedy(path)}') from e
    with torch.device('meta'):
        expected = InceptionV3().state_dict()
    shapes = {k: tuple(v.shape) for k, v in state.items() if isinstance(v, torch.Tensor)} \
        if isinstance(state, dict) else {}
    # Batch norm's counters have no effect in evaluation mode, and older files lack them.
    counters = {k: torch.zeros((), dtype=torch.int64) for k in expected if k.endswith('num_batches_tracked')}
    wrong = [k for k in expected if k not in counters and shapes.get(k) != tuple(expected[k].shape)]
    wrong += [k for k in shapes if k not in expected]
    if wrong:
        raise UserError(f"the state dict {path} is not laid out like the public Inception weights: '{wrong[0]}' is "
                        f'{shapes.get(wrong[0], "missing")}; give pt_inception-2015-12-05-6726825d.pth')
    return {**{k: v.to(torch.float32) for k, v in state.items() if k not in counters}, **counters}
