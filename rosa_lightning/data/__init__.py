"""From records to batches: sources, prompt styles, tokens, mixing, splits and contamination."""
