"""A second device with real values, for finding out on a CPU what a GPU would refuse: tensors that lie apart.

`torch.device("twin")` is torch's place for a backend of one's own, written in Python. Its tensors hold one on the
CPU, with which everything is computed; but an operation on tensors of both devices is refused, as CUDA does it. A
CPU's numbers (tensors without dimensions) may be mixed in, and a CPU's indices may index; nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from reknow.patching import weights

aten = torch.ops.aten

_MOVE = {aten._to_copy.default, aten.copy_.default}
"""What moves values from one device to another."""
_LENGTHS = {aten._pack_padded_sequence.default, aten._pad_packed_sequence.default}
"""What takes lengths, and gives sizes of batches, on the CPU wherever the values are."""
_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class Twin(Tensor):
    """A tensor on the second device."""

    held: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor):
        twin = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=PLACE,
        )
        twin.held = held
        return twin

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        _refuse_mixed(func, args, kwargs)
        wanted = kwargs.get("device")
        here = wanted is None or torch.device(wanted).type == PLACE.type
        if wanted is not None and here:
            kwargs["device"] = torch.device("cpu")
        given = {id(leaf.held): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Twin)}
        shapes = {key: leaf.shape for key, leaf in given.items()}
        found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        grown = [leaf for key, leaf in given.items() if leaf.held.shape != shapes[key]]
        assert not grown, f"{func} changed a tensor's shape in place"
        if func is aten.copy_.default:
            return args[0]
        if func in _LENGTHS:
            return Twin(found[0]), *found[1:]

        def wrap(value):
            if not isinstance(value, Tensor) or not here:
                return value
            return given.get(id(value)) if id(value) in given else Twin(value)

        return tree_map(wrap, found)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        """Whose memory is this tensor's from now on."""
        self.held = other.held

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **options):
        raise TypeError("can't convert a tensor of another device to numpy: use Tensor.cpu() first")

    def __repr__(self, **options):
        return f"Twin({self.held})"


def _held(value):
    return value.held if isinstance(value, Twin) else value


def _refuse_mixed(func, args, kwargs) -> None:
    if func in _MOVE | _LENGTHS:
        return
    leaves = (args, kwargs)
    if func.overloadpacket.__name__ in _INDEX and isinstance(args[0], Twin):
        leaves = (args[0], args[2:], kwargs)
    tensors = [leaf for leaf in tree_leaves(leaves) if isinstance(leaf, Tensor)]
    plain = [t for t in tensors if not isinstance(t, Twin) and t.dim()]
    if plain and len(plain) < len(tensors):
        shapes = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {shapes} in {func}")


def _made(operation):
    """What makes a tensor from nothing, on the second device."""

    def make(*args, device=None, pin_memory=None, layout=None, **kwargs):
        return Twin(operation(*args, device="cpu", **kwargs))

    return make


def _copy_from(source, target, non_blocking=False):
    _held(target).copy_(_held(source))
    return target


class _Backend(_DummyBackendModule):
    """What torch asks of a device: it draws from the CPU's random numbers."""

    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))


_setup_privateuseone_for_python_backend("twin", backend_module=_Backend())
PLACE = torch.device("twin", 0)
_library = torch.library.Library("aten", "IMPL")
for name in ("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "eye", "eye.m"):
    packet, _, overload = name.partition(".")
    _library.impl(name, _made(getattr(getattr(aten, packet), overload or "default")), "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")


def _is_plain(module: torch.nn.Module) -> bool:
    """As `weights.takes_changes`, which knows a matrix of a kind of its own as quantised."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Twin):
        return not weights.wraps_matrix(module)
    return _takes_changes(module)


_takes_changes = weights.takes_changes
weights.takes_changes = _is_plain
