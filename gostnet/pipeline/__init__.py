"""Service, router, chain, hop, node, selector: how a flow gets from listener to target."""
