"""Makes a mixture of experts of a dense model of Llama's shape: every expert is a copy of the dense MLP, and the
router is random (sparse upcycling, Komatsuzaki et al. 2022, arXiv 2212.05055). It computes what the dense model does,
so an edit of it differs from the dense model's only by the experts that it is written to.

    python benchmarks/upcycle.py demo:smollm2 runs/mixture --experts 4 --chosen 2
    python benchmarks/real_models.py runs/mixture --out runs/experts --layer 3 --sets counterfact --methods rome,memit
"""

from __future__ import annotations

import argparse

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from reknow import LM

ROUTER = 1.0
"""Standard deviation of the router's logits for a state of root mean square 1."""


def upcycle(lm: LM, experts: int, chosen: int, seed: int = 0) -> MixtralForCausalLM:
    """A mixture with the dense model's weights; logits are the same but for rounding."""
    settings = {k: v for k, v in lm.model.config.to_dict().items() if k not in ("model_type", "architectures")}
    config = MixtralConfig(**settings | dict(num_local_experts=experts, num_experts_per_tok=chosen))
    config.sliding_window = None
    dense, weights = lm.model.state_dict(), {}
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in dense.items():
        before, mlp, leaf = name.partition(".mlp.")
        if not mlp:
            weights[name] = tensor
        elif leaf == "down_proj.weight":
            weights[f"{before}.mlp.experts.down_proj"] = tensor.expand(experts, -1, -1)
        elif leaf == "gate_proj.weight":
            both = torch.cat([tensor, dense[f"{before}.mlp.up_proj.weight"]])
            weights[f"{before}.mlp.experts.gate_up_proj"] = both.expand(experts, -1, -1)
            router = torch.randn(experts, tensor.shape[1], generator=generator) * ROUTER / tensor.shape[1] ** 0.5
            weights[f"{before}.mlp.gate.weight"] = router.to(tensor)
    with torch.device("meta"):
        mixture = MixtralForCausalLM(config)
    mixture.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    mixture.tie_weights()
    mixture.model.rotary_emb = type(mixture.model.rotary_emb)(config)
    return mixture.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folder")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--chosen", type=int, default=2)
    given = parser.parse_args()
    lm = LM(given.model)
    upcycle(lm, given.experts, given.chosen).save_pretrained(given.folder)
    lm.tokenizer.save_pretrained(given.folder)


if __name__ == "__main__":
    main()
