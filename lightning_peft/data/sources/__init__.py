"""Reading rows, checking them, and turning them into token ids and batches."""
