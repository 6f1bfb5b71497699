"""One file a task, and what language models share."""
