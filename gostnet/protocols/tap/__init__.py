"""GOST's VPN of Ethernet frames over datagrams: a switch whose ports are a device and the peers."""
