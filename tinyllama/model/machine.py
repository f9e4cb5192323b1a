"""What a choice of kernels depends on: the machine and the run; and why a kernel cannot be used there.

Each check is a function of its `Setting` alone, so that a machine which is not at hand can be asked about.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import torch

MODULES = ("flash_attn_interface", "flash_attn.cute", "flash_attn.flash_attn_interface", "liger_kernel", "triton")


@dataclasses.dataclass(frozen=True)
class Machine:
    """What there is to choose from. capability: of the GPU, as (9, 0) for an H100. torch_version, cudnn: of libraries."""

    device: str = "cpu"
    capability: tuple[int, int] = (0, 0)
    torch_version: tuple[int, int] = (2, 13)
    cudnn: int | None = None  # 91900 for 9.19.0
    modules: frozenset[str] = frozenset()

    @staticmethod
    @functools.cache
    def here(device: torch.device) -> Machine:
        """This machine, computing on `device`."""
        major, minor = torch.__version__.split(".")[:2]
        gpu = device.type == "cuda"
        return Machine(
            device.type,
            torch.cuda.get_device_capability(device) if gpu else (0, 0),
            (int(major), int(minor)),
            torch.backends.cudnn.version() if gpu else None,
            frozenset(module for module in MODULES if _installed(module)),
        )

    @property
    def cudnn_version(self) -> str:
        """As cuDNN writes it: 9.19.0."""
        if self.cudnn is None:
            return "none"
        return f"{self.cudnn // 10000}.{self.cudnn // 100 % 100}.{self.cudnn % 100}"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a choice depends on.

    documents: attention stays inside documents. deterministic: the same bits in every run. low_precision: the run
    computes in 16 bits. on: the machine; this one by default.
    """

    device: torch.device
    compiled: bool = False
    documents: bool = False
    deterministic: bool = False
    low_precision: bool = True
    on: Machine | None = None

    @property
    def machine(self) -> Machine:
        return self.on or Machine.here(self.device)


Check = Callable[[Setting], str | None]  # why a kernel cannot be used in a setting; None if it can


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that would hold it
        return False


def gpu_kernel(module: str, least: tuple[int, int], newest: int | None = None) -> Check:
    """The check of a kernel that needs an installed module and a GPU of some capability."""

    def missing(setting: Setting) -> str | None:
        machine = setting.machine
        if machine.device != "cuda":
            return "it needs a GPU"
        major, minor = machine.capability
        if machine.capability < least or (newest is not None and major > newest):
            return f"this GPU is of compute capability {major}.{minor}, and it needs {least[0]}.{least[1]}"
        if module not in machine.modules:
            return f"{module.split('.')[0]} is not installed"
        return None

    return missing


def all_of(*checks: Check) -> Check:
    """The first reason against."""
    return lambda setting: next((reason for check in checks if (reason := check(setting))), None)


def anywhere(_: Setting) -> str | None:
    return None


def unmasked(setting: Setting) -> str | None:
    return "data.document_masking needs an attention that knows documents" if setting.documents else None


def sixteen_bits(setting: Setting) -> str | None:
    return None if setting.low_precision else "it computes in 16 bits only, and this run in 32"


def not_deterministic(setting: Setting) -> str | None:
    return "training.deterministic: its backward pass is not known to be" if setting.deterministic else None


def registered(setting: Setting) -> str | None:
    """flash-attn 3 and 4 run in the place of torch's own flash kernel, for which torch has a registry."""
    return None if setting.machine.torch_version >= (2, 11) else "it needs torch 2.11 or newer"


def no_cudnn(setting: Setting) -> str | None:
    machine = setting.machine
    if machine.device != "cuda":
        return "it needs a GPU"
    if machine.capability < (8, 0):
        return f"this GPU is of compute capability {machine.capability[0]}.{machine.capability[1]}, and it needs 8.0"
    return None if (machine.cudnn or 0) >= 90000 else f"it needs cuDNN 9, and this is {machine.cudnn_version}"


def no_flex(setting: Setting) -> str | None:
    if not setting.documents:
        return "it is for data.document_masking"
    return "it needs a GPU: torch has no backward pass of it on a CPU" if setting.machine.device != "cuda" else None
