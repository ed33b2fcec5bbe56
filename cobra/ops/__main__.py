"""`python -m cobra.ops`: which backends there are, which can run here, and which each function would come from."""

import sys

import torch

from cobra.errors import BackendError

from .dispatch import FUNCTIONS, choose, discover, forced_backend


def main() -> int:
    """Write the table to standard output; 1 if the backend that was asked for cannot be had."""
    lines = [f"{'backend':12} {'available':10} reason"]
    for name, module in discover().items():
        reason = module.available()
        lines.append(f"{name:12} {'no' if reason else 'yes':10} {reason or ''}".rstrip())
    failed = False
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        try:
            modules, reason = choose(device, torch.float32, forced_backend())
        except BackendError as error:
            lines.append(f"float32 on {device}: {error}")
            failed = True
            continue
        lines.append(f"float32 on {device}: {modules[0].NAME}, {reason}")
        for function in FUNCTIONS:
            source = next(module for module in modules if hasattr(module, function))
            lines.append(f"    {function:24} {source.NAME}")
    sys.stdout.write("\n".join(lines) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
