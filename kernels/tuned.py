"""Block sizes measured on a card: `tuned.json` beside a kernel, by device and by what the best one depends on.

    {"NVIDIA H200": {"rows256 slots8192 d128 2B": {"splits": 3, "stages": 3}}}

It holds what `python -m experiments.gpu_suite --part=tune` found to be better than the kernel's own rule, and nothing else; where it says
nothing, the rule holds. A device's name may go on, as "NVIDIA H200 141GB HBM3e" does that is compiled for and not there.
"""

import functools
import json
import pathlib

FILE = "tuned.json"


def find(operation: str, device: str, key: str) -> dict[str, int]:
    """The fields of the kernel's configuration that were tuned for this device and key; none where nothing was.

    Raises:
      ValueError: the file is not such a table.
    """
    for name, found in table(operation).items():
        if device == name or device.startswith(name + " "):
            return found.get(key, {})
    return {}


@functools.cache
def table(operation: str) -> dict[str, dict[str, dict[str, int]]]:
    """All that was tuned of an operation. A change of the file is seen after `table.cache_clear()`."""
    path = where(operation)
    try:
        found = json.loads(path.read_text())
        sound = all(isinstance(value, int) for kind in found.values() for config in kind.values() for value in config.values())
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is no table of tuned block sizes: {error}") from error
    if not sound:
        raise ValueError(f"{path} is no table of tuned block sizes: a field of a configuration is not a whole number")
    return found


def where(operation: str) -> pathlib.Path:
    return pathlib.Path(__file__).parent / operation / FILE


def bucket(size: int) -> int:
    """Sizes up to the same power of two share what was tuned."""
    return 1 << max(size - 1, 0).bit_length()
