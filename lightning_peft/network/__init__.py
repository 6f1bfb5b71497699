"""Reads a model and changes nothing: its layers, blocks, norms, positions, parameters, and what patterns match."""
