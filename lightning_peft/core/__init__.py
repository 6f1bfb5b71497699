"""What the author of a method reads: methods, their fields, the kinds of adapters, and how adapters combine."""
