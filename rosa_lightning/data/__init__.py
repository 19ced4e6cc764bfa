"""From records to batches: sources, prompts, tokens, the mixture of sources, and contamination."""
