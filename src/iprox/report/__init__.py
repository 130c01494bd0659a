"""The study report: what ran, what it measured, and how far the measurements carry."""
