"""Who may talk to the server: hosts by name, and holders of a key.

A web page can have a browser call a server on this machine, by a name of its own that resolves to 127.0.0.1 (DNS
rebinding) or by a form; Host and Origin then name the page. Needs starlette.
"""

import hmac
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from radlads.inference.openai_answers import ApiError

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
ANY_HOST = "*"
OPEN_PATHS = frozenset({"/health"})


class Guard:
    """Lets requests through that name one of `hosts` and bring the key, if there is one."""

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str] = (), api_key: str | None = None):
        self._app, self._api_key = app, api_key
        self._hosts = LOCAL_NAMES | {host.lower().strip("[]") for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope["path"], Headers(scope=scope))
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        """Raise ApiError for a request that is not let through."""
        named = [f"//{host}" for host in headers.getlist("host") or [""]]
        for name in map(_host_of, [*named, *headers.getlist("origin")]):
            if name not in self._hosts and ANY_HOST not in self._hosts:
                raise ApiError(403, f"{name!r} is no name of this server: start it with --allowed-host {name}")
        if self._api_key is None or path in OPEN_PATHS:
            return
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._api_key.encode()):
            sentence = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
            raise ApiError(401, sentence, code="invalid_api_key")


def _host_of(url: str) -> str:
    """The host of an address, in lower case; what stands there, if it is none."""
    try:
        return urlsplit(url).hostname or url
    except ValueError:
        return url
