"""A run whose workdir is in a bucket: killed, refused and slowed down, it ends with the bits of one on a disk."""

import signal
import time

import pytest

from tests.train_process import Run, arrays_of, lines_of, names_of

pytestmark = pytest.mark.slow

STEPS = 30
OUTAGE = 8  # seconds


@pytest.fixture(scope="module")
def shared(rectangles, tmp_path_factory):
    return [
        f"--config.data.directory={rectangles.directory}",
        f"--config.data.prepared_directory={rectangles.prepared_directory}",
        f"--config.train.compilation_cache={tmp_path_factory.mktemp('compiled')}",
        f"--config.train.num_steps={STEPS}",
        "--config.train.log_every=3",
        f"--config.train.eval_every={STEPS // 2}",
        "--config.train.checkpoint_every=5",
    ]


def test_a_run_in_a_bucket_is_that_on_a_disk(shared, bucket, tmp_path):
    status, _, err = Run(tmp_path / "whole", shared).end()
    assert status == 0, err

    def run():
        return Run(f"{bucket.url}/run", shared, variables=bucket.variables)

    def steps(complete):
        """Of the checkpoints that are complete, or have only begun."""
        names = bucket.names("run/checkpoints/")
        found = {name.split("/")[0] for name in names}
        return {int(step) for step in found if (f"{step}/commit_success.txt" in names) == complete}

    killed = run()
    killed.wait_for(lambda: steps(False) and steps(True), "a save under way")
    assert killed.end(signal.SIGKILL)[0] == -signal.SIGKILL
    assert steps(False), "the save was over before the kill"
    first = max(steps(True))

    killed = run()
    killed.wait_for(lambda: not steps(False) and max(steps(True)) > first, "no save under way")
    assert killed.end(signal.SIGKILL)[0] == -signal.SIGKILL
    second = max(steps(True))
    assert first < second < STEPS

    continued = run()
    continued.wait_for(lambda: max(steps(True)) > second, "a checkpoint of its own")
    until = time.monotonic() + OUTAGE
    bucket.fault = lambda method, path: 503 if time.monotonic() < until else None
    status, out, err = continued.end()
    assert status == 0, err
    assert f"steps {second + 1} to {STEPS}." in out.splitlines()[0]
    assert bucket.refused and "has not answered for 5 s; waiting for it." in err and "answers again" in err, err

    for name in bucket.names("run/"):
        copy = tmp_path / "copy" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(bucket.read(f"run/{name}"))
    expected, found = arrays_of(tmp_path / "whole", STEPS), arrays_of(tmp_path / "copy", STEPS)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert array.dtype == found[name].dtype and array.tobytes() == found[name].tobytes(), name
    assert sorted(names_of(tmp_path / "copy")) == sorted(names_of(tmp_path / "whole"))
    assert lines_of(tmp_path / "copy") == lines_of(tmp_path / "whole")
    assert list((tmp_path / "copy").glob("events.out.tfevents.*"))
    for step in (str(STEPS // 2), str(STEPS)):
        for name in ("metrics.json", "detections.json"):
            files = [directory / "eval" / step / name for directory in (tmp_path / "copy", tmp_path / "whole")]
            assert files[0].read_bytes() == files[1].read_bytes()
