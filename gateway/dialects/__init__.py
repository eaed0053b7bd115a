"""The HTTP dialects: one file each, named in ZFLEET_DIALECTS. `base` says what such a file holds."""
