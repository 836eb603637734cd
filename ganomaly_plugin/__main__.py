"""`python -m ganomaly_plugin` is `bench`."""

import sys

from ganomaly_plugin.cli import main

sys.exit(main())
