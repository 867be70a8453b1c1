"""OpenSSL's functions for what Python's ssl keeps to itself, where they can be had; None elsewhere.

The structures behind an SSLContext and an SSLObject are found where CPython 3.11 to 3.14 has them. Before that is
believed, each place is looked at in objects of our own: what lies there and beside it must agree with what Python says.
"""

from __future__ import annotations

import ctypes
import ssl
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

_HEADER: Final = object.__basicsize__
_WORD: Final = ctypes.sizeof(ctypes.c_void_p)


def context_pointer(context: ssl.SSLContext) -> ctypes.c_void_p:
    """Return where OpenSSL's SSL_CTX is: right behind the object's header. Only where `library` is not None."""
    return ctypes.c_void_p.from_address(id(context) + _HEADER)


def connection_pointer(tls: ssl.SSLObject) -> ctypes.c_void_p:
    """Return where OpenSSL's SSL is: header | weak reference to a socket | SSL | the SSLContext. Only with `sessions`.

    It is valid as long as `tls` lives.
    """
    return ctypes.c_void_p.from_address(id(_inner(tls)) + _HEADER + _WORD)


def _inner(tls: ssl.SSLObject) -> object:
    return tls._sslobj  # type: ignore[attr-defined]


@cache
def library() -> Any:
    """Return the OpenSSL that the module ssl uses, None if it cannot be had."""
    if sys.implementation.name != "cpython" or not (3, 11) <= sys.version_info[:2] <= (3, 14):
        return None  # where the pointers are, is known of these
    try:
        import _ssl

        # Through the module's own library: another OpenSSL in the process would take the structures for its own.
        found = ctypes.PyDLL(_ssl.__file__)
        options = found.SSL_CTX_get_options
    except (ImportError, AttributeError, OSError):
        return None  # a static interpreter keeps these names to itself
    options.argtypes, options.restype = (ctypes.c_void_p,), ctypes.c_uint64
    # Where the pointer is believed to be must be one to a context that says of itself what Python says of it.
    probe = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    pointer = context_pointer(probe)
    if not pointer.value or options(pointer) & 0xFFFFFFFF != int(probe.options) & 0xFFFFFFFF:
        return None
    return found


@dataclass(frozen=True, slots=True)
class SessionCalls:
    """OpenSSL's functions of these names, without SSL_ and SSL_SESSION_."""

    get_session: Any
    set_session: Any
    set_num_tickets: Any
    dup: Any
    free: Any
    has_ticket: Any


@cache
def sessions() -> SessionCalls | None:
    """Return the functions that handle the sessions of an SSLObject, None if they cannot be had."""
    found = library()
    if found is None:
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    try:
        functions = {
            "get_session": (found.SSL_get_session, pointer, (pointer,)),
            "set_session": (found.SSL_set_session, integer, (pointer, pointer)),
            "set_num_tickets": (found.SSL_set_num_tickets, integer, (pointer, ctypes.c_size_t)),
            "dup": (found.SSL_SESSION_dup, pointer, (pointer,)),
            "free": (found.SSL_SESSION_free, None, (pointer,)),
            "has_ticket": (found.SSL_SESSION_has_ticket, integer, (pointer,)),
        }
        context_of = found.SSL_get_SSL_CTX
    except AttributeError:
        return None
    for function, result, arguments in functions.values():
        function.argtypes, function.restype = arguments, result
    context_of.argtypes, context_of.restype = (pointer,), pointer
    if not _sound(context_of):
        return None
    return SessionCalls(**{name: function for name, (function, _, _) in functions.items()})


def _sound(context_of: Any) -> bool:
    """Whether an SSLObject is laid out as `connection_pointer` believes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="a.example")
    inner = _inner(tls)
    if type(inner).__basicsize__ < _HEADER + 3 * _WORD:
        return False
    # Python's pointer to the context is known; only if it lies where it should is the one before it followed.
    words = (ctypes.c_void_p * 3).from_address(id(inner) + _HEADER)
    if words[0] or not words[1] or words[2] != id(context):
        return False
    return bool(context_of(words[1]) == context_pointer(context).value)
