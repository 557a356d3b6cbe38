"""Upload of a folder to a repository of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from lit_llm.config.problems import InputError, Problem


def check_repo(repo: str) -> None:
    """Raise InputError for a name that no repository can have."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(Problem(f"is no name of a repository, such as user/model: {error}", repo)) from None


def upload(folder: Path, repo: str, private: bool) -> str:
    """Upload all files of a folder as one commit, to a repository that is made where there is none.

    Args:
        folder: Folder with the files.
        repo: Name of the repository, such as user/model.
        private: Whether a new repository is hidden from others; an existing one stays as it is.

    Returns:
        Address of the repository.

    Raises:
        InputError: The Hub refused it, or was not reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    hub = HfApi(library_name="lit-llm")
    try:
        made = hub.create_repo(repo, private=private or None, exist_ok=True)
        hub.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Upload by lit-llm push")
    except LocalTokenNotFoundError:
        raise InputError(Problem(f"needs a token; {LOGIN}", repo)) from None
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # An upload to the storage of large files has a RuntimeError around its cause.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            advice = f"; {LOGIN}" if status in (401, 403) else ""
            message = f"was refused by the Hub ({status}): {_first_line(cause)}{advice}"
        elif isinstance(cause, HTTPError | OSError):
            message = f"the Hub at {hub.endpoint} was not reached: {_first_line(cause)}"
        else:
            message = f"was not uploaded: {' '.join(str(cause).split())}"
        raise InputError(Problem(message, repo)) from None
    return str(made)


LOGIN = "`hf auth login` stores one that may write, or set HF_TOKEN"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
