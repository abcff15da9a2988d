"""The web page that searches indexes: a Starlette application and its server."""

from __future__ import annotations

import asyncio
import contextlib
import io
import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from samer.config import InputError
from samer.data.pictures import load_image
from samer.search.open_index import SearchIndex, _Latest, check_query

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


def loopback_names(host: str) -> list[str] | None:
    """Host names under which a server bound to `host` may be asked: those of this machine; None: any.

    Other sites can point a name of theirs at 127.0.0.1 and read answers through a visitor's browser, were it answered.
    """
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    return sorted({"localhost", "127.0.0.1", "[::1]", "::1", host}) if local else None


def make_app(indexes: Sequence[SearchIndex], hosts: Sequence[str] | None = None):
    """The page and its interface.

        GET /, /page.css, /page.js    the page
        GET /api/indexes              {"indexes": [facts]}, in the order given
        GET /api/search?index=0&q=two+dogs&top=12
        GET /image/<index>/<number>   JPEG, at most 640 pixels wide; the number is a row of the index, never a path

    A wrong request is answered with {"error": "..."} and 400 or 404, 503 where an index on disk is broken. Searches
    queue for one thread: torch uses all cores for each, and would keep a set of threads for every thread that calls it.
    Pictures are read beside them.

    Args:
        indexes: opened; one whose manifest is replaced is opened again at its next search.
        hosts: names that a request may address; None: any (see `loopback_names`).

    Returns:
        A Starlette application.

    Raises:
        InputError: starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.requests import Request
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route
    except ImportError:
        raise InputError("the search page needs starlette: pip install -r requirements-serve.txt") from None

    served = list(indexes)
    searching = ThreadPoolExecutor(max_workers=1, thread_name_prefix="search")
    reading = ThreadPoolExecutor(max_workers=4, thread_name_prefix="pictures")  # 4 large pictures at a time in memory
    pictures = _Latest(256)  # of about 60 kB each

    def number(text: str, what: str, low: int, high: int) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise InputError(f"{what} is {text[:20]!r}; it must be a number from {low} to {high:,}")
        return int(text)

    @contextlib.contextmanager
    def on_disk():
        """What is wrong on disk is not the request's fault."""
        try:
            yield
        except InputError as error:
            raise HTTPException(503, " ".join(str(error).split())) from None

    def current(place: int) -> SearchIndex:
        """In the searching thread only, so that an index is opened once."""
        with on_disk():
            served[place] = served[place].now()
        return served[place]

    def answer(place: int, text: str, top: int) -> dict:
        check_query(text)  # before anything is read
        index = current(place)
        found = index.search(text, top)
        with on_disk():
            words, rows = index.explain(text, found)
        version = format(hash(index.stamp) & 0xFFFFFFFF, "08x")
        results = [
            {
                "id": name,
                "score": score,
                "image": f"/image/{place}/{row['number']}?v={version}",
                **row,
            }
            for (name, score), row in zip(found.hits, rows)
        ]
        return {
            "query": text,
            "index": {"index": place, **index.facts()},
            "grid": index.grid,
            "words": [{"text": word.text, "start": word.start, "end": word.end} for word in words],
            "results": results,
            "encode_ms": round(found.encode_ms, 2),
            "search_ms": round(found.search_ms, 2),
        }

    async def in_thread(pool: ThreadPoolExecutor, function: Callable, *words: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, function, *words)

    async def list_indexes(request: Request) -> Response:
        places = range(len(served))
        rows = await in_thread(searching, lambda: [{"index": place, **current(place).facts()} for place in places])
        return JSONResponse({"indexes": rows})

    async def search(request: Request) -> Response:
        try:  # read here, as starlette would replace what is no UTF-8
            text = request.scope["query_string"].decode()
            pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=20)
        except ValueError:
            raise InputError("the address can't be read; write ?q= and UTF-8") from None
        asked = {"index": "0", "top": "12", "q": "", **dict(pairs)}
        place = number(asked["index"], "index", 0, len(served) - 1)
        top = number(asked["top"], "top", 1, MOST_RESULTS)
        return JSONResponse(await in_thread(searching, answer, place, asked["q"], top))

    async def image(request: Request) -> Response:
        try:
            place = number(request.path_params["index"], "index", 0, len(served) - 1)
            row = number(request.path_params["number"], "picture", 0, 10**9)
        except InputError as error:
            raise HTTPException(404, str(error)) from None
        index = served[place]

        def small() -> bytes:
            path = index.picture(row)
            if path is None:
                raise HTTPException(404, f"there is no picture {row}")
            return _small_jpeg(path)

        try:
            content = await in_thread(reading, pictures.get, (place, index.stamp, row), small)
        except InputError:  # its words name files, which are nobody's business here
            raise HTTPException(404, f"picture {row} can't be read") from None
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    def page_file(name: str, kind: str) -> Callable:
        content = (PAGE / name).read_bytes()

        async def endpoint(request: Request) -> Response:
            return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

        return endpoint

    async def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return JSONResponse({"error": error.detail}, error.status_code, error.headers)
        return JSONResponse({"error": " ".join(str(error).split())}, 400)

    async def failed(request: Request, error: Exception) -> Response:
        words = "something failed on the server; its terminal says what"
        return JSONResponse({"error": words}, 500, HEADERS)

    return Starlette(
        routes=[
            *(Route(path, page_file(*words)) for path, words in PAGE_FILES.items()),
            Route("/api/indexes", list_indexes),
            Route("/api/search", search),
            Route("/image/{index}/{number}", image),
        ],
        middleware=[
            Middleware(_WithHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=["*"] if hosts is None else list(hosts)),
        ],
        exception_handlers={HTTPException: refused, InputError: refused, Exception: failed},
    )


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


def _small_jpeg(path: Path) -> bytes:
    """A picture as it is displayed, made smaller if it is large."""
    image = load_image(path)
    image.thumbnail((PICTURE_WIDTH, PICTURE_HEIGHT))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return content.getvalue()


def serve(indexes: Sequence[SearchIndex], host: str, port: int) -> None:
    """Serves the page until it is interrupted; prints its address once it can be asked. Queries are not logged.

    Args:
        indexes: to search, in the order of their numbers.
        host: address to listen on; one of this machine alone (127.0.0.1) answers to this machine's names only.
        port: 0: any that is free.

    Raises:
        InputError: the address can't be had, or uvicorn or starlette are not installed.
    """
    app = make_app(indexes, loopback_names(host))
    try:
        import uvicorn
    except ImportError:
        raise InputError("the search page needs uvicorn: pip install -r requirements-serve.txt") from None
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        raise InputError(f"{host}:{port}: can't listen there ({reason}); name another --port or --host") from None
    with listener:
        shown = f"[{host}]" if ":" in host else host
        what = ", ".join(f"{index.folder} ({index.split}, {index.images:,} images)" for index in indexes)
        beyond = "" if loopback_names(host) else "; whoever reaches this machine can see these pictures"
        print(f"http://{shown}:{listener.getsockname()[1]}/ searches {what}{beyond}", flush=True)
        # uvicorn raises the interrupt again when it has closed; it is the way to end this
        with contextlib.suppress(KeyboardInterrupt):
            settings = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
            uvicorn.Server(settings).run([listener])
