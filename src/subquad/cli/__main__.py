"""``python -m subquad.cli`` is ``subquad``."""

import sys

from subquad.cli import main

sys.exit(main())
