# SPDX-License-Identifier: Apache-2.0
"""Attention problems of real models, for `python -m fa4_jax.bench --preset NAME`.

Heads, head dims, windows and softcaps are those of the models' published configurations; batch and
length are what one GPU sees in training (image and structure models: at their usual input).
"""

from __future__ import annotations

from typing import Any

_LLAMA3 = {"batch": 2, "seqlen": 8192, "kv_heads": 8, "head_dim": 128, "mask": "causal"}
# Gemma 2, alternately a layer of either kind.
_GEMMA2_9B = {"batch": 2, "seqlen": 8192, "heads": 16, "kv_heads": 8, "head_dim": 256}

PRESETS: dict[str, tuple[dict[str, Any], ...]] = {
    "llama3-8b": ({**_LLAMA3, "heads": 32},),
    "llama3-70b": ({**_LLAMA3, "batch": 1, "heads": 64},),
    # Seven query heads on each key/value head.
    "qwen2.5-7b": (
        {
            "batch": 1,
            "seqlen": 16384,
            "heads": 28,
            "kv_heads": 4,
            "head_dim": 128,
            "mask": "causal",
        },
    ),
    "gemma2-9b": (
        {**_GEMMA2_9B, "mask": "window", "window": 4096, "softcap": 50.0},
        {**_GEMMA2_9B, "mask": "causal", "softcap": 50.0},
    ),
    # Multi-head latent attention as it is trained: 128 channels and 64 of the rotary embedding.
    "deepseek-v3": (
        {
            "batch": 1,
            "seqlen": 4096,
            "heads": 128,
            "kv_heads": 128,
            "head_dim": 192,
            "value_dim": 128,
            "mask": "causal",
        },
    ),
    # 384 x 384 pixels in patches of 16, and the class token.
    "vit-l16": (
        {
            "batch": 64,
            "seqlen": 577,
            "heads": 16,
            "kv_heads": 16,
            "head_dim": 64,
            "mask": "full",
        },
    ),
    # Attention along the rows of a pair representation of 384 residues, without its dense bias,
    # which runs on the reference.
    "alphafold-like": (
        {
            "batch": 384,
            "seqlen": 384,
            "heads": 4,
            "kv_heads": 4,
            "head_dim": 32,
            "mask": "full",
        },
    ),
}
"""Keywords of `bench.Case` by the model's name."""
