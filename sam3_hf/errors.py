"""What went wrong, in one line that names the remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .sources_sam3_lite import EXPORT_FILE

EXPECTED = (ValueError, OSError, RuntimeError, ImportError)  # what a user can mend; the type of others is named

# Why a file of a repository was not had, as Transformers gives it as the cause of its own error.
_NOT_HAD = (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)


def one_line(error: BaseException, memory_option: str = "--batch_size") -> str:
    """
    The message of an error without line breaks.

    Args:
        memory_option: what to pass a smaller number to when the memory of the GPU does not suffice.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return f"the memory of the GPU does not suffice: pass a smaller {memory_option}."
    if isinstance(error, OSError) and error.strerror is not None:
        return _of_the_system(error)
    text = joined(str(error)) or type(error).__name__
    return text if isinstance(error, EXPECTED) else f"{type(error).__name__}: {text}"


def joined(text: str) -> str:
    """
    Lines as one: a colon introduces what follows, other ends become semicolons. Control characters, which names of
    files may hold, are written as escapes.
    """
    result = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        result += ("" if not result else " " if result[-1] in ":;,." else "; ") + line
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in result)


@contextmanager
def model_errors(source: str) -> Iterator[None]:
    """Raises a ValueError that names the model, of whatever error the files of a damaged or foreign one lead to."""
    try:
        yield
    except (ValueError, OSError, ImportError, AssertionError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{source} cannot be loaded, a file of it is damaged or no model's: {reason}") from error


def usable_device(name: str | torch.device, option: str = "device") -> torch.device:
    """
    Args:
        option: what the user named it with.

    Raises:
        ValueError: it is no device, or there is none of that name here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{option} {name} cannot be used here ({reason}): leave it out, or give cpu") from None
    return device


@contextmanager
def named_source(source: str | os.PathLike, token: str | bool | None = None) -> Iterator[None]:
    """Raises what `missing_source` says instead of an error of the Hub, or of what lies on the way there."""
    try:
        yield
    except OSError as error:
        cause = error.__cause__
        if os.path.exists(source) or not isinstance(cause, _NOT_HAD) or isinstance(cause, RevisionNotFoundError):
            raise
        raise missing_source(source, token) from error


def missing_source(source: str | os.PathLike, token: str | bool | None = None) -> OSError:
    """
    Why there is no model under this name: a folder without one; or no name of a repository, none there, no access, or
    no network. Asks the Hub once.

    Args:
        token: as in `from_pretrained`.
    """
    if os.path.exists(os.path.join(source, EXPORT_FILE)):
        return FileNotFoundError(
            f"{source} holds graphs of 'sam3-lite export', which can be run, and neither trained nor converted: give "
            "the model that they were made of"
        )
    if os.path.exists(source):
        return FileNotFoundError(f"{source} has neither a config.json nor a .pt file of Meta's")
    try:
        validate_repo_id(os.fspath(source))
    except HFValidationError:
        return FileNotFoundError(
            f"there is no folder or file {source}, and repositories of the Hub are named owner/name: correct the path"
        )
    page = f"https://huggingface.co/{source}"
    try:
        HfApi(token=token).auth_check(os.fspath(source))
    except GatedRepoError:
        return PermissionError(f"no access to {source}: ask for it at {page}, then log in with 'hf auth login'")
    except RepositoryNotFoundError:
        return FileNotFoundError(
            f"there is no folder {source} here, and no repository {source} on the Hub that you may see: correct the "
            "name, or log in with 'hf auth login' if it is a private one"
        )
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        return ConnectionError(f"no network: {source} is not on this machine, and HF_HUB_OFFLINE is set: unset it")
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            return PermissionError(f"no access to {source} (status {status}): see {page}, then run 'hf auth login'")
        return ConnectionError(f"the Hub answers with status {status} for {source}: try again later")
    except Exception as error:  # each HTTP library has its own errors for a host that cannot be reached
        return ConnectionError(
            f"no network: {source} is not on this machine, and the Hub cannot be reached ({joined(str(error))}): "
            "connect, or give a folder"
        )
    return FileNotFoundError(f"the repository {source} has neither a config.json nor a .pt file of Meta's")


def _of_the_system(error: OSError) -> str:
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes, os.PathLike)) else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}the disk is full: make space"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}no right to read or write here ({error.strerror}): change the rights or the folder"
    if error.errno in (errno.EEXIST, errno.ENOTDIR) and where and not os.path.isdir(error.filename):
        return f"{where}{error.strerror}, where a folder is needed: choose another path"
    return f"{where}{error.strerror}"
