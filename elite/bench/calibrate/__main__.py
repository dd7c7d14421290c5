"""The plan against this machine: `python -m elite.bench.calibrate FILE [--seed fit|held_out|N] [--count N] [--seconds N] [--fresh]`.

FILE                measure a drawn grid into FILE; the same command goes on where it ended
FILE --caps         run configurations under caps a little above or below their planned peaks
--list              print a draw, and need no GPU for it; with FILE, write it there without measuring
--fit FILE …        set the constants of elite/hardware/calibration.json by what these files measured
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from elite.bench.calibrate.caps import caps
from elite.bench.calibrate.fit import fitted
from elite.bench.calibrate.grid import Request, drawn, grid, one_of
from elite.bench.calibrate.sample import SETS, SPACES, draw
from elite.compose import show
from elite.console import console, start_logging
from elite.errors import ConfigError, EliteError
from elite.hardware.calibration import calibration, write

CAPPED = 20
"""Configurations under caps, unless told otherwise."""


def main() -> None:
    """The command."""
    start_logging()
    arguments = _parser().parse_args()
    try:
        _act(arguments)
    except EliteError as error:
        show(error)
        sys.exit(error.exit_code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--seed", default="held_out", help=f"{', '.join(SETS)} or a number")
    parser.add_argument("--count", type=int, help=f"configurations: 40, under caps {CAPPED}")
    parser.add_argument("--card", default="h100", help="hardware preset for which configurations are drawn")
    parser.add_argument("--space", choices=tuple(SPACES), help="what is drawn from: gpu, under caps paged")
    parser.add_argument("--seconds", type=float, help="begin no configuration later than this")
    parser.add_argument("--fresh", action="store_true", help="each configuration in a process of its own")
    parser.add_argument("--only", help="measure this configuration of FILE")
    parser.add_argument("--cache", help="folder of kernel choices")
    parser.add_argument("--list", action="store_true", help="only draw")
    parser.add_argument("--caps", action="store_true", help="under caps")
    parser.add_argument("--around", choices=("needed", "allocated"), default="needed", help="the planned figure that caps are set around")
    parser.add_argument("--fit", type=Path, nargs="+", metavar="FILE", help="measurements to set constants by")
    return parser


def _act(arguments: argparse.Namespace) -> None:
    if arguments.fit is not None:
        made = fitted(calibration(), arguments.fit)
        write(made)
        for name, value in vars(made).items():
            console.print(f"{name}: {value}", markup=False)
        return
    request = _request(arguments)
    if arguments.list and arguments.file is None:
        for one in draw(request.seed, request.count, SPACES[request.space], request.card):
            console.print(one.name, *one.overrides, markup=False)
    elif arguments.file is None:
        raise ConfigError("no FILE for the result", "python -m elite.bench.calibrate FILE, or --list")
    elif arguments.list:
        console.print(f"{len(drawn(request)['configurations'])} configurations in {request.file}", markup=False)
    elif arguments.only is not None:
        one_of(request.file, arguments.only, arguments.cache)
    elif arguments.caps:
        caps(request, arguments.around)
    else:
        grid(request)


def _request(arguments: argparse.Namespace) -> Request:
    seed = SETS.get(arguments.seed)
    if seed is None and not arguments.seed.isdecimal():
        raise ConfigError(f"--seed {arguments.seed}: must be a number or one of {', '.join(SETS)}", "--seed held_out")
    count = (CAPPED if arguments.caps else 40) if arguments.count is None else arguments.count
    if count < 1:
        raise ConfigError(f"--count {count}: must be positive", "leave --count out for its default")
    made = Request(arguments.file or Path(), int(arguments.seed) if seed is None else seed, count)
    made = replace(made, card=arguments.card, seconds=arguments.seconds, fresh=arguments.fresh, cache=arguments.cache)
    return replace(made, space=arguments.space or ("paged" if arguments.caps else "gpu"))


if __name__ == "__main__":
    main()
