"""Measurements of gostnet against its peers: `python -m benchmarks`. Not part of the package, not a test."""
