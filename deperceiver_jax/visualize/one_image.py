"""The one image that a picture is about, and the detector that looks at it."""

import numpy as np
from absl import flags
from jaxtyping import UInt8
from ml_collections import ConfigDict

from deperceiver_jax.data import open_source
from deperceiver_jax.data.batches.geometry import check_augmentation, evaluation_geometry
from deperceiver_jax.data.batches.pixels import decode_image, place_image
from deperceiver_jax.data.image_header import CorruptImage, exif_orientation
from deperceiver_jax.errors import UserError
from deperceiver_jax.files import as_path, reason, require_readable
from deperceiver_jax.visualize.output import check_output, need


def check_image_flags(values: flags.FlagValues) -> None:
    """Raises UserError unless there is one image, and a picture of it could be written."""
    need(values, "output")
    check_output(values.output)
    if (values.image is None) == (values.example is None):
        raise UserError("Either --image or --example is needed: a file, or the number of an image of the split.")


def read_image(values: flags.FlagValues, config: ConfigDict) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
    """(pixels, what to call it). Raises UserError for an image that is not there or cannot be read."""
    if values.example is not None:
        source = open_source(config.data, config.data.eval_split)
        if not 0 <= values.example < len(source):
            raise UserError(
                f"--example: {config.data.name}, {config.data.eval_split}, has the images 0 to {len(source) - 1}, "
                f"not {values.example}."
            )
        name = f"{config.data.name}, {config.data.eval_split} image {values.example}"
        data, orientation = source.image_bytes(values.example), source.orientation(values.example)
    else:
        name = values.image
        require_readable("--image", as_path(name))
        try:
            data, orientation = as_path(name).read_bytes(), None
        except OSError as error:
            raise UserError(f"--image: {name} cannot be read: {reason(error)}.") from None
    try:
        return decode_image(data, exif_orientation(data) if orientation is None else orientation), name
    except CorruptImage as error:
        raise UserError(f"{name} is not an image that can be read: {error}.") from None


def see(image: UInt8[np.ndarray, "h w 3"], config_data: ConfigDict) -> UInt8[np.ndarray, "H W 3"]:
    """The image at the size at which the detector is evaluated."""
    check_augmentation(config_data)
    geometry = evaluation_geometry(np.array([image.shape[:2]], np.int32), config_data)
    frame = np.zeros((*geometry.size[0].tolist(), 3), np.uint8)
    place_image(frame, image, False, geometry.window()[0], geometry.size[0])
    return frame
