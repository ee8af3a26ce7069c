"""visualize --help lists every picture, and each names itself."""

from pathlib import Path

from deperceiver_jax.program.command_line import run
from deperceiver_jax.visualize import __main__ as visualize


def test_every_picture_is_listed(capsys):
    """A file with `main` draws one. That a help text starts no JAX is in tests/program/test_command.py."""
    folder = Path(visualize.__file__).parent
    drawn = {path.stem for path in folder.glob("[!_]*.py") if "\ndef main(argv" in path.read_text()}
    assert drawn == set(visualize.DRAWN)
    assert run(visualize.main, ["visualize", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in drawn) and "encoder_decoder_memory.py" in printed
    for name in drawn:
        assert f"deperceiver visualize {name} " in (folder / f"{name}.py").read_text()


def test_a_name_that_is_not_quite_right(capsys):
    assert run(visualize.main, ["visualize", "query"]) == 1
    assert "the nearest is queries; --help shows how." in capsys.readouterr().err
