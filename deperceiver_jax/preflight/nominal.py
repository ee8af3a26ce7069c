"""Image sizes of a COCO that is not on this disk, for planning its buckets."""

import numpy as np
from jaxtyping import Int32

# (height, width) of the commonest images of COCO 2017, and about how many of a hundred images have such a size.
_COMMON = {(480, 640): 33, (640, 480): 11, (427, 640): 19, (640, 427): 8, (426, 640): 7, (375, 500): 9, (500, 375): 4}
_RARE = {(360, 640): 3, (640, 640): 3, (612, 612): 2, (333, 500): 1}
NOMINAL_BOXES = 100  # COCO's fullest training images have a few fewer
NOMINAL_IMAGES = 118_287, 5_000  # of COCO's train2017 and val2017


def nominal_sizes() -> Int32[np.ndarray, "N 2"]:
    """A thousand images in these proportions."""
    sizes = [size for size, share in {**_COMMON, **_RARE}.items() for _ in range(10 * share)]
    return np.asarray(sizes, np.int32)
