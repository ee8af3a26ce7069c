"""One queue before one detector: what many people ask for is run in batches, one after the other."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from deperceiver_jax.errors import UserError
from deperceiver_jax.prediction.detections import PictureDetections
from deperceiver_jax.prediction.detector import PictureDetector


class DetectionQueue:
    """A thread that owns the detector. While a batch runs, pictures gather for the next one; none waits for another."""

    def __init__(self, detector: PictureDetector):
        self._detector, self._batch_size = detector, detector.config.eval.batch_size
        self._waiting: deque[tuple[bytes, Future]] = deque()
        self._thread = ThreadPoolExecutor(1, "detector")

    def detect(self, picture: bytes) -> Future[PictureDetections]:
        """An image file -> what is in it, whatever the scores. The future may raise UserError: it is no whole image."""
        future: Future[PictureDetections] = Future()
        self._waiting.append((picture, future))
        self._thread.submit(self._run_waiting)
        return future

    def run_ahead(self, tasks: Sequence[Callable[[], object]]) -> None:
        """Runs all tasks, each behind what has come in meanwhile, so that nobody waits for more than one of them."""
        if tasks:
            self._thread.submit(tasks[0])
            self._thread.submit(self.run_ahead, tasks[1:])

    def submit(self, function: Callable, *arguments: Any) -> Future:
        """function(*arguments) between two batches."""
        return self._thread.submit(function, *arguments)

    def close(self) -> None:
        """Ends after what runs now; what waits is cancelled."""
        self._thread.shutdown(cancel_futures=True)
        for _, future in self._waiting:
            future.cancel()

    def _run_waiting(self) -> None:
        """Runs one batch of what waits: nothing, where an earlier call took all of it along."""
        jobs: list[tuple[bytes, Future]] = []
        while self._waiting and len(jobs) < self._batch_size:
            picture, future = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                jobs.append((picture, future))
        if jobs:
            self._run(jobs)

    def _run(self, jobs: list[tuple[bytes, Future]]) -> None:
        try:
            answers = list(self._detector.stream((picture for picture, _ in jobs), threshold=0))
        except Exception as error:
            if len(jobs) == 1:  # UserError would mean the picture, but that is an answer, and this the detector's fault
                jobs[0][1].set_exception(RuntimeError(str(error)).with_traceback(error.__traceback__))
            else:  # whose fault it is shows when each is alone
                for job in jobs:
                    self._run([job])
            return
        for (_, future), answer in zip(jobs, answers, strict=True):
            if isinstance(answer, UserError):
                future.set_exception(answer)
            else:
                future.set_result(answer)
