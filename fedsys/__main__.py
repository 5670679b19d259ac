"""``python -m fedsys`` is ``fedsys``."""

import sys

from fedsys.main import main

sys.exit(main())
