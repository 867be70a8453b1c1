"""The hierarchy of errors.

Every error that gostnet raises on purpose is a `GostnetError` with a stable dotted `code` and an optional `hint`.
`OSError` becomes one of these where a socket is touched (`from_os_error`), so the layers above match classes only.
"""

from __future__ import annotations

import errno as _errno
import os


class GostnetError(Exception):
    """Anything that gostnet reports; `str()` of it is a sentence a user can act on."""

    code = "error"
    hint = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        if hint:
            self.hint = hint


class ConfigError(GostnetError):
    """Something in the configuration is wrong; `path` names the place, such as `services[0].addr`."""

    code = "config"

    def __init__(self, path: str, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(f"{path}: {message}" if path else message, hint=hint)
        self.path = path
        self.reason = message
        if code:
            self.code = code


class ProtocolError(GostnetError):
    """The peer (or the bytes given to a codec) broke the protocol."""

    code = "protocol"


class EndOfStream(ProtocolError):
    """The peer closed before the dialogue was complete."""

    code = "protocol.eof"


class PolicyDenied(GostnetError):
    """A policy refused: not a failure, and never counted as one."""

    code = "denied"


class AuthDenied(PolicyDenied):
    """The credentials are missing or wrong."""

    code = "denied.auth"


class BypassDenied(PolicyDenied):
    """The destination is bypassed at the service, which means that it is refused."""

    code = "denied.bypass"


class LimitDenied(PolicyDenied):
    """A connection, rate or volume limit is reached."""

    code = "denied.limit"


class RateDenied(LimitDenied):
    """More requests came than the rate allows."""

    code = "denied.rate"

    def __init__(self) -> None:
        super().__init__("rate limit")


class QuotaDenied(LimitDenied):
    """A quota is used up; it also ends flows that are under way."""

    code = "denied.quota"


class DialError(GostnetError):
    """An outgoing connection could not be made."""

    code = "dial"


class DialRefused(DialError):
    """The destination answered with a reset (ECONNREFUSED)."""

    code = "dial.refused"


class DialUnreachable(DialError):
    """There is no way to the destination."""

    code = "dial.unreachable"


class DialTimeout(DialError):
    """The deadline of the route passed."""

    code = "dial.timeout"


class ResolveError(DialError):
    """A name has no address."""

    code = "dial.resolve"


class NoRoute(DialError):
    """The chain gave no usable node where one is required."""

    code = "dial.noroute"


class UpstreamRejected(DialError):
    """A proxy on the way answered with a refusal; `reply` is its code."""

    code = "dial.rejected"

    def __init__(self, message: str, reply: int = 0, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reply = reply


class ConnError(GostnetError):
    """An established connection broke (reset, broken pipe, timed out)."""

    code = "conn"


class IdleTimeout(ConnError):
    """Nothing moved for the configured idle time."""

    code = "conn.idle"


class KernelError(GostnetError):
    """The kernel refused an operation; `errno` is its number."""

    code = "kernel"

    def __init__(self, operation: str, errno: int, detail: str = "", *, hint: str = "") -> None:
        reason = detail or os.strerror(errno)
        super().__init__(f"{operation}: {reason}", hint=hint)
        self.operation = operation
        self.errno = errno


class Unavailable(GostnetError):
    """A name of GOST's that this version does not build yet."""

    code = "unavailable"


_DIAL = {
    _errno.ECONNREFUSED: DialRefused,
    _errno.ENETUNREACH: DialUnreachable,
    _errno.EHOSTUNREACH: DialUnreachable,
    _errno.EHOSTDOWN: DialUnreachable,
    _errno.ENETDOWN: DialUnreachable,
    _errno.EADDRNOTAVAIL: DialUnreachable,
    _errno.EACCES: DialUnreachable,
    _errno.EPERM: DialUnreachable,
    _errno.ETIMEDOUT: DialTimeout,
}


def dial_error(exc: OSError, where: object) -> DialError:
    """Translate the errno of a failed connect into a `DialError` that names the destination."""
    kind = _DIAL.get(exc.errno or 0, DialError)
    return kind(f"dial {where}: {os.strerror(exc.errno) if exc.errno else exc}")


def conn_error(exc: OSError) -> ConnError:
    """Translate the errno of a failed read or write."""
    return ConnError(os.strerror(exc.errno) if exc.errno else str(exc))


def without_frames(error: BaseException) -> None:
    """Let go of the frames that an error has come through, and what is behind it.

    For who keeps an error: its frames hold whatever they worked on, which often holds the error in turn, and such a
    circle stays in memory until the garbage collector comes by.
    """
    left: BaseException | None = error
    seen = 0
    while left is not None and seen < 100:
        left.__traceback__ = None
        left = left.__cause__ or left.__context__
        seen += 1
