"""Measurements of the spine, each against its goal and, where there is one, against stock RQ in the same run."""
