"""SOCKS4 and SOCKS4a: handler and connector."""
