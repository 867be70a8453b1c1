"""The kit for tests, here and of others: memory streams, conformance checks, networks of namespaces, small servers.

memory         streams and datagrams in memory, with back-pressure, half-close and faults
conformance    check_stream and check_datagrams: what every implementation of the contracts must do
certificates   an authority that issues certificates on the spot
namespaces     hosts, links, addresses and routes as data, built and removed
state          what the kernel holds for a namespace, as text to compare
servers        HTTP, HTTPS, echo and DNS inside a namespace
processes      programs inside a namespace: readiness, output, and an end for each
"""

from .conformance import check_datagrams, check_stream
from .memory import datagrams_pair, stream_pair

__all__ = ["check_datagrams", "check_stream", "datagrams_pair", "stream_pair"]
