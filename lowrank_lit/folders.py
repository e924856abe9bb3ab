"""Model folders as files: what may be overwritten, how one is written whole, and what its files say.

Nothing here loads a model or knows a plan.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lowrank_lit.errors import ExportError, LowRankError, reason_of

FORMAT_VERSION = 1
"""Version of the entry in ``config.json`` and of ``lowrank_lit.json``; a newer one is refused."""
MARKER = "lowrank_lit.json"
"""File that marks a folder as an export of this package."""

_PathLike = str | os.PathLike[str]


def refuse_foreign(path: _PathLike, fingerprint: str) -> None:
    """Check that an export may go to ``path``; cheap, so that a run asks before it starts.

    Allowed are a path that does not exist, an empty folder, and an export with the same fingerprint in which nobody put
    a file.

    Args:
        path: Folder of the export.
        fingerprint: Of the export to be written, see :func:`export_fingerprint`.

    Raises:
        ExportError: If something else is there; the message names it.
    """
    folder = Path(path)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ExportError(f"path='{path}' is a file; choose a folder")
    files = files_in(folder)
    if not files:
        return
    if MARKER not in files:
        raise ExportError(f"path='{path}' holds '{files[0]}', which is no export of this run; choose an empty folder")
    marker = read_json(folder / MARKER)
    found = marker.get("fingerprint")
    if not fingerprint or found != fingerprint:
        raise ExportError(
            f"path='{path}' holds the export of another run (fingerprint '{str(found)[:12]}', this one "
            f"'{fingerprint[:12]}'); choose another folder or delete it"
        )
    added = [name for name in files if name not in marker.get("files", [])]
    if added:
        raise ExportError(f"path='{path}' holds '{added[0]}' beside an earlier export; move the file away")


def read_shapes(files: Iterable[_PathLike]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in safetensors files; reads the headers alone.

    Raises:
        ExportError: If a file is missing, truncated, or no safetensors file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            # Opening compares the length that the header promises with the length of the file.
            with safe_open(os.fspath(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    shapes[name] = tuple(opened.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise ExportError(
                f"weight file '{file}' is missing, truncated or no safetensors file ({error}); export the model again"
            ) from error
    return shapes


def damaged_file(folder: Path) -> str | None:
    """Which weight file of a model folder is missing, truncated or no safetensors file, if one is."""
    if not list(folder.glob("*.safetensors*")):
        return None
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"'{file}' is missing, truncated or no safetensors file: {reason_of(error)}"
    return None


def check_version(version: object, where: str) -> None:
    if not isinstance(version, int) or version < 1:
        raise ExportError(f"format_version={version!r} in {where} is none of lowrank-lit; export the model again")
    if version > FORMAT_VERSION:
        raise ExportError(
            f"format_version={version} in {where} is newer than this release reads ({FORMAT_VERSION}); "
            "upgrade lowrank-lit"
        )


def _siblings(target: Path) -> tuple[Path, Path]:
    """Where a folder is written before it is renamed, and where the one it replaces waits until then."""
    return (
        target.with_name(f".{target.name}.lowrank-lit-partial"),
        target.with_name(f".{target.name}.lowrank-lit-previous"),
    )


def restore_interrupted(target: Path) -> None:
    """Undo what a killed export left: its partial folder, and an earlier export that it had moved aside."""
    partial, previous = _siblings(target)
    if partial.exists():
        shutil.rmtree(partial)
    if previous.exists():
        if target.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(target)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of ``target`` when the block ends without an error."""
    partial, previous = _siblings(target)
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rename(previous)
        partial.rename(target)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise unwritable(target, error) from error
    except (RuntimeError, ValueError) as error:
        if isinstance(error, LowRankError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"transformers refuses to save the model ({reason}); mend that and export again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def unwritable(path: _PathLike, error: Exception) -> ExportError:
    reason = (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0]
    return ExportError(f"path='{path}' cannot be written ({reason}); free space or choose another folder")


def files_in(folder: Path) -> list[str]:
    """Files under a folder, as relative paths with forward slashes, sorted."""
    return sorted(item.relative_to(folder).as_posix() for item in folder.rglob("*") if not item.is_dir())


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"'{file}' cannot be read ({error.strerror}); export the model again") from error
    except ValueError as error:
        raise ExportError(f"'{file}' is truncated or no JSON ({error}); export the model again") from error
    if not isinstance(values, dict):
        raise ExportError(f"'{file}' holds no JSON object; export the model again")
    return values


def hub_settings(name: str) -> dict[str, bool]:
    """For ``from_pretrained``: the cache alone where the hub does not answer, for its client tries for half a minute.

    Args:
        name: A folder, for which nothing is asked, or a name of the hub.
    """
    if Path(name).exists() or os.environ.get("HF_HUB_OFFLINE"):
        return {}
    try:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
        urllib.request.urlopen(request, timeout=10).close()
    except (urllib.error.HTTPError, ValueError):  # it answers; or the client is to say what is wrong with its address
        return {}
    except OSError as error:  # what certificates are trusted is the client's affair
        return {} if isinstance(getattr(error, "reason", None), ssl.SSLError) else {"local_files_only": True}
    return {}


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_OF_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def from_hub(name: str, settings: dict[str, Any]) -> Path:
    """The folder in the cache with the files of a model of the hub; fetches those that are missing.

    Args:
        name: Such as ``user/model``.
        settings: For ``from_pretrained``; those that say what to fetch, such as ``revision``, are taken out.

    Raises:
        ExportError: If it is no such name, the hub has no such model, or the hub cannot be reached.
    """
    from transformers.utils.hub import cached_file

    wanted = {key: settings.pop(key) for key in _OF_HUB if key in settings}
    if not _HUB_NAME.fullmatch(name):
        raise ExportError(f"path='{name}' is no folder; give the folder of an export")

    def fetch(file: str, *, optional: bool = False) -> str | None:
        found: str | None = cached_file(name, file, _raise_exceptions_for_missing_entries=not optional, **wanted)
        return found

    wanted |= hub_settings(name)
    try:
        config = fetch("config.json")
        if config is None:
            raise ExportError(f"path='{name}' is a repository of the hub without config.json; give that of an export")
        folder = Path(config).parent
        for file in ("model.safetensors.index.json", MARKER, "generation_config.json", "modeling_lowrank.py"):
            fetch(file, optional=True)
        for path in weight_files(folder):
            fetch(path.name)
    except LowRankError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise ExportError(
            f"path='{name}' is no folder here, and the hub gives no such model ({reason_of(error)}); give the folder "
            "of an export, or the name of a model that is there or in the cache"
        ) from error
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, by its index where there is one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ExportError(f"'{index}' names no weight file; export the model again")
    return [folder / str(name) for name in sorted(set(shards.values()))]
