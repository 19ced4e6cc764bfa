"""Pushing a finished folder to the Hugging Face hub."""

import shlex
from pathlib import Path

from rosa_lightning.utils.text import one_line


def check_push(repo: str) -> None:
    """Check that a model can be pushed as USER/NAME, before it is made.

    Raises:
        ValueError: It is no name of a repository.
        OSError: Nobody is logged in, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"push={repo}: {one_line(error)} Give USER/NAME.") from error
    if "/" not in repo:
        raise ValueError(f"push={repo} names no user or organization. Give USER/{repo}.")
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise OSError(
            f"push={repo}: nobody is logged in to the hub. Run hf auth login, or set HF_TOKEN."
        ) from error
    except Exception as error:  # of its own and of its HTTP client, without a common base
        raise OSError(
            f"push={repo}: the hub refuses, or cannot be reached: {one_line(error, 200)}. Log in "
            "with hf auth login, or leave push out. Nothing was written."
        ) from error


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Push all files of a folder as the model USER/NAME; returns its address.

    A repository is made if there is none, a private one if so wanted.

    Raises:
        OSError: The hub refuses, or cannot be reached. The folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="rosa-lightning")
    try:
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        message = "Upload by rosa_lightning export"
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # as above
        raise OSError(
            f"{folder} is written, and could not be pushed to {repo}: {one_line(error, 200)}. Push "
            f"it with hf upload {repo} {shlex.quote(str(folder))}{' --private' * private}"
        ) from error
    return str(made)
