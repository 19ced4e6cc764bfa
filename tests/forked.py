"""Commands as processes of their own that start at once: forked from a process that is warm.

Lines of JSON come in, and one line goes out for each: a process id for {"run": [...], "log": path},
an exit status or null for {"poll": pid}. A process leads a group of its own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


class Commands:
    """Starts `python -m rosa_lightning` with arguments, without the wait for imports."""

    def __init__(self, config: Path) -> None:
        root = str(Path(__file__).parents[1])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        self._warm = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", str(config)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, **question: object) -> int | None:
        assert self._warm.stdin is not None
        assert self._warm.stdout is not None
        self._warm.stdin.write(json.dumps(question) + "\n")
        self._warm.stdin.flush()
        answer: int | None = json.loads(self._warm.stdout.readline())
        return answer

    def start(self, arguments: Sequence[str], log: Path) -> int:
        """Run a command in the working folder; returns its process id."""
        pid = self._ask(run=list(arguments), log=str(log), cwd=str(Path.cwd()))
        assert pid is not None
        return pid

    def poll(self, pid: int) -> int | None:
        """The exit status, once; None while it runs."""
        return self._ask(poll=pid)

    def kill(self, pid: int) -> None:
        """End a process and its children without notice."""
        os.killpg(pid, signal.SIGKILL)
        while self.poll(pid) is None:
            pass

    def close(self) -> None:
        """End the process that the others are forked from."""
        self._warm.communicate()


def run(arguments: list[str], log: str, cwd: str) -> int:
    from rosa_lightning.cli.main import main

    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(cwd)
    return main(arguments)


def serve(config: str) -> None:
    import docstring_parser

    from rosa_lightning.cli.main import main

    for name in ("parse", "parse_from_object"):
        setattr(docstring_parser, name, functools.cache(getattr(docstring_parser, name)))
    answers, sys.stdout = sys.stdout, sys.stderr
    with contextlib.suppress(SystemExit):
        main(["fit", "--config", config, "--print_config"])  # all that a command line imports
    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                status = 1
                try:
                    status = run(question["run"], question["log"], question["cwd"])
                finally:
                    sys.stderr.flush()
                    os._exit(status)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    sys.argv[0] = "rosa"
    serve(sys.argv[1])
