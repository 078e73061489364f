"""The last steps of a model by themselves: its last MLP at a few places, the final norm and the head."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from reknow.model.decoder import Decoder
from reknow.model.hooks import forward_replaced, hidden_states
from reknow.model.parts import mlp_module

__all__ = ["apply_head", "mlp_only_at"]


class _LastStates(BaseModelOutputWithPastAndCrossAttentions):
    """What stands in for the blocks' output; that of a mixture of experts has what the routers said, too."""

    router_logits = None


def apply_head(lm: Decoder, hidden: Tensor) -> Tensor:
    """Logits (n, vocabulary), on `lm.device`, of the last block's output (n, hidden): final norm, head, and any scale
    or cap.

    The model's own `forward` does it, around a decoder stack that is replaced by the given states.
    """
    for name in lm.parts.final_norm:
        hidden = lm.model.get_submodule(name)(hidden)
    states = _LastStates(last_hidden_state=hidden[None])  # type: ignore[arg-type]
    with forward_replaced(lm.model.get_submodule(lm.parts.backbone), lambda *args, **kwargs: states):
        dummy = torch.zeros((1, len(hidden)), dtype=torch.long, device=lm.device)  # logits come where it is
        return lm.model(input_ids=dummy, use_cache=False).logits[0]


def mlp_only_at(lm: Decoder, wanted: tuple[Tensor, ...]):
    """While open, the last block's MLP is computed at these (rows, columns) alone, where it is a module that maps
    states to states; elsewhere it gives 0. What the block gives at other places is read by nobody."""
    block, name = lm.parts.blocks[-1], mlp_module(lm.model, lm.parts.value[-1])
    module = lm.model.get_submodule(name)
    own = module.forward

    def forward(states: Tensor, *rest):
        here = tuple(places.to(states.device) for places in wanted)
        # One row of all these places: a mixture of experts wants rows.
        given = own(states[here][None], *(a[here][None] if isinstance(a, Tensor) else a for a in rest))
        outputs = hidden_states(given)[0]
        whole = states.new_zeros(*states.shape[:2], outputs.shape[-1]).index_put(here, outputs)
        return (whole, *given[1:]) if isinstance(given, tuple) else whole

    # A memory wants to see whole rows.
    return nullcontext() if name == block or lm.hooked else forward_replaced(module, forward)
