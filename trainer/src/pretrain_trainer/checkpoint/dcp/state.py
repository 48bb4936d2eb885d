"""State of a checkpoint: the tensors of model and optimizer under stable names.

Names are `model.<name>` for parameters and persistent buffers, `optimizer.<parameter>.<entry>` for the optimizer's
state of a parameter. Nothing else: step, tokens and skipped ranges are in the manifest, and hyperparameters are in the
job's configuration. Tensors may be DTensors (FSDP2): DCP reshards them for any number of processes.

This mapping is our own because a restore is part of a recovery with a budget of 0.3 s:
`torch.distributed.checkpoint.state_dict` takes a trial step of the optimizer to make its state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""Prefixes that torch.compile and activation checkpointing insert into names."""


def tensors_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return all tensors of model and optimizer by name, sharing their memory. A tied tensor appears once."""
    tensors = tensors_of_model(model)
    for name, parameter in _parameters(model):
        for entry, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{entry}"] = value
    return tensors


def tensors_of_model(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the model alone."""
    return {f"model.{name}": tensor.detach() for name, tensor in _of_model(model)}


def optimizer_entries(names: Mapping[str, object], model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the optimizer's entries of each parameter, by its name, as found among the names of a checkpoint."""
    found: dict[str, list[str]] = {name: [] for name, _ in _parameters(model)}
    for name in names:
        parameter, _, entry = name.removeprefix("optimizer.").rpartition(".")
        if name.startswith("optimizer.") and parameter in found:
            found[parameter].append(entry)
    return {name: tuple(entries) for name, entries in found.items()}


def make_optimizer_state(
    model: nn.Module, optimizer: Optimizer, entries: Mapping[str, tuple[str, ...]], scalars: frozenset[str]
) -> None:
    """Give the optimizer uninitialised state to load into: scalars if `scalars` names them, else like the parameter.

    Scalars live on the CPU unless the optimizer is fused or capturable, as in torch's own optimizers.
    """
    settings = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in _parameters(model):
        for entry in entries.get(name, ()):
            if f"optimizer.{name}.{entry}" not in scalars:
                optimizer.state[parameter][entry] = torch.empty_like(parameter, requires_grad=False)
                continue
            group = settings[parameter]
            on_device = group.get("fused") or group.get("capturable")
            device = parameter.device if on_device else torch.device("cpu")
            optimizer.state[parameter][entry] = torch.empty((), dtype=torch.float32, device=device)


def replace_tensors(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Make these tensors, named as in `tensors_of`, the memory of parameters, buffers and the optimizer's entries."""
    for name, tensor in _of_model(model):
        if (found := tensors.get(f"model.{name}")) is not None:
            tensor.data = found
    for name, parameter in _parameters(model):
        entries = optimizer.state.get(parameter, {})
        for entry in entries:
            if (found := tensors.get(f"optimizer.{name}.{entry}")) is not None:
                entries[entry] = found


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        yield _stable(name), parameter


def _of_model(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # state_dict() rather than named_parameters(): it leaves out buffers that are not persistent, and before it FSDP2
    # puts parameters that an evaluation gathered back into shards.
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield _stable(name), tensor


def _stable(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
