"""What a browser asks for: the page, detections in a picture, and where a query looked.

    GET  /            the page
    POST /detect      an image file -> {"width", "height", "orientation", "detections": [{box, score, ...}]}
    POST /attention   the same file, ?box=l,t,r,b&label=...&score=... -> what attention.py says

No other path exists and no file is read, so none of this machine is served. A picture is the whole body of a request:
it is neither stored nor given a name here. Every refusal is {"error": a sentence}.
"""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from deperceiver_jax.app.attention import Attention
from deperceiver_jax.app.detection_queue import DetectionQueue
from deperceiver_jax.data.image_header import exif_orientation
from deperceiver_jax.errors import UserError
from deperceiver_jax.pages.template import fill, render
from deperceiver_jax.prediction.detections import PictureDetections
from deperceiver_jax.prediction.detector import PictureDetector
from deperceiver_jax.runs.load_detector import LoadedDetector
from deperceiver_jax.visualize.draw_boxes import class_color

ROOM = Path(__file__).parent
KINDS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "MPO")  # what browsers show; MPO is several JPEGs in one file
HEADERS = {  # the page loads nothing, and is shown inside of no other
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Limits(NamedTuple):
    """What is refused."""

    waiting: int  # pictures in hand, from their first byte to their answer
    megabytes: int
    megapixels: int
    seconds: int  # for an upload, and for an answer


def make_app(
    loaded: LoadedDetector, limits: Limits, *, threshold: float, hosts: Sequence[str], compile_ahead: bool
) -> Starlette:
    """threshold: where the page's slider stands at first. hosts: what requests may call this machine; * is anything.

    compile_ahead: while nobody asks, what pictures of other shapes will need.
    """
    loaded = loaded._replace(arrays=jax.device_put(loaded.arrays))
    service = Service(PictureDetector(loaded), Attention(loaded), limits)
    page = write_page(loaded, limits, threshold)

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page, headers=HEADERS)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if compile_ahead:
            service.compile_ahead()
        yield
        service.queue.close()

    app = Starlette(
        routes=[
            Route("/", show_page),
            Route("/detect", service.detect, methods=["POST"]),
            Route("/attention", service.attention, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
        exception_handlers={HTTPException: refuse, Exception: fail},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


def write_page(loaded: LoadedDetector, limits: Limits, threshold: float) -> str:
    """The page with what it must know of the detector."""
    classes = loaded.classes
    colors = {slot: "#{:02x}{:02x}{:02x}".format(*class_color(slot)) for slot in classes.slots}
    style, script = ROOM / "page.css", (ROOM / "page.js").read_text()
    page = render(ROOM, f"Try {loaded.config.model.name}", styles=(style,), scripts=(script,), limits=limits)
    return fill(page, {"colors": {str(slot): color for slot, color in colors.items()}, "threshold": threshold})


class Service:
    """The two questions that a request can ask."""

    def __init__(self, detector: PictureDetector, attention: Attention, limits: Limits):
        self._detector, self._attention, self._limits = detector, attention, limits
        self.queue, self._in_hand = DetectionQueue(detector), 0

    def compile_ahead(self) -> None:
        """Runs everything once in every shape: single pictures first, where each looked, batches."""
        blank = [np.zeros((*shape, 3), np.uint8) for shape in self._detector.padded_sizes.tolist()]
        batches = [[frame] * self._detector.config.eval.batch_size for frame in blank]
        detect: Callable[..., object] = self._detector.predict
        look: Callable[..., object] = self._attention.look
        tasks: list[Callable[[], object]] = [partial(detect, frame) for frame in blank]
        tasks += [partial(look, frame, np.array(frame.shape[:2], np.int32)) for frame in blank]
        self.queue.run_ahead([*tasks, *(partial(detect, batch) for batch in batches)])

    async def detect(self, request: Request) -> Response:
        async with self._picture(request) as picture:
            found: PictureDetections = await self._answer(self.queue.detect(picture))
        rows = zip(
            *(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()),
            *(found.names.tolist(), found.category_ids.tolist()),
            strict=True,
        )
        names = ("box", "score", "label", "name", "category_id")
        detections = [dict(zip(names, row, strict=True)) for row in rows]
        height, width = found.size
        of_picture = {"width": width, "height": height, "orientation": exif_orientation(picture)}
        return JSONResponse({**of_picture, "detections": detections})

    async def attention(self, request: Request) -> Response:
        box, label, score = self._which(request.query_params)
        async with self._picture(request) as picture:
            return JSONResponse(await self._answer(self.queue.submit(self._attention, picture, box, label, score)))

    def _which(self, given) -> tuple[np.ndarray, int, float]:
        """(box, label, score) of a detection, as /detect told them."""
        try:
            box = np.array([float(edge) for edge in given["box"].split(",")])
            label, score = int(given["label"]), float(given["score"])
        except (KeyError, ValueError):
            box, label, score = np.zeros(0), -1, 0.0
        finite, known = np.isfinite([*box, score]).all(), 0 <= label < self._detector.classes.num_slots
        if box.shape != (4,) or not finite or not known:
            raise HTTPException(400, "box, label and score must be those of a detection, as /detect tells them.")
        return box, label, score

    @contextlib.asynccontextmanager
    async def _picture(self, request: Request) -> AsyncIterator[bytes]:
        """The image file of a request, which counts as in hand until its answer is known."""
        if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            raise HTTPException(403, "The request comes from another site's page.")
        if self._in_hand >= self._limits.waiting:
            sentence = f"{self._in_hand} pictures are waiting already; try again in a moment."
            raise HTTPException(503, sentence, {"Retry-After": "1"})
        self._in_hand += 1
        try:
            data = await self._read(request)
            self._check(data)
            yield data
        finally:
            self._in_hand -= 1

    async def _read(self, request: Request) -> bytes:
        """The body, as far as it may go."""
        most, data = self._limits.megabytes * 1_000_000, bytearray()
        too_large = HTTPException(413, f"The file has more than {self._limits.megabytes} MB.")
        length = request.headers.get("Content-Length", "0")
        if not length.isdecimal() or int(length) > most:
            raise too_large
        try:
            async with asyncio.timeout(self._limits.seconds):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > most:
                        raise too_large
        except TimeoutError:
            raise HTTPException(408, f"The upload took longer than {self._limits.seconds} s.") from None
        except ClientDisconnect:
            raise HTTPException(400, "The upload ended early.") from None
        return bytes(data)

    def _check(self, data: bytes) -> None:
        """Refuses what the page could not show, and what would fill the memory, by its header alone."""
        too_large = HTTPException(413, f"The picture has more than {self._limits.megapixels} megapixels.")
        try:
            with Image.open(io.BytesIO(data), formats=KINDS) as image:
                pixels = image.width * image.height
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise too_large from None
        except Exception:  # whatever a parser makes of bytes that are not its own
            raise HTTPException(415, "The file is not a JPEG, PNG, WebP, AVIF, GIF or BMP picture.") from None
        if pixels > self._limits.megapixels * 1_000_000:
            raise too_large

    async def _answer(self, future: Future) -> Any:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._limits.seconds)
        except TimeoutError:
            raise HTTPException(504, f"There was no answer within {self._limits.seconds} s.") from None
        except UserError as error:
            raise HTTPException(422, str(error)) from None


async def refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = error.detail if error.detail.endswith(".") else f"{error.detail}: {request.url.path}."
    return JSONResponse({"error": sentence}, error.status_code, error.headers)


async def fail(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "The server failed at this picture; its log says why."}, 500)
