"""Adapters folded into the base, and adapters made of others."""
