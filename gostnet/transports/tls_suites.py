"""The order of the suites of TLS 1.3, which Python's ssl leaves to OpenSSL's default: AES-256 first."""

from __future__ import annotations

import ctypes
import ssl
from functools import cache
from pathlib import Path
from typing import Any, Final

from .openssl import context_pointer, library

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
    if choose(context_pointer(context), ":".join(names).encode()) != 1:
        return False
    if server:
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE | _PRIORITIZE_CHACHA
    return True


@cache
def _setter() -> Any:
    """Return SSL_CTX_set_ciphersuites, None if it cannot be had."""
    try:
        found = library().SSL_CTX_set_ciphersuites
    except AttributeError:
        return None
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_char_p), ctypes.c_int
    return found


@cache
def _has_aes() -> bool:
    """Whether the processor has instructions for AES."""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return True
    return "aes" in words
