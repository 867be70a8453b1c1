"""SOCKS5 with GOST's extensions (TLS inside, UDP over TCP): handler and connector."""
