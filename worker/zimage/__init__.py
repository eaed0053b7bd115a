"""Z-Image in parts: what pipelines/zimage.py is made of. Knows tensors, and neither queues nor storage."""
