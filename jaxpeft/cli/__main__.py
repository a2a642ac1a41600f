"""`python -m jaxpeft.cli`, for where the `jaxpeft` script is not on the path."""

import sys

from jaxpeft.cli.main import main

sys.exit(main())
