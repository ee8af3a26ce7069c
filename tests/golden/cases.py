"""What the golden training files hold and the inputs both sides make for them; NumPy only, so either side imports it.

See README.md beside this file. Everything here is a pure function of names and numbers: no state, no weights.
"""

import dataclasses
import zlib
from collections.abc import Mapping

import numpy as np

STEPS = 5  # of the training trajectory
DROP_EVERY = 2  # steps between drops of the learning rate, so that the trajectory meets the schedule twice
MAX_BOXES = 8  # box slots of an image
PROJECTIONS = 8  # random directions that stand for the gradient of a parameter
SAMPLES = 16  # entries that stand for an updated parameter
QUERY_STRIDE = 4  # of the stored queries, every fourth is stored of the logits of layers before the last
PROPOSAL_STRIDE = 16  # every sixteenth token's proposal is stored


@dataclasses.dataclass(frozen=True)
class Case:
    """One model, as our config and as the arguments of the official program."""

    config: str  # file:variant
    official: tuple[str, ...]  # command-line arguments that differ from the official defaults
    changes: Mapping[str, object] = dataclasses.field(default_factory=dict)  # our fields that differ from the variant
    sizes: tuple[tuple[int, int], ...] = ((60, 117), (96, 75))  # (height, width) of the images of a batch
    query_stride: int = 1  # between the queries whose logits and boxes are stored
    seeds: Mapping[str, int] = dataclasses.field(default_factory=dict)  # of weights, by how their names begin

    @property
    def family(self) -> str:
        return self.config.split(":")[0]

    def seed(self, name: str) -> int:
        """The seed of the weight of this official name: 0 but for those in `seeds`."""
        return next((seed for beginning, seed in self.seeds.items() if name.startswith(beginning)), 0)


_SMALL_DETR = {
    "model.backbone.depth": 18,
    "model.embed_dim": 64,
    "model.num_queries": 20,
    "model.encoder.num_layers": 2,
    "model.encoder.num_heads": 4,
    "model.encoder.mlp_dim": 96,
    "model.decoder.num_layers": 3,
    "model.decoder.num_heads": 4,
    "model.decoder.mlp_dim": 96,
}
_SMALL_DETR_OFFICIAL = (
    *("--backbone", "resnet18", "--hidden_dim", "64", "--num_queries", "20", "--nheads", "4"),
    *("--enc_layers", "2", "--dec_layers", "3", "--dim_feedforward", "96"),
)
_SMALL_DEFORMABLE = {**_SMALL_DETR, "model.encoder.num_points": 2, "model.decoder.num_points": 3}
_SMALL_DEFORMABLE_OFFICIAL = (*_SMALL_DETR_OFFICIAL, "--enc_n_points", "2", "--dec_n_points", "3")
_LARGE = ((120, 234), (192, 150))  # sizes whose real tokens are more than 300
# The released SMCA has 8 heads and a width of 256 whatever one asks for, and on several scales 6 decoder layers.
_SMALL_SMCA = {
    "model.backbone.depth": 18,
    "model.num_queries": 20,
    "model.encoder.mlp_dim": 96,
    "model.decoder.mlp_dim": 96,
    "eval.max_detections": 20,
}
_SMALL_SMCA_OFFICIAL = ("--backbone", "resnet18", "--num_queries", "20", "--enc_layers", "1", "--dim_feedforward", "96")
_LATENTS = ("--num_latents", "256")
# The released DePerceiver takes 2048 channels, whatever the backbone.
_SMALL_DEPERCEIVER = {
    "model.num_queries": 20,
    "model.encoder.num_latents": 32,
    "model.encoder.num_blocks": 2,
    "model.encoder.layers_per_block": 2,
}
_SMALL_DEPERCEIVER_OFFICIAL = (
    *("--num_queries", "20", "--num_latents", "32", "--enc_blocks", "2", "--enc_layers_per_block", "2"),
    "--no_aux_loss",
)
_AUXILIARY = {
    "model.decoder.num_layers": 3,
    "model.decoder.self_attention": True,
    "model.decoder.final_norm": True,
    "loss.auxiliary": True,
}


def _deformable(variant: str, *official: str, **fields) -> Case:
    """Of 300 queries every fifth is stored."""
    return Case(f"deformable_detr:{variant}", official, **{"query_stride": 5, **fields})


def _smca(variant: str, number: int, *official: str, scale: str = "independent") -> Case:
    """Of 300 queries every fifth is stored; the released code numbers what a Gaussian's scales can be."""
    official = ("--num_queries", "300", "--dynamic_scale", f"type{number}", *official)
    return Case(f"smca:{variant}", official, {"model.decoder.gaussian_scale": scale}, query_stride=5)


def _small_smca(scale: str, number: int) -> Case:
    fields = {"model.encoder.layout": ("intra",), "model.decoder.num_layers": 2, "model.decoder.gaussian_scale": scale}
    official = (*_SMALL_SMCA_OFFICIAL, "--dec_layers", "2", "--dynamic_scale", f"type{number}")
    return Case("smca:r50_single_scale", official, {**_SMALL_SMCA, **fields})


def _deperceiver(variant: str, *official: str, **changes) -> Case:
    """256 latents where the published models have 1024: the number changes no weight but the latents' own."""
    return Case(
        f"deperceiver:{variant}", (*_LATENTS, *official), {"model.encoder.num_latents": 256, **changes.pop("to", {})}
    )


CASES = {
    "detr_r50": Case("detr:r50", ()),
    "detr_r50_dc5": Case("detr:r50_dc5", ("--dilation",)),
    "detr_r101": Case("detr:r101", ("--backbone", "resnet101")),
    "detr_small_pre_norm_learned": Case(
        "detr:r50",
        (*_SMALL_DETR_OFFICIAL, "--pre_norm", "--position_embedding", "learned"),
        {**_SMALL_DETR, "model.pre_norm": True, "model.position.encoding": "learned"},
    ),
    "detr_small_no_auxiliary": Case(
        "detr:r50", (*_SMALL_DETR_OFFICIAL, "--no_aux_loss"), {**_SMALL_DETR, "loss.auxiliary": False}
    ),
    "deformable_r50_single_scale": _deformable("r50_single_scale", "--num_feature_levels", "1"),
    "deformable_r50_single_scale_dc5": _deformable("r50_single_scale_dc5", "--num_feature_levels", "1", "--dilation"),
    "deformable_r50": _deformable("r50"),
    "deformable_r50_refine": _deformable("r50_refine", "--with_box_refine"),
    # With these seeds of the proposals' class head no two of the best scores of the first batch are close.
    "deformable_r50_two_stage": _deformable(
        *("r50_two_stage", "--with_box_refine", "--two_stage"), sizes=_LARGE, seeds={"class_embed.6.": 1405}
    ),
    "deformable_small": _deformable("r50", *_SMALL_DEFORMABLE_OFFICIAL, changes=_SMALL_DEFORMABLE, query_stride=1),
    "deformable_small_refine": _deformable(
        "r50_refine", *_SMALL_DEFORMABLE_OFFICIAL, "--with_box_refine", changes=_SMALL_DEFORMABLE, query_stride=1
    ),
    # The official code encodes proposals in 512 channels, whatever the width.
    "deformable_small_two_stage": _deformable(
        "r50_two_stage",
        *(*_SMALL_DEFORMABLE_OFFICIAL, "--hidden_dim", "256", "--with_box_refine", "--two_stage"),
        changes={**_SMALL_DEFORMABLE, "model.embed_dim": 256},
        query_stride=1,
        seeds={"class_embed.3.": 595},
    ),
    "smca_r50_single_scale": _smca("r50_single_scale", 3),
    "smca_r50_single_scale_fixed": _smca("r50_single_scale", 1, scale="fixed"),
    "smca_r50_single_scale_single": _smca("r50_single_scale", 2, scale="single"),
    "smca_r50_single_scale_coupled": _smca("r50_single_scale", 4, scale="coupled"),
    "smca_r50_multiscale_conv": _smca("r50_multiscale_conv", 3, "--dim_feedforward", "1024"),
    "smca_small_fixed": _small_smca("fixed", 1),
    "smca_small_single": _small_smca("single", 2),
    "smca_small_independent": _small_smca("independent", 3),
    "smca_small_coupled": _small_smca("coupled", 4),
    "smca_small_conv": Case(
        "smca:r50_multiscale_conv",
        (*_SMALL_SMCA_OFFICIAL, "--dynamic_scale", "type3"),
        {**_SMALL_SMCA, "model.encoder.num_layers": 1, "eval.max_detections": 500},
    ),
    "deperceiver_r50_32": _deperceiver("r50_32", "--no_aux_loss"),
    "deperceiver_r50_16": _deperceiver("r50_16", "--no_aux_loss", "--downsample_factor", "16"),
    "deperceiver_r50_8": _deperceiver("r50_8", "--no_aux_loss", "--downsample_factor", "8"),
    "deperceiver_r50_4": _deperceiver("r50_4", "--no_aux_loss", "--downsample_factor", "4"),
    "deperceiver_r50_multiscale": _deperceiver("r50_multiscale", "--no_aux_loss", "--multiscale"),
    "deperceiver_r50_32_auxiliary": _deperceiver("r50_32", to=_AUXILIARY),
    "deperceiver_small": Case("deperceiver:r50_32", _SMALL_DEPERCEIVER_OFFICIAL, _SMALL_DEPERCEIVER),
}


def _rng(*keys) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(str(key).encode()) for key in keys])


def batch(case: Case, step: int) -> dict[str, np.ndarray]:
    """The fields of a Batch: images of colour patches and noise, padded to the largest, with 3 to 7 boxes each."""
    rng = _rng("batch", step)
    frame = np.max(case.sizes, axis=0)
    count = len(case.sizes)
    image = np.zeros((count, *frame, 3), np.uint8)
    boxes = np.zeros((count, MAX_BOXES, 4), np.float32)
    labels = np.zeros((count, MAX_BOXES), np.int32)
    box_valid = np.zeros((count, MAX_BOXES), bool)
    for b, (height, width) in enumerate(case.sizes):
        patches = rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3))
        patches = patches.repeat(16, axis=0).repeat(16, axis=1)[:height, :width]
        image[b, :height, :width] = (3 * patches + rng.integers(0, 256, (height, width, 3))) // 4
        n = rng.integers(3, MAX_BOXES)
        size = rng.uniform(0.1, 0.6, (n, 2))
        center = size / 2 + rng.uniform(0, 1, (n, 2)) * (1 - size)
        boxes[b, :n] = np.concatenate([center, size], axis=1)
        labels[b, :n] = rng.integers(1, 91, n)
        box_valid[b, :n] = True
    return dict(
        image=image,
        size=np.asarray(case.sizes, np.int32),
        original_size=rng.integers(200, 641, (count, 2)).astype(np.int32),
        example=np.arange(count, dtype=np.int32),
        boxes=boxes,
        labels=labels,
        box_valid=box_valid,
    )


def project(name: str, array: np.ndarray) -> np.ndarray:
    """Products of an array in official layout with PROJECTIONS random directions of entries -1 and 1, float64.

    For two arrays, the mean square difference of their projections is an unbiased estimate of the squared norm of
    their difference.
    """
    flat = np.asarray(array).reshape(-1)
    # A random byte per entry holds its 8 signs, so one pass sums the entries of each byte for all directions at once.
    drawn = _rng("projection", name).integers(0, 1 << PROJECTIONS, flat.size, np.uint8)
    sums = np.bincount(drawn, weights=flat, minlength=1 << PROJECTIONS)
    signs = 2.0 * (np.arange(1 << PROJECTIONS)[None] >> np.arange(PROJECTIONS)[:, None] & 1) - 1.0
    return signs @ sums


def sample(name: str, array: np.ndarray) -> np.ndarray:
    """SAMPLES entries of an array in official layout, drawn with replacement."""
    return np.asarray(array).reshape(-1)[_rng("sample", name).integers(0, np.size(array), SAMPLES)]
