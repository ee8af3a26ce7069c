"""What all pictures share: their colours and fonts, and the file that they go to."""

from pathlib import Path

from absl import flags
from PIL import Image

from deperceiver_jax.errors import UserError
from deperceiver_jax.files import as_path, make_folder, reason, require_file, written_whole

PAPER, MOUNT, FAINT, INK = (255, 255, 255), (233, 236, 239), (108, 117, 125), (33, 37, 41)


def need(values: flags.FlagValues, *names: str) -> None:
    """Raises UserError for a flag that was not given."""
    for name in names:
        if values[name].value is None:
            raise UserError(f"--{name} is needed: {values[name].help}")


def check_output(output: str, what: str = "--output") -> Path:
    """The path of a picture, given as `what`. Raises UserError, before anything is computed, for one that could not be
    written."""
    return require_file(what, output, (".png", ".jpg"))


def save_picture(picture: Image.Image, path: str | Path, what: str = "--output", **options) -> None:
    """Writes a .png or .jpg, given as `what`, whole or not at all. options: Pillow's, of a .jpg. Raises UserError."""
    path = as_path(path)
    try:
        make_folder(path.parent)
        with written_whole(path) as partial:
            if path.suffix.lower() == ".jpg":
                picture.save(partial, "JPEG", **options)
            else:
                picture.save(partial, "PNG")
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be written: {reason(error)}.") from error


def wrap(text: str, font, width: int) -> list[str]:
    """Lines of whole words that fit into `width` pixels; a longer word has a line of its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
