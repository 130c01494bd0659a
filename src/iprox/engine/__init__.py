"""Passes over models that see every linear layer's inputs and output gradients."""
