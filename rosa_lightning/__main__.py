"""``python -m rosa_lightning``."""

import os
import sys


def main() -> None:
    """Run the command line and exit with its status."""
    from rosa_lightning.cli.names import answer_early

    status = answer_early(sys.argv[1:])
    if status is None:
        asks = {"-h", "--help", "--print_config"} & set(sys.argv)
        if sys.argv[1] == "compare" and not asks and not sys.stdout.isatty():
            # The imports alone take seconds, and in a file or a pipe no bar will follow.
            sys.stderr.write("compare: starting; what is planned follows in some seconds\n")
        # Bars of downloads and of weights appear where they last. Read when tqdm is imported.
        os.environ.setdefault("TQDM_DELAY", "3")
        from rosa_lightning.cli.main import main as run

        status = run()
    sys.exit(status)


if __name__ == "__main__":
    main()
