"""Turn weights of any known layout into another. See `python scripts/convert.py --help`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

_EXAMPLES = """
examples
  cobra convert cobra-3b models/cobra-3b --to cobra
  cobra convert runs/tiny exported --to public
  cobra convert exported back --to cobra --vision exported/vision.yaml --llm exported/llm.yaml
  cobra convert runs/tiny tiny-hf --to hf --results results
  cobra convert state-spaces/mamba-2.8b mamba-2.8b-hf --to hf-mamba

Nothing is cast. The target is written whole or not at all. The folder that the environment variable COBRA_WEIGHTS names
is searched before the Hugging Face Hub.
"""


def main() -> None:
    from cobra.config import one_of
    from cobra.convert import LAYOUTS, convert
    from cobra.errors import CobraError
    from cobra.loading import settings
    from cobra.runtime import setup_logging

    layouts = "\n".join(f"  {name:<10} {about}" for name, about in LAYOUTS.items())
    parser = argparse.ArgumentParser(
        prog="convert",
        description=__doc__.splitlines()[0] + "\n\nlayouts\n" + layouts,  # type: ignore[union-attr]
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="run or model folder, public Cobra run, Mamba folder, released name, or Hub id")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--to", required=True, metavar="LAYOUT", help=", ".join(LAYOUTS))
    parser.add_argument("--vision", metavar="FILE", help="YAML: what the source's vision id stands for")
    parser.add_argument("--llm", metavar="FILE", help="YAML: what the source's language model id stands for")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="of --to hf: evaluations for the model card")
    parser.add_argument("--overwrite", action="store_true", help="replace the target if it exists")
    given = parser.parse_args()
    setup_logging()
    log = logging.getLogger("cobra")
    try:
        one_of("--to", given.to, LAYOUTS)
        vision, llm = settings(given.vision, "--vision"), settings(given.llm, "--llm")
        options = {"vision": vision, "llm": llm, "results": given.results, "overwrite": given.overwrite}
        convert(given.source, given.target, given.to, **options)
    except (CobraError, OSError) as error:
        log.error("error: %s", error)
        sys.exit(1)
    log.info("Wrote %s.", given.target)


if __name__ == "__main__":
    main()
