"""Files that grow, in a bucket: they are written on this machine, and lie in the bucket whole, again and again.

A bucket has no locks either, and a run that was killed could not give one back. So the run that begins last owns the
workdir: it leaves its mark there, and an earlier one that finds another's mark stops before it writes anything more.
"""

import contextlib
import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from deperceiver_jax.errors import UserError
from deperceiver_jax.files import is_bucket, reason, told_when_slow, write_whole

OWNER = ".owner"  # whose the workdir is
EVERY = 10.0  # seconds between two copies, at least; one object takes one a second
SHARE = 0.05  # of the time at most goes into copying
GIVE_UP = 600.0  # seconds that a bucket may refuse a copy which the run waits for


class Mirror:
    """`folder`, whose files lie in `workdir`, too; on this machine it is the workdir itself.

    Changed files are copied by a thread at a bounded rate, and by `flush` at once.
    """

    def __init__(self, workdir: Path, until_end: contextlib.ExitStack):
        self.workdir = self.folder = workdir
        self._copied: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if is_bucket(workdir):
            self.folder = Path(until_end.enter_context(tempfile.TemporaryDirectory(prefix="deperceiver_jax_")))
            self._mark = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4()}\n"
            write_whole(workdir / OWNER, self._mark)
            self._thread = threading.Thread(target=self._copy_now_and_then, daemon=True)
            self._thread.start()

    def flush(self) -> None:
        """Returns when the workdir has what was written until now. Raises UserError when the bucket does not take it,
        and when the workdir is another run's by now."""
        if self._thread is None:
            return
        deadline = time.monotonic() + GIVE_UP
        with told_when_slow(self.workdir):
            while True:
                try:
                    return self._copy()
                except OSError as error:
                    if time.monotonic() > deadline:
                        raise UserError(f"{self.workdir} cannot be written: {reason(error)}.") from error
                    time.sleep(1)

    def close(self) -> None:
        """The last flush."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self.flush()

    def _copy_now_and_then(self) -> None:
        pause = EVERY
        while not self._stop.wait(pause):
            began = time.monotonic()
            try:
                self._copy()
            except OSError as error:
                what = f"{self.workdir} cannot be written ({reason(error)})"
                print(f"warning: {what}; it is tried again, and nothing is lost.", file=sys.stderr, flush=True)
            except UserError:
                return  # flush says so, in the thread that can stop the run
            pause = max(EVERY, (time.monotonic() - began) / SHARE)

    def _copy(self) -> None:
        """Raises OSError, and UserError when the workdir is another run's."""
        with self._lock:
            changed = [(name, state) for name, state in self._states() if self._copied.get(name) != state]
            if changed:
                self._require_own()
            for name, state in changed:
                write_whole(self.workdir / name, (self.folder / name).read_bytes())
                self._copied[name] = state

    def _states(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Of every file: its name below the folder, its size and when it was changed."""
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and not path.name.endswith(".partial"):
                status = path.stat()
                yield path.relative_to(self.folder).as_posix(), (status.st_size, status.st_mtime_ns)

    def _require_own(self) -> None:
        try:
            owner = (self.workdir / OWNER).read_text()
        except FileNotFoundError:
            owner = "nobody"
        except OSError:
            raise
        except Exception as error:  # gcsfs's own
            raise OSError(None, reason(error), str(self.workdir)) from error
        if owner != self._mark:
            host = owner.split(" ")[0]
            raise UserError(f"{self.workdir} belongs to a run that began later, on {host}: this one stops.")
