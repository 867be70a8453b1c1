"""Contracts and primitives that every package builds on: data shapes, flow, errors, options, the readiness hub."""
