"""The sheet of the attention command: a row for each query, large panels at its left and lines of small ones."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deperceiver_jax.visualize.attention_maps import Size, View
from deperceiver_jax.visualize.fonts import fitting
from deperceiver_jax.visualize.output import FAINT, INK, MOUNT, PAPER, save_picture, wrap

SMALL = 168  # long side of a small panel; a large one is as high as two of them with what is between
GAP, CAPTION, MARGIN = 8, 20, 20
CAPTION_WIDTH = 104  # at least
MOST = 4  # times as long as it is wide is a panel at most; those of longer images are stretched


def save_sheet(
    path: str | Path, views: Sequence[View], aspect: float, *, title: str, note: str, side: int = SMALL
) -> None:
    """Writes the picture. aspect: width / height of the image; side: the long one of a small panel, in pixels.

    Large panels lie below one another where there are lines enough, else side by side.
    """
    aspect = min(max(aspect, 1 / MOST), MOST)
    small = round(side / max(aspect, 1)), round(side * min(aspect, 1))
    step = small[0] + CAPTION + GAP
    high = 2 * small[0] + CAPTION + GAP
    large = high, max(round(high * aspect), CAPTION_WIDTH)
    num_lines, num_large = max(len(view.lines) for view in views), max(len(view.large) for view in views)
    stacked = num_lines > 2 * (num_large - 1)
    columns = max(len(line) for view in views for line in view.lines)
    beside = MARGIN + (1 if stacked else num_large) * (large[1] + GAP) + GAP
    column = max(small[1], CAPTION_WIDTH) + GAP
    width = max(beside + columns * column - GAP + MARGIN, 560)
    row_height = max(num_lines * step, (num_large if stacked else 1) * 2 * step)

    body = ImageFont.load_default(15)
    lines = wrap(note, body, width - 2 * MARGIN)
    head = 56 + 20 * len(lines)
    sheet = Image.new("RGB", (width, head + len(views) * (row_height + GAP) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 14), title, fill=INK, font=fitting(title, 24, width - 2 * MARGIN))
    for i, line in enumerate(lines):
        draw.text((MARGIN, 48 + 20 * i), line, fill=FAINT, font=body)
    for i, view in enumerate(views):
        y = head + i * (row_height + GAP)
        draw.line((MARGIN, y, width - MARGIN, y), fill=MOUNT, width=2)
        for j, panel in enumerate(view.large):
            corner = (MARGIN, y + 2 * step * j) if stacked else (MARGIN + (large[1] + GAP) * j, y)
            _put(sheet, panel, corner, large)
        for j, line in enumerate(view.lines):
            for k, panel in enumerate(line):
                _put(sheet, panel, (beside + k * column, y + j * step), small)
    save_picture(sheet, path, quality=72, optimize=True, progressive=True)


def _put(sheet: Image.Image, panel, corner: tuple[int, int], size: Size) -> None:
    x, y = corner
    font = fitting(panel.caption, 14, max(size[1], CAPTION_WIDTH))
    ImageDraw.Draw(sheet).text((x, y + GAP + CAPTION - 4), panel.caption, fill=INK, font=font, anchor="ls")
    sheet.paste(Image.fromarray(np.ascontiguousarray(panel.draw(size))), (x, y + GAP + CAPTION))
