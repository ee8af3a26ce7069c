"""When a class head that was trained for other data is kept, and what the first line of a run says."""

from types import SimpleNamespace

import jax
import pytest
from ml_collections import ConfigDict

from deperceiver_jax.data.classes import COCO_CATEGORIES, ClassMap
from deperceiver_jax.training.start import describe_run, other_classes

COCO = ClassMap.from_categories(COCO_CATEGORIES.items())
KITCHEN = ClassMap.from_categories([(5, "cup"), (9, "plate"), (12, "spoon")])


@pytest.mark.parametrize(
    ("stored", "classes", "reason"),
    [
        (COCO, COCO, ""),
        (COCO, ClassMap.from_categories([(18, "dog"), (1, "person")]), ""),  # COCO's own slots, fewer of them
        (ClassMap.from_categories([(18, "dog")]), COCO, "it has no class in slot 1, which is 'person' here"),
        (COCO, KITCHEN, "it has 91 class slots, and this data has 3"),
        (KITCHEN, ClassMap.from_categories([(1, "cup"), (2, "plate"), (3, "spoon")]), ""),  # other ids, the same slots
        (
            KITCHEN,
            ClassMap.from_categories([(5, "cup"), (9, "fork"), (12, "spoon")]),
            "its slot 1 is 'plate', and 'fork' here",
        ),
    ],
)
def test_a_class_head_is_kept_where_its_classes_are_in_their_slots(stored, classes, reason):
    assert other_classes(stored, classes) == reason


@pytest.mark.parametrize(
    ("processes", "told"),
    [(1, "An epoch reads 0.0045 GB of pictures from the disk."), (4, "the disk, each of 4 processes 0.00112 GB.")],
)
def test_the_first_line_says_what_an_epoch_reads(tiny, monkeypatch, processes, told):
    """Nine of ten pictures of half a megabyte fill the batches of an epoch."""
    fixture = tiny()
    fixture.config.data.batch_size, fixture.config.model = 3, ConfigDict({"name": "tiny"})
    source = type("", (), {"bytes_per_image": 500_000.0, "__len__": lambda self: 10})()
    batches = SimpleNamespace(buckets=[(8, 8)], steps_per_epoch=3)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    assert describe_run(fixture.config, fixture.plan.abstract, source, batches, range(1, 4)).endswith(told)
