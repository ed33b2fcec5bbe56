"""Compare several models' evaluations, with paired significance. See `python scripts/compare.py --help`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

_EXAMPLES = """
examples
  cobra compare tiny tiny-siglip
  cobra compare runs/tiny runs/tiny-siglip runs/tiny-ldpv2 --output comparison --rule paper
  cobra compare results/pope/cobra-3b results/pope/mine

The evaluations are those of scripts/evaluate.py. Differences are on the questions that both of a pair answered.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="compare",
        description=(__doc__ or "").splitlines()[0],
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="evaluation's folder, folder of these, or model's name or run folder"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write compare.md, compare.json and compare.png here"
    )
    parser.add_argument("--rule", default="official", choices=("official", "paper"), help="default: official")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", default=Path(os.environ.get("COBRA_RESULTS", "results")),
        help="where models' names are looked up: DIR/<benchmark>/<model> (default: results, or $COBRA_RESULTS)",
    )  # fmt: skip
    given = parser.parse_args()

    from cobra.errors import CobraError
    from cobra.eval import compare
    from cobra.eval.evaluations import read_runs
    from cobra.runtime import setup_logging

    setup_logging()
    log = logging.getLogger("cobra")
    try:
        comparison = compare.compare(read_runs(given.runs, given.results, given.rule), given.rule)
        print(compare.report(comparison), end="")
        if given.output is not None:
            compare.write(given.output, comparison)
            log.info("Wrote %s.", given.output / "compare.md")
    except (CobraError, OSError) as error:
        log.error("error: %s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
