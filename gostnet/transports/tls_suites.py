"""The order of the suites of TLS 1.3, which Python's ssl leaves to OpenSSL's default: AES-256 first."""

from __future__ import annotations

import ctypes
import ssl
import sys
from functools import cache
from pathlib import Path
from typing import Any, Final

_AES: Final = ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384")
_CHACHA: Final = ("TLS_CHACHA20_POLY1305_SHA256",)

_PRIORITIZE_CHACHA: Final = 1 << 21
"""SSL_OP_PRIORITIZE_CHACHA, which Python has no name for: a client that puts ChaCha20 first has no AES instructions."""


def prefer(context: ssl.SSLContext, *, server: bool) -> bool:
    """Put the suites in the order that Go has them in, for a server as the one that decides; tell whether that worked.

    AES-128 is a fifth cheaper than AES-256 in bulk, and its handshake hashes with SHA-256. Where it does not work
    everything goes on in OpenSSL's order.
    """
    choose = _setter()
    if choose is None:
        return False
    names = _AES + _CHACHA if _has_aes() else _CHACHA + _AES
    # An SSLContext begins with the object's header, then the pointer to OpenSSL's structure.
    pointer = ctypes.c_void_p.from_address(id(context) + object.__basicsize__)
    if choose(pointer, ":".join(names).encode()) != 1:
        return False
    if server:
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE | _PRIORITIZE_CHACHA
    return True


@cache
def _setter() -> Any:
    """Return SSL_CTX_set_ciphersuites of the library that the module ssl uses, None if it cannot be had."""
    if sys.implementation.name != "cpython" or not (3, 11) <= sys.version_info[:2] <= (3, 14):
        return None  # where the pointer is, is known of these
    try:
        import _ssl

        # Through the module's own library: another OpenSSL in the process would take the structure for its own.
        library = ctypes.PyDLL(_ssl.__file__)
        found = library.SSL_CTX_set_ciphersuites
        options = library.SSL_CTX_get_options
    except (ImportError, AttributeError, OSError):
        return None  # a static interpreter keeps these names to itself
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_char_p), ctypes.c_int
    options.argtypes, options.restype = (ctypes.c_void_p,), ctypes.c_uint64
    # Where the pointer is believed to be must be one to a context that says of itself what Python says of it.
    probe = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    pointer = ctypes.c_void_p.from_address(id(probe) + object.__basicsize__)
    if not pointer.value or options(pointer) & 0xFFFFFFFF != int(probe.options) & 0xFFFFFFFF:
        return None
    return found


@cache
def _has_aes() -> bool:
    """Whether the processor has instructions for AES."""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return True
    return "aes" in words
