"""Handlers for captured flows, whose target the kernel knows: red and redu."""
