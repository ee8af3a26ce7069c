"""When a class head that was trained for other data is kept."""

import pytest

from deperceiver_jax.data.classes import COCO_CATEGORIES, ClassMap
from deperceiver_jax.training.start import other_classes

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
