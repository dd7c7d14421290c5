"""Reading JSON that something else may have cut off or altered: what is wrong with it in words, as an error of the caller's kind."""

import json
from pathlib import Path
from typing import Any

from elite.errors import EliteError

MAX_BYTES = 256 << 20
"""A larger file was not written by a run, and is no tokenizer either."""


def read_json(file: Path, kind: type[EliteError], remedy: str) -> Any:
    """The contents of a JSON file.

    Args:
        kind: of the error to raise.
        remedy: what to do where it is damaged.

    Raises:
        EliteError: of that kind: it cannot be read, or is not JSON.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise kind(f"{file} is larger than {MAX_BYTES >> 20} MiB", remedy)
        return json.loads(file.read_bytes())
    except OSError as error:
        raise kind(f"{file} cannot be read: {error.strerror}", remedy) from None
    except (ValueError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise kind(f"{file} is damaged, it is not JSON: {said}", remedy) from None


def read_object(file: Path, kind: type[EliteError], remedy: str) -> dict[str, Any]:
    """The same of a file that holds an object.

    Raises:
        EliteError: of that kind: it cannot be read, is not JSON, or is something else.
    """
    found = read_json(file, kind, remedy)
    if not isinstance(found, dict):
        raise kind(f"{file} is damaged, it is not a JSON object", remedy)
    return found
