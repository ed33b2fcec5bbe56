"""Does a run survive anything? Kill one again and again at random moments, and compare it with an undisturbed one.

python benchmarks/kills.py [--kills 20] [--processes 2] [--steps 120] [--seed 0]

Each kill is a SIGKILL, without warning, at a random moment from the start on: of the process that supervises the ranks,
of one rank, or of all. Then the same command is given again. At the end the models must be equal byte for byte.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHILDREN = "/proc/{pid}/task/{pid}/children"


def command(folder: Path, name: str, steps: int, processes: int) -> list[str]:
    settings = {
        "parallel.processes": processes,
        "parallel.device": "cpu",
        "paths.runs": folder / "runs",
        "paths.data": folder / "data",
        "run.name": name,
        "train.max_steps": steps,
        "train.save_every": 3,
        "train.log_every": 1,
        "train.global_batch_size": 8,
        "train.per_device_batch_size": 4,
        "data.check": "exists",
        "model.llm.num_layers": 2,
    }
    return [
        sys.executable,
        str(ROOT / "scripts" / "pretrain.py"),
        *(f"{key}={value}" for key, value in settings.items()),
    ]


def ranks_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(CHILDREN.format(pid=pid)).read_text().split()]
    except OSError:
        return []


def kill_at_random(process: subprocess.Popen[bytes], rng: random.Random, longest: float) -> str | None:
    """SIGKILL somebody after a random time; return whom, or None if the run ended before."""
    try:
        process.wait(rng.uniform(0, longest))
        return None
    except subprocess.TimeoutExpired:
        pass
    ranks = ranks_of(process.pid)
    victim = rng.choice(["supervisor", "one rank", "all"])
    chosen = {"supervisor": [process.pid], "one rank": [rng.choice(ranks)] if ranks else [process.pid]}
    for pid in chosen.get(victim, [process.pid, *ranks]):
        with contextlib.suppress(ProcessLookupError):  # it ended just now
            os.kill(pid, signal.SIGKILL)
    process.wait(60)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):  # the others have to notice
        if time.monotonic() > deadline:
            raise SystemExit(f"Killed {victim}; a rank was still there after a minute.")
        time.sleep(0.05)
    return victim


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        log = (folder / "log.txt").open("wb")

        def start(name: str, steps: int) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                command(folder, name, steps, args.processes), stdout=log, stderr=subprocess.STDOUT, cwd=folder
            )

        started = time.monotonic()
        if start("data", 1).wait() != 0:  # makes the data set and its index, which come once
            raise SystemExit((folder / "log.txt").read_text())
        begun = time.monotonic()
        process = start("undisturbed", args.steps)
        while process.poll() is None and not (folder / "runs" / "undisturbed" / "metrics.jsonl").exists():
            time.sleep(0.01)
        startup = time.monotonic() - begun
        if process.wait() != 0:
            raise SystemExit((folder / "log.txt").read_text())
        training = time.monotonic() - begun - startup
        # A kill at a random moment of the first `startup + reach` seconds lets reach^2 / (2 (startup + reach)) seconds
        # of training happen on average: all kills together shall leave the last fifth of the run to the last start.
        share = 0.8 * training / args.kills
        reach = share + math.sqrt(share**2 + 2 * share * startup)
        victims: Counter[str] = Counter()
        steps: list[int] = []
        while victims.total() < args.kills:
            process = start("killed", args.steps)
            victim = kill_at_random(process, rng, startup + reach)
            if victim is None:
                if process.returncode != 0:
                    raise SystemExit((folder / "log.txt").read_text()[-5000:])
                print(f"The run ended after {victims.total()} kills; use more --steps for more of them.")
                break
            victims[victim] += 1
            latest = folder / "runs" / "killed" / "checkpoints" / "latest"
            steps.append(int(latest.read_text().split("-")[1]) if latest.exists() else 0)
            print(f"kill {victims.total():2d}: {victim:10s}  newest checkpoint: step {steps[-1]}", flush=True)
        if start("killed", args.steps).wait() != 0:
            raise SystemExit((folder / "log.txt").read_text()[-5000:])
        runs = [folder / "runs" / name / "model" / "model.safetensors" for name in ("killed", "undisturbed")]
        is_equal = runs[0].read_bytes() == runs[1].read_bytes()
        print(f"{victims.total()} kills ({', '.join(f'{n} x {who}' for who, n in victims.items())}), ", end="")
        print(f"{time.monotonic() - started:.0f} s: the final weights are {'equal' if is_equal else 'NOT EQUAL'}.")
        return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
