"""gostnet: a Linux TUN/TAP and transparent-proxy networking appliance, a drop-in GOST v3."""

__version__ = "0.1.0"
