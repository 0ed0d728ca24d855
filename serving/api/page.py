"""The page at `/` and Swagger UI at `/docs`: files of `serving/page`, which may ask this server alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.api.failures import ApiError

_FOLDER = Path(__file__).parents[1] / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_ALONE = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; connect-src 'self'"
# what the page adds to the document is text, never markup
_PAGE_POLICY = f"{_ALONE}; script-src 'self'; style-src 'self'; img-src 'self'; require-trusted-types-for 'script'"
# Swagger UI sets styles in its markup and has images in its style sheet
_DOCS_POLICY = f"{_ALONE}; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"


@dataclass(frozen=True)
class PageFile:
    """One file as it is sent.

    Attributes:
        content: whole.
        media_type: by its suffix.
        etag: changes with the content, so that no browser goes on with an older page.
    """

    content: bytes
    media_type: str
    etag: str


def _read(path: Path) -> PageFile:
    content = path.read_bytes()
    return PageFile(content, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


FILES = {path.name: _read(path) for path in sorted(_FOLDER.iterdir()) if path.suffix in _TYPES}
# they hold nothing that a key should guard, and one of them asks for it
OPEN_PATHS = frozenset({"/", "/docs", *(f"/page/{name}" for name in FILES)})


async def page(request: Request) -> Response:
    """The page."""
    return _response(request, FILES["index.html"], _PAGE_POLICY)


async def docs(request: Request) -> Response:
    """Swagger UI, whose own files BentoML serves."""
    return _response(request, FILES["docs.html"], _DOCS_POLICY)


async def asset(request: Request) -> Response:
    """A file that one of the two needs."""
    name = request.path_params["name"]
    if name not in FILES:
        raise ApiError(404, f"no such path: {request.url.path}", code="not_found")
    return _response(request, FILES[name], _ALONE)


def page_routes() -> list[Route]:
    """Where they are."""
    return [
        Route("/", page, methods=["GET"]),
        Route("/docs", docs, methods=["GET"]),
        Route("/page/{name}", asset, methods=["GET"]),
    ]


def _response(request: Request, file: PageFile, policy: str) -> Response:
    headers = {
        "Cache-Control": "no-cache",  # kept, and asked for again each time: the answer is nearly always 304
        "Content-Security-Policy": policy,
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "ETag": file.etag,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if file.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
