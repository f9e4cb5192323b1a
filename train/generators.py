"""The random generators of a rank, as JSON: saved with every checkpoint and set again by a resume.

The training itself draws no random number after the weights are made; what is added to it may.
"""

from __future__ import annotations

import base64
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama import checkpoint
from tinyllama.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


def file_name(rank: int) -> str:
    """Where a checkpoint keeps the generators of a rank."""
    return f"rng-{rank:05d}.json"


def read_state() -> dict[str, Any]:
    """torch's, numpy's and Python's generators of this process."""
    import numpy as np
    import torch

    numpy_state: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = numpy_state
    version, words, gauss_next = random.getstate()
    state = {
        "torch": _encode(torch.get_rng_state()),
        "numpy": [kind, keys.tolist(), position, has_gauss, gauss],
        "python": [version, list(words), gauss_next],
    }
    if torch.cuda.is_available():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def restore(directory: Path, rank: int) -> None:
    """Set the generators as `rank` had them; left as they are where more ranks continue than saved."""
    path = directory / file_name(rank)
    if path.exists():
        try:
            write_state(checkpoint.read_json(path))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} holds no generators ({error})", fix="use another checkpoint") from None


def write_state(state: dict[str, Any]) -> None:
    """Set the generators of this process to what `read_state` gave."""
    import numpy as np
    import torch

    torch.set_rng_state(_decode(state["torch"]))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def _encode(values: Tensor) -> str:
    return base64.b64encode(values.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    import torch

    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
