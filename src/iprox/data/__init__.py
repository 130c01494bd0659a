"""Pools, tasks, chat formats and batches: everything between files and token ids."""
