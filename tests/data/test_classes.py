import json

import numpy as np
import pytest

from deperceiver_jax.data.classes import COCO_CATEGORIES, ClassMap, require_same_classes
from deperceiver_jax.errors import UserError


def test_coco_has_the_official_categories():
    assert len(COCO_CATEGORIES) == 80
    assert (min(COCO_CATEGORIES), max(COCO_CATEGORIES)) == (1, 90)
    places = {1: "person", 11: "fire hydrant", 13: "stop sign", 44: "bottle", 70: "toilet", 90: "toothbrush"}
    assert {id: COCO_CATEGORIES[id] for id in places} == places


@pytest.mark.parametrize("ids", [list(COCO_CATEGORIES), [1, 3, 90]])
def test_coco_and_its_subsets_keep_the_91_slots(ids):
    classes = ClassMap.from_categories((id, COCO_CATEGORIES[id]) for id in reversed(ids))
    assert classes.num_slots == 91
    assert classes.slots == classes.category_ids == tuple(ids)
    assert classes.name(90) == "toothbrush"
    assert classes.name(12) == "unused 12"


@pytest.mark.parametrize("categories", [[(1, "person"), (2, "cat")], [(0, "person"), (2, "bicycle")]])
def test_any_other_data_set_has_contiguous_slots(categories):
    classes = ClassMap.from_categories(categories)
    assert (classes.slots, classes.num_slots) == ((0, 1), 2)


def test_slots_follow_ascending_category_ids():
    classes = ClassMap.from_categories([(70, "z"), (-4, "m"), (12, "a")])
    assert classes.category_ids == (-4, 12, 70)
    assert classes.names == ("m", "a", "z")
    np.testing.assert_array_equal(classes.category_to_slot(np.array([70, 12, 70, -4])), [2, 1, 2, 0])


def test_classes_json_is_the_contracts_and_comes_back():
    classes = ClassMap.from_categories([(5, "dog"), (1, "cat")])
    stored = json.loads(classes.to_json())
    assert stored == {
        "num_slots": 2,
        "classes": [{"slot": 0, "category_id": 1, "name": "cat"}, {"slot": 1, "category_id": 5, "name": "dog"}],
    }
    assert ClassMap.from_json(classes.to_json()) == classes


def test_two_splits_with_different_classes_are_refused():
    train = ClassMap.from_categories([(1, "cat"), (5, "dog")])
    require_same_classes(train, "train", ClassMap.from_categories([(5, "dog"), (1, "cat")]), "validation")
    with pytest.raises(UserError, match=r"of train and validation differ: train has category 5 \('dog'\) in slot 1"):
        require_same_classes(train, "train", ClassMap.from_categories([(1, "cat")]), "validation")
    with pytest.raises(UserError, match=r"validation has category 5 \('bird'\) in slot 1, train has not"):
        require_same_classes(train, "train", ClassMap.from_categories([(1, "cat"), (5, "bird")]), "validation")
