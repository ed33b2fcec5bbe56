"""What a manifest still needs: files, room on the disk, a human. Nothing is fetched here."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from cobra.data.prepare.download import RemoteFile, is_complete, remote_sizes
from cobra.data.prepare.expect import is_held
from cobra.data.prepare.manifest import Manifest, SourceFile
from cobra.data.prepare.partial import present_bytes
from cobra.errors import DataError


def extraction_note(file: SourceFile, folder: Path) -> Path:
    """Return the file by which `extract` remembers that it has taken an archive apart."""
    return folder / (file.extract.into if file.extract else ".") / f".{Path(file.target).name}.extracted"


def is_extracted(file: SourceFile, folder: Path) -> bool:
    """Whether an archive was extracted; it may be deleted then."""
    return file.extract is not None and extraction_note(file, folder).is_file()


def wanted(manifest: Manifest, root: Path, again: Collection[str] = ()) -> list[SourceFile]:
    """Return the files to work on: all but archives that are not there and that nobody misses.

    Args:
        manifest: the data set.
        root: the data folder.
        again: targets of archives that are missed although what they bring seems to be there.
    """
    folder = root / manifest.folder
    return [
        file
        for file in manifest.files
        if (folder / file.target).exists()
        or file.target in again
        or not (is_extracted(file, folder) or is_held(file, manifest, root))
    ]


def remote_file(file: SourceFile, folder: Path) -> RemoteFile:
    """Return what has to be downloaded for a file with addresses."""
    return RemoteFile(urls=tuple(file.urls), target=folder / file.target, size=file.size, checksum=file.checksum)


def needs_a_human(files: Sequence[SourceFile], folder: Path) -> list[str]:
    """Return what to fetch by hand, and where to put it."""
    return [
        f"Fetch {file.manual}\n  and put it at {folder / file.target}; then start the same command again."
        for file in files
        if file.manual is not None and not (folder / file.target).is_file() and not is_extracted(file, folder)
    ]


def check_space(manifests: Sequence[Manifest], root: Path, *, keep_archives: bool = True) -> None:
    """Raise DataError if the disk has no room for what is known of the sizes; nothing is counted twice."""
    needed, free = _needed_bytes(manifests, root, keep_archives, {}), _free_bytes(root)
    if needed > free:
        archives = "archives included" if keep_archives else "with the largest archive"
        raise DataError(
            f"{root} needs {needed / 10**9:,.1f} GB more, {archives}, and has {free / 10**9:,.1f} GB free. Free "
            "some, choose another data_root, or prepare the sets one by one with keep_archives=false."
        )


def describe(manifests: Sequence[Manifest], root: Path, *, keep_archives: bool = True) -> str:
    """Return what would be fetched, from where, how large; asks the hosts for sizes that are not known."""
    lines: list[str] = []
    asked: dict[Path, int] = {}
    for manifest in manifests:
        folder = root / manifest.folder
        lines += [f"{manifest.name}: {manifest.title} -> {folder}", f"  licence: {manifest.licence}"]
        needed = wanted(manifest, root)
        unknown = [remote_file(file, folder) for file in needed if file.urls and file.size is None]
        unknown = [remote for remote in unknown if not is_complete(remote, remember=False)]
        for remote, size in zip(unknown, remote_sizes(unknown), strict=True):
            asked |= {remote.target: size} if size is not None else {}
        for file in manifest.files:
            size = _size_of(file, folder, asked)
            state = _state(file, folder) if file in needed else _state_of_unneeded(file, folder)
            lines.append(f"  {state:12} {_readable(size):>12}  {file.target}")
            lines += [f"  {'':26}  from {url}" for url in file.urls]
            lines += [f"  {'':26}  {file.manual}"] * (file.manual is not None)
    total, free = _needed_bytes(manifests, root, keep_archives, asked), _free_bytes(root)
    room = f"{free / 10**9:,.1f} GB." + (" That is too little: nothing would be fetched." if total > free else "")
    lines.append(f"Still needed: {total / 10**9:,.1f} GB as far as known, archives included; free: {room}")
    return "\n".join(lines)


def _state(file: SourceFile, folder: Path) -> str:
    if is_extracted(file, folder):
        return "extracted"
    if not file.urls:
        return "there" if (folder / file.target).is_file() else "by hand"
    return "there" if is_complete(remote_file(file, folder), remember=False) else "to download"


def _state_of_unneeded(file: SourceFile, folder: Path) -> str:
    return "extracted" if is_extracted(file, folder) else "not needed"


def _needed_bytes(manifests: Sequence[Manifest], root: Path, keep_archives: bool, asked: Mapping[Path, int]) -> int:
    """Return how much more the disk has to take. An archive that is complete is left to `extract`, which knows more."""
    lasting, passing = 0, [0]
    for manifest in manifests:
        folder = root / manifest.folder
        for file in wanted(manifest, root):
            target = folder / file.target
            if target.exists():
                continue
            size = _size_of(file, folder, asked)
            missing = max(0, size - present_bytes(target))
            if file.extract is None:
                lasting += missing
                continue
            lasting += round(file.extract.gigabytes * 10**9) if file.extract.gigabytes else size
            if keep_archives:
                lasting += missing
            else:  # each is deleted before the next one comes
                passing.append(missing)
    return lasting + max(passing)


def _size_of(file: SourceFile, folder: Path, asked: Mapping[Path, int]) -> int:
    return file.size or asked.get(folder / file.target) or round((file.gigabytes or 0) * 10**9)


def _free_bytes(root: Path) -> int:
    there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _readable(size: int) -> str:
    if not size:
        return "size unknown"
    return f"{size / 10**9:,.2f} GB" if size >= 10**8 else f"{size / 10**6:,.1f} MB"
