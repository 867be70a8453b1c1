"""Port forwarding, and the connectors that speak no protocol of their own."""
