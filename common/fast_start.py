"""Saves more than a second at the start of each script, by not importing PyTorch's compiler. May be skipped.

Some ordinary functions of PyTorch import the compiler (torch._dynamo, sympy) when they are first called, even
if nothing is ever compiled. The functions in this file give the same results, to the bit, without the
import.
"""

import inspect

import torch


class Optimizer(torch.optim.Optimizer):
    """torch.optim.Optimizer, as a base class for optimizers that are never compiled.

    PyTorch wraps each of these four methods. The wrapper keeps the compiler out of the method, and imports
    the compiler in order to do so. `inspect.unwrap` gives the method inside of the wrapper.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(Optimizer, torch.optim.AdamW):
    """torch.optim.AdamW (Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101)."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))  # AdamW inherits the step of Adam


class without_initial_values(torch.overrides.TorchFunctionMode):
    """Within `with without_initial_values():` the functions of torch.nn.init do nothing.

    This is for models on the meta device. Weights have a shape there, but no memory that could be filled.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def give_memory(model: torch.nn.Module, device) -> None:
    """The same as model.to_empty(device=device): memory, not filled, for a model on the meta device.

    A parameter that two layers shared becomes two parameters.
    """
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
