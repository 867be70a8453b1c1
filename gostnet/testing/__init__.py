"""The kit for tests and the lab: memory streams, conformance checks, namespaces, small servers."""
