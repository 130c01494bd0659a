"""Numerical cores: tensors in, tensors out; nothing here knows models, files or configs."""
