"""Time to extract many small files, as a multiple of `unzip`'s and `tar`'s: `python benchmarks/extraction.py`.

The files are random bytes, stored as in COCO's zips: as hard to compress as JPEG. Ways take turns within rounds, each
into a folder of its own that is removed before the next; the least time of each counts. A process is started for every
way, and `sync` is part of it (`--no-sync`: only our own sync, which is always there). `again` is the second run of a
finished extraction, `resumed` one whose note is gone, so that every file's CRC is compared.

    python benchmarks/extraction.py --folder /dev/shm/extraction    # without a disk
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from io import BytesIO
from pathlib import Path

OURS = "import sys; from pathlib import Path; from cobra.data.prepare.extract import extract; "
OURS += "extract(Path(sys.argv[1]), Path(sys.argv[2]), jobs=int(sys.argv[3]))"


def make_archives(folder: Path, num_files: int, size: int) -> tuple[Path, Path]:
    """Write the same files as a stored zip and as a plain tar."""
    rng = random.Random(0)
    archives = folder / "a.zip", folder / "a.tar"
    with zipfile.ZipFile(archives[0], "w") as zipped, tarfile.open(archives[1], "w") as tarred:
        for number in range(num_files):
            name, content = f"train2017/{number:012d}.jpg", rng.randbytes(size)
            zipped.writestr(name, content)
            info = tarfile.TarInfo(name)
            info.size = size
            tarred.addfile(info, BytesIO(content))
    return archives


def seconds(command: list[str], sync: bool) -> float:
    subprocess.run(["sync"], check=True)  # what others have left is not this command's
    before = time.perf_counter()
    subprocess.run(command, check=True)
    if sync:
        subprocess.run(["sync"], check=True)
    return time.perf_counter() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=50_000, help="bytes of a file")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="work here, for example on another disk")
    parser.add_argument("--no-sync", action="store_true", help="let unzip and tar leave their files in memory")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        zipped, tarred = make_archives(folder, arguments.files, arguments.size)
        out = folder / "out"
        theirs = {
            "unzip": ["unzip", "-q", str(zipped), "-d", str(out)],
            "tar": ["tar", "-xf", str(tarred), "-C", str(out)],
        }
        for _ in range(arguments.rounds):
            for tool, command in theirs.items():
                out.mkdir()
                times.setdefault(tool, []).append(seconds(command, not arguments.no_sync))
                shutil.rmtree(out)
                archive = zipped if tool == "unzip" else tarred
                for jobs in arguments.jobs:
                    ours = [sys.executable, "-c", OURS, str(archive), str(out), str(jobs)]
                    way = f"{archive.suffix[1:]}, {jobs} jobs"
                    times.setdefault(way, []).append(seconds(ours, not arguments.no_sync))
                    if jobs == arguments.jobs[-1]:
                        times.setdefault(f"{way}, again", []).append(seconds(ours, not arguments.no_sync))
                        (out / f".{archive.name}.extracted").unlink()
                        times.setdefault(f"{way}, resumed", []).append(seconds(ours, not arguments.no_sync))
                    shutil.rmtree(out)
    print(f"{arguments.files:,} files of {arguments.size:,} bytes, least of {arguments.rounds} rounds")
    results: dict[str, dict[str, float]] = {}
    for way, found in times.items():
        tool = "unzip" if way.startswith(("zip", "unzip")) else "tar"
        results[way] = {"seconds": min(found), "ratio": min(found) / min(times[tool])}
        print(f"{way:22}{min(found):8.2f} s   {results[way]['ratio']:5.2f} x {tool}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
