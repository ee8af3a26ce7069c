"""How many boxes the images of COCO have, for batches that are made up."""

import statistics

import numpy as np
from jaxtyping import Int


def coco_box_counts(num_images: int, largest: int) -> Int[np.ndarray, " num_images"]:
    """Ascending: quantiles of a log-normal with COCO's median of 4 and mean of 7, at least 1 and at most `largest`."""
    quantiles = (np.arange(num_images) + 0.5) / num_images
    counts = [np.exp(np.log(4.3) + statistics.NormalDist().inv_cdf(q)) for q in quantiles]
    return np.rint(counts).astype(int).clip(1, largest)
