"""What stands for the client of the Hugging Face hub, as the fixture `hub` of conftest."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar


class Hub:
    """Stands for the client of the hub; keeps what it was asked for."""

    calls: ClassVar[list[tuple]] = []
    fails: ClassVar[dict[str, Exception]] = {}

    def __init__(self, **options):
        pass

    def _asked(self, name, *about):
        if name in self.fails:
            raise self.fails[name]
        self.calls.append((name, *about))

    def whoami(self):
        self._asked("whoami")

    def create_repo(self, repo, *, private, exist_ok):
        self._asked("create_repo", repo, private, exist_ok)
        return Made(f"https://huggingface.co/{repo}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        files = sorted(path.name for path in Path(folder_path).rglob("*"))
        self._asked("upload_folder", repo_id, files)


class Made(str):
    """The address of a repository."""

    @property
    def repo_id(self) -> str:
        return self.removeprefix("https://huggingface.co/")
