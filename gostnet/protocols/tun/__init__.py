"""GOST's VPN over datagrams: bare IP packets, and registrations that tell which addresses a peer has."""
