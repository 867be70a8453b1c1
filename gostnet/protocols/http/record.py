"""What records tell of a request and its answer, in GOST's form."""

from __future__ import annotations

from typing import Any, Final

from ...wire.http1 import Head, Request, Response

_SECRET: Final = frozenset((b"authorization", b"proxy-authorization"))
"""Fields whose values are credentials."""


def http_fields(request: Request, host: str, response: Response | None = None) -> dict[str, Any]:
    """Return the object `http` of a record; `host` is whom the request is for.

    Credentials are left out. Bodies are not recorded.
    """
    return {
        "host": host,
        "method": request.method.decode("ascii"),
        "proto": f"HTTP/1.{request.version % 10}",
        "scheme": "http",
        "uri": request.target.decode("latin-1"),
        "cached": False,
        "statusCode": response.status if response is not None else 0,
        "request": _side(request),
        "response": _side(response),
    }


def _side(head: Head | None) -> dict[str, Any]:
    """Return one direction: Go's map of a head, names in Go's spelling and order, without Host."""
    fields: dict[str, list[str]] = {}
    length = 0
    if head is not None:
        for name, value in sorted(head.fields, key=lambda field: field[0].lower()):
            lower = name.lower()
            if lower != b"host":
                shown = "***" if lower in _SECRET else value.decode("latin-1")
                fields.setdefault(_canonical(name), []).append(shown)
        declared = head.get(b"content-length")
        chunked = b"chunked" in head.tokens(b"transfer-encoding")
        length = int(declared) if declared.isdigit() else -1 if chunked else 0
    return {"contentLength": length, "header": fields, "body": None}


def _canonical(name: bytes) -> str:
    return "-".join(part.capitalize() for part in name.decode("ascii").split("-"))
