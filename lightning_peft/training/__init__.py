"""Lightning: the callback, the module base, and one file a task."""
