"""A detector for ganomaly-plugin, from another package."""
