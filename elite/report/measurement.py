"""Keep finished runs, or a file of `elite.bench`, as a measurement: `python -m elite.report.measurement NAME RUN_FOLDER … | FILE`.

Writes `docs/measurements/NAME.json` with device, versions, commit, command line, configuration, prediction and the raw line
of every step, so that each number in the documentation can be traced and taken again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from elite.callbacks import metrics_file
from elite.config import CONF_DIR
from elite.errors import EliteError
from elite.runfolder import RunFolder

MEASUREMENTS = CONF_DIR.parent / "docs" / "measurements"


def collect(folder: RunFolder) -> dict[str, Any]:
    """All that a run folder says about itself.

    Raises:
        EliteError: the run has not ended well.
    """
    if not folder.finished:
        raise EliteError(f"{folder.path} has no summary.json: the run has not ended well", "measure finished runs only")
    config: Any = OmegaConf.to_container(OmegaConf.load(folder.config))
    plan = json.loads(folder.plan.read_text())
    # Its folders, and when it was begun.
    del config["output"]
    return {
        "environment": json.loads(folder.environment.read_text()),
        "config": config,
        "plan": plan,
        "summary": json.loads(folder.summary.read_text()),
        "metrics": metrics_file.read(folder.metrics),
    }


def write(name: str, sources: list[Path], target: Path = MEASUREMENTS, *, add: bool = False) -> Path:
    """Write the measurement `name` of these run folders, or of one file that a benchmark or a probe wrote; returns its path.

    Args:
        add: keep the runs that the measurement has already, before these.

    Raises:
        EliteError: a run has not ended well, or a file is not alone.
    """
    if any(source.is_file() for source in sources):
        if len(sources) > 1:
            raise EliteError("a benchmark's file is a measurement by itself", "give one file, or run folders")
        content = _without_places(json.loads(sources[0].read_text()))
    else:
        content = _without_places({"runs": [collect(RunFolder(folder)) for folder in sources]})
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{name}.json"
    if add:
        content["runs"] = json.loads(path.read_text())["runs"] + content["runs"]
    # A measurement that is kept under another name.
    content.pop("name", None)
    path.write_text(json.dumps({"name": name} | content, indent=1) + "\n")
    return path


def _without_places(value: Any) -> Any:
    """Absolute paths, alone or as `option=/path`, by their last part: where things lay on that machine says nothing to others."""
    if isinstance(value, dict):
        return {key: _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    if not isinstance(value, str):
        return value
    option, sign, place = value.rpartition("=")
    return option + sign + Path(place).name if Path(place).is_absolute() else value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--target", type=Path, default=MEASUREMENTS)
    parser.add_argument("--add", action="store_true", help="keep the runs that NAME has already, before these")
    arguments = parser.parse_args()
    print(write(arguments.name, arguments.sources, arguments.target, add=arguments.add))
