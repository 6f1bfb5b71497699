"""Adapters in files: written whole, checked when read, the peft package's format included."""
