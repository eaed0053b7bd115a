"""What the gateway and the worker share: wire models, the task's life on Redis, storage. No flask, no torch."""
