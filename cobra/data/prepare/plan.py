"""What a manifest still needs: files, room on the disk, a human. Nothing is fetched here."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from cobra.data.prepare.download import RemoteFile, is_complete, remote_sizes
from cobra.data.prepare.manifest import Manifest, SourceFile
from cobra.errors import DataError


def extraction_note(file: SourceFile, folder: Path) -> Path:
    """Return the file by which `extract` remembers that it has taken an archive apart."""
    return folder / (file.extract.into if file.extract else ".") / f".{Path(file.target).name}.extracted"


def is_extracted(file: SourceFile, folder: Path) -> bool:
    """Whether an archive was extracted; it may be deleted then."""
    return file.extract is not None and extraction_note(file, folder).is_file()


def remote_files(manifest: Manifest, root: Path) -> list[RemoteFile]:
    """Return what has to be downloaded: all with addresses but archives that were extracted and deleted."""
    folder = root / manifest.folder
    return [
        RemoteFile(urls=tuple(file.urls), target=folder / file.target, size=file.size, checksum=file.checksum)
        for file in manifest.files
        if file.urls and ((folder / file.target).exists() or not is_extracted(file, folder))
    ]


def needs_a_human(manifest: Manifest, root: Path) -> list[str]:
    """Return what to fetch by hand, and where to put it."""
    folder = root / manifest.folder
    return [
        f"Fetch {file.manual}\n  and put it at {folder / file.target}; then start the same command again."
        for file in manifest.files
        if file.manual is not None and not (folder / file.target).is_file() and not is_extracted(file, folder)
    ]


def check_space(manifests: Sequence[Manifest], root: Path) -> None:
    """Raise DataError if the disk has no room for what is known of the sizes; nothing is counted twice."""
    needed = sum(_missing_gigabytes(manifest, root) for manifest in manifests) * 10**9
    there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise DataError(
            f"{root} needs {needed / 10**9:,.1f} GB more, archives included, and has {free / 10**9:,.1f} GB free. Free "
            "some, choose another data_root, or prepare the sets one by one with keep_archives=false."
        )


def describe(manifests: Sequence[Manifest], root: Path) -> str:
    """Return what would be fetched, from where, how large; asks the hosts for sizes that are not known."""
    lines: list[str] = []
    for manifest in manifests:
        folder = root / manifest.folder
        lines += [f"{manifest.name}: {manifest.title} -> {folder}", f"  licence: {manifest.licence}"]
        remote = {file.target: file for file in remote_files(manifest, root)}
        unknown = [file for file in remote.values() if file.size is None and not is_complete(file, remember=False)]
        sizes = dict(zip([file.target for file in unknown], remote_sizes(unknown), strict=True))
        for file in manifest.files:
            target = folder / file.target
            size = file.size or sizes.get(target) or round((file.gigabytes or 0) * 10**9)
            lines.append(f"  {_state(file, folder, remote.get(target)):12} {_readable(size):>12}  {file.target}")
            lines += [f"  {'':26}  from {url}" for url in file.urls]
            lines += [f"  {'':26}  {file.manual}"] * (file.manual is not None)
    needed = sum(_missing_gigabytes(manifest, root) for manifest in manifests)
    there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free / 10**9
    lines.append(f"Still needed: {needed:,.1f} GB as far as known, archives included; free: {free:,.1f} GB.")
    return "\n".join(lines)


def _state(file: SourceFile, folder: Path, remote: RemoteFile | None) -> str:
    if is_extracted(file, folder):
        return "extracted"
    if remote is None:
        return "there" if (folder / file.target).is_file() else "by hand"
    return "there" if is_complete(remote, remember=False) else "to download"


def _missing_gigabytes(manifest: Manifest, root: Path) -> float:
    folder, total = root / manifest.folder, 0.0
    for file in manifest.files:
        if is_extracted(file, folder):
            continue
        size = file.gigabytes or (file.size or 0) / 10**9
        total += 0.0 if (folder / file.target).exists() else size
        if file.extract is not None:
            total += file.extract.gigabytes or size
    return total


def _readable(size: int) -> str:
    if not size:
        return "size unknown"
    return f"{size / 10**9:,.2f} GB" if size >= 10**8 else f"{size / 10**6:,.1f} MB"
