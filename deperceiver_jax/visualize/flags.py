"""The flags of what visualize draws, apart from the drawing, for which a help text need not wait."""

from absl import flags

from deperceiver_jax.data.datasets.shapes.drawing import CLASSES
from deperceiver_jax.program.flags import define_detector_flags

COUNTS = "1,2,3,4,6,8,12,16,20,24,32,40,48"  # of objects


def define_image_flags(values: flags.FlagValues) -> None:
    """Of a detector and an image."""
    define_detector_flags(values)
    define_picture_flags(values)


def define_picture_flags(values: flags.FlagValues) -> None:
    """Of an image, and the picture that is made of it."""
    flags.DEFINE_string("image", None, "An image file.", flag_values=values)
    flags.DEFINE_integer("example", None, "Or an image of the evaluated split, counted from 0.", flag_values=values)
    flags.DEFINE_string("output", None, "The picture to write, a .png or .jpg.", flag_values=values)


def define_split_flags(values: flags.FlagValues) -> None:
    define_detector_flags(values)
    flags.DEFINE_string("split", None, "Of the data set; without it the run's evaluated one.", flag_values=values)
    flags.DEFINE_integer("images", None, "Only so many, taken evenly; without it all.", flag_values=values)
    flags.DEFINE_string("output", None, "The picture to write, a .png or .jpg.", flag_values=values)


def detections_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "An evaluated run.", flag_values=values)
    flags.DEFINE_string("output", None, "The picture to write, a .png or .jpg.", flag_values=values)
    flags.DEFINE_integer("images", 8, "How many images, taken evenly from the split.", flag_values=values)
    flags.DEFINE_float("score_threshold", 0.5, "Detections below it are left out.", flag_values=values)


def small_objects_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_list("published", [], "Families whose published bars are shown, too.", flag_values=values)
    flags.DEFINE_string("output", None, "The picture to write, a .png or .jpg.", flag_values=values)


def layers_flags(values: flags.FlagValues) -> None:
    define_split_flags(values)
    flags.DEFINE_float("nms_iou", 0.5, "From which overlap on the lower score is suppressed.", flag_values=values)


def queries_flags(values: flags.FlagValues) -> None:
    define_split_flags(values)
    flags.DEFINE_string("queries", None, "Which slots, as in 3,17; else --slots of them.", flag_values=values)
    flags.DEFINE_integer("slots", 20, "How many slots, taken evenly from all.", flag_values=values)
    flags.DEFINE_float("score_threshold", 0.0, "Boxes below it are left out.", flag_values=values)


def counting_flags(values: flags.FlagValues) -> None:
    define_detector_flags(values)
    flags.DEFINE_string("output", None, "The picture to write, a .png or .jpg.", flag_values=values)
    flags.DEFINE_string("label", CLASSES[0], "The class of all objects.", flag_values=values)
    flags.DEFINE_list("counts", COUNTS, "How many objects a picture has.", flag_values=values)
    flags.DEFINE_integer("pictures", 10, "How many pictures of each count.", flag_values=values)
    flags.DEFINE_float("score_threshold", 0.5, "Detections below it are left out.", flag_values=values)


def attention_flags(values: flags.FlagValues) -> None:
    define_image_flags(values)
    flags.DEFINE_string("queries", None, "Which queries, as in 3,17; else the best ones.", flag_values=values)
    flags.DEFINE_integer("best", 3, "How many of the best queries of different objects.", flag_values=values)
    flags.DEFINE_integer("layer", -1, "Which decoder layer, from 0; -1 is the last.", flag_values=values)


def encoder_flags(values: flags.FlagValues) -> None:
    define_image_flags(values)
    flags.DEFINE_multi_string("points", [], "x,y of a point, in pixels of the image", flag_values=values)
    flags.DEFINE_integer("layer", -1, "Which encoder layer, from 0; -1 is the last.", flag_values=values)
    flags.DEFINE_integer("level", 0, "Of which level the tokens are, from 0, the finest.", flag_values=values)


def latents_flags(values: flags.FlagValues) -> None:
    define_image_flags(values)
    flags.DEFINE_float("score_threshold", 0.4, "From which score on a latent has an object.", flag_values=values)


def compare_attention_flags(values: flags.FlagValues) -> None:
    define_picture_flags(values)
    flags.DEFINE_integer("object", 0, "Which object, from 0.", flag_values=values)
    flags.DEFINE_integer("layer", -1, "Which decoder layer, from 0; -1 is the last.", flag_values=values)


DRAWN = {
    "detections": detections_flags,
    "small_objects": small_objects_flags,
    "layers": layers_flags,
    "queries": queries_flags,
    "counting": counting_flags,
    "attention": attention_flags,
    "encoder": encoder_flags,
    "latents": latents_flags,
    "compare_attention": compare_attention_flags,
}
