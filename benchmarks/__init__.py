"""Measurements of Postroad and its peers; nothing here is shipped."""
