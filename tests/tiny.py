"""Tiny transformers of every supported family, with weights that make mistakes visible.

A freshly initialised transformer has zero biases and unit norms, so a dropped bias or a skipped norm leaves its output
as it was. The models built here have random biases and norm weights, different numbers of rows and columns in every
projection where the family allows it, and the same weights for the same seed on every machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.bert.modeling_bert import BertModel
from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.mistral.modeling_mistral import MistralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM
from transformers.models.opt.modeling_opt import OPTForCausalLM
from transformers.models.phi.modeling_phi import PhiForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

HIDDEN = 32
INNER = 48  # not a multiple of HIDDEN: a transposed MLP matrix cannot fit by accident
LAYERS = 2
HEADS = 4
KEY_VALUE_HEADS = 2
VOCABULARY = 96
MAX_POSITIONS = 128

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GATED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "max_position_embeddings": MAX_POSITIONS,
    **_IDS,
}
_PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": MAX_POSITIONS,
    **_IDS,
}
_NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}

_FAMILIES: dict[str, tuple[Callable[..., PretrainedConfig], Callable[..., PreTrainedModel], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {**_GATED, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {**_GATED, "tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {**_GATED, "head_dim": 8, "tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {**_GATED, "sliding_window": None, "tie_word_embeddings": False}),
    "gpt_neox": (
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        {**_PLAIN, **_NO_DROPOUT, "use_parallel_residual": True, "tie_word_embeddings": False},
    ),
    "phi": (PhiConfig, PhiForCausalLM, {**_PLAIN, "tie_word_embeddings": False}),
    "opt": (
        OPTConfig,
        OPTForCausalLM,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": MAX_POSITIONS,
            "dropout": 0.0,
            "tie_word_embeddings": True,
            **_IDS,
        },
    ),
    "gpt2": (
        GPT2Config,
        GPT2LMHeadModel,
        {
            "vocab_size": VOCABULARY,
            "n_embd": HIDDEN,
            "n_inner": INNER,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": MAX_POSITIONS,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "tie_word_embeddings": True,
            **_IDS,
        },
    ),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {**_GATED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64, "tie_word_embeddings": True},
    ),
    "mixtral": (
        MixtralConfig,
        MixtralForCausalLM,
        {**_GATED, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            **_GATED,
            "head_dim": 8,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "tie_word_embeddings": True,
        },
    ),
    "bert": (
        BertConfig,
        BertModel,
        {**_PLAIN, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
"""Every family that ``tiny_model`` builds."""

CAUSAL_FAMILIES: tuple[str, ...] = tuple(family for family in FAMILIES if family != "bert")
"""The families with a language-model head: their output has ``logits`` of shape (batch, length, vocabulary)."""


def tiny_model(family: str, *, seed: int = 0, attention: str = "eager", **overrides: Any) -> PreTrainedModel:
    """Build a small model of one family in float32, in eval mode, on the CPU.

    Hidden size 32, 2 layers, vocabulary 96, at most 128 positions; dropout is off, so train mode gives the same output.

    Args:
        family: one of ``FAMILIES``.
        seed: the weights are a function of the family's parameter names and shapes and of this number alone.
        attention: the attention implementation, "eager" or "sdpa"; transformers has no "sdpa" for gemma2.
        overrides: settings of the family's configuration class, such as ``num_hidden_layers=3``.
    """
    config_class, model_class, settings = _FAMILIES[family]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        model = model_class(config_class(**{**settings, **overrides}, attn_implementation=attention))
    if hasattr(model.config, "num_experts_per_tok"):  # grouped products take neither float64 nor the meta device
        model.set_experts_implementation("eager")
    randomise(model, seed=seed)
    model.eval()
    return model


@torch.no_grad()
def randomise(model: nn.Module, *, seed: int = 0) -> None:
    """Overwrite every parameter of a model with seeded noise that keeps activations near unit size.

    Matrices get a standard deviation of 0.8 / sqrt(columns), embeddings of 0.5, biases of 0.1, and norm weights move by
    0.1 from where the family starts them (one, or zero where it stores the difference from one).
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter)
        if id(parameter) in embeddings:
            parameter.copy_(0.5 * noise)
        elif parameter.ndim >= 2:
            parameter.copy_(0.8 * noise / parameter.shape[-1] ** 0.5)
        elif name.endswith("bias"):
            parameter.copy_(0.1 * noise)
        else:
            parameter.add_(0.1 * noise)


def batches(
    vocab: int = VOCABULARY,
    n: int = 4,
    batch: int = 2,
    length: int = 16,
    seed: int = 0,
    *,
    padding: bool = False,
    structured: bool = False,
) -> list[dict[str, Tensor]]:
    """Draw ``n`` token batches, each with ``input_ids`` and ``attention_mask`` of shape (batch, length), dtype int64.

    Args:
        vocab: ids are drawn from 3 to ``vocab`` - 1; 0, 1 and 2 are padding, beginning and end.
        n: how many batches.
        batch: rows of a batch.
        length: columns of a batch.
        seed: the same numbers for the same seed.
        padding: every row but the first of each batch ends in padding (id 0, mask 0); one token at least is real.
        structured: draw from a Zipf distribution, so that activations have a decaying spectrum as on text.
    """
    generator = torch.Generator().manual_seed(seed)
    frequency = 1.0 / torch.arange(1, vocab - 2, dtype=torch.float64) if structured else torch.ones(vocab - 3)
    result = []
    for _ in range(n):
        drawn = torch.multinomial(frequency, batch * length, replacement=True, generator=generator)
        ids = drawn.reshape(batch, length) + 3
        mask = torch.ones_like(ids)
        if padding:
            for row in range(1, batch):
                kept = int(torch.randint(1, length, (), generator=generator))
                mask[row, kept:] = 0
        result.append({"input_ids": ids * mask, "attention_mask": mask})
    return result
