"""What the stores that are spoken to in JSON share: one request, its answer, one line when it fails."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

from samer.config import InputError
from samer.export.base import down
from samer.index.names import store_key

SECONDS = 120


def ask(method: str, url: str, value: Any = None) -> dict:
    """The answer to a request, an empty object where there is none.

    Raises:
        InputError: the server is down, or refuses.
    """
    body = None if value is None else json.dumps(value).encode()
    key = store_key()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(url, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as error:
        raise down(url, ValueError(f"{error.code} {error.read()[:160].decode(errors='replace')}")) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise down(url, error) from None


def check_url(place: str) -> str:
    """A server's URL without its last stroke.

    Raises:
        InputError: it is none.
    """
    if not place.startswith(("http://", "https://")):
        raise InputError(f"--place {place!r} is no URL of a server; it begins with http:// or https://")
    return place.rstrip("/")
