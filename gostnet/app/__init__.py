"""The daemon: assembles a configuration into services, brings them up with their kernel state, reloads, winds down."""
