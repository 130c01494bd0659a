"""Evaluation: likelihoods and generations of test items, and what they are worth."""
