"""HTTP proxies: CONNECT, forwarded requests, and UDP over HTTP, both sides."""
