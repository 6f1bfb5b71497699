"""The life of an adapter in a model: put in, switched, listed, reported, taken out."""
