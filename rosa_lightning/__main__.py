"""``python -m rosa_lightning``."""

import sys


def main() -> None:
    """Run the command line and exit with its status."""
    from rosa_lightning.cli.main import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
