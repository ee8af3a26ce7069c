"""How long the tests take, as `make test RECORD=1` found: what FAST=1 leaves out, and which files come first.

durations.json has the seconds of every test that took half a second or more on two cores, with its fixtures. What runs
is recorded again; what it says of other tests stays.
"""

import json
import os
from collections import Counter
from pathlib import Path

FILE = Path(__file__).with_name("durations.json")
RECORD = "DEPERCEIVER_JAX_RECORD_TESTS"  # a variable of the environment, set by make
LONG = 0.5  # seconds


def read() -> dict[str, float]:
    """Seconds by node id."""
    return json.loads(FILE.read_text())


class Recorder:
    """Of pytest's reports, which come to the process that writes the file, also from xdist's workers."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()

    def add(self, report) -> None:
        self.seconds[report.nodeid] += report.duration

    def write(self) -> None:
        """Merges them into the file, if this run is to be recorded."""
        if os.environ.get(RECORD) and "PYTEST_XDIST_WORKER" not in os.environ:
            long = {test: round(x, 1) for test, x in self.seconds.items() if x >= LONG}
            kept = {test: x for test, x in read().items() if test not in self.seconds}
            FILE.write_text(json.dumps(dict(sorted((kept | long).items())), indent=1) + "\n")


def order(items: list, slow: list) -> None:
    """Files that take long first, so that at the end no worker is alone with one while the others have nothing.

    A file that has no record but a test that is marked slow counts as long as the longest.
    """
    of_file: Counter[str] = Counter()
    for test, seconds in read().items():
        of_file[test.split("::")[0]] += seconds
    longest = max(of_file.values(), default=0.0)
    unknown = {item.nodeid.split("::")[0] for item in slow} - of_file.keys()
    items.sort(key=lambda item: -(longest if (file := item.nodeid.split("::")[0]) in unknown else of_file[file]))
