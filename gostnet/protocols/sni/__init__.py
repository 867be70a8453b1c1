"""SNI proxies: handler and connector."""
