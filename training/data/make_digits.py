"""Makes digits-8x8.zip from scikit-learn's copy of the digits: python -m training.data.make_digits

Needs scikit-learn, which nothing else in the project does. Values 0…16 become round(v·255/16).
"""

import json

import numpy as np
import PIL.Image
import sklearn.datasets

from training.dataset import EMBEDDED
from training.dataset_convert import image_name, open_dest
from training.image_codec import encode_png


def main(dest=EMBEDDED):
    """Write the images in their order, with their classes, as a compressed dataset zip."""
    digits = sklearn.datasets.load_digits()
    labels = []
    with open_dest(dest, compress=True) as add:
        for i, (values, label) in enumerate(zip(digits.images, digits.target)):
            name = image_name(i)
            image = PIL.Image.fromarray(np.rint(values * 255 / 16).astype(np.uint8))
            add(name, encode_png(image, compress_level=9, optimize=True))
            labels.append([name, int(label)])
        add('dataset.json', json.dumps({'labels': labels}).encode())


if __name__ == '__main__':
    main()
