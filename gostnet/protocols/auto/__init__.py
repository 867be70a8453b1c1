"""One port for several protocols."""
