"""Files of a recipe: the safetensors beside it, the Hub, and writing whole.

Nothing from outside is used before its sha256 is checked.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dit_accel.errors import RecipeError


def verified(folder: Path, name: str, digest: str, recipe_file: Path, where: str) -> Path:
    """The path of a file that is where it may be and holds what the recipe says."""
    path = folder / name
    if not path.is_file():
        raise RecipeError(f"{where}: [files] {name} is not at {path}. Put the file beside the recipe.")
    # the Hub's cache keeps a snapshot as links into one folder of blobs, where the recipe lies as well
    real, home = path.resolve(), folder.resolve()
    if home not in real.parents and real.parent != recipe_file.resolve().parent:
        raise RecipeError(
            f"{where}: [files] {name} is a link out of the recipe's folder, to {real}. Copy the file here."
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise RecipeError(
            f"{where}: [files] {name} has sha256 {found}, but the recipe says {digest}. "
            f"It was changed or is another version: fetch it again, or correct the recipe."
        )
    return path


def copy_beside(target: Path, names: Mapping[str, Path]) -> None:
    """Copy verified files to a saved recipe's new folder."""
    for name, path in names.items():
        if (target / name).resolve() != path.resolve():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)


def download(repo_id: str, filename: str, revision: str | None) -> Path:
    """One file of a Hub repository, or of the Hub library's cache when offline."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, filename, revision=revision))
    except Exception as error:  # the Hub library raises its own, httpx's, OSError and ValueError
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise RecipeError(
            f"hub:{repo_id}/{filename}:1: cannot be fetched: {reason} "
            f"Check the id, your access (hf auth login) and the network, or pass a local path."
        ) from error


def commit_of(path: Path) -> str | None:
    """The commit of a file in the Hub's cache, so that its companions come from the same one."""
    found = re.search(r"/snapshots/([0-9a-f]{40})/", path.as_posix())
    return found[1] if found else None


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file that appears whole or not at all, in a folder that is made if need be; text as UTF-8."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
        temporary.write(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(temporary.name, file)
