"""The mechanism, in torch alone: adapters on hooks, hosts, targets, injection, merging, checkpoints."""
