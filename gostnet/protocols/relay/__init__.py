"""GOST relay: a request, a response, then the stream itself; datagrams in frames."""
