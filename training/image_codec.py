"""From the bytes of an image file to pixels and back; what cannot be trusted is refused by its header."""

import functools
import io
import os
import struct

import numpy as np
import PIL.Image

from dnnlib import UserError

try:
    import pyspng
except ImportError:
    pyspng = None

# Raster formats only: Pillow would hand PostScript (even in a file called .png) to an interpreter.
FORMATS = ('AVIF', 'BMP', 'DIB', 'GIF', 'JPEG', 'JPEG2000', 'MPO', 'PNG', 'PPM', 'QOI', 'SGI', 'TGA', 'TIFF', 'WEBP')
MAX_PIXELS = 1 << 26  # 8192×8192; half of it where a pixel takes more than 3 bytes, so that memory stays under 1 GiB
PNG_HEADER_BYTES = 33  # signature, then the IHDR chunk
PNG_END = b'\0\0\0\0IEND\xaeB`\x82'  # the last chunk, which is empty
PNG_CHANNELS = {0: 1, 2: 3, 3: 3}  # colour type → channels after decoding (palettes become RGB)
PLAIN = {'1': 'L', 'L': 'L', 'RGB': 'RGB', 'P': 'RGB', 'CMYK': 'RGB', 'YCbCr': 'RGB'}  # loses nothing but CMYK's K


@functools.cache
def _formats():
    """Those of FORMATS that this Pillow was built with."""
    PIL.Image.init()
    return [f for f in FORMATS if f in PIL.Image.OPEN]


def is_image_name(name):
    """Whether `name` ends like an image that Pillow can open."""
    _formats()
    return PIL.Image.EXTENSION.get(os.path.splitext(name)[1].lower()) in FORMATS


def png_header(data):
    """(width, height, bit depth, colour type) of a PNG from its first 33 bytes; None if it is no PNG."""
    if len(data) < PNG_HEADER_BYTES or data[:8] != b'\x89PNG\r\n\x1a\n' or data[12:16] != b'IHDR':
        return None
    return struct.unpack('>IIBB', data[16:26])


def png_shape(data):
    """[C, H, W] that `decode` gives for a PNG, from its first 33 bytes; None if that needs decoding."""
    header = png_header(data)
    if header is None or header[3] not in PNG_CHANNELS:
        return None
    return [PNG_CHANNELS[header[3]], header[1], header[0]]


def decode(data, what):
    """Decode an image file that needs no lossy conversion.

    Args:
        data: Content of the file.
        what: The file in words, for messages.

    Returns:
        uint8 array [C, H, W], C 1 or 3; palette, CMYK and YCbCr images become RGB, bitmaps grey.

    Raises:
        UserError: it does not decode, is absurdly large, or has transparency or more than 8 bits per channel.
    """
    header = png_header(data)
    if pyspng is not None and header is not None and header[2:] in ((8, 0), (8, 2)):
        _check_size(header[0], header[1], what)
        try:
            pixels = pyspng.load(data, format='L' if header[3] == 0 else 'RGB')
        except Exception as e:  # the decoder's exceptions are undocumented
            raise _undecodable(what, e) from e
    else:
        image = _open(data, what)
        if image.mode not in PLAIN or (image.mode == 'P' and 'transparency' in image.info):
            raise UserError(f'{what} has the image mode {image.mode} (transparency, or more than 8 bits per channel), '
                            'which training does not accept; convert the images with dataset_tool.py')
        pixels = np.array(image.convert(PLAIN[image.mode]))
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def open_image(data, what):
    """Open an image file of any kind as a Pillow image of mode L or RGB, for conversion.

    Transparent images are composited over white, 16-bit images scaled to 8 bits.

    Raises:
        UserError: it does not decode, is absurdly large, or holds floating-point values.
    """
    image = _open(data, what)
    if image.mode in ('LA', 'PA', 'RGBA') or (image.mode == 'P' and 'transparency' in image.info):
        rgba = image.convert('RGBA')
        white = PIL.Image.new('RGBA', rgba.size, 'white')
        return PIL.Image.alpha_composite(white, rgba).convert('L' if image.mode == 'LA' else 'RGB')
    if image.mode.startswith('I'):
        values = np.asarray(image).astype(np.float64)
        if values.min() >= 0 and values.max() <= 65535:
            return PIL.Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.mode not in PLAIN:
        raise UserError(f'{what} has the image mode {image.mode}, which cannot be converted to 8-bit L or RGB; '
                        'convert it with another program, or remove it')
    return image.convert(PLAIN[image.mode])


def encode_png(image, **options):
    """A Pillow image as the bytes of a PNG; uncompressed unless `options` say otherwise."""
    buffer = io.BytesIO()
    image.save(buffer, format='PNG', **{'compress_level': 0, 'optimize': False, **options})
    return buffer.getvalue()


def _open(data, what):
    """The first frame of an image file, decoded by Pillow."""
    try:
        with PIL.Image.open(io.BytesIO(data), formats=_formats()) as image:
            _check_size(*image.size, what, MAX_PIXELS if image.mode in PLAIN else MAX_PIXELS // 2)
            image.load()
            return image
    except UserError:
        raise
    except Exception as e:  # damaged files raise nearly anything in Pillow's plugins
        raise _undecodable(what, e) from e


def _check_size(width, height, what, limit=MAX_PIXELS):
    if width * height > limit:
        raise UserError(f'{what} claims {width}x{height} pixels, more than the {limit} accepted; remove it')


def _undecodable(what, error):
    if isinstance(error, (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning)):
        return UserError(f'{what} claims more than the {MAX_PIXELS} pixels accepted; remove it')
    reason = 'of no known format' if isinstance(error, PIL.UnidentifiedImageError) else f'damaged ({error})'
    return UserError(f'{what} does not decode as an image: it is {reason}; replace or remove it')
