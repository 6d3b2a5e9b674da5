"""openpi's checkpoints of π0 and π0.5: the Orbax tree `params`, and the safetensors of its PyTorch model.

What the two models differ in: π0.5 conditions the expert's norms on the flow time (adaRMS), π0 mixes the time into the
action tokens and has a state token.
"""

import dataclasses

from insula.checkpoints import paligemma
from insula.checkpoints.tensor_map import Format, Line
from insula.model.config import ModelConfig
from insula.model.expert import expert_weights

TORCH = "paligemma_with_expert."
EXPERT = TORCH + "gemma_expert."


def _projections(config: ModelConfig) -> dict[str, str]:
    """Ours → theirs."""
    time = "time_mlp" if config.time_input == "adarms" else "action_time_mlp"
    names = {"action_in": "action_in_proj", "action_out": "action_out_proj"}
    names |= {"time_in": f"{time}_in", "time_out": f"{time}_out"}
    return names | ({"state_in": "state_proj"} if config.state_input == "token" else {})


def _prefixed(lines: list[Line], prefix: str) -> list[Line]:
    return [dataclasses.replace(line, theirs=prefix + line.theirs) for line in lines]


def openpi_jax_table(config: ModelConfig) -> list[Line]:
    """Names of the Orbax tree, joined by slashes, below the item "params"."""
    table = expert_weights(config)
    llm = "PaliGemma/llm"
    lines = [
        *_prefixed(paligemma.paligemma_jax_table(config), "PaliGemma/"),
        *paligemma.jax_layers("expert", config, llm, "_1"),
    ]
    for ours, theirs in _projections(config).items():
        axes = getattr(table, ours).kernel.axes
        lines += [
            Line(f"expert.{ours}.kernel", f"{theirs}/kernel", axes),
            Line(f"expert.{ours}.bias", f"{theirs}/bias", axes[-1]),
        ]

    # adaRMS makes each norm's scale from the time, by a matrix of its own; a plain norm is a scale alone.
    norms = {"layers.attention_norm": "layers/pre_attention_norm_1", "layers.mlp_norm": "layers/pre_ffw_norm_1"}
    for ours, theirs in (norms | {"norm": "final_norm_1"}).items():
        depth = "X" if ours.startswith("layers") else ""
        if config.time_input == "adarms":
            lines += [
                Line(f"expert.{ours}.kernel", f"{llm}/{theirs}/Dense_0/kernel", f"{depth}WY"),
                Line(f"expert.{ours}.bias", f"{llm}/{theirs}/Dense_0/bias", f"{depth}Y"),
            ]
        else:
            lines.append(Line(f"expert.{ours}", f"{llm}/{theirs}/scale", f"{depth}W"))

    return lines


def openpi_torch_table(config: ModelConfig) -> list[Line]:
    """Names of the PyTorch model's state_dict."""
    table = expert_weights(config)
    lines = _prefixed(paligemma.paligemma_torch_table(config), TORCH + "paligemma.")
    lines += paligemma.torch_layers("expert", EXPERT + "model")
    for ours, theirs in _projections(config).items():
        axes = getattr(table, ours).kernel.axes
        lines += [
            Line(f"expert.{ours}.kernel", f"{theirs}.weight", axes[::-1]),
            Line(f"expert.{ours}.bias", f"{theirs}.bias", axes[-1]),
        ]

    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    norms = {f"layers.{ours}": f"layers.{{}}.{theirs}" for ours, theirs in norms.items()}
    for ours, theirs in (norms | {"norm": "norm"}).items():
        if config.time_input == "adarms":
            lines += [
                Line(f"expert.{ours}.kernel", f"{EXPERT}model.{theirs}.dense.weight", "YW"),
                Line(f"expert.{ours}.bias", f"{EXPERT}model.{theirs}.dense.bias", "Y"),
            ]
        else:
            lines.append(Line(f"expert.{ours}", f"{EXPERT}model.{theirs}.weight", "W"))

    return lines


def unused_head(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The PyTorch expert keeps a language head that nothing reads."""
    return {f"{EXPERT}lm_head.weight": (config.vocab_size, config.expert.width)}


HEAD = f"{TORCH}paligemma.lm_head.weight", f"{TORCH}paligemma.model.language_model.embed_tokens.weight"
OPENPI = Format("openpi", openpi_jax_table, renames=((r"^params/", ""), (r"/value$", "")))
OPENPI_TORCH = Format(
    "openpi (PyTorch)",
    openpi_torch_table,
    renames=paligemma.TORCH_RENAMES,
    tied=(HEAD,),
    unused=unused_head,
)
