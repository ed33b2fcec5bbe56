"""`python -m cobra.ops`: which backends there are, which can run here, and which would be chosen."""

import sys

import torch

from cobra.errors import BackendError

from .dispatch import choose, discover, forced_backend


def main() -> None:
    """Write the table to standard output."""
    lines = [f"{'backend':12} {'available':10} reason"]
    for name, module in discover().items():
        reason = module.available()
        lines.append(f"{name:12} {'no' if reason else 'yes':10} {reason or ''}".rstrip())
    for device in ("cpu", "cuda"):
        try:
            modules, reason = choose(device, torch.float32, forced_backend())
            lines.append(f"float32 on {device}: {modules[0].NAME}, {reason}")
        except BackendError as error:
            lines.append(f"float32 on {device}: {error}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
