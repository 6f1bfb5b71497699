"""One batch whose rows have adapters of their own."""
