"""The table of prices: what an hour of a device costs. A user's own table lies over the shipped one.

Peaks are those of `tinyllama.hardware`; a user's table may add devices with a peak of its own.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tinyllama import hardware
from tinyllama.errors import ConfigError, nearest

PRICES = Path(__file__).parent / "prices.json"
DEFAULT_DEVICE = "H100"
FIELDS = ("dollars_per_hour", "peak_flops")
EXAMPLE = '{"MI300X": {"dollars_per_hour": 2, "peak_flops": 1e15}}'


@dataclasses.dataclass(frozen=True)
class Device:
    """Price of an hour and dense bf16 peak in FLOP/s of one device."""

    name: str
    dollars_per_hour: float
    peak_flops: float


def load_prices(path: Path | None = None) -> dict[str, Device]:
    """The shipped table with the user's over it: `{"H100": 1.99, "MI300X": {"dollars_per_hour": 2, "peak_flops": 1e15}}`.

    A device of the shipped table may be written in any case.
    """
    shipped: dict[str, dict[str, float]] = json.loads(PRICES.read_text())
    table = {name: {**fields, "peak_flops": hardware.named(name).flops_per_s} for name, fields in shipped.items()}
    for given, entry in (read_object(path, "--prices") if path else {}).items():
        name = next((known for known in table if known.lower() == given.lower()), given)
        fields = entry if isinstance(entry, dict) else {"dollars_per_hour": entry}
        for key, value in fields.items():
            if key not in FIELDS:
                raise ConfigError(f"{path}: {name}.{key} is not a field of a device", fix=nearest(key, list(FIELDS)))
            if not is_positive(value):
                raise ConfigError(f"{path}: {name}.{key}={value!r} is not a positive number", fix="correct the table")
        table[name] = {**table.get(name, {}), **fields}
        missing = [key for key in FIELDS if key not in table[name]]
        if missing:
            raise ConfigError(f"{path}: {name} has no {missing[0]}", fix=f"add it: {EXAMPLE}")
    return {name: Device(name, **fields) for name, fields in table.items()}


def is_positive(value: Any) -> bool:
    """A number from JSON that can be divided by."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30


def read_object(path: Path, option: str) -> dict[str, Any]:
    """The JSON object in a file that an option named."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}", fix="correct the path") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{option} {path} is not JSON ({error})", fix="correct the file or make it again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{option} {path} is not a JSON object", fix="correct the file or make it again")
    return values


def find_device(name: str, prices: dict[str, Device], option: str) -> Device:
    """The device called `name`, whatever the case."""
    for known, device in prices.items():
        if known.lower() == name.lower():
            return device
    raise ConfigError(
        f"{option} {name} has no price", fix=f"{hardware.meant(name, list(prices))} or add it with --prices FILE"
    )
