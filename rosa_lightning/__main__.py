"""``python -m rosa_lightning``."""

import os
import sys


def main() -> None:
    """Run the command line and exit with its status."""
    from rosa_lightning.cli.names import answer_early

    status = answer_early(sys.argv[1:])
    if status is None:
        # Bars of downloads and of weights appear where they last. Read when tqdm is imported.
        os.environ.setdefault("TQDM_DELAY", "3")
        from rosa_lightning.cli.main import main as run

        status = run()
    sys.exit(status)


if __name__ == "__main__":
    main()
