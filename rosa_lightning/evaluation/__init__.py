"""Answers and scores: generation, likelihood, metrics and result files."""
