"""How many pictures a second `load(DIR).predict` looks at: one a call, 8 a call, 32 a call.

    python benchmarks/predict.py --workdir=runs/demo --size=480x640

The pictures are JPEG files of noise-free gradients; the time is from files to detections, without the compilation.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deperceiver_jax import load  # noqa: E402

WORKDIR = flags.DEFINE_string("workdir", None, "A run, or an output of import-weights.", required=True)
SIZE = flags.DEFINE_string("size", "480x640", "HEIGHTxWIDTH of the pictures.")
IMAGES = flags.DEFINE_integer("images", 32, "Number of pictures; the largest batch.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Times that all are looked at; the median round counts.")


def main(argv: list[str]) -> None:
    height, width = map(int, SIZE.value.split("x"))
    rows, columns = np.mgrid[:height, :width]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{k}.jpg") for k in range(IMAGES.value)]
        for k, path in enumerate(paths):
            picture = np.stack([rows * k, columns, rows + columns], axis=-1) % 256
            Image.fromarray(picture.astype(np.uint8)).save(path, quality=90)
        detector = load(WORKDIR.value)
        for count in [n for n in (1, 8, 32) if n <= len(paths)]:
            calls = [paths[start : start + count] for start in range(0, len(paths), count)]
            detector.predict(calls[0], batch_size=count)  # compiles
            seconds = []
            for _ in range(ROUNDS.value):
                start = time.perf_counter()
                for call in calls:
                    detector.predict(call, batch_size=count)
                seconds.append(time.perf_counter() - start)
            print(f"{count:>3} a call: {len(paths) / statistics.median(seconds):.2f} pictures/s", flush=True)


if __name__ == "__main__":
    app.run(main)
