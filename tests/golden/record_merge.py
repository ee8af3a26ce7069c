"""Writes merge.json: what sahi's suppression leaves of drawn boxes. Needs sahi 0.12.8 (and shapely), on the path."""

import json
from pathlib import Path

import numpy as np
from sahi.postprocess.combine import batched_nms

THRESHOLDS = (0.3, 0.5, 0.6, 0.8)


def drawn(seed: int) -> np.ndarray:
    """[200, 6]: left, top, right, bottom, score, class, of boxes that lie in heaps."""
    rng = np.random.default_rng(seed)
    heaps = rng.uniform(20, 380, (30, 2))[rng.integers(30, size=200)]
    centre, extent = heaps + rng.normal(0, 4, (200, 2)), rng.uniform(20, 45, (200, 2))
    boxes = np.concatenate([centre - extent / 2, centre + extent / 2], 1).astype(np.float32)
    return np.concatenate([boxes, rng.permutation(200)[:, None] / 200, rng.integers(3, size=(200, 1))], 1)


if __name__ == "__main__":
    found = {
        f"{seed} {iou}": [int(kept) for kept in batched_nms(drawn(seed), "IOU", iou)]
        for seed in range(3)
        for iou in THRESHOLDS
    }
    Path(__file__).with_name("merge.json").write_text(json.dumps(found) + "\n")
