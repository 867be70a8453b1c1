"""What speaks with clients and upstream proxies, one package per protocol."""
