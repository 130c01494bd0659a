"""The study file: its schema, presets and loading."""
