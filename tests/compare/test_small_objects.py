"""APs / AP as bars, of runs and of published rows."""

from PIL import Image

from deperceiver_jax.program.command_line import run
from deperceiver_jax.visualize import __main__ as visualize


def draw(*arguments):
    return run(visualize.main, ["visualize", "small_objects", *map(str, arguments)])


def test_bars(make_run, tmp_path, capsys):
    (first, _), (other, _) = make_run("a", 2), make_run("b", 8, width=3)
    output = tmp_path / "bars.png"
    heights = []
    for arguments in ([first], [first, other, "--published=deperceiver,detr"], ["--published=deperceiver"]):
        assert draw(*arguments, f"--output={output}") == 0, capsys.readouterr().err
        with Image.open(output) as picture:
            heights.append(picture.height)
    assert heights[0] < heights[2] < heights[1]
    for arguments, sentence in (
        ([f"--output={output}"], "There is no bar to draw"),
        ([first], "--output is needed"),
        (["--published=yolo", f"--output={output}"], "--published is 'yolo'"),
        ([first, f"--output={output}", "--config.seed=1"], "bars take no config"),
        ([tmp_path, f"--output={output}"], f"{tmp_path}"),
    ):
        assert draw(*arguments) == 1
        assert sentence in capsys.readouterr().err
