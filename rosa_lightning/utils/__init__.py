"""Small parts that know nothing of models, data or training.

Files and JSON, agreement and orderly ends between processes, random state, errors, and tables.
"""
