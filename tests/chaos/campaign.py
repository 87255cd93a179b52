"""`python -m tests.chaos.campaign`: a campaign by hand; see `support.chaos.campaign`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from support.chaos.campaign import main

    sys.exit(main())
