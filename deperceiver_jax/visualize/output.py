"""What all pictures share: their colours and fonts, and the file that they go to."""

from absl import flags

from deperceiver_jax.errors import UserError

PAPER, MOUNT, FAINT, INK = (255, 255, 255), (233, 236, 239), (108, 117, 125), (33, 37, 41)


def need(values: flags.FlagValues, *names: str) -> None:
    """Raises UserError for a flag that was not given."""
    for name in names:
        if values[name].value is None:
            raise UserError(f"--{name} is needed: {values[name].help}")


def check_output(output: str) -> None:
    """Raises UserError for a picture that could not be written, before anything is computed."""
    if not output.lower().endswith((".png", ".jpg")):
        raise UserError(f"--output: {output} must end in .png or .jpg.")


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
