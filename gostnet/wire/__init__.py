"""Formats shared by several protocols, without I/O."""
