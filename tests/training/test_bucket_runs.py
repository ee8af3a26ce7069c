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


@pytest.fixture(scope="module")
def whole(shared, tmp_path_factory):
    """The workdir of a run on a disk that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole")
    status, _, err = Run(workdir, shared).end()
    assert status == 0, err
    return workdir


def saved(bucket, run, complete=True):
    """Steps of a run's checkpoints that are complete, or have only begun."""
    names = bucket.names(f"{run}/checkpoints/")
    found = {name.split("/")[0] for name in names}
    return {int(step) for step in found if (f"{step}/commit_success.txt" in names) == complete}


def download(bucket, run, folder):
    for name in bucket.names(f"{run}/"):
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(bucket.read(f"{run}/{name}"))
    return folder


def test_a_run_in_a_bucket_is_that_on_a_disk(shared, whole, bucket, tmp_path):
    def run():
        return Run(f"{bucket.url}/run", shared, variables=bucket.variables)

    def steps(complete):
        return saved(bucket, "run", complete)

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
    asked = []

    def outage(method, path):
        """From the next request on."""
        asked.append(time.monotonic())
        return 503 if asked[-1] - asked[0] < OUTAGE else None

    bucket.fault = outage
    status, out, err = continued.end()
    assert status == 0, err
    assert f"steps {second + 1} to {STEPS}." in out.splitlines()[0]
    assert bucket.refused and "nothing is lost" in err, err

    copy = download(bucket, "run", tmp_path)
    expected, found = arrays_of(whole, STEPS), arrays_of(copy, STEPS)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert array.dtype == found[name].dtype and array.tobytes() == found[name].tobytes(), name
    assert sorted(names_of(copy)) == sorted(names_of(whole))
    assert lines_of(copy) == lines_of(whole)
    assert list(copy.glob("events.out.tfevents.*"))
    for step in (str(STEPS // 2), str(STEPS)):
        for name in ("metrics.json", "detections.json"):
            files = [directory / "eval" / step / name for directory in (copy, whole)]
            assert files[0].read_bytes() == files[1].read_bytes()


def test_two_processes_become_one_and_two_again(shared, whole, bucket, tmp_path):
    """Each time SIGTERM ends them, all after the same step; the losses are those of a run of one."""
    last = 0
    for count in (2, 1):
        run = Run(f"{bucket.url}/moved", [*shared, "--stopped_status=75"], count=count, variables=bucket.variables)
        run.wait_for(lambda before=last: max(saved(bucket, "moved"), default=0) > before, "a checkpoint of its own")
        ends = run.ends(signal.SIGTERM)
        assert [status for status, _, _ in ends] == [75] * count, ends
        assert last < (last := max(saved(bucket, "moved"))) < STEPS and not saved(bucket, "moved", complete=False)
        assert f"after step {last} of {STEPS}" in ends[0][1]
    ends = Run(f"{bucket.url}/moved", shared, count=2, variables=bucket.variables).ends()
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert f"steps {last + 1} to {STEPS}." in ends[0][1]
    rows = [
        [row for row in lines_of(place) if row["split"] == "train"]
        for place in (download(bucket, "moved", tmp_path), whole)
    ]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    assert [row["loss"] for row in rows[0]] == pytest.approx([row["loss"] for row in rows[1]], rel=1e-3)
