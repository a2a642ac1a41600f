"""The `jaxpeft` command."""

from jaxpeft.cli.main import main as main
