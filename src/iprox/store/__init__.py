"""Artifacts on disk: manifests, the content store, tables and arrays."""
