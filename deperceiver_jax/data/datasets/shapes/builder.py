"""TFDS builder of the built-in data set `shapes`: drawn, never downloaded; see drawing.py for what is in it."""

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from deperceiver_jax.data.datasets.ordered_builder import OrderedBuilder
from deperceiver_jax.data.datasets.record import Annotations, example, record_features
from deperceiver_jax.data.datasets.shapes import drawing


class Shapes(OrderedBuilder):
    """Coloured shapes with boxes: `shapes/standard`, and `shapes/small` with many small shapes in small images."""

    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=name, version=recipe.version, description=recipe.description)
        for name, recipe in drawing.RECIPES.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        categories = [[position + 1, name] for position, name in enumerate(drawing.CLASSES)]
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.builder_config.description,
            features=record_features(),
            metadata=tfds.core.MetadataDict(categories=categories, notes=[]),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in drawing.IMAGES}

    def _generate_examples(self, split):
        recipe = drawing.RECIPES[self.builder_config.name]
        annotation_id = 0
        for index in tqdm(range(drawing.IMAGES[split]), desc=f"Drawing {split}", unit=" images", disable=None):
            picture = drawing.draw(recipe, split, index)
            image = drawing.encode(picture.image)
            count = len(picture.labels)
            annotations = Annotations(
                boxes=picture.boxes,
                category_id=picture.labels + 1,
                is_crowd=np.zeros(count, bool),
                area=picture.areas,
                id=annotation_id + 1 + np.arange(count),
            )
            annotation_id += count
            yield index, example(image, f"{split}_{index:05d}.jpg", index + 1, annotations)
