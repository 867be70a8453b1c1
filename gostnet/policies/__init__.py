"""Decisions about flows: admission, auth, bypass, hosts, limits, resolver."""
