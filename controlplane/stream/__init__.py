"""Configuration to nodes: sessions, cache, hub."""
