"""A place is looked at before the work is done, and nothing is made there."""

import os
import stat

import pytest

from deperceiver_jax.errors import UserError
from deperceiver_jax.files import reason, require_writable


def test_places_that_can_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "new", tmp_path / "new" / "deep" / "a.png", tmp_path / "file"):
        require_writable("--output", path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError) as refusal:
        require_writable("--output", tmp_path / "file" / "deep" / "a")
    place = tmp_path / "file"
    assert str(refusal.value) == f"--output: {place}/deep/a cannot be written: {place} is not a folder."


@pytest.mark.parametrize("name", ["", "a", "deep/a"])
def test_a_folder_of_another_users(tmp_path, monkeypatch, name):
    """Root may write anywhere, so the answer of the system is replaced by that to another user."""
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o500)
    monkeypatch.setattr(
        os, "access", lambda path, mode: mode & ~os.X_OK == 0 or bool(stat.S_IWUSR & path.stat().st_mode)
    )
    with pytest.raises(UserError, match=f"cannot be written: {folder} does not permit it"):
        require_writable("--output", folder / name)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(28, "what it says"), "No space left on device"),
        (OSError(-2, "Name or service not known"), "Name or service not known"),
        (ValueError("Error opening: it has a cause [with='a long list']"), "Error opening: it has a cause"),
        (ValueError("failed [os_error_code='13']"), "Permission denied"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_reasons_are_the_systems_or_the_first_sentence(error, why):
    assert reason(error) == why
