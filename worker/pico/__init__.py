"""pico: a trained Z-Image in miniature that ships in this package, so that the fleet runs on a laptop with no download.

README.md beside this file says what it can paint and how it was trained.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "checkpoint"  # in the diffusers layout
