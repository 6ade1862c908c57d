"""``python -m ospnext`` is ``ospnext``."""

import sys

from ospnext.cli import main

sys.exit(main())
