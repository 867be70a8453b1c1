"""Moving bytes: relay engines, datagram pump."""
