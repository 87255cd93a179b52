"""`python -m tests.chaos.broken`: broken builds, each of which the judge must catch; see `support.chaos.broken`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from support.chaos.broken import main

    sys.exit(main())
