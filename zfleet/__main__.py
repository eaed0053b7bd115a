"""`python -m zfleet` is `zfleet`."""

from __future__ import annotations

import sys

from zfleet.cli import main

if __name__ == "__main__":
    sys.exit(main())
