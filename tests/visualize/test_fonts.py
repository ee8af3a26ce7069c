"""Class names in any script: drawn in a font that has their letters, or as ids with one warning."""

import numpy as np
import pytest
from PIL import ImageFont

from deperceiver_jax.data import ClassMap
from deperceiver_jax.visualize import fonts
from deperceiver_jax.visualize.draw_boxes import draw_detections
from deperceiver_jax.visualize.fonts import font_for, has_letter, installed_fonts, readable

CYRILLIC = next((path for path in installed_fonts() if has_letter(path, "ш")), None)
needs_font = pytest.mark.skipif(CYRILLIC is None, reason="no installed font has Cyrillic letters")


def installed(monkeypatch, *paths):
    monkeypatch.setattr(fonts, "installed_fonts", lambda: paths)


def test_plain_names_keep_pillows_font(monkeypatch):
    installed(monkeypatch, "never/opened.ttf")
    assert font_for("traffic light 0.75", 20).getname() == ImageFont.load_default(20).getname()
    assert not has_letter(None, "ш") and not has_letter(None, "猫") and has_letter(None, "a")


@needs_font
def test_a_font_is_found_for_other_scripts(monkeypatch, capsys):
    installed(monkeypatch, CYRILLIC)
    assert font_for("чашка 0.75", 20).path == CYRILLIC
    assert readable(ClassMap.from_categories([(1, "чашка"), (2, "cup")]))(0) == "чашка"
    assert capsys.readouterr().err == ""


def test_without_a_font_ids_are_drawn_with_one_warning(monkeypatch, tmp_path, capsys):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    installed(monkeypatch, str(broken), str(tmp_path / "missing.otf"))
    name_of = readable(ClassMap.from_categories([(7, "чашка"), (9, "cup"), (2**60, "猫")]))
    assert [name_of(slot) for slot in range(3)] == ["7", "cup", str(2**60)]
    assert capsys.readouterr().err == (
        "warning: No installed font has all letters of 2 class names (the first is чашка); their category ids are "
        "drawn. A font such as Noto Sans CJK would have most.\n"
    )
    assert font_for("чашка", 20).getname() == ImageFont.load_default(20).getname()


@needs_font
def test_letters_are_drawn_and_not_squares(monkeypatch):
    """Two names of equally many letters are the same picture when every letter is a square."""

    def label(name):
        grey = np.full((600, 600, 3), 128, np.uint8)
        return draw_detections(grey, np.array([[100.0, 100, 500, 500]]), np.array([0]), None, lambda slot: name)

    installed(monkeypatch)
    np.testing.assert_array_equal(label("чашка"), label("птица"))
    installed(monkeypatch, CYRILLIC)
    assert (label("чашка") != label("птица")).any()


def test_fonts_are_looked_for_where_systems_keep_them(monkeypatch, tmp_path):
    for name in ("a/Zapf.ttf", "NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "readme.txt"):
        (tmp_path / "fonts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fonts" / name).touch()
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path))
    monkeypatch.delenv("HOME")
    found = [path for path in installed_fonts.__wrapped__() if path.startswith(str(tmp_path))]
    assert [path.removeprefix(f"{tmp_path}/fonts/") for path in found] == [
        "NotoSansCJK-Regular.ttc",
        "DejaVuSans.ttf",
        "a/Zapf.ttf",
    ]
