"""Manifests: what a data set consists of, where it comes from, and what its finished folder holds.

Each is a YAML file in `manifests/`, read into the classes below. Sizes in bytes and checksums stand there only where
they are known; `gigabytes` are rounded, and serve to see whether a disk has room.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cobra.config import as_config, nearest, one_of, read_yaml
from cobra.errors import ConfigError

_FOLDER = Path(__file__).parent / "manifests"
_CHECKSUM = re.compile(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}")
KINDS = ("training", "benchmark", "images")
CONVERSIONS = ("gather", "ocr-vqa-jpeg", "lvis", "lrv")


@dataclass(frozen=True, kw_only=True)
class Extract:
    """How an archive is unpacked.

    Attributes:
        into: folder, below the manifest's.
        strip: leading folder of the archive's members that is dropped.
        rename: first parts of the members' paths that get another name.
        gigabytes: what it takes when unpacked; None: as much as the archive, as images do.
    """

    into: str = "."
    strip: str = ""
    rename: dict[str, str] = field(default_factory=dict[str, str])
    gigabytes: float | None = None

    def __post_init__(self) -> None:
        for key, path in (("into", self.into), ("strip", self.strip or ".")):
            _check_inside(f"extract.{key}", path)
        for path in self.rename.values():
            _check_inside("extract.rename", path)


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file to download.

    Attributes:
        target: where it lies, below the manifest's folder.
        urls: addresses of the same bytes, the best one first.
        manual: for a file that needs a human: what to fetch, from where. It has no `urls`; once it lies at `target`,
            preparing goes on with it.
        size: bytes, exactly.
        checksum: `sha256:...` or `md5:...`.
        gigabytes: size, rounded.
        hint: what else a human can do when no address works.
        extract: how it is unpacked; None: it is no archive.
    """

    target: str
    urls: list[str] = field(default_factory=list[str])
    manual: str | None = None
    size: int | None = None
    checksum: str | None = None
    gigabytes: float | None = None
    hint: str | None = None
    extract: Extract | None = None

    def __post_init__(self) -> None:
        _check_inside("target", self.target)
        if bool(self.urls) == (self.manual is not None):
            raise ConfigError(f"{self.target}: give either `urls` or `manual`, which says what a human has to fetch.")
        for url in self.urls:
            if not url.startswith(("https://", "http://")):
                raise ConfigError(f"{self.target}: urls has {url!r}, which is no address of the web.")
        if self.checksum is not None and not _CHECKSUM.fullmatch(self.checksum):
            raise ConfigError(
                f"{self.target}: checksum={self.checksum!r} must be sha256:<64 hexadecimal digits> or md5:<32>."
            )
        for key in ("size", "gigabytes"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ConfigError(f"{self.target}: {key}={value} must be greater than 0.")


@dataclass(frozen=True, kw_only=True)
class Convert:
    """A step after unpacking; `cobra.data.prepare.convert` has all but `ocr-vqa-jpeg`.

    Attributes:
        kind: one of `CONVERSIONS`.
        source: file or folder that it reads.
        target: file or folder that it makes; None: it works inside `source`.
        image: for `lrv`: image path of a row, with `{image_id}` in it.
    """

    kind: str
    source: str
    target: str | None = None
    image: str | None = None

    def __post_init__(self) -> None:
        one_of("convert.kind", self.kind, CONVERSIONS)
        for key in ("source", "target", "image"):
            if getattr(self, key) is not None:
                _check_inside(f"convert.{key}", getattr(self, key))
        if (self.target is None) != (self.kind == "ocr-vqa-jpeg"):
            raise ConfigError(f"convert.target: a step {self.kind} has {'none' if self.target else 'to name one'}.")
        if (self.image is not None) != (self.kind == "lrv"):
            raise ConfigError("convert.image is for the kind lrv, which needs it.")


@dataclass(frozen=True, kw_only=True)
class Expect:
    """What the finished folder holds.

    Attributes:
        files: glob of files to count; or else
        rows: glob of the one JSON file whose rows count: a list, an object, or JSON lines (`.jsonl`, or any name where
            every line is a value).
        key: of a JSON object that holds the rows; None: it is them.
        count: how many, exactly.
        at_least: how many, where there may be more. Neither: it varies, but there must be some.
    """

    files: str | None = None
    rows: str | None = None
    key: str | None = None
    count: int | None = None
    at_least: int | None = None

    def __post_init__(self) -> None:
        if (self.files is None) == (self.rows is None):
            raise ConfigError("expect: each entry has either `files` or `rows`.")
        if self.key is not None and self.rows is None:
            raise ConfigError("expect.key belongs to `rows`.")
        if self.count is not None and self.at_least is not None:
            raise ConfigError("expect: an entry has `count` or `at_least`, not both.")
        _check_inside("expect", self.files or self.rows or "")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A data set, a benchmark, or images that several of them share.

    Attributes:
        name: as in `data=...` or `benchmark=...`.
        title: one line.
        kind: one of `KINDS`.
        folder: below `paths.data`; all paths of the manifest start from it.
        homepage, licence, citation: of who made it.
        needs: manifests that have to be prepared as well.
        files: to download.
        convert: steps after unpacking, in their order.
        expect: what is there in the end.
    """

    name: str
    title: str
    kind: str
    folder: str
    homepage: str
    licence: str
    citation: str
    needs: list[str] = field(default_factory=list[str])
    files: list[SourceFile] = field(default_factory=list[SourceFile])
    convert: list[Convert] = field(default_factory=list[Convert])
    expect: list[Expect] = field(default_factory=list[Expect])

    def __post_init__(self) -> None:
        one_of("kind", self.kind, KINDS)
        _check_inside("folder", self.folder)
        targets = [file.target for file in self.files]
        if len(set(targets)) < len(targets):
            raise ConfigError(f"files: two have the same target, {max(targets, key=targets.count)}.")
        if not self.files and not self.needs:
            raise ConfigError("files: there are none, and `needs` names no other manifest.")

    @property
    def gigabytes(self) -> float:
        """Disk space for what is downloaded and what is unpacked, as far as it is known before asking the hosts."""
        total = 0.0
        for file in self.files:
            size = file.gigabytes or 0.0
            unpacked = file.extract.gigabytes if file.extract and file.extract.gigabytes else size
            total += size + (unpacked if file.extract else 0.0)
        return total


def available_manifests(kind: str | None = None) -> list[str]:
    """Return the names of all manifests, or of those of one kind, sorted."""
    names = sorted(file.stem for file in _FOLDER.glob("*.yaml"))
    return names if kind is None else [name for name in names if load_manifest(name).kind == kind]


def load_manifest(name: str) -> Manifest:
    """Read the manifest called `name`.

    Raises:
        ConfigError: there is none, or it is not in order; the message names the file and the key.
    """
    if name not in (known := available_manifests()):
        raise ConfigError(f"There is no data set {name!r}.{nearest(name, known)} Known: {', '.join(known)}.")
    return read_manifest(_FOLDER / f"{name}.yaml")


def load_with_needs(name: str) -> list[Manifest]:
    """Read a manifest and those that it needs, these first, each once.

    Raises:
        ConfigError: as `load_manifest`; or manifests need each other.
    """
    found: dict[str, Manifest] = {}

    def add(one: str, above: tuple[str, ...]) -> None:
        if one in above:
            raise ConfigError(f"The manifests {' -> '.join([*above, one])} need each other.")
        if one not in found:
            manifest = load_manifest(one)
            for other in manifest.needs:
                add(other, (*above, one))
            found[one] = manifest

    add(name, ())
    return list(found.values())


def read_manifest(file: Path) -> Manifest:
    """Read a manifest file.

    Raises:
        ConfigError: it is not in order; the message names the file and the key.
    """
    node = read_yaml(file, "manifest")
    try:
        manifest = as_config(Manifest, node)
        if manifest.name != file.stem:
            raise ConfigError(f"name={manifest.name!r} must be the file's own, {file.stem!r}.")
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    return manifest


def _check_inside(key: str, path: str) -> None:
    """Refuse a path that leaves its folder, on any system."""
    parts = PurePosixPath(path).parts
    if not path or path.startswith("/") or ".." in parts or "\\" in path or ":" in path:
        raise ConfigError(f"{key}={path!r} leaves its folder; give a path below it, with '/' between its parts.")
