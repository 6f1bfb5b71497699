"""Virtual tokens, keys and values before a text, and what a call of a transformers model means."""
