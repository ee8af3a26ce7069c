"""Many people at the app at once, and files that are no pictures: answers lost or mixed up, statuses, memory.

    python benchmarks/app_load.py --workdir=runs/demo [--clients=16] [--seconds=60] [--files=500]

Starts `deperceiver app` on a free port of this machine. Each client has a picture of its own, whose boxes were asked
for before, and sends it again and again; an answer with other boxes is another client's. Then one client sends mutated
files: bytes changed, cut out, doubled, ends cut off, of all kinds that the app takes. Memory is the app's resident set,
as Linux tells it.
"""

import http.client
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from deperceiver_jax.errors import UserError  # noqa: E402
from deperceiver_jax.program.command_line import parse_flags, run  # noqa: E402

KINDS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP")
TOLERANCE = 0.5  # pixels: batches order sums otherwise, and boxes of other pictures are further away


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "The run whose detector is used.", flag_values=values)
    flags.DEFINE_integer("clients", 16, "At the same time.", flag_values=values, lower_bound=1)
    flags.DEFINE_float("seconds", 60, "That they send pictures for.", flag_values=values)
    flags.DEFINE_integer("files", 500, "That are mutated.", flag_values=values)


def main(argv: list[str]) -> None:
    values, _ = parse_flags(argv, define_flags, __doc__)
    if not values.workdir:
        raise UserError("--workdir is missing: a run.")
    command = [sys.executable, "-m", "deperceiver_jax", "app", f"--workdir={values.workdir}", "--port=0"]
    app = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        if not (match := re.search(r"http://127\.0\.0\.1:(\d+)", app.stdout.readline())):
            raise UserError(f"The app did not start: {app.stderr.read()}")
        port = int(match[1])
        pictures = [draw(number) for number in range(values.clients)]
        expected = [ask(port, picture)[1] for picture in pictures]
        before = resident(app.pid)
        told = load(port, pictures, expected, seconds=values.seconds)
        print(describe_load(told, values.clients, values.seconds))
        print(f"resident: {before:.0f} MB before, {resident(app.pid):.0f} MB after", flush=True)
        statuses: Counter[int] = Counter()
        for number, file in enumerate(mutated_files(values.files)):
            status, content = ask(port, file)
            statuses[status] += 1
            if status != 200 and not (400 <= status < 500 and content["error"].endswith(".")):
                raise UserError(f"Mutated file {number} got {status}: {content}")
            if number in {values.files * k // 5 - 1 for k in range(1, 6)}:
                print(f"after {number + 1} mutated files: {resident(app.pid):.0f} MB", flush=True)
        print(f"mutated files by status: {dict(sorted(statuses.items()))}")
    finally:
        app.send_signal(signal.SIGINT)
        _, log = app.communicate()
    print("the app's log is empty" if not log.strip() else f"the app's log:\n{log}")


def draw(number: int) -> bytes:
    """A PNG of a size of its own, so that its boxes are not another's, with a few rectangles."""
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (200 + 12 * number, 160 + 7 * number), tuple(rng.integers(0, 256, 3).tolist()))
    for _ in range(4):
        left, top = (int(rng.integers(0, side - 40)) for side in image.size)
        place = (left, top, left + int(rng.integers(12, 40)), top + int(rng.integers(12, 40)))
        ImageDraw.Draw(image).rectangle(place, tuple(rng.integers(0, 256, 3).tolist()))
    return encode(image, "PNG")


def encode(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def ask(port: int, picture: bytes, path: str = "/detect", **headers: str) -> tuple[int, dict]:
    """(status, content) of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", path, picture, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


class Answered(NamedTuple):
    """What one client got."""

    seconds: list[float]  # of each answer
    refused: int  # 503, each tried again
    wrong: list[str]  # what was lost, or another's


def load(
    port: int, pictures: Sequence[bytes], expected: Sequence[dict], *, seconds: float = 0, times: int = 0
) -> list[Answered]:
    """A client a picture, all at once, each for so many seconds or so many times."""
    told = [Answered([], 0, []) for _ in pictures]
    end = time.perf_counter() + seconds

    def work(number: int) -> None:
        count = 0
        while count < times if times else time.perf_counter() < end:
            start = time.perf_counter()
            try:
                status, content = ask(port, pictures[number])
            except (OSError, http.client.HTTPException, ValueError) as error:
                told[number].wrong.append(f"{type(error).__name__}: {error}")
                continue
            if status == 503:
                told[number] = told[number]._replace(refused=told[number].refused + 1)
                time.sleep(0.05)
                continue
            count += 1
            told[number].seconds.append(time.perf_counter() - start)
            if status != 200 or not same(content, expected[number]):
                told[number].wrong.append(f"status {status}: {str(content)[:200]}")

    threads = [threading.Thread(target=work, args=[number]) for number in range(len(pictures))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def same(content: dict, expected: dict) -> bool:
    """The picture's own size, and its five best boxes, whose order may change where scores are alike."""
    if any(content[name] != expected[name] for name in ("width", "height")):
        return False
    boxes = np.array([one["box"] for one in content["detections"]])
    best = np.array([one["box"] for one in expected["detections"][:5]])
    apart = np.abs(best[:, None] - boxes[None]).max(axis=-1).min(axis=1)
    return len(boxes) == len(expected["detections"]) and bool((apart < TOLERANCE).all())


def describe_load(told: Sequence[Answered], clients: int, seconds: float) -> str:
    times = np.concatenate([answered.seconds for answered in told])
    wrong = [sentence for answered in told for sentence in answered.wrong]
    lines = [
        f"{clients} clients for {seconds:g} s: {len(times)} answers, {len(times) / seconds:.1f} a second, "
        f"{len(wrong)} lost or mixed up, {sum(answered.refused for answered in told)} refused and tried again",
        f"seconds an answer: median {np.median(times):.2f}, 99th percentile {np.percentile(times, 99):.2f}, "
        f"most {times.max():.2f}; answers of a client: {min(len(answered.seconds) for answered in told)} or more",
    ]
    return "\n".join(lines + wrong[:5])


def mutated_files(count: int, seed: int = 0) -> Iterator[bytes]:
    """Pictures of all kinds with something broken: bytes anywhere or in the header, a stretch, the end."""
    rng = np.random.default_rng(seed)
    whole = [encode(Image.open(io.BytesIO(draw(number))), kind) for number, kind in enumerate(KINDS)]
    for number in range(count):
        data = bytearray(whole[number % len(whole)])
        place, length = int(rng.integers(len(data))), int(rng.integers(1, 200))
        match (number // len(whole)) % 5:
            case 0:
                for position in rng.integers(len(data), size=20):
                    data[position] = int(rng.integers(256))
            case 1:
                for position in rng.integers(min(len(data), 64), size=3):
                    data[position] = int(rng.integers(256))
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = data[place : place + length]
            case 4:
                del data[place:]
        yield bytes(data)


def resident(pid: int) -> float:
    """Megabytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


if __name__ == "__main__":
    sys.exit(run(main))
