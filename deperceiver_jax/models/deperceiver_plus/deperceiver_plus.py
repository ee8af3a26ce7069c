"""DePerceiver+: latents that have places in the image, start from its best proposals, and answer for what they hold.

What the published DePerceiver lacks is a place for what a latent knows. Here every latent is an object query with a
box of its own; in each layer the latents look at one another, then at the image tokens around their boxes, and correct
their boxes. All of it is linear in the number of tokens.
"""

import jax
from flax import nnx

from deperceiver_jax.errors import UserError, check_choice
from deperceiver_jax.field_needs import Need, at_least, equal
from deperceiver_jax.models.config_section import build_part
from deperceiver_jax.models.deperceiver_plus.denoising import AttentionMask, Denoising, denoising_mask
from deperceiver_jax.models.deperceiver_plus.latent_decoder import LatentDecoder, LatentDecoderFields
from deperceiver_jax.models.deperceiver_plus.starts import LearnedStart, ProposedStart
from deperceiver_jax.models.detector import Detector, DetectorFields
from deperceiver_jax.models.features.feature_pyramid import FeaturePyramid, sources
from deperceiver_jax.models.features.pyramid import make_level_tokens, sine_positions
from deperceiver_jax.models.features.resnet import STRIDES
from deperceiver_jax.models.features.tokens import size_in_cells
from deperceiver_jax.models.heads.heads import BOX_DELTAS
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.initializers import normal
from deperceiver_jax.models.layers.layer_stack import apply_rematerialized
from deperceiver_jax.structures import Predictions


class DePerceiverPlus(Detector):
    """image -> ResNet features -> tokens -> latents with places -> Predictions of every layer.

    `start`: `learned` latents are the same for every image at first; with `proposals` every token proposes a box, all
    of which come along in `Predictions.proposals`, and the best become the latents.
    """

    needs = {
        "model.decoder.least_width": equal("model.decoder.gaussian", True),
        "model.decoder.separate_levels": Need(
            lambda config: len(config.model.strides) > 1, "two or more config.model.strides"
        ),
        "model.decoder.look_forward_twice": Need(
            lambda config: config.model.decoder.refine and config.model.decoder.num_layers > 1,
            "config.model.decoder.refine=True and config.model.decoder.num_layers of at least 2",
        ),
        "model.denoising.noise": at_least("model.denoising.copies", 1),
        "loss.auxiliary": Need(
            lambda config: config.model.decoder.num_layers > 1 or config.model.start == "proposals",
            "config.model.decoder.num_layers of at least 2",
        ),
    }

    def __init__(
        self,
        fields: DetectorFields,
        *,
        top_down: bool,
        neck_blocks: int,
        start: str,
        box_deltas: str,
        denoising: dict,
        decoder: dict,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        check_choice("config.model.start", start, ("learned", "proposals"))
        check_choice("config.model.box_deltas", box_deltas, BOX_DELTAS)
        for stride in fields.strides:
            check_choice("config.model.strides", stride, STRIDES)
        dim, num_levels = fields.embed_dim, len(fields.strides)
        if dim % 2:
            raise UserError(f"config.model.embed_dim is {dim}; half of it encodes rows, so it must be even.")
        needed = sources(fields.strides, top_down=top_down)
        super().__init__(fields, backbone_strides=needed, compute=compute, rngs=rngs)
        self.denoising = build_part(Denoising, "config.model.denoising", denoising)
        self.rematerialize = compute.rematerialize
        neck: dict = dict(strides=self.strides, top_down=top_down, neck_blocks=neck_blocks)
        self.levels = FeaturePyramid(self.backbone.channels, dim, **neck, compute=compute, rngs=rngs)
        self.level_embedding = nnx.Param(normal(0.02)(rngs.params(), (num_levels, dim)))
        if start == "learned":
            self.start: LearnedStart | ProposedStart = LearnedStart(dim, fields.num_queries, rngs=rngs)
        else:
            latents = (fields.num_queries, fields.num_logits)
            self.start = ProposedStart(dim, *latents, box_deltas=box_deltas, dtype=compute.dtype, rngs=rngs)
        decoder = build_part(LatentDecoderFields, "config.model.decoder", decoder)
        layer: dict = dict(num_levels=num_levels, box_deltas=box_deltas, dropout=fields.dropout, compute=compute)
        self.decoder = LatentDecoder(dim, fields.num_logits, decoder, **layer, rngs=rngs)

    @property
    def fewest_tokens(self) -> int:
        return self.start.proposals.num_proposals if isinstance(self.start, ProposedStart) else 1

    def __call__(self, image, pixel_valid, *, targets=None, dropout_key: jax.Array | None = None) -> Predictions:
        """Detector's call. Of `targets` it makes denoising queries, whose answers are `Predictions.denoising`.

        They do not change the other answers: no latent attends to them, but for those of their own copy.
        """
        maps, map_valid = self.levels(self.backbone(image, pixel_valid), pixel_valid)
        tokens = make_level_tokens(maps, map_valid, size_in_cells(pixel_valid, self.strides))
        tokens = tokens.replace(position=sine_positions(tokens, self.level_embedding[...]).astype(self.dtype))
        denoising = self.denoising.queries(targets, dropout_key)
        if self.rematerialize:
            proposals, content, boxes = apply_rematerialized(self.start, tokens, denoising)
        else:
            proposals, content, boxes = self.start(tokens, denoising)
        count = 0 if denoising is None else denoising.references.shape[1]
        mask = AttentionMask() if denoising is None else denoising_mask(denoising, content.shape[1] - count)
        predictions = self.decoder(content, boxes, tokens, mask, dropout_key=dropout_key)
        if denoising is None:
            return predictions._replace(proposals=proposals)
        answers = jax.tree.map(lambda x: x[:, :, :-count], predictions)
        of_denoising = jax.tree.map(lambda x: x[:, :, -count:], predictions)
        return answers._replace(proposals=proposals, denoising=of_denoising)
