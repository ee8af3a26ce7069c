"""From the published DePerceiver to DePerceiver+, one change a row, and the other families beside them.

    python benchmarks/small_objects.py --rows=published,gaussian --seeds=0,1,2

All rows see the same images (many small shapes on clutter), through the same narrow ResNet, for the same steps. A
small shape is about as wide as a cell of stride 8, as COCO's small objects are of stride 32. Each row is the one before
it with the change that its function makes; docs/experiments/ladder.md says what came of each, and of two changes that
were tried and are gone.
"""

from ml_collections import ConfigDict

from configs import deformable_detr, demo, deperceiver, deperceiver_plus, detr, smca


def get_config(variant: str = "published") -> ConfigDict:
    """One of VARIANTS."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/ladder.py has no variant {variant!r}; it has {', '.join(VARIANTS)}.")
    config = demo.get_config("detr")
    config.data.name = "shapes/small"
    config.data.scales = (52, 58, 64)
    config.data.max_size = 64
    config.data.eval_scale = 64
    config.data.eval_max_size = 64
    config.data.buckets = 1
    config.matcher.backend = "device"  # the compilation cache keeps the step for the next seed
    config.train.num_steps = 600
    config.train.eval_every = 50
    config.train.checkpoint_every = 100
    if variant in FAMILIES:
        FAMILIES[variant](config)
    else:
        _climb(config, variant)
    return config


def _climb(config: ConfigDict, row: str) -> None:
    """The changes of all rows up to this one."""
    for name, change in ROWS.items():
        change(config)
        if name == row:
            return


def _use(config: ConfigDict, model: ConfigDict, **sizes) -> None:
    """`model` with the benchmark's backbone and widths."""
    backbone = config.model.backbone
    config.model = model
    config.model.backbone = backbone
    config.model.update(num_queries=32, embed_dim=64, dropout=0.0, **sizes)


# ---------------------------------------------------------------------------------------------------- the ladder


def _published(config: ConfigDict) -> None:
    """The published architecture and losses, narrow: 64 latents, blocks of two layers instead of six."""
    _use(config, deperceiver.model(), strides=(8,))
    config.model.encoder.update(num_latents=64, latent_dim=64, layers_per_block=2)
    config.loss.update(classification="softmax_no_object", weight_class=1.0, auxiliary=False)
    config.matcher.cost_class = 1.0


def _small_latents(config: ConfigDict) -> None:
    """Latents of scale 0.02 rather than 1, and a residual around the decoder's cross-attention."""
    config.model.encoder.update(latent_init="truncated_normal", latent_scale=0.02)
    config.model.decoder.residual = "query"


def _heads(config: ConfigDict) -> None:
    """Four heads in the cross-attentions, MLPs twice as wide as their input."""
    config.model.encoder.update(cross_heads=4, mlp_ratio=2.0)
    config.model.decoder.update(cross_heads=4, self_heads=4, mlp_ratio=2.0)


def _query_self_attention(config: ConfigDict) -> None:
    """Three decoder layers with self-attention among the queries, all of them trained."""
    config.model.decoder.update(num_layers=3, self_attention=True, final_norm=True)
    config.model.decoder.update(self_attention_value="content", residual="content")
    config.loss.auxiliary = True


def _key_positions(config: ConfigDict) -> None:
    """Positions on the keys of every cross-attention, rather than added to the tokens once."""
    config.model.position.use = "keys"


def _repeated_cross_attention(config: ConfigDict) -> None:
    """The latents attend to the image before each of the three blocks, which no longer share weights."""
    config.model.encoder.update(num_cross_attentions=3, share_blocks=False)


def _latents_as_queries(config: ConfigDict) -> None:
    """The queries are the latents: one cross-attention to the image with many heads, then eight layers with GEGLU."""
    config.model.decoder.num_layers = 0
    config.model.encoder.update(num_latents=config.model.num_queries, num_cross_attentions=1)
    config.model.encoder.update(num_blocks=1, layers_per_block=8, cross_heads=8, mlp_ratio=4.0, gated_mlp=True)


def _cross_attention_in_every_layer(config: ConfigDict) -> None:
    """The queries are the latents: three layers of self-attention and cross-attention to the image, each answering."""
    _use(config, deperceiver_plus.model(), strides=(8,), top_down=False, neck_blocks=0, start="learned")
    config.model.denoising.copies = 0
    config.model.no_object_logit = True
    config.model.decoder.update(num_layers=3, num_heads=4, mlp_dim=128, gaussian=False, refine=False, least_width=0.03)
    config.model.decoder.look_forward_twice = False
    config.model.box_deltas = "logits"


def _gaussian(config: ConfigDict) -> None:
    """Each latent has a box, around which it looks first, and relative to which it answers."""
    config.model.decoder.gaussian = True


def _refinement(config: ConfigDict) -> None:
    """Each layer starts from the boxes of the one before."""
    config.model.decoder.refine = True


def _focal(config: ConfigDict) -> None:
    """The focal loss, of each class on its own."""
    config.model.no_object_logit = False
    config.loss.update(classification="sigmoid_focal", weight_class=2.0)
    config.matcher.cost_class = 2.0


def _two_scales(config: ConfigDict) -> None:
    """Tokens of strides 4 and 8 in one softmax."""
    config.model.strides = (4, 8)


def _top_down(config: ConfigDict) -> None:
    """A feature pyramid: deeper features are added to the finer maps."""
    config.model.top_down = True


def _proposals(config: ConfigDict) -> None:
    """Latents start as the best tokens of the image instead of the same for all images."""
    config.model.start = "proposals"


def _denoising(config: ConfigDict) -> None:
    """In training, two noisy copies of every box to correct (denoising queries)."""
    config.model.denoising.copies = 2


def _neck_blocks(config: ConfigDict) -> None:
    """Two residual blocks of 3x3 convolutions on each map: what lies beside a cell tells where an object ends."""
    config.model.neck_blocks = 2


def _scaled_deltas(config: ConfigDict) -> None:
    """Boxes are moved by shares of their own sides rather than in logits, which depend on the place in the image."""
    config.model.box_deltas = "scaled"


def _iou_aware(config: ConfigDict) -> None:
    """The score of a class is high where the box lies well, too."""
    config.loss.classification = "sigmoid_iou_aware"


def _look_forward_twice(config: ConfigDict) -> None:
    """The loss of a layer's boxes moves the deltas of the layer before, too."""
    config.model.decoder.look_forward_twice = True


def _separate_levels(config: ConfigDict) -> None:
    """A softmax for each level, with predicted weights."""
    config.model.decoder.separate_levels = True


ROWS = {
    "published": _published,
    "small_latents": _small_latents,
    "heads": _heads,
    "query_self_attention": _query_self_attention,
    "key_positions": _key_positions,
    "repeated_cross_attention": _repeated_cross_attention,
    "latents_as_queries": _latents_as_queries,
    "cross_attention_in_every_layer": _cross_attention_in_every_layer,
    "gaussian": _gaussian,
    "refinement": _refinement,
    "focal": _focal,
    "two_scales": _two_scales,
    "top_down": _top_down,
    "proposals": _proposals,
    "denoising": _denoising,
    "neck_blocks": _neck_blocks,
    "scaled_deltas": _scaled_deltas,
    "iou_aware": _iou_aware,
    "look_forward_twice": _look_forward_twice,
    "separate_levels": _separate_levels,
}


# ------------------------------------------------------------- the families, each at the best of three learning rates


def _deperceiver_plus(config: ConfigDict) -> None:
    """The parts of configs/deperceiver_plus.py: the row `look_forward_twice`."""
    _climb(config, "look_forward_twice")
    config.optimizer.learning_rate = 3e-3


def _detr(config: ConfigDict) -> None:
    """DETR at stride 8, three layers each."""
    _use(config, detr.model(), strides=(8,))
    config.model.no_object_logit = False
    config.model.encoder.update(num_layers=3, num_heads=4, mlp_dim=128)
    config.model.decoder.update(num_layers=3, num_heads=4, mlp_dim=128)
    config.optimizer.learning_rate = 3e-4


def _deformable_detr(config: ConfigDict) -> None:
    """Deformable DETR on strides 4 and 8, three layers each; the rate is the best for two stages."""
    _use(config, deformable_detr.model(), strides=(4, 8), extra_levels=0)
    config.model.encoder.update(num_layers=3, num_heads=4, mlp_dim=128)
    config.model.decoder.update(num_layers=3, num_heads=4, mlp_dim=128)
    config.optimizer.learning_rate = 3e-3


def _deformable_detr_single(config: ConfigDict) -> None:
    """Deformable DETR on stride 8."""
    _deformable_detr(config)
    config.model.strides = (8,)


def _deformable_detr_two_stage(config: ConfigDict) -> None:
    """Deformable DETR on strides 4 and 8 with refinement and proposals."""
    _deformable_detr(config)
    config.model.update(refine=True, two_stage=True)


def _deformable_detr_pixels(config: ConfigDict) -> None:
    """The same with places that are exact, as DePerceiver+'s are."""
    _deformable_detr_two_stage(config)
    config.model.places = "pixels"


def _smca(config: ConfigDict) -> None:
    """SMCA at stride 8, three layers each."""
    _use(config, smca.model(), strides=(8,))
    config.model.no_object_logit = False
    config.model.encoder.update(layout=("intra",) * 3, num_heads=4, mlp_dim=128)
    config.model.decoder.update(num_layers=3, num_heads=4, mlp_dim=128)


FAMILIES = {
    "deperceiver_plus": _deperceiver_plus,
    "detr": _detr,
    "deformable_detr_single": _deformable_detr_single,
    "deformable_detr": _deformable_detr,
    "deformable_detr_two_stage": _deformable_detr_two_stage,
    "deformable_detr_pixels": _deformable_detr_pixels,
    "smca": _smca,
}
VARIANTS = (*ROWS, *FAMILIES)
