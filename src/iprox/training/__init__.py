"""Supervised fine-tuning: the warm-up, and training on a selection."""
