"""The search page's application: what it answers to a browser. Needs starlette."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from samer.config import InputError
from samer.data.pictures import load_image
from samer.runtime.files import DiskError, FileTrouble, trouble
from samer.search.latest import Latest
from samer.search.open_index import SearchIndex, Wanted
from samer.search.words import check_query

MOST_RESULTS = 100
PICTURE_WIDTH, PICTURE_HEIGHT = 640, 1280  # pixels at most, as the page gets them
PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css")}
PAGE_FILES["/page.js"] = ("page.js", "text/javascript")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def make_app(indexes: Sequence[SearchIndex], hosts: Sequence[str] | None = None, coarse: int = 0) -> Starlette:
    """The page and its interface.

        GET /, /page.css, /page.js    the page
        GET /api/indexes              {"indexes": [facts]}, in the order given
        GET /api/search?index=0&q=two+dogs&top=12
        GET /image/<index>/<number>   JPEG, at most 640 pixels wide; the number is a row of the index, never a path

    A wrong request is answered with {"error": "..."} and 400 or 404, 503 where an index on disk is broken.

    Args:
        indexes: opened; one whose manifest is replaced is opened again at its next search.
        hosts: names that a request may address; None: any (see `server.loopback_names`).
        coarse: searches choose candidates by so many vectors, as `Index.search`; 0: they look at all.
    """
    app = SearchApp(indexes, coarse)
    return Starlette(
        routes=[
            *(Route(path, _page_file(*words)) for path, words in PAGE_FILES.items()),
            Route("/api/indexes", app.list_indexes),
            Route("/api/search", app.search),
            Route("/image/{index}/{number}", app.image),
        ],
        middleware=[
            Middleware(_WithHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=["*"] if hosts is None else list(hosts)),
        ],
        exception_handlers={HTTPException: _refused, InputError: _refused, Exception: _failed},
    )


class SearchApp:
    """The endpoints, and the threads that do what they are asked for.

    Searches queue for one thread: torch uses all cores for each, and would keep a set of threads for every thread that
    calls it. Pictures are read beside them.
    """

    def __init__(self, indexes: Sequence[SearchIndex], coarse: int) -> None:
        self.indexes, self.coarse = list(indexes), coarse
        self.searching = ThreadPoolExecutor(max_workers=1, thread_name_prefix="search")
        # 4 large pictures at a time in memory
        self.reading = ThreadPoolExecutor(max_workers=4, thread_name_prefix="pictures")
        self.pictures = Latest(256)  # of about 60 kB each

    async def list_indexes(self, request: Request) -> Response:
        """What is served."""
        return JSONResponse({"indexes": await _in_thread(self.searching, self._facts)})

    async def search(self, request: Request) -> Response:
        """The best pictures of an index for a text, and what each word of it looked at."""
        try:  # read here, as starlette would replace what is no UTF-8
            text = request.scope["query_string"].decode()
            pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=20)
        except ValueError:
            raise InputError("the address can't be read; write ?q= and UTF-8") from None
        asked = {"index": "0", "top": "12", "q": "", **dict(pairs)}
        place = _number(asked["index"], "index", 0, len(self.indexes) - 1)
        top = _number(asked["top"], "top", 1, MOST_RESULTS)
        return JSONResponse(await _in_thread(self.searching, self._answer, place, asked["q"], top))

    async def image(self, request: Request) -> Response:
        """A picture of an index, small enough for the page."""
        try:
            place = _number(request.path_params["index"], "index", 0, len(self.indexes) - 1)
            row = _number(request.path_params["number"], "picture", 0, 10**9)
        except InputError as error:
            raise HTTPException(404, str(error)) from None
        index = self.indexes[place]
        make = functools.partial(_small_jpeg, index, row)
        try:
            content = await _in_thread(self.reading, self.pictures.get, (place, index.stamp, row), make)
        # their words name files, which are nobody's business here
        except FileTrouble:
            raise HTTPException(503, f"picture {row} can't be read now") from None
        except (InputError, OSError):
            raise HTTPException(404, f"picture {row} can't be read") from None
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    def _current(self, place: int) -> SearchIndex:
        """An index as it is on disk now; in the searching thread only, so that it is opened once."""
        with _on_disk():
            self.indexes[place] = self.indexes[place].now()
            self.indexes[place].index.check_budget(self.coarse)
        return self.indexes[place]

    def _facts(self) -> list[dict]:
        return [{"index": place, **self._current(place).facts()} for place in range(len(self.indexes))]

    def _answer(self, place: int, text: str, top: int) -> dict:
        """What `search` says."""
        check_query(text)  # before anything is read
        index = self._current(place)
        # what it refuses is the text, or a `DiskError`
        found = index.search(text, Wanted(top, coarse=self.coarse))
        with _on_disk():
            words, rows = index.explain(text, found)
        version = format(hash(index.stamp) & 0xFFFFFFFF, "08x")
        results = [
            {"id": name, "score": score, "image": f"/image/{place}/{row['number']}?v={version}", **row}
            for (name, score), row in zip(found.hits, rows)
        ]
        return {
            "query": text,
            "index": {"index": place, **index.facts()},
            "words": [{"text": word.text, "start": word.start, "end": word.end} for word in words],
            "results": results,
            "encode_ms": round(found.encode_ms, 2),
            "search_ms": round(found.search_ms, 2),
        }


def _number(text: str, what: str, low: int, high: int) -> int:
    """A number of a request, or an InputError that names `what` it is."""
    if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise InputError(f"{what} is {text[:20]!r}; it must be a number from {low} to {high:,}")
    return int(text)


@contextlib.contextmanager
def _on_disk() -> Iterator[None]:
    """What is wrong on disk is not the request's fault."""
    try:
        yield
    except OSError as error:
        raise trouble(error.filename or "the index", error) from None
    except InputError as error:
        raise DiskError(str(error)) from None


async def _in_thread(pool: Executor, function: Callable, *words: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(pool, function, *words)


def _small_jpeg(index: SearchIndex, number: int) -> bytes:
    """A picture of an index as it is displayed, made smaller if it is large."""
    path = index.picture(number)
    if path is None:
        raise HTTPException(404, f"there is no picture {number}")
    box = PICTURE_WIDTH, PICTURE_HEIGHT
    image = load_image(path, box, inside=True)
    image.thumbnail(box)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return content.getvalue()


def _page_file(name: str, kind: str) -> Callable:
    """The endpoint of a file of the page, read once."""
    content = (PAGE / name).read_bytes()

    async def endpoint(request: Request) -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return endpoint


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    return JSONResponse({"error": " ".join(str(error).split())}, 503 if isinstance(error, DiskError) else 400)


async def _failed(request: Request, error: Exception) -> Response:
    words = "something failed on the server; its terminal says what"
    return JSONResponse({"error": words}, 500, HEADERS)


class _WithHeaders:
    """Adds what a browser must know to every answer."""

    def __init__(self, app) -> None:
        self.app = app
        self.headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope, receive, send) -> None:
        async def send_more(message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *self.headers]}
            await send(message)

        await self.app(scope, receive, send_more)
