"""Serves the search page."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Sequence

from samer.config import InputError
from samer.search.open_index import SearchIndex


def loopback_names(host: str) -> list[str] | None:
    """Host names under which a server bound to `host` may be asked: those of this machine; None: any.

    Other sites can point a name of theirs at 127.0.0.1 and read answers through a visitor's browser, were it answered.
    """
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    return sorted({"localhost", "127.0.0.1", "[::1]", "::1", host}) if local else None


def serve(indexes: Sequence[SearchIndex], host: str, port: int, coarse: int = 0) -> None:
    """Serves the page until it is interrupted; prints its address once it can be asked. Queries are not logged.

    Args:
        indexes: to search, in the order of their numbers.
        host: address to listen on; one of this machine alone (127.0.0.1) answers to this machine's names only.
        port: 0: any that is free.
        coarse: searches choose candidates by so many vectors of each image, and rank those by all; 0: rank all images.

    Raises:
        InputError: an index that holds no such budget; the address can't be had, or uvicorn or starlette are not
            installed.
    """
    for index in indexes:
        index.index.check_budget(coarse)
    try:
        import uvicorn

        from samer.search.app import make_app
    except ImportError as error:
        raise InputError(f"the search page needs {error.name}: pip install -e '.[serve]'") from None
    app = make_app(indexes, loopback_names(host), coarse)
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
