"""HTTP in front of the broker: thin, without torch, any number of processes."""
