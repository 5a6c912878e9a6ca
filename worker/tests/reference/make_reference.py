#!/usr/bin/env python3
"""Makes worker/tests/fixtures/llama-tiny: a small random Llama with Llama 3.3's proportions, and its logits.

Eight query heads share a KV head, the feed-forward width is 3.5 times the hidden one, rope is scaled as in Llama 3, the output
matrix is not the embedding. The weights are bfloat16; the reference computes with them in float32.

Needs torch, transformers and safetensors. Usage: make_reference.py [FOLDER]
"""

import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS = 80
ROWS = 24  # the last rows, whose logits are kept


def main() -> None:
    default = pathlib.Path(__file__).parent.parent / "fixtures" / "llama-tiny"
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else default
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(33)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            # Short enough that the test's positions reach the scaled waves.
            "original_max_position_embeddings": 64,
        },
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            # Norms near one; matrices so that activations keep their size and attention is not flat.
            value = 1 + 0.1 * noise if "norm" in name else noise / weight.shape[-1] ** 0.5
            weight.copy_(value.to(torch.bfloat16).to(torch.float32))
    tokens = torch.randint(0, config.vocab_size, (1, TOKENS))
    with torch.no_grad():
        logits = model(tokens).logits[0, -ROWS:]

    weights = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    reference = {"tokens": tokens[0].to(torch.float32), "logits": logits.contiguous()}
    save_file(reference, folder / "reference.safetensors")
    config.torch_dtype = "bfloat16"
    config.save_pretrained(folder)
    print(f"{folder}: largest logit {logits.abs().max():.3f}")


if __name__ == "__main__":
    main()
