"""Keeps pages of other origins from using the page's API, and the page from using theirs.

A page of any site may send requests to loopback. Its browser says where they come from, in `Origin`
and `Sec-Fetch-Site`: what is not of this origin is refused. A site whose name is made to resolve to
127.0.0.1 (DNS rebinding) would be of this origin by name, so names are refused that are not this
machine's. Beyond loopback the names of a machine are not known here; there a token is needed, which
such a site does not have.

Sources: Fetch Metadata Request Headers, W3C; Content Security Policy Level 3, W3C.
"""

from __future__ import annotations

from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clip_rt.gateway.openai import answer_problem
from clip_rt.gateway.problems import ProblemError
from clip_rt.ui.config import is_local_name

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        # blob: for images that people drop.
        "img-src 'self' blob:",
        "connect-src 'self'",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


class SameOrigin:
    """An ASGI application that answers requests of its own origin, and of programs, only.

    Args:
        application: That answers them.
        is_local: Whether only this machine reaches it; then its names are checked.
    """

    def __init__(self, application: ASGIApp, *, is_local: bool) -> None:
        self._application = application
        self._is_local = is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        try:
            check_origin(Headers(scope=scope), scope, is_local=self._is_local)
        except ProblemError as problem:
            await answer_problem(problem)(scope, receive, send_guarded)
            return
        await self._application(scope, receive, send_guarded)


def check_origin(headers: Headers, scope: Scope, *, is_local: bool) -> None:
    """Let a request pass that is of this origin, or of a program that is no browser.

    Raises:
        ProblemError: it is of a page elsewhere, or under a name that is not this machine's.
    """
    host = headers.get("host", "")
    if is_local and not is_local_name(_find_name(host)):
        raise ProblemError(
            f"This server is for this machine only, and is not called {host[:80]!r}. Open it as "
            "http://localhost, with its port.",
            status=HTTPStatus.FORBIDDEN,
            code="unknown_host",
        )
    origin = headers.get("origin")
    site = headers.get("sec-fetch-site", "none")
    # Following a link from elsewhere to the page is what links are for.
    is_link = (
        headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
        and scope["method"] == "GET"
        and scope["path"] == "/"
    )
    is_ours = origin is None or _find_address(origin) == host.lower() != ""
    if not is_ours or (site not in ("same-origin", "none") and not is_link):
        raise ProblemError(
            "Pages of other origins are not answered here. Open this server's own page, or ask it "
            "from a program.",
            status=HTTPStatus.FORBIDDEN,
            code="cross_origin",
        )


def _find_name(host: str) -> str:
    """Return the name or address in a `Host` header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _find_address(origin: str) -> str:
    """Return the name and port of an `Origin`; empty where it has none, as "null" has."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
