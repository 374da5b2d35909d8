"""Running the Triton kernels on CPU tensors, by Triton's interpreter: for tests and for rehearsing measurements."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch


def use_interpreter() -> None:
    """From here on, in this process, kernels are interpreted. Call it before any module with kernels is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def patch_with_index(tensor: Any, scope: Any) -> None:
        # Triton 3.6 converts one-element arrays to int, which numpy 2.4 refuses: loops over loaded bounds would fail.
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def as_fp32(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        data = operand.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(data.view(np.float32), tl.float32)

    def dot_of_values(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        # Triton 3.6 keeps bf16 as uint16 and multiplies those bits as if they were integers.
        return dot(self, as_fp32(a), as_fp32(b), *rest)

    convert = interpreter._convert_float
    rounded_by_torch = {tl.bfloat16: (torch.bfloat16, np.uint16), tl.float8e4nv: (torch.float8_e4m3fn, np.uint8)}

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        # Triton 3.6 loses the carry when rounding 1.11..1 up, which then counts as 1.0.
        if source != tl.float32 or target not in rounded_by_torch:
            return convert(data, source, target, rounding)
        dtype, bits = rounded_by_torch[target]
        values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
        return values.to(dtype).view(torch.uint8).numpy().view(bits).reshape(data.shape)

    interpreter._convert_float = convert_float
    interpreter._patch_lang_tensor = patch_with_index
    builder.create_dot = dot_of_values
