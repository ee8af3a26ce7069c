"""Published weights by name: hf://owner/name, or hf://owner/name@revision, on the Hugging Face hub.

huggingface_hub fetches them, once: HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean there. Only
JSON and safetensors are asked for, never a pickle.
"""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple, NoReturn

from tqdm import tqdm

from deperceiver_jax.errors import UserError

SCHEME = "hf://"
WEIGHTS, CONFIG, SCALING = "model.safetensors", "config.json", "preprocessor_config.json"
_NAME = re.compile(r"hf://([^/@\s]+/[^/@\s]+)(?:@(\S+))?")


class HubName(NamedTuple):
    """A model of the hub."""

    model: str  # owner/name
    revision: str  # a branch, a tag or a commit

    def address(self, file: str) -> str:
        """Where a browser finds one of its files."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.model}/resolve/{self.revision}/{file}"


class _Bar(tqdm):
    """A bar where a person looks on, and none in a log."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | {"disable": kwargs.get("disable") or None})


def is_hub_name(place: object) -> bool:
    return isinstance(place, str) and place.startswith(SCHEME)


def parse_name(place: str) -> HubName:
    """Raises UserError for what is no name of a model."""
    if not (match := _NAME.fullmatch(place)):
        raise UserError(f"{place} is no name of the hub: it is hf://owner/name or hf://owner/name@revision.")
    return HubName(match[1], match[2] or "main")


def fetch(place: str) -> Path:
    """The folder that has config.json and model.safetensors of hf://..., all of one commit; fetched if need be.

    Raises UserError, a sentence, when there is no such model or revision, when it has no safetensors, when it cannot be
    reached and is not in the cache, when it breaks off, and when what came is not what the hub says it has.
    """
    import httpx2  # which huggingface_hub speaks with; not above: neither is needed but for a name of the hub
    from huggingface_hub import constants, errors, snapshot_download

    name = parse_name(place)
    try:
        folder = Path(
            snapshot_download(
                name.model,
                revision=name.revision,
                allow_patterns=[WEIGHTS, CONFIG, SCALING],
                library_name="deperceiver_jax",
                tqdm_class=_Bar,
                max_workers=1,  # several close one another's connections where the network fails
            )
        )
    except errors.HFValidationError as error:
        raise UserError(f"{place} is no name of the hub: {str(error).split(':')[0].rstrip('.')}.") from None
    except errors.GatedRepoError:
        raise UserError(f"{place} is given to those alone who have asked for it: set HF_TOKEN to your token.") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{place}: {constants.ENDPOINT} has no model {name.model}, or it is private.") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{place}: {name.model} has no revision {name.revision}.") from None
    except errors.LocalEntryNotFoundError:
        _refuse_without_network(place, name)
    except (errors.HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise UserError(
            f"{place} was not fetched whole ({str(error).splitlines()[0].rstrip('.')}): the same command tries again."
        ) from None
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{place} has no {WEIGHTS}; from the hub nothing else is read, and never a pickle.")
    for file in folder.iterdir():
        _require_same_contents(file, place)
    return folder


def _refuse_without_network(place: str, name: HubName) -> NoReturn:
    from huggingface_hub import constants

    raise UserError(
        f"{place} is not in the cache, {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be reached: fetch "
        f"{name.address(WEIGHTS)} and its {CONFIG} elsewhere, put both into a folder here, and give the folder in "
        f"place of {place} (the file itself as a backbone)."
    ) from None


def _require_same_contents(file: Path, place: str) -> None:
    """Raises UserError, and takes a file out of the cache, when its bytes have not the hash that the hub names it by.

    That is the SHA-256 of large files, and git's SHA-1 of the others; a cache without links does not say it.
    """
    blob = file.resolve()
    expected = blob.name
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", expected):
        return
    with open(blob, "rb") as opened:
        if len(expected) == 64:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        else:
            content = opened.read()
            found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if found != expected:
        file.unlink()
        blob.unlink()
        raise UserError(
            f"{file.name} of {place} is not what the hub has: its hash is {found[:12]}... instead of "
            f"{expected[:12]}.... It was deleted; the same command fetches it again."
        )
