"""Bricks that several methods are built of."""
