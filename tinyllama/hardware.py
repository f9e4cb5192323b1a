"""The one table of GPUs: what a device can do at most, by the vendor's data sheet, and how its driver names it.

Training (MFU), the dry run (memory, time), serving (roofline), the planner and the report (dollars per FLOP) all read it.
A name is matched as a whole: `NVIDIA A40` is not `NVIDIA RTX A4000`, and a laptop's chip or a MIG slice, whose limits
are others, is unknown rather than wrong. To add a device: one row, with the numbers of its data sheet.
Standard library only.
"""

from __future__ import annotations

import dataclasses
import re

from tinyllama.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class Device:
    """Limits of one GPU. Peaks are dense (no sparsity), summed in fp32.

    name: on the command line. memory_bytes: nominal, GB as 10^9. bytes_per_s: memory bandwidth.
    flops_per_s: of 16-bit values, bf16; fp16 where capability is below 8.0, which has no bf16 units.
    fp8_flops_per_s: None where there are no FP8 units. capability: compute capability, (9, 0) for an H100.
    driver_names: what the driver calls it, without the words NVIDIA, GeForce and Tesla.
    """

    name: str
    memory_bytes: float
    bytes_per_s: float
    flops_per_s: float
    fp8_flops_per_s: float | None
    capability: tuple[int, int]
    driver_names: tuple[str, ...]


# Data sheets of NVIDIA. GeForce: tables of the architecture white papers (GA102, AD102, GB202), "with FP32 accumulate";
# the 4090 D has the 4090's clock and 114 of its 128 multiprocessors. RTX A4000, A6000 and 6000 Ada: half, a half and a
# quarter of the "tensor performance", which is given with sparsity (and for the last in FP8).
DEVICES = (
    Device("V100-16G", 16e9, 900e9, 125e12, None, (7, 0), ("V100-SXM2-16GB",)),
    Device("V100-32G", 32e9, 900e9, 125e12, None, (7, 0), ("V100-SXM2-32GB",)),
    Device("T4", 16e9, 320e9, 65e12, None, (7, 5), ("T4",)),
    Device("A100-40G", 40e9, 1555e9, 312e12, None, (8, 0), ("A100-SXM4-40GB", "A100-PCIE-40GB")),
    Device("A100-80G", 80e9, 2039e9, 312e12, None, (8, 0), ("A100-SXM4-80GB", "A100-SXM-80GB")),
    Device("A100-80G-PCIe", 80e9, 1935e9, 312e12, None, (8, 0), ("A100 80GB PCIe",)),
    Device("A30", 24e9, 933e9, 165e12, None, (8, 0), ("A30",)),
    Device("A40", 48e9, 696e9, 149.7e12, None, (8, 6), ("A40",)),
    Device("A10", 24e9, 600e9, 125e12, None, (8, 6), ("A10",)),
    Device("A10G", 24e9, 600e9, 70e12, None, (8, 6), ("A10G",)),
    Device("RTX-A4000", 16e9, 448e9, 76.7e12, None, (8, 6), ("RTX A4000",)),
    Device("RTX-A6000", 48e9, 768e9, 154.8e12, None, (8, 6), ("RTX A6000",)),
    Device("RTX-3090", 24e9, 936e9, 71e12, None, (8, 6), ("RTX 3090",)),
    Device("RTX-3090-Ti", 24e9, 1008e9, 80e12, None, (8, 6), ("RTX 3090 Ti",)),
    Device("L4", 24e9, 300e9, 121e12, 242e12, (8, 9), ("L4",)),
    Device("L40", 48e9, 864e9, 181e12, 362e12, (8, 9), ("L40",)),
    Device("L40S", 48e9, 864e9, 362e12, 733e12, (8, 9), ("L40S",)),
    Device("RTX-6000-Ada", 48e9, 960e9, 364.2e12, 728.5e12, (8, 9), ("RTX 6000 Ada Generation",)),
    Device("RTX-4090", 24e9, 1008e9, 165.2e12, 330.3e12, (8, 9), ("RTX 4090",)),
    Device("RTX-4090-D", 24e9, 1008e9, 147.1e12, 294.2e12, (8, 9), ("RTX 4090 D",)),
    Device("H100", 80e9, 3350e9, 989e12, 1979e12, (9, 0), ("H100 80GB HBM3",)),
    Device("H100-PCIe", 80e9, 2000e9, 756e12, 1513e12, (9, 0), ("H100 PCIe",)),
    Device("H100-NVL", 94e9, 3900e9, 835e12, 1671e12, (9, 0), ("H100 NVL",)),
    Device("GH200", 96e9, 4000e9, 989e12, 1979e12, (9, 0), ("GH200 480GB",)),  # 480 GB are the processor's
    Device("H200", 141e9, 4800e9, 989e12, 1979e12, (9, 0), ("H200",)),
    Device("H200-NVL", 141e9, 4800e9, 835e12, 1671e12, (9, 0), ("H200 NVL",)),
    Device("B200", 180e9, 8000e9, 2250e12, 4500e12, (10, 0), ("B200",)),
    Device("RTX-5090", 32e9, 1792e9, 209.5e12, 419e12, (12, 0), ("RTX 5090",)),
)
NAMES = tuple(device.name for device in DEVICES)
_BRANDS = {"nvidia", "geforce", "tesla"}


def _words(driver_name: str) -> tuple[str, ...]:
    """A name as words in lower case, without brands: `NVIDIA A100-SXM4-40GB` is (a100, sxm4, 40gb)."""
    return tuple(word for word in re.split(r"[\s-]+", driver_name.strip().lower()) if word and word not in _BRANDS)


_BY_WORDS = {_words(name): device for device in DEVICES for name in device.driver_names}


def find(driver_name: str) -> Device | None:
    """The device that the driver (torch.cuda.get_device_name, nvidia-smi) calls so; None if it is not in the table."""
    return _BY_WORDS.get(_words(driver_name))


def named(name: str, option: str = "--device") -> Device:
    """The device of this command line name, in any case; ConfigError names the option and the nearest one."""
    for device in DEVICES:
        if device.name.lower() == name.lower():
            return device
    begun = [known for known in NAMES if name and known.lower().startswith(f"{name.lower()}-")]  # A100, nearest to A10
    fix = f"give {' or '.join(begun)}" if begun else nearest(name, list(NAMES))
    raise ConfigError(f"{option} {name} is not a device of the table", fix=fix)


def training_peak(driver_name: str) -> tuple[float, str]:
    """(FLOP/s that MFU is measured against, where the number is from); not-a-number for a device not in the table.

    The bf16 peak under any precision: an MFU under FP8 is thus bf16-equivalent, comparable with others, and may pass 100%.
    """
    device = find(driver_name)
    if device is None:
        return float("nan"), f"no data sheet known for {driver_name}"
    return device.flops_per_s, f"data sheet of {device.name}"
