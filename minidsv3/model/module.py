"""What a module is: attributes that are parameters, buffers or modules, found by name.

Names are those of the released checkpoint. `named_parameters` walks the attributes in the order in which the
constructor set them, so the order is the same in every run. A packed parameter (several checkpoint tensors side by
side in one array) is listed by its parts: ``gate_up`` appears as ``gate_proj.weight`` and ``up_proj.weight``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..autograd import Array, Parameter, Tensor, call_module


class Module:
    """Base of all modules; a subclass sets attributes in `__init__` and defines `forward`."""

    name = ""  # full name inside the model, set by `Transformer`
    buffer_names: tuple[str, ...] = ()  # attributes that are saved but have no gradient

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return call_module(self, self.name or type(self).__name__, args, kwargs)

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Direct submodules; the items of a list are named by their index."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list):
                for i, item in enumerate(value):
                    if isinstance(item, Module):
                        yield f"{name}.{i}", item

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, with their full names."""
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter array once, packed ones whole: what an optimizer steps."""
        for _, module in self.named_modules():
            yield from (value for value in vars(module).values() if isinstance(value, Parameter))

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Every tensor of the checkpoint that is trained, under its released name."""
        for prefix, module in self.named_modules():
            dot = f"{prefix}." if prefix else ""
            for name, value in vars(module).items():
                if isinstance(value, Parameter) and value.parts:
                    yield from ((dot + part, value.part(part)) for part in value.parts)
                elif isinstance(value, Parameter):
                    yield dot + name, value

    def named_buffers(self) -> Iterator[tuple[str, Array]]:
        """Arrays that are saved and have no gradient, under their released names."""
        for prefix, module in self.named_modules():
            for name in module.buffer_names:
                yield f"{prefix}.{name}" if prefix else name, getattr(module, name)

    def allocate(self, dtype: Any = np.float32) -> None:
        """Spend the memory: all weights zero, to be filled from a checkpoint."""
        for parameter in self.parameters():
            parameter.allocate(dtype)

    def init_weights(self, rng: np.random.Generator, dtype: Any = np.float32, *, std: float = 0.02) -> None:
        """Draw all weights from N(0, std); norm weights (the only vectors) are one, buffers zero.

        Numbers are drawn in float32 in the order of `named_parameters`, so a float64 model has the same weights.
        """
        self.allocate(dtype)
        for _, parameter in self.named_parameters():
            if len(parameter.shape) == 1:
                parameter.data[...] = 1
            else:
                parameter.data[...] = rng.standard_normal(parameter.shape, dtype=np.float32) * np.float32(std)
        for _, buffer in self.named_buffers():
            buffer[...] = 0


def as_tensor(x: Any) -> Tensor:
    """`x` itself if it is a Tensor, else a constant."""
    return x if isinstance(x, Tensor) else Tensor(x)
