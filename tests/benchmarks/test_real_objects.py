"""mAP and F at one IoU, worked out by hand, and the folder on which rates are tuned."""

import pytest

from benchmarks.real_objects import ROWS, divide_training_split, fields_of_all, fields_of_row, main, mean_ap_and_f
from configs.base import base
from deperceiver_jax.data.datasets.layouts.recognise import find_split
from deperceiver_jax.models import field_needs
from deperceiver_jax.program.command_line import parse_config


def box(category, image, x, score=None):
    made = {"category_id": category, "image_id": image, "bbox": [x, 0, 10, 10]}
    return made if score is None else {**made, "score": score}


def test_ap_and_f_of_a_few_boxes():
    truth = [box(1, 1, 0), box(1, 2, 0), box(2, 1, 50)]
    detections = [
        box(1, 1, 4, 0.9),  # IoU 6/14: right
        box(1, 1, 1, 0.8),  # the same object again: wrong
        box(1, 2, 6, 0.7),  # IoU 4/16: wrong
        box(1, 2, 5, 0.6),  # IoU 5/15 > 0.33: right
        box(2, 1, 50, 0.5),  # right
        box(2, 3, 50, 0.4),  # a picture without any
        box(3, 1, 50, 0.3),  # a class without any
    ]
    ap, f = mean_ap_and_f(truth, detections)
    assert ap == pytest.approx(((1 + 2 / 4) / 2 + 1) / 2)
    assert f == pytest.approx(2 * 3 / (5 + 3))  # at 0.5: 3 of 5 right, 3 of 3 found
    assert mean_ap_and_f(truth, []) == (0.0, 0.0)


def test_rates_are_tuned_on_the_training_split_alone(rectangles, tmp_path):
    folder = tmp_path / "source"
    (folder / "train").mkdir(parents=True)
    root = rectangles.directory
    (folder / "train.json").symlink_to(f"{root}/annotations/instances_val2017.json")
    for file in range(10):
        (folder / "train" / f"{file}.png").symlink_to(f"{root}/val2017/{file}.png")
    divided = divide_training_split(folder, tmp_path / "divided")
    data = base().data
    data.directory, data.layout = str(divided), "one_file"
    train, validation = (find_split(divided, data, split).names for split in ("train", "validation"))
    assert len(train) == 8 and len(validation) == 2 and not set(train) & set(validation)


def test_a_folder_that_is_not_there_is_told_before_any_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["real_objects.py", f"--coco={tmp_path}/none", f"--output={tmp_path}/runs"])
    with pytest.raises(SystemExit):
        main()
    assert f"error: --coco: There is no directory {tmp_path}/none" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("row", ROWS)
def test_every_row_takes_the_fields_of_all(row):
    arguments = ["train.py", f"--config=configs/{ROWS[row].config}", *fields_of_row(ROWS[row], 4, 120, "1e-3")]
    made = parse_config([*arguments, *fields_of_all(64), "--config.data.directory=/data"], needs=field_needs)
    assert made.data.scales == (64,) and (made.train.num_steps, made.data.batch_size) == (30, 4)
    assert made.optimizer.name == "muon" and made.optimizer.learning_rate == 1e-3
    assert made.model.backbone.width == 16 and made.model.backbone.depth == 18
