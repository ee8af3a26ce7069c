"""What the published code of a family cannot be told to compute otherwise."""

import operator

from ml_collections import ConfigDict

# Fields of config.model that the published code has no switch for, or not by name of a parameter: with another value
# it loads the weights, or some, and computes something else.
FIXED_IN_PUBLISHED_CODE = {
    "deperceiver": {
        "no_object_logit": True,
        "relative_boxes": False,
        "backbone.norm": "frozen_batch_norm",
        "position.encoding": "sine",
        "position.use": "add",
        "encoder.num_blocks": 3,
        "encoder.layers_per_block": 6,
        "encoder.share_blocks": True,
        "encoder.num_cross_attentions": 1,
        "encoder.cross_heads": 1,
        "encoder.self_heads": 8,
        "encoder.gated_mlp": False,
        "decoder.self_attention_value": "query",
        "decoder.residual": "none",
        "decoder.cross_heads": 1,
        "decoder.self_heads": 1,
    },
    "detr": {
        "no_object_logit": True,
        "backbone.norm": "frozen_batch_norm",
        "position.encoder": "attention",
        "position.decoder": "attention",
        "decoder.query_position": "attention",
    },
    "deformable_detr": {
        "no_object_logit": False,
        "backbone.norm": "frozen_batch_norm",
        "encoder.across_levels": True,
        "places": "cells",
    },
    "smca": {
        "no_object_logit": True,
        "backbone.norm": "frozen_batch_norm",
        "decoder.num_heads": 8,
        "decoder.modulation": "multi_head",
        "decoder.scale_form": "inverse",
        "decoder.stride_factor": True,
        "decoder.scale_selection": True,
    },
}


def differences(config: ConfigDict) -> list[tuple[str, object, object]]:
    """(field, its value, the published code's) where this model is one that the published code cannot compute."""
    fixed = FIXED_IN_PUBLISHED_CODE[config.model.name]
    fields = [(field, operator.attrgetter(field)(config.model), value) for field, value in fixed.items()]
    return [(field, here, there) for field, here, there in fields if here != there]
