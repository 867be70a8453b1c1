"""What carries streams and datagrams: sockets, TLS, and the table of names."""
