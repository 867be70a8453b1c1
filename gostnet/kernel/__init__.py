"""Kernel state: plan, apply, journal, roll-back; nftables, rules, routes, namespaces."""
