"""Hold the ablation at tiny size beside the paper's: table, plot, findings. See `python scripts/ablation.py --help`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

_EXAMPLES = """
examples
  make ablation                      (data, trainings and evaluations, then this)
  cobra ablation
  cobra ablation --rule paper --output comparison
  cobra ablation --page docs/ablation.md

Reads DIR/seed-*/<benchmark>/<experiment>, for the experiments tiny-full, tiny-siglip, tiny-ldpv2, tiny-base,
tiny-one-epoch and tiny-aligned. Rows, seeds and benchmarks that are not there yet are shown as missing.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="ablation",
        description=(__doc__ or "").splitlines()[0].partition(" See ")[0],
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    results = Path(os.environ.get("COBRA_RESULTS", "results")) / "ablation"
    parser.add_argument(
        "--results", type=Path, metavar="DIR", default=results,
        help="the evaluations (default: results/ablation, or $COBRA_RESULTS/ablation)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="write ablation.md, ablation.json and ablation.png here (default: to the evaluations)",
    )  # fmt: skip
    parser.add_argument("--rule", default="official", choices=("official", "paper"), help="default: official")
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="renew the results of this Markdown page too, and ablation.png beside it",
    )
    given = parser.parse_args()

    from cobra.errors import CobraError
    from cobra.eval import ablation_report
    from cobra.eval.ablation import read
    from cobra.runtime import setup_logging

    setup_logging()
    log = logging.getLogger("cobra")
    try:
        found = read(given.results, given.rule)
        output = given.output or given.results
        ablation_report.write(output, found)
        log.info("Wrote %s.", output / "ablation.md")
        if given.page is not None:
            ablation_report.update_page(given.page, found)
            log.info("Renewed %s.", given.page)
        print(ablation_report.report(found))
    except (CobraError, OSError) as error:
        log.error("error: %s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
