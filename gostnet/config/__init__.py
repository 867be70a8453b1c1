"""The configuration: schema, YAML/JSON loading with positions, -L/-F URLs, dumping."""
