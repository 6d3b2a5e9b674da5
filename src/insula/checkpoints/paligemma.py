"""PaliGemma's weights (Beyer et al. 2024): Hugging Face safetensors, and big_vision's npz. Vision and backbone only."""

from insula.checkpoints.tensor_map import Format, Line
from insula.model.config import ModelConfig

_VISION_LAYER = {
    "attention_norm.scale": ("layer_norm1.weight", "W"),
    "attention_norm.bias": ("layer_norm1.bias", "W"),
    "query.kernel": ("self_attn.q_proj.weight", "(NE)W"),
    "query.bias": ("self_attn.q_proj.bias", "(NE)"),
    "key.kernel": ("self_attn.k_proj.weight", "(NE)W"),
    "key.bias": ("self_attn.k_proj.bias", "(NE)"),
    "value.kernel": ("self_attn.v_proj.weight", "(NE)W"),
    "value.bias": ("self_attn.v_proj.bias", "(NE)"),
    "out.kernel": ("self_attn.out_proj.weight", "W(NE)"),
    "out.bias": ("self_attn.out_proj.bias", "W"),
    "mlp_norm.scale": ("layer_norm2.weight", "W"),
    "mlp_norm.bias": ("layer_norm2.bias", "W"),
    "up.kernel": ("mlp.fc1.weight", "FW"),
    "up.bias": ("mlp.fc1.bias", "F"),
    "down.kernel": ("mlp.fc2.weight", "WF"),
    "down.bias": ("mlp.fc2.bias", "W"),
}
_GEMMA_LAYER = {
    "query": ("self_attn.q_proj.weight", "(NE)W"),
    "key": ("self_attn.k_proj.weight", "(GE)W"),
    "value": ("self_attn.v_proj.weight", "(GE)W"),
    "out": ("self_attn.o_proj.weight", "W(NE)"),
    "gate": ("mlp.gate_proj.weight", "FW"),
    "up": ("mlp.up_proj.weight", "FW"),
    "down": ("mlp.down_proj.weight", "WF"),
}
_JAX_VISION_LAYER = {
    "attention_norm.scale": ("LayerNorm_0/scale", "XW"),
    "attention_norm.bias": ("LayerNorm_0/bias", "XW"),
    "query.kernel": ("MultiHeadDotProductAttention_0/query/kernel", "XWNE"),
    "query.bias": ("MultiHeadDotProductAttention_0/query/bias", "XNE"),
    "key.kernel": ("MultiHeadDotProductAttention_0/key/kernel", "XWNE"),
    "key.bias": ("MultiHeadDotProductAttention_0/key/bias", "XNE"),
    "value.kernel": ("MultiHeadDotProductAttention_0/value/kernel", "XWNE"),
    "value.bias": ("MultiHeadDotProductAttention_0/value/bias", "XNE"),
    "out.kernel": ("MultiHeadDotProductAttention_0/out/kernel", "XNEW"),
    "out.bias": ("MultiHeadDotProductAttention_0/out/bias", "XW"),
    "mlp_norm.scale": ("LayerNorm_1/scale", "XW"),
    "mlp_norm.bias": ("LayerNorm_1/bias", "XW"),
    "up.kernel": ("MlpBlock_0/Dense_0/kernel", "XWF"),
    "up.bias": ("MlpBlock_0/Dense_0/bias", "XF"),
    "down.kernel": ("MlpBlock_0/Dense_1/kernel", "XFW"),
    "down.bias": ("MlpBlock_0/Dense_1/bias", "XW"),
}


def torch_layers(ours: str, theirs: str) -> list[Line]:
    """The attention and feed-forward of a Gemma in PyTorch's layout, without norms."""
    return [Line(f"{ours}.layers.{o}", f"{theirs}.layers.{{}}.{t}", axes) for o, (t, axes) in _GEMMA_LAYER.items()]


def jax_layers(ours: str, config: ModelConfig, theirs: str = "llm", suffix: str = "") -> list[Line]:
    """The same in big_vision's layout; openpi writes its expert beside it, with the suffix "_1".

    Where there are as many key heads as query heads, query, key and value are one tensor.
    """
    attention, mlp = f"{theirs}/layers/attn", f"{theirs}/layers/mlp{suffix}"

    if config.backbone.num_heads == config.backbone.num_kv_heads:
        names = {"query": "X0NWE", "key": "X1GWE", "value": "X2GWE"}
        lines = [Line(f"{ours}.layers.{n}", f"{attention}/qkv_einsum{suffix}/w", a) for n, a in names.items()]
    else:
        lines = [
            Line(f"{ours}.layers.query", f"{attention}/q_einsum{suffix}/w", "XNWE"),
            Line(f"{ours}.layers.key", f"{attention}/kv_einsum{suffix}/w", "X0GWE"),
            Line(f"{ours}.layers.value", f"{attention}/kv_einsum{suffix}/w", "X1GWE"),
        ]

    return [
        *lines,
        Line(f"{ours}.layers.out", f"{attention}/attn_vec_einsum{suffix}/w", "XNEW"),
        Line(f"{ours}.layers.gate", f"{mlp}/gating_einsum", "X0WF"),
        Line(f"{ours}.layers.up", f"{mlp}/gating_einsum", "X1WF"),
        Line(f"{ours}.layers.down", f"{mlp}/linear", "XFW"),
    ]


def paligemma_torch_table(config: ModelConfig) -> list[Line]:
    """Vision and backbone as `transformers` names them since 4.52."""
    tower, text = "model.vision_tower.vision_model", "model.language_model"
    return [
        Line("vision.stem.0.kernel", f"{tower}.embeddings.patch_embedding.weight", "Wchw"),
        Line("vision.stem.0.bias", f"{tower}.embeddings.patch_embedding.bias", "W"),
        Line("vision.position", f"{tower}.embeddings.position_embedding.weight", "PW"),
        *(
            Line(f"vision.layers.{ours}", f"{tower}.encoder.layers.{{}}.{theirs}", axes)
            for ours, (theirs, axes) in _VISION_LAYER.items()
        ),
        Line("vision.norm.scale", f"{tower}.post_layernorm.weight", "W"),
        Line("vision.norm.bias", f"{tower}.post_layernorm.bias", "W"),
        Line("vision.head.kernel", "model.multi_modal_projector.linear.weight", "OW"),
        Line("vision.head.bias", "model.multi_modal_projector.linear.bias", "O"),
        Line("backbone.embedding", f"{text}.embed_tokens.weight", "VW"),
        *torch_layers("backbone", text),
        Line("backbone.layers.attention_norm", f"{text}.layers.{{}}.input_layernorm.weight", "W"),
        Line("backbone.layers.mlp_norm", f"{text}.layers.{{}}.post_attention_layernorm.weight", "W"),
        Line("backbone.norm", f"{text}.norm.weight", "W"),
    ]


def paligemma_jax_table(config: ModelConfig) -> list[Line]:
    """Vision and backbone as big_vision names them."""
    return [
        Line("vision.stem.0.kernel", "img/embedding/kernel", "hwcW"),
        Line("vision.stem.0.bias", "img/embedding/bias", "W"),
        Line("vision.position", "img/pos_embedding", "0PW"),
        *(
            Line(f"vision.layers.{ours}", f"img/Transformer/encoderblock/{theirs}", axes)
            for ours, (theirs, axes) in _JAX_VISION_LAYER.items()
        ),
        Line("vision.norm.scale", "img/Transformer/encoder_norm/scale", "W"),
        Line("vision.norm.bias", "img/Transformer/encoder_norm/bias", "W"),
        Line("vision.head.kernel", "img/head/kernel", "WO"),
        Line("vision.head.bias", "img/head/bias", "O"),
        Line("backbone.embedding", "llm/embedder/input_embedding", "VW"),
        *jax_layers("backbone", config),
        Line("backbone.layers.attention_norm", "llm/layers/pre_attention_norm/scale", "XW"),
        Line("backbone.layers.mlp_norm", "llm/layers/pre_ffw_norm/scale", "XW"),
        Line("backbone.norm", "llm/final_norm/scale", "W"),
    ]


TORCH_RENAMES = (
    (r"vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"language_model\.model\.", "language_model."),
)
"""What transformers 5 calls otherwise, in memory or in the files it writes."""
HUGGING_FACE = Format(
    "PaliGemma (Hugging Face)",
    paligemma_torch_table,
    renames=(
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(vision_tower|multi_modal_projector|language_model)\.", r"model.\1."),  # before 4.52, and in files since
        *TORCH_RENAMES,
    ),
    tied=(("lm_head.weight", "model.language_model.embed_tokens.weight"),),
)
BIG_VISION = Format("PaliGemma (big_vision)", paligemma_jax_table, renames=((r"^params/", ""),))
