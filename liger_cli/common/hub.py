"""Requests to the Hugging Face hub, which fail within seconds when it is out of reach."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from liger_cli.common.readers import read_json
from liger_cli.errors import ConfigError, EnvironmentProblem, LigerError

__all__ = [
    "check_push",
    "check_repository",
    "fetch_config",
    "fetch_dataset",
    "fetch_weights",
    "loading_error",
    "push_files",
]

_PROBE_TIMEOUT_S = 5.0


def fetch_config(name: str) -> tuple[dict[str, Any], Path | None]:
    """Return the configuration of a hub model, and its directory in the cache while offline.

    Raises:
        EnvironmentProblem: The hub is out of reach and the model is not in the cache, or the hub
            does not give it.
    """
    from huggingface_hub import hf_hub_download

    online = _is_reachable()
    try:
        # The client retries for half a minute before it says that there is no network.
        path = Path(hf_hub_download(name, "config.json", local_files_only=not online))
    except Exception as error:
        if online:
            raise _refused(name, error) from error
        raise EnvironmentProblem(
            f"the Hugging Face hub cannot be reached, and {name} is neither a local directory "
            "nor in the hub's cache",
            hint="offline, take a preset (liger models lists them) or a local directory that holds "
            f"the model; where there is a network, `hf download {name}` fills the cache",
        ) from error
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the config.json of {name} cannot be read: {error}") from error
    return config, None if online else path.parent


def fetch_weights(name: str) -> Path:
    """Return the directory in the cache that holds the safetensors of a hub model.

    Raises:
        EnvironmentProblem: The hub does not give them.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise _refused(name, error) from error


def fetch_dataset(
    name: str, choose_split: Callable[[Sequence[str]], str], *, streaming: bool
) -> Any:
    """Return a split of a hub dataset, named organisation/name or organisation/name:configuration.

    Args:
        choose_split: Is given the names of all splits.
        streaming: The rows are read as they arrive and not stored.

    Raises:
        EnvironmentProblem: The hub is out of reach, or does not give it.
    """
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        if not _is_reachable():
            raise ConnectionError("the Hugging Face hub cannot be reached")
        splits = datasets.get_dataset_split_names(repository, configuration or None)
        return datasets.load_dataset(
            repository, configuration or None, split=choose_split(splits), streaming=streaming
        )
    except LigerError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or repr(error)
        raise EnvironmentProblem(
            f"{name}: there is no such file, and as a dataset of the hub: {text}",
            hint="organisation/name:configuration takes one of several configurations; offline, "
            "take a file or a folder that datasets.save_to_disk wrote",
        ) from error


def check_repository(repository: str) -> None:
    """Check the name of a repository.

    Raises:
        ConfigError: The hub does not take it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{repository!r} cannot be a repository of the hub: {text}") from error


def check_push(repository: str) -> None:
    """Check, without a request, that a push may succeed.

    Raises:
        ConfigError: The name is not one that the hub takes.
        EnvironmentProblem: There is no login, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants, get_token

    check_repository(repository)
    if constants.HF_HUB_OFFLINE:
        raise EnvironmentProblem(
            f"{repository} cannot be pushed while HF_HUB_OFFLINE is set", hint="unset it"
        )
    if get_token() is None:
        raise EnvironmentProblem(
            f"{repository} cannot be pushed: there is no login to the Hugging Face hub",
            hint="`hf auth login`, or the variable HF_TOKEN, with a token that may write",
        )


def push_files(
    repository: str, files: Mapping[str, Path | bytes], *, private: bool, message: str
) -> str:
    """Create a repository, if there is none, and add files to it in one commit.

    Args:
        repository: organisation/name, or a name of the user's own.
        files: Path or content by the name in the repository.
        private: Of a repository that is created.
        message: Of the commit.

    Returns:
        The address of the repository.

    Raises:
        ConfigError: As check_push.
        EnvironmentProblem: As check_push, or the hub is out of reach or refuses.
    """
    import huggingface_hub

    check_push(repository)
    try:
        api = huggingface_hub.HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        operations = [
            huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
            for name, content in files.items()
        ]
        api.create_commit(address.repo_id, operations=operations, commit_message=message)
    # A request fails in the ways of several libraries.
    except Exception as error:
        text = " ".join(str(error).split()) or repr(error)
        raise EnvironmentProblem(
            f"{repository} was not pushed: {text}",
            hint="the files are where they were, and the command may be run again",
        ) from error
    return str(address)


def _is_reachable() -> bool:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_PROBE_TIMEOUT_S):
            return True
    except urllib.error.HTTPError:
        # Any answer is an answer.
        return True
    except urllib.error.URLError as error:
        # A certificate that is not trusted here may be trusted by the hub's client.
        return isinstance(error.reason, ssl.SSLError)
    except (OSError, ValueError):
        return False


def _refused(name: str, error: Exception) -> EnvironmentProblem:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return EnvironmentProblem(
        f"the Hugging Face hub does not give {name}: {first_line}",
        hint="check the name; a gated model needs `hf auth login` and its licence accepted",
    )


def loading_error(error: Exception, what: str, is_remote: bool) -> LigerError:
    """Convert an error of loading `what` to one with an exit code.

    Args:
        is_remote: Whether it comes from the hub (EnvironmentProblem), or from the user's files
            (ConfigError).
    """
    text = " ".join(str(error).split()) or repr(error)
    kind = EnvironmentProblem if is_remote else ConfigError
    return kind(f"{what} cannot be loaded: {text}")
