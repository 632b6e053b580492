"""Canaries: files, folders and links of a user's, planted next to what whichkl writes, and whether they are as they were."""

import hashlib
import os
from pathlib import Path

_TEXTS = {
    "thesis.tex": "years",
    ".DS_Store": "\0\0Bud1",
    "notes.txt": "whichkl is a library",
    "sub/data.csv": "1,2\n",
    "sub/deeper/.hidden": "x",
    "journal.safetensors.bak": "old",
    ".whichkl": "settings of mine",
}


def plant(folder):
    """Write files of a user's into a folder, with an empty folder, and links to a file and a folder outside."""
    folder = Path(folder)
    outside = folder.resolve().parent / f"outside-{folder.name}"
    (outside / "album").mkdir(parents=True, exist_ok=True)
    (outside / "album" / "photo.jpg").write_text("irreplaceable")
    for name, text in _TEXTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "linked").symlink_to(outside / "album")
    (folder / "photo").symlink_to(outside / "album" / "photo.jpg")
    return folder


def seen(folder, but=()):
    """Every entry below a folder and outside it, with its content, kind and date; `but` names entries that may be new."""
    folder = Path(folder)
    found = {}
    for root in (folder, folder.resolve().parent / f"outside-{folder.name}"):
        for path in sorted(root.rglob("*")) if root.exists() else []:
            name = path.relative_to(root).as_posix()
            if any(name == one or name.startswith(f"{one}/") for one in but):
                continue
            if path.is_symlink():
                found[root.name, name] = ("link", os.readlink(path))
            elif path.is_dir():
                found[root.name, name] = ("folder",)
            else:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                found[root.name, name] = ("file", digest, path.stat().st_mtime_ns)
    return found
