"""A TFDS builder that writes its examples at once and in order."""

import tensorflow_datasets as tfds

EXAMPLES_PER_SHARD = 2048  # about 300 MB of COCO's photos


class OrderedBuilder(tfds.core.GeneratorBasedBuilder):
    """A GeneratorBasedBuilder without TFDS's shuffler.

    The shuffler keeps at most 1 GB in memory, needs TensorFlow beyond that, and writes everything twice; the loader
    shuffles epoch by epoch anyway.
    """

    def _download_and_prepare(self, dl_manager, download_config):
        info = self._info()  # says where TFDS wants the files for now; it renames that directory at the end
        writer = tfds.core.SequentialWriter(info, EXAMPLES_PER_SHARD, file_format="array_record")
        splits = self._split_generators(dl_manager)
        writer.initialize_splits(list(splits))
        for split, examples in splits.items():
            writer.add_examples({split: (example for _, example in examples)})
        writer.close_all()
        self.info.set_splits(info.splits)
