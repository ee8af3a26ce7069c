"""A prepared data set in a bucket: copied there once, and from there to the disk of every host.

What is there is there whole: files are compared by size and CRC32C, which the bucket computes of every object itself.
`prepared.json` lists them, and is written when all of them are there. So the same command goes on where it was cut off.
"""

import base64
import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tqdm import tqdm

from deperceiver_jax.data.datasets.prepare import alone
from deperceiver_jax.errors import UserError
from deperceiver_jax.files import (
    BUCKETS,
    file_system,
    is_bucket,
    reason,
    require_writable,
    told_when_slow,
    write_whole,
    written_whole,
)

LIST = "prepared.json"
AT_ONCE = 4  # files
PATIENCE = 60  # seconds for a file
TRIES = 3  # for one that arrives with another checksum


class State(NamedTuple):
    """What a file must have to be the one that is meant."""

    size: int
    crc32c: str  # as the bucket writes it


class Share(NamedTuple):
    """Which of several processes this is that copy one data set, each the files of its range."""

    process: int = 0
    processes: int = 1

    def of(self, names: Sequence[str]) -> Sequence[str]:
        first, last = (len(names) * number // self.processes for number in (self.process, self.process + 1))
        return names[first:last]


def require_place(flag: str, place: Path) -> None:
    """Raises UserError unless `place`, given as `flag`, is in a bucket, which may be written where it is --to.

    Whether it may be read, `upload` and `download` find out.
    """
    if not is_bucket(place):
        raise UserError(f"{flag} is {place}; it is a folder of a bucket, as in gs://my-bucket/coco.")
    if flag == "--to":
        require_writable(flag, place)


def upload(folders: Mapping[str, Path], place: Path, share: Share) -> None:
    """Copies the files of each folder into the one of its name below `place`, but for those that are there.

    The process that finds all of them there writes the list. Raises UserError, in one sentence.
    """
    files = {
        PurePosixPath(name, path.name).as_posix(): path
        for name, folder in folders.items()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix != ".tmp"
    }
    states = {name: functools.cache(functools.partial(_state, path)) for name, path in files.items()}  # each read once
    system, there = _stored("--to", place)
    listed = _listed("--to", place, there)
    another = f"--to: {place} has another prepared data set; choose another folder for this one, or delete that one"
    if listed and listed.keys() != files.keys():
        raise UserError(f"{another}.")

    def copy(name: str) -> int | None:
        state, target = states[name](), f"{place}/{name}"
        if listed and listed[name] != state:
            raise UserError(f"{another}: their {name} differ.")
        if there.get(name) == state:
            return None
        system.put_file(os.fspath(files[name]), target)
        if _stored_state(system.info(target)) != state:
            system.rm_file(target)
            raise UserError(f"--to: {target} did not arrive as it was sent; the same command copies it again.")
        return state.size

    mine = share.of(list(files))
    copied = _copy_all("--to", place, copy, mine, {name: files[name].stat().st_size for name in mine})
    there = _stored("--to", place)[1]
    found = {name: state() for name, state in states.items()} if there.keys() >= files.keys() else {}
    missing = [name for name in files if name not in found or there[name] != found[name]]
    if missing:
        if share.processes == 1:
            raise UserError(f"--to: {place}/{missing[0]} is not there any more; the same command copies it again.")
        print(f"{copied} The last process to be done writes {place}/{LIST}, which this one is not.", flush=True)
        return
    if listed != found:
        write_whole(place / LIST, json.dumps({name: state._asdict() for name, state in found.items()}, indent=1))
    print(f"{copied} {place}/{LIST} lists all {len(files)}, {_total(found)}.", flush=True)


def download(place: Path, directory: Path, share: Share, given_as: str = "--from") -> None:
    """Copies what `place` lists into `directory`, but for the files that are there. Raises UserError, in one sentence.

    given_as: the flag or field that a person wrote `place` into. A file has its name when it is whole. The descriptions
    come first, so that a reader sees what is missing.
    """
    system, there = _stored(given_as, place)
    listed = _listed(given_as, place, there)
    if listed is None:
        command = f"deperceiver data prepare DIR --to={place}"
        raise UserError(f"{given_as}: {place} has no {LIST}, which is there when this has copied everything: {command}")

    def copy(name: str) -> int | None:
        target, state, source = directory / name, listed[name], f"{place}/{name}"
        if target.is_file() and target.stat().st_size == state.size and _state(target) == state:
            return None
        if there.get(name) != state:
            what = "is damaged: its size or checksum is not that of" if name in there else "is gone from"
            raise UserError(f"{given_as}: {source} {what} {place}/{LIST}; `--to` copies it there again.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(target) as partial:
            for _ in range(TRIES):
                system.get_file(source, os.fspath(partial))
                if _state(partial) == state:
                    return state.size
            raise UserError(f"{given_as}: {source} arrived {TRIES} times with a checksum that is not the bucket's.")

    names = sorted(listed, key=lambda name: listed[name].size)
    mine = share.of(names)
    try:
        with alone(directory, ".lock" if share.processes == 1 else f".lock-{share.process}-of-{share.processes}"):
            _require_room(directory, {name: listed[name] for name in mine})
            copied = _copy_all(given_as, place, copy, mine, {name: listed[name].size for name in mine})
    except OSError as error:
        raise UserError(f"{error.filename or directory} cannot be written: {reason(error)}.") from error
    print(f"{copied} {directory} has {len(mine)} of {len(names)}, of {_total(listed)} in all.", flush=True)


def _copy_all(
    flag: str, place: Path, copy: Callable[[str], int | None], names: Sequence[str], sizes: Mapping[str, int]
) -> str:
    """Calls `copy` for each file, several at the same time, and says what was copied. The first error ends it.

    copy: the file's name -> its size, or None where it was there.
    """

    def tell_reason(name: str) -> int | None:
        try:
            with told_when_slow(f"{place}/{name}", PATIENCE):
                return copy(name)
        except UserError:
            raise
        except Exception as error:  # of the network, the credentials, the answer, the disk
            why = f"{place}/{name} cannot be copied: {reason(error)}"
            raise UserError(f"{flag}: {why}. The same command goes on from there.") from error

    count = copied = 0
    total, began = sum(sizes.values()), time.monotonic()
    with (
        ThreadPoolExecutor(AT_ONCE) as pool,
        tqdm(total=total, desc=f"{flag} {place}", unit="B", unit_scale=True, disable=None) as bar,
    ):
        try:
            for name, size in zip(names, pool.map(tell_reason, names), strict=True):
                bar.update(sizes[name])
                count, copied = count + (size is not None), copied + (size or 0)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    seconds = time.monotonic() - began
    return f"Copied {count} of {len(names)} files, {copied / 1e6:.1f} MB in {seconds:.0f} s; the others were there."


def _stored(flag: str, place: Path) -> tuple[Any, dict[str, State]]:
    """(the file system, what is below `place`)."""
    system = file_system(flag, place)
    try:
        with told_when_slow(place):
            found = system.find(str(place), detail=True)
    except Exception as error:
        raise UserError(f"{flag}: {place} cannot be read: {reason(error)}.") from error
    above = f"{str(place).removeprefix(BUCKETS).rstrip('/')}/"
    return system, {name.removeprefix(above): _stored_state(item) for name, item in found.items()}


def _stored_state(item: Mapping[str, Any]) -> State:
    return State(int(item["size"]), item["crc32c"])


def _listed(flag: str, place: Path, there: Mapping[str, State]) -> dict[str, State] | None:
    """What the list of a data set says; None where there is none."""
    if LIST not in there:
        return None
    try:
        with told_when_slow(place):
            content = json.loads((place / LIST).read_bytes())
        listed = {name: State(int(item["size"]), str(item["crc32c"])) for name, item in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{flag}: {place}/{LIST} is not a list that `--to` has written.") from None
    except Exception as error:
        raise UserError(f"{flag}: {place}/{LIST} cannot be read: {reason(error)}.") from error
    for name in listed:
        if PurePosixPath(name).is_absolute() or {"..", ""} & set(name.split("/")):
            raise UserError(f"{flag}: {place}/{LIST} lists {name!r}, which is not the name of a file below it.")
    return listed


def _state(path: Path) -> State:
    """Reads the file."""
    from google_crc32c import Checksum  # comes with gcsfs, which is an extra

    checksum = Checksum()
    with open(path, "rb") as file:
        for _ in checksum.consume(file, 2**20):
            pass
    return State(path.stat().st_size, base64.b64encode(checksum.digest()).decode())


def _require_room(directory: Path, states: Mapping[str, State]) -> None:
    """A disk that is too small is told at once."""
    lacking = sum(state.size for name, state in states.items() if not (directory / name).is_file())
    free = shutil.disk_usage(directory).free
    if lacking > free:
        needed = f"{lacking / 1e6:.1f} MB are to be copied, and {free / 1e6:.1f} MB are free"
        raise UserError(f"{directory} has too little room: {needed}.")


def _total(states: Mapping[str, State]) -> str:
    return f"{sum(state.size for state in states.values()) / 1e6:.1f} MB"
