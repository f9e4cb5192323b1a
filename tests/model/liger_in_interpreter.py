"""Run by test_liger.py under TRITON_INTERPRET=1: relative errors of liger's kernels against `ops.py`, as JSON.

[{"operation", "dtype", "fused": whether the inputs are views of one product, "output": its number, "error"}]
"""

from __future__ import annotations

import json

import liger_kernel.ops.rms_norm
import numpy as np
import torch
import triton.language as tl
from test_kernels import inputs, of_one_product, values_and_gradients
from triton.runtime import interpreter

from tinyllama.model.kernels import PLAIN, TABLE, Setting

DIFFERENTIABLE = {"norm": 2, "rotary": 2, "swiglu": 1, "loss": 2}


def pass_floats_as_a_gpu_does() -> None:
    """Triton's compiler makes an argument that is a Python float an fp32 scalar; its interpreter leaves it a float."""
    convert = interpreter._implicit_cvt

    def converted(argument):
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = converted


def replace_what_only_a_gpu_has() -> None:
    """liger takes rsqrt from CUDA's libdevice; Triton's own is the same function."""
    liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)  # looked up as it runs, when it is interpreted


def main() -> None:
    pass_floats_as_a_gpu_does()
    replace_what_only_a_gpu_has()
    found = []
    for operation, differentiable in DIFFERENTIABLE.items():
        for dtype in (torch.float32, torch.float16):
            given = [
                x.to(dtype if x.is_floating_point() else x.dtype) if torch.is_tensor(x) else x
                for x in inputs(operation)
            ]
            for fused in (False, True) if operation == "rotary" else (False,):
                arguments = of_one_product(operation, given) if fused else given
                kernel = TABLE[operation]["liger"].build(Setting(torch.device("cpu")))
                expected = values_and_gradients(
                    getattr(PLAIN, operation),
                    [x.clone() if torch.is_tensor(x) else x for x in arguments],
                    differentiable,
                )
                mine = values_and_gradients(kernel, arguments, differentiable)
                for number, (one, other) in enumerate(zip(mine, expected, strict=True)):
                    found.append(
                        {
                            "operation": operation,
                            "dtype": str(dtype).removeprefix("torch."),
                            "fused": fused,
                            "output": number,
                            "error": ((one - other).norm() / other.norm()).item(),
                        }
                    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
