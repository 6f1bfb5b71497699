"""Updates of adapters written into the memory of a layer's output, with backwards of their own."""
