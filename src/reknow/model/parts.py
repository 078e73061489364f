"""Finds the parts of a decoder by watching one forward pass, and verifies them: no family is known by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from reknow.errors import ModelError
from reknow.model.experts import ExpertsValue, experts_setting, has_experts, join_experts
from reknow.model.hooks import hidden_states, hooked


@dataclass(frozen=True)
class Parts:
    """Module names of a decoder; the lists have one entry per layer."""

    backbone: str
    """Module that holds the blocks and returns the hidden states that the head reads."""
    blocks: tuple[str, ...]
    final_norm: tuple[str, ...]
    """What the backbone applies behind its last block, in order: the final norm, rarely a projection too."""
    value: tuple[str, ...]
    """The value matrix: the MLP's projection back into the residual stream; of a mixture of experts those of all
    (`reknow.model.experts`)."""
    mlp_in: tuple[tuple[str, ...], ...]
    """The matrices that read the normed hidden state into the MLP: up, or gate and up, or both fused; of a mixture of
    experts none."""
    attention_out: tuple[str, ...]
    """Attention's projection back into the residual stream."""
    hidden_size: int
    residual_identity: bool = True
    """Whether an addition to the value matrix's output arrives unchanged at the block's output.

    False where a norm or a multiplier follows the MLP (Gemma 2 and 3, OLMo 2, GLM-4, Granite).
    """
    value_normed: bool = False
    """Whether only the direction of the value matrix's output counts, since a norm follows (and no multiplier)."""
    replayable: bool = True
    """Whether the blocks above a layer can be run by themselves (`replay.BlockReplay`)."""
    row_selectable: bool = False
    """Whether some rows can be, with what was kept of all (not with BLOOM's biases, which mix rows and heads)."""
    packable: bool = False
    """Whether the blocks can be run without what pads the rows (`packing.Packing`)."""


def is_matrix(module: nn.Module) -> bool:
    """A linear map, however it stores its weight (transposed, quantised); embeddings are none."""
    if isinstance(module, nn.Embedding):
        return False
    weight = getattr(module, "weight", None)
    return _features(module) is not None or (isinstance(weight, Tensor) and weight.dim() == 2)


def wraps_matrix(module: nn.Module) -> bool:
    """Whether other matrices lie inside this one: an adapter's factors, and the matrix that it adapts."""
    return any(is_matrix(inner) for inner in module.modules() if inner is not module)


def matrices_of(model: nn.Module, block: str) -> list[str]:
    """Names of the matrices in the module `block`, in the order in which the model has them."""
    inside = model.get_submodule(block).named_modules()
    return [f"{block}.{name}" for name, module in inside if multiplies(module) and not wraps_matrix(module)]


def multiplies(module: nn.Module) -> bool:
    """Whether the module gives the product of its input with a matrix; a router has a matrix too, and gives more."""
    return is_matrix(module) and (_features(module) is not None or isinstance(module, Conv1D))


def shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a matrix."""
    if features := _features(module):
        return features
    rows, columns = getattr(module, "weight").shape  # noqa: B009, a module's attribute has no type
    return (columns, rows) if is_transposed(module) else (rows, columns)


def groups(module: nn.Module) -> int:
    """Among how many experts the inputs of a matrix are divided; 1: it is none of a mixture."""
    return module.groups if isinstance(module, ExpertsValue) else 1


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its matrix as (in, out)."""
    return isinstance(module, Conv1D)


def reorient(module: nn.Module, weight: Tensor) -> Tensor:
    """A matrix (out, in) the way round the module stores it, and back. A view."""
    if isinstance(module, ExpertsValue):
        return module.split(weight) if weight.dim() == 2 else module.joined(weight)
    return weight.T if is_transposed(module) else weight


def stored_weight(module: nn.Module) -> Tensor:
    """The parameter that holds the matrix, the way round the module stores it."""
    return module.stored if isinstance(module, ExpertsValue) else getattr(module, "weight")  # noqa: B009


def _features(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) as linear modules name them; quantised ones pack the weight in another shape."""
    features = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return features if all(isinstance(size, int) for size in features) else None  # type: ignore[return-value]


def embedding_matrix(model: PreTrainedModel) -> Tensor:
    """The matrix of token embeddings. (vocabulary, features)"""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def device_of(module: nn.Module, other: torch.device) -> torch.device:
    """Where the module computes: for an offloaded one what Accelerate moves it to; `other` if it has no tensors."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device(device)
    if isinstance(module, ExpertsValue):  # whose parameter is that of the module around it
        return module.stored.device
    tensor = next((t for t in (*module.parameters(), *module.buffers()) if t.device.type != "meta"), None)
    return other if tensor is None else tensor.device


def find_parts(model: PreTrainedModel) -> Parts:
    """The parts of a decoder, from its modules and the order in which one forward pass calls them.

    Raises:
        ModelError: encoder-decoder, experts that are fused in an unknown way, state-space, or a structure that is not
            understood.
    """
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise refusal(model, "it is an encoder-decoder")
    joined = join_experts(model)
    setting = experts_setting(model, config)
    unknown = f"it is a mixture of experts ({setting}) that are fused in a way that is not known"
    if setting and not joined:
        raise refusal(model, unknown)
    calls, widths = _call_order(model)
    blocks = _blocks(model, getattr(config, "num_hidden_layers", None), set(calls))
    for block in blocks if setting else ():
        within = has_experts(model.get_submodule(block))
        if within and not any(name.startswith(f"{block}.") for name in joined):
            raise refusal(model, f"{unknown} in {block}")
    backbone = blocks[0].rpartition(".")[0].rpartition(".")[0]
    hidden_size = widths.get(blocks[0], 0)
    layers = [_block_parts(model, block, calls, hidden_size) for block in blocks]
    last = max(i for i, name in enumerate(calls) if name == blocks[-1])
    behind = tuple(name for name in calls[last + 1 :] if name.rpartition(".")[0] == backbone)
    value, mlp_in, attention_out = zip(*layers, strict=True)
    return Parts(backbone, tuple(blocks), behind, value, mlp_in, attention_out, hidden_size)


def refusal(model: PreTrainedModel, why: str) -> ModelError:
    return ModelError(
        "expected a decoder with attention and an MLP, dense or of experts, in each block; "
        f"{type(model).__name__} is not handled, because {why}: choose a model of a family listed in docs/models.md"
    )


def _blocks(model: PreTrainedModel, count: int | None, called: set[str]) -> list[str]:
    """Names of the decoder's blocks: the list with as many entries as the configuration has layers, all run."""
    for name, module in model.named_modules():
        names = [f"{name}.{i}" for i in range(count or 0)]
        fits = isinstance(module, nn.ModuleList) and len(module) == count and any(module[0].children())
        if fits and called.issuperset(names):
            return names
    raise refusal(model, f"no list of {count} blocks was found, which is the number of layers in its configuration")


def _call_order(model: PreTrainedModel) -> tuple[list[str], dict[str, int]]:
    """Names of all modules in the order in which a forward pass over three tokens leaves them, and their widths."""
    calls: list[str] = []
    widths: dict[str, int] = {}

    def left(name: str, output) -> None:
        calls.append(name)
        if isinstance(states := hidden_states(output), Tensor):
            widths[name] = states.shape[-1]

    hooks = (
        partial(module.register_forward_hook, lambda _module, _args, output, name=name: left(name, output))
        for name, module in model.named_modules()
    )
    with hooked(*hooks):
        ids = torch.tensor([[3, 4, 5]], device=device_of(model.get_input_embeddings(), model.device))
        try:
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            raise refusal(model, f"a forward pass over three tokens failed ({error})") from error
    return calls, widths


def _block_parts(
    model: PreTrainedModel, block: str, calls: list[str], hidden: int
) -> tuple[str, tuple[str, ...], str]:
    """(value matrix, MLP input matrices, attention's output matrix) of one block.

    The last matrix that writes into the residual stream is the value matrix; the one or two that read the stream
    since attention wrote into it feed the MLP. A narrow matrix behind them is an adapter (Gemma 4), no MLP. What lies
    inside a matrix belongs to that one. The value matrix of experts is one by what it is, and attention's output the
    last that writes into the stream in the first part of the block that does.
    """
    names = [name for name in calls if name.startswith(f"{block}.") and is_matrix(model.get_submodule(name))]
    names = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    shapes = {name: shape(model.get_submodule(name)) for name in names}
    wide = [i for i, name in enumerate(names) if shapes[name][0] == hidden <= shapes[name][1]]
    if not wide:
        raise refusal(model, f"{block} has no attention projection followed by an MLP projection")
    if experts := [name for name in names if isinstance(model.get_submodule(name), ExpertsValue)]:
        return experts[-1], (), _before_experts(model, block, experts, [names[i] for i in wide])
    value = names[wide[-1]]
    if len(_numbered(model, block, value)) > 1:
        raise refusal(model, f"{value} is one of several, as of a mixture of experts that are kept one by one")
    inner, mlp = shapes[value][1], value.rpartition(".")[0]
    before = names[: wide[-1]]
    mlp_in: list[str] = []
    while before and shapes[before[-1]] in ((inner, hidden), (2 * inner, hidden)):
        if before[-1].rpartition(".")[0] != mlp:
            break
        mlp_in.insert(0, before.pop())
    if len(mlp_in) not in (1, 2) or not before or shapes[before[-1]][0] != hidden:
        raise refusal(model, f"no matrices from the hidden state into the MLP were found in {block}")
    return value, tuple(mlp_in), before[-1]


def _numbered(model: nn.Module, block: str, value: str) -> list[str]:
    """Names of the block's matrices of the same sizes that differ from `value` by the number of a module alone."""

    def kind(name: str) -> tuple[str, tuple[int, int]]:
        return re.sub(r"\.\d+(?=\.)", ".#", name), shape(model.get_submodule(name))

    return [name for name in matrices_of(model, block) if kind(name) == kind(value)]


def _before_experts(model: PreTrainedModel, block: str, experts: Sequence[str], writers: Sequence[str]) -> str:
    """Attention's output matrix in a block of experts. writers: what writes into the stream, in order"""
    around = mlp_module(model, experts[0])
    before = [name for name in writers if not name.startswith(f"{around}.")]
    if len(experts) > 1 or experts[0] not in writers or around == block or not before:
        raise refusal(model, f"{block} has more than attention followed by a mixture of experts")
    first = before[0][len(block) + 1 :].partition(".")[0]  # a dense MLP may stand beside the experts
    return [name for name in before if name.startswith(f"{block}.{first}.")][-1]


def mlp_module(model: nn.Module, value: str) -> str:
    """Name of the module around the value matrix of that name; of experts, of that around all of them."""
    parent = value.rpartition(".")[0]
    return parent.rpartition(".")[0] if isinstance(model.get_submodule(value), ExpertsValue) else parent


def accepts_positions(model: PreTrainedModel) -> bool:
    """Whether the model's forward takes `position_ids`; GPT-2 and GPT-Neo are wrong with left padding without."""
    return "position_ids" in inspect.signature(model.forward).parameters
