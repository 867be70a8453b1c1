"""The name service: answers queries from hosts, a cache, and upstream servers."""
