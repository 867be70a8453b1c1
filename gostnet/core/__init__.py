"""Contracts and primitives that every other package builds on: data shapes, flow, errors, options, the readiness hub."""
