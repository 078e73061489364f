"""Seeded damage to files: bytes, JSON values, tensors. What a seed does is always the same."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

DEEP, TWICE = "@deep", "@twice"
"""Stand for what cannot be written from Python values: 100,000 brackets, a field that is there twice."""
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.5, 1e308, float("nan"), float("inf"),
    "", " ", "x", "y" * 5000, "\ud800", "a\udfffb", "\x1b[31mred\x1b[0m", "\x00", "../../etc/passwd", "{}",
    "{0.__class__}", "{x:>1000000000}", "日本語",
    [], [[]], [None], ["x"], [1, 2], {}, {"x": 1}, {"": None}, DEEP, TWICE,
)  # fmt: skip


def flipped(content: bytes, chance: random.Random) -> bytes:
    """One to three changes of bytes: bit, byte, a piece taken out, put in twice or overwritten, the end cut off."""
    found = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(found) + 1) if chance.random() < 0.5 else chance.randrange(min(len(found), 400) + 1)
        size = chance.choice((1, 4, 64, 1000))
        kind = chance.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and at < len(found):
            found[at] = chance.randrange(256)
        elif kind == 2:
            del found[at : at + size]
        elif kind == 3:
            found[at:at] = found[at : at + size]
        elif kind == 4:
            found[at : at + size] = chance.randbytes(min(size, len(found) - at))
        else:
            del found[at:]
    return bytes(found)


def altered(value: Any, chance: random.Random) -> str:
    """JSON text of the value after one to three changes of its parts."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        value = _altered(value, chance)
    text = json.dumps(value)
    if chance.random() < 0.05:
        text = text.replace(":", ": " + "[" * 300, 1)
    deep = "[" * 100_000 + "]" * 100_000
    return text.replace(f'"{DEEP}"', deep).replace(f'"{TWICE}"', '{"a": 1, "a": 2}')


def _altered(value: Any, chance: random.Random) -> Any:
    """The value with one part changed, somewhere inside."""
    parts = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    if not parts or chance.random() < 0.15:
        return _replaced(value, chance)
    key, inner = chance.choice(parts)
    kind = chance.random()
    if kind < 0.6:
        value[key] = _altered(inner, chance)
    elif kind < 0.7:
        del value[key]
    elif kind < 0.85:
        value[key] = _replaced(inner, chance)
    elif isinstance(value, dict):
        value[chance.choice(("extra", "", "format", key + " ", "\ud800"))] = copy.deepcopy(
            chance.choice((inner, *VALUES))
        )
    else:
        value.insert(key, copy.deepcopy(inner))
    return value


def _replaced(value: Any, chance: random.Random) -> Any:
    """Another value: an odd one, or one not far from it."""
    near: list[Any] = []
    if isinstance(value, str):
        near = [value + "x", value[:-1], value.upper(), [value], value * 3]
    elif isinstance(value, (int, float)):
        near = [value + 1, value - 1, -value, value * 1000, str(value), float(value)]
    elif isinstance(value, list):
        near = [value[:-1], value + value, value[::-1], {"0": value}]
    elif isinstance(value, dict):
        near = [list(value.values()), list(value), [value]]
    return copy.deepcopy(chance.choice(near if near and chance.random() < 0.4 else VALUES))


def bent(tensors: dict[str, Tensor], chance: random.Random) -> dict[str, Tensor]:
    """The tensors after one or two changes of shapes, kinds of numbers, numbers or names."""
    found = dict(tensors)
    for _ in range(chance.choice((1, 1, 2))):
        if not found:
            break
        name = chance.choice(sorted(found))
        tensor = found.pop(name)
        kind = chance.randrange(10)
        if kind == 0:
            found[name + chance.choice(("x", ".left", ""))[:5] if chance.random() < 0.5 else "odd"] = tensor
        elif kind == 1:
            found["base.samples" if chance.random() < 0.2 else f"{name}.copy"] = tensor.clone()
            found[name] = tensor
        elif kind > 2:
            found[name] = chance.choice(BENDS)(tensor, chance).contiguous()
    return found


def _some(tensor: Tensor, value: float, chance: random.Random) -> Tensor:
    tensor = tensor.clone()
    if tensor.numel():
        tensor.view(-1)[chance.randrange(tensor.numel())] = value
    return tensor


def _numbers(tensor: Tensor, chance: random.Random) -> Tensor:
    if tensor.is_floating_point():
        return _some(tensor, chance.choice((float("nan"), float("inf"), -1.0, 0.0, 30.0)), chance)
    limit = torch.iinfo(tensor.dtype).max if tensor.dtype != torch.bool else 1
    return _some(tensor, chance.choice((0, 1, limit, limit // 2, 7)), chance)


BENDS: tuple[Callable[[Tensor, random.Random], Tensor], ...] = (
    _numbers,
    _numbers,
    lambda tensor, _: tensor.mT if tensor.dim() > 1 else tensor[None],
    lambda tensor, _: tensor[:-1] if tensor.dim() else tensor[None],
    lambda tensor, _: torch.cat([tensor, tensor]) if tensor.dim() else tensor,
    lambda tensor, _: tensor[..., :1] if tensor.dim() else tensor,
    lambda tensor, _: tensor.flatten(),
    lambda tensor, _: tensor[:0] if tensor.dim() else tensor,
    lambda tensor, _: tensor.double(),
    lambda tensor, _: tensor.half(),
    lambda tensor, _: tensor.to(torch.int32),
    lambda tensor, _: tensor.to(torch.uint8),
    lambda tensor, _: torch.zeros(()),
    lambda tensor, _: tensor * 3,
)


def unsealed(content: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Texts without the digest, and tensors, of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    texts = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return {name: text for name, text in texts.items() if name != "sha256"}, load(content)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file of ours, damaged in its bytes, in its JSON header or in its tensors.

    Where it is not the bytes, the digest is left out, as in a file from before there were digests.
    """
    kind = chance.random()
    if kind < 0.3:
        return flipped(content, chance)
    texts, tensors = unsealed(content)
    if kind < 0.7:
        texts["reknow"] = altered(json.loads(texts["reknow"]), chance)
    else:
        tensors = bent(tensors, chance)
    if kind > 0.95:
        texts[chance.choice(sorted(texts))] = chance.choice(("", "{", "[]", "null", "5", "\x00"))
    return save(tensors, texts)


def lines(content: bytes, chance: random.Random) -> bytes:
    """A file of JSON lines, damaged in its bytes, in a line's values, or in the order and number of its lines."""
    kind = chance.random()
    if kind < 0.35:
        return flipped(content, chance)
    found = content.split(b"\n")[:-1]
    place = chance.randrange(len(found))
    if kind < 0.85:
        found[place] = altered(json.loads(found[place]), chance).encode()
    elif kind < 0.9:
        found.insert(place, found[chance.randrange(len(found))])
    elif kind < 0.95:
        del found[place]
    else:
        found.insert(place, chance.choice((b"", b"\xff\xfe", b"null", b"{}", b"\x00" * 50)))
    return b"".join(line + b"\n" for line in found)


def one_json(content: bytes, chance: random.Random) -> bytes:
    """A file that is one JSON value, damaged in its bytes or its values."""
    return flipped(content, chance) if chance.random() < 0.35 else altered(json.loads(content), chance).encode()


def table(content: bytes, chance: random.Random) -> bytes:
    """A CSV file, damaged in its bytes or with odd cells."""
    if chance.random() < 0.5:
        return flipped(content, chance)
    cell = chance.choice((b'"', b",", b"\n", b'"a""b', b"\xe9", b"\x00", b"\r", b";" * 50, b"{}", b"x" * 200_000))
    at = chance.randrange(len(content) + 1)
    return content[:at] + cell + content[at:]
