"""Where derived files go, how they get there whole, and checksums that are computed once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ganomaly_plugin.errors import InvalidInput, one_line
from ganomaly_plugin.files import as_path, atomic_write, locked
from ganomaly_plugin.provenance import available_cpus

_PIECE = 1 << 20


def cache_folder(root: Path) -> Path:
    """A writable folder for derived files: `root/.cache`, else the user's cache folder.

    The user's cache folder is $XDG_CACHE_HOME or ~/.cache, and below it `ganomaly_plugin`. It serves when `root`
    does not exist or is read-only. Everything in either folder can be deleted while nothing runs; it is made again.

    Raises:
        InvalidInput: Neither can be written.
    """
    places, reason = [root / ".cache"] if root.is_dir() and os.access(root, os.W_OK) else [], ""
    try:
        places.append(as_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ganomaly_plugin")
    except InvalidInput as error:  # the user has no home folder, as in some containers
        reason = one_line(error)
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = one_line(error)
            continue
        if os.access(place, os.W_OK):
            return place
    raise InvalidInput(f"No cache folder can be written ({reason or places[-1]}). Set XDG_CACHE_HOME to a folder that can be.")


def file_digest(path: Path) -> dict[str, str]:
    """sha256 and md5 of a file; md5 because that is what most data sets publish."""
    digests = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            for digest in digests.values():
                digest.update(piece)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def remembered_digests(paths: Iterable[Path], root: Path) -> dict[Path, dict[str, str]]:
    """`file_digest` of each path, taken from `checksums.json` in the cache when size and time have not changed.

    Args:
        paths: Files that exist.
        root: The data root, which decides where `checksums.json` is.

    Returns:
        path → {"sha256": ..., "md5": ...}.
    """
    sidecar = cache_folder(root) / "checksums.json"
    known = _read_json(sidecar)
    stamps = {path: _stamp(path) for path in paths}
    stale = [path for path, stamp in stamps.items() if known.get(_name(path), {}).get("stamp") != stamp]
    if stale:
        with ThreadPoolExecutor(available_cpus()) as pool:  # hashing releases the interpreter
            fresh = dict(zip(stale, pool.map(file_digest, stale), strict=True))
        with locked(sidecar.with_name("checksums.lock")):
            known = _read_json(sidecar)
            known |= {_name(path): {"stamp": stamps[path], **digest} for path, digest in fresh.items()}
            atomic_write(sidecar, json.dumps(known, indent=1, sort_keys=True).encode())
    return {path: {kind: known[_name(path)][kind] for kind in ("sha256", "md5")} for path in stamps}


def _name(path: Path) -> str:
    return str(path.absolute())


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _read_json(path: Path) -> dict[str, Any]:
    """The content of `path`, or nothing: what is remembered can always be computed again."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
