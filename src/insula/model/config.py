"""Sizes and settings of a model, and the presets that name them."""

import dataclasses
import math
from typing import Any, Literal, get_type_hints

from insula.checks import check_choice, check_integer, check_number, is_a, name_of
from insula.errors import InputError, did_you_mean
from insula.model.objective import INSULATED, ObjectiveConfig

LARGEST_SIZE = 2**24
"""Of any size: far beyond every model there is, and small enough that no product of three overflows."""


def _check_sizes(what: str, config: Any, *names: str, least: int = 1) -> None:
    for name in names:
        check_integer(f"{what}{name}", getattr(config, name), least, LARGEST_SIZE)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """SigLIP-style ViT. `patch_sizes` nest: (14,) is one linear patch embedding of 14 px; (4, 2, 2) embeds 4 px
    patches, then merges 2×2 of them twice through a GELU, which is a strided convolutional stem with 16 px tokens."""

    image_size: int
    patch_sizes: tuple[int, ...]
    stem_widths: tuple[int, ...]
    width: int
    depth: int
    mlp_dim: int
    num_heads: int

    def __post_init__(self) -> None:
        _check_sizes("vision: ", self, "image_size", "width", "depth", "mlp_dim", "num_heads")
        for name in ("patch_sizes", "stem_widths"):
            for size in getattr(self, name):
                check_integer(f"vision: {name} has one that", size, 1, LARGEST_SIZE)
        if not self.patch_sizes:
            raise InputError("vision: patch_sizes is empty, expected at least one, such as (14,)")

    @property
    def grid(self) -> int:
        """Tokens along one side of an image."""
        return self.image_size // math.prod(self.patch_sizes)

    @property
    def num_patches(self) -> int:
        """Tokens of one image, P."""
        return self.grid**2


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Gemma-style decoder: the backbone's text model, and the action expert."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        _check_sizes("transformer: ", self, *(field.name for field in dataclasses.fields(self)))


LORA_PARTS = ("backbone", "expert")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates (`insula.model.lora`) of the attention and feed-forward matrices of `parts`, scaled by
    alpha / rank. All else of these parts is frozen; the other parts are trained as usual. Raises InputError for values
    that make no update."""

    rank: int = 16
    alpha: float = 16.0
    parts: tuple[Literal["backbone", "expert"], ...] = ("backbone",)

    def __post_init__(self) -> None:
        check_integer("lora: rank", self.rank, 1)  # for no LoRA at all: lora=None
        check_number("lora: alpha", self.alpha, "> 0", lambda alpha: alpha > 0)
        for part in self.parts:
            if part not in LORA_PARTS:
                near = did_you_mean(str(part), LORA_PARTS)
                raise InputError(f"lora: parts has {part!r}, expected any of {LORA_PARTS}{near}")
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise InputError(f"lora: parts is {self.parts}, expected at least one, and each once")


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How it is computed; none of it changes what is computed beyond rounding. Raises InputError for contradictions."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """What matrix products read. They accumulate in float32 either way."""
    stream: Literal["auto", "float32", "dtype"] = "auto"
    """What layers hand on: the residual stream, queries, keys and values, and what products give. Norms, softmax,
    rotary angles, losses and the optimizer are float32 whatever it is. "auto": float32 on a CPU, where nothing else is
    as fast, and `dtype` on an accelerator, where float32 takes twice the memory."""
    scan_layers: bool = False
    """Walk depth by one compiled loop: less compilation, slower for small models."""
    remat: Literal["none", "dots", "all"] = "none"
    """What of each layer is computed again in the backward pass rather than kept: nothing, all but the results of
    matrix products with weights, or everything. Each needs less memory than the one before, and more time."""
    vocab_chunk: int | None = None
    """Vocabulary entries per step of the token loss, a divisor of the vocabulary; None takes all at once."""

    def __post_init__(self) -> None:
        check_choice("compute: dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("compute: stream", self.stream, ("auto", "float32", "dtype"))
        check_choice("compute: remat", self.remat, ("none", "dots", "all"))
        if self.vocab_chunk is not None:  # None: all at once
            check_integer("compute: vocab_chunk", self.vocab_chunk, 1)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A knowledge-insulated VLA. Change fields with `dataclasses.replace`; the whole is checked each time.

    Raises InputError where fields contradict each other, naming them.
    """

    name: str
    vision: VisionConfig
    backbone: TransformerConfig
    expert: TransformerConfig
    vocab_size: int
    cameras: tuple[str, ...]
    """Every camera the model knows, in the order of their tokens; one that a sample lacks is masked."""
    max_prompt_len: int
    """Tokens of the bidirectional part, BOS included. The expert reads no further."""
    max_fast_len: int
    """Tokens of the causal part, and the most that one sample may score."""
    horizon: int
    """Steps of one action chunk, H."""
    action_dim: int
    state_dim: int
    state_input: Literal["prompt", "token"] = "prompt"
    """How the model learns the state: as digits in the prompt (π0.5), or as a projected token of the expert's (π0)."""
    time_input: Literal["adarms", "mlp"] = "adarms"
    """How the expert learns the flow time: by modulating its norms (π0.5), or mixed into the action tokens (π0)."""
    objective: ObjectiveConfig = INSULATED
    compute: ComputeConfig = ComputeConfig()
    lora: LoraConfig | None = None
    """Train low-rank updates in place of whole matrices."""

    @property
    def max_token_len(self) -> int:
        """Text columns of one sample, L: the longest prompt, then the longest causal part."""
        return self.max_prompt_len + self.max_fast_len

    @property
    def num_image_tokens(self) -> int:
        """Image columns of one sample, C·P, absent cameras among them."""
        return len(self.cameras) * self.vision.num_patches

    @property
    def num_memory(self) -> int:
        """Columns of the prefix kept for the expert, M: all image tokens and the longest prompt."""
        return self.num_image_tokens + self.max_prompt_len

    def with_objective(self, **changes: Any) -> "ModelConfig":
        """The same model with some fields of `objective` changed."""
        return dataclasses.replace(self, objective=dataclasses.replace(self.objective, **changes))

    def with_compute(self, **changes: Any) -> "ModelConfig":
        """The same model with some fields of `compute` changed."""
        return dataclasses.replace(self, compute=dataclasses.replace(self.compute, **changes))

    def __post_init__(self) -> None:
        where = f"config {self.name!r}"
        _check_sizes(f"{where}: ", self, "vocab_size", "max_prompt_len", "max_fast_len", "horizon", "action_dim")
        _check_sizes(f"{where}: ", self, "state_dim", least=0)

        # The expert reads the backbone's keys and values layer by layer, head by head.
        for field in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            backbone, expert = getattr(self.backbone, field), getattr(self.expert, field)
            if backbone != expert:
                raise InputError(
                    f"{where}: backbone.{field} is {backbone}, expert.{field} is {expert}; "
                    "they share attention per layer, so both must be equal"
                )

        # Grouped-query attention: every key/value head serves the same number of query heads.
        if self.backbone.num_heads % self.backbone.num_kv_heads:
            raise InputError(
                f"{where}: num_heads {self.backbone.num_heads} is no multiple of "
                f"num_kv_heads {self.backbone.num_kv_heads}"
            )

        # Between the steps of the stem; the last step ends at the encoder's own width.
        if len(self.vision.stem_widths) != len(self.vision.patch_sizes) - 1:
            raise InputError(
                f"{where}: vision.stem_widths {self.vision.stem_widths} must have one entry "
                f"fewer than vision.patch_sizes {self.vision.patch_sizes}"
            )

        # Pixels of a last, smaller patch would have to be dropped.
        if self.vision.image_size % math.prod(self.vision.patch_sizes):
            raise InputError(
                f"{where}: vision.image_size {self.vision.image_size} is no multiple of the "
                f"patch, {math.prod(self.vision.patch_sizes)} px"
            )

        check_choice(f"{where}: state_input", self.state_input, ("prompt", "token"))
        check_choice(f"{where}: time_input", self.time_input, ("adarms", "mlp"))

        # With all steps given there would be none to learn.
        if self.objective.rtc_max_delay >= self.horizon:
            raise InputError(
                f"{where}: objective.rtc_max_delay is {self.objective.rtc_max_delay}, expected less than the horizon, "
                f"{self.horizon}"
            )

        if self.objective.freeze_backbone and self.lora and "backbone" in self.lora.parts:
            raise InputError(
                f"{where}: freeze_backbone contradicts lora.parts {self.lora.parts}, which trains the "
                "backbone's updates; drop one of them"
            )


def _gemma(width: int, mlp_dim: int) -> TransformerConfig:
    """Gemma 2B's shape, of which openpi's 300M expert is a narrower copy: depth and heads must be equal."""
    return TransformerConfig(width=width, depth=18, mlp_dim=mlp_dim, num_heads=8, num_kv_heads=1, head_dim=256)


# Made for two CPU cores. What a step costs here is tokens, not parameters: 16 tokens an image, and a prompt of 20. The
# limits are what the embedded tabletop needs: FAST of its chunks takes 20 tokens at most, then "|", and EOS.
TINY = ModelConfig(
    name="tiny",
    vision=VisionConfig(64, (4, 2, 2), (32, 96), width=128, depth=2, mlp_dim=256, num_heads=4),
    backbone=TransformerConfig(width=128, depth=4, mlp_dim=384, num_heads=4, num_kv_heads=4, head_dim=32),
    expert=TransformerConfig(width=96, depth=4, mlp_dim=256, num_heads=4, num_kv_heads=4, head_dim=32),
    vocab_size=3200,
    cameras=("front", "wrist"),
    max_prompt_len=20,
    max_fast_len=24,
    horizon=6,
    action_dim=7,
    state_dim=5,
    # Even a batch of 32 leaves the expert with few times and noises; one draw more costs only the expert.
    objective=ObjectiveConfig(flow_samples=2),
)

# With room for all of its tasks: a subtask in the prompt, and lists of seven things to answer.
TABLETOP = dataclasses.replace(TINY, name="tabletop", max_prompt_len=40, max_fast_len=32)

TINY_BFLOAT16 = TINY.with_compute(dtype="bfloat16")
"""What training on a CPU with AVX-512 bfloat16 wants; docs/log.md has the ratios."""

# Pictures as π0.5 sees them and towers a tenth of its own, with the embedded tokenizer: what a real model asks of a
# machine, without a download. 304 M parameters. Limits leave room for other arms than the tabletop's.
SMALL = dataclasses.replace(
    TINY,
    name="small",
    vision=VisionConfig(224, (16,), (), width=768, depth=12, mlp_dim=3072, num_heads=12),
    backbone=TransformerConfig(width=1024, depth=12, mlp_dim=3072, num_heads=8, num_kv_heads=1, head_dim=128),
    expert=TransformerConfig(width=512, depth=12, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=128),
    max_prompt_len=48,
    max_fast_len=64,
    horizon=10,
    action_dim=14,
    state_dim=14,
    objective=ObjectiveConfig(),
    compute=ComputeConfig(dtype="bfloat16", scan_layers=True, remat="all"),
)

# openpi's sizes, so that its weights load: SigLIP So400m/14, Gemma 2B and the 300M expert, three cameras, actions and
# state padded to 32. 257,152 entries: Gemma's 256,000, then PaliGemma's 1,024 locations and 128 segments.
PI05 = ModelConfig(
    name="pi05",
    vision=VisionConfig(224, (14,), (), width=1152, depth=27, mlp_dim=4304, num_heads=16),
    backbone=_gemma(2048, 16384),
    expert=_gemma(1024, 4096),
    vocab_size=257_152,
    cameras=("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"),
    max_prompt_len=200,
    max_fast_len=180,
    horizon=50,
    action_dim=32,
    state_dim=32,
    # A sixteenth of the vocabulary at a time.
    compute=ComputeConfig(dtype="bfloat16", scan_layers=True, remat="all", vocab_chunk=16_072),
)

# The state is no text here, so the prompt is short.
PI0 = dataclasses.replace(PI05, name="pi0", state_input="token", time_input="mlp", max_prompt_len=48)
PRESETS = {config.name: config for config in (TINY, TABLETOP, SMALL, PI05, PI0)}


def preset(name: str) -> ModelConfig:
    """The named config. Raises InputError with the nearest name where there is none."""
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}{did_you_mean(name, PRESETS)}; known: {', '.join(PRESETS)}")

    return PRESETS[name]


def config_from_dict(raw: Any, where: str = "config") -> ModelConfig:
    """The inverse of `dataclasses.asdict`. Raises InputError for a missing or unknown field, naming the nearest."""
    check_object(raw, where)
    _refuse_old_fields(raw, where)

    parts = {
        "vision": VisionConfig,
        "backbone": TransformerConfig,
        "expert": TransformerConfig,
        "objective": ObjectiveConfig,
        "compute": ComputeConfig,
    }

    # Older versions computed every scanned layer again, and had no name for it.
    if isinstance(old := raw.get("compute"), dict) and old.get("scan_layers") is True:
        raw = raw | {"compute": {"remat": "all"} | old}

    # An absent part is built from nothing: its defaults where it has all, else an error that names what is missing.
    nested = {name: build(kind, raw.get(name, {}), f"{where}: {name}") for name, kind in parts.items()}
    nested["lora"] = build(LoraConfig, raw["lora"], f"{where}: lora") if raw.get("lora") is not None else None
    return build(ModelConfig, {**raw, **nested}, where)


def _refuse_old_fields(raw: dict[str, Any], where: str) -> None:
    """Runs written before `objective` and `compute` existed are named as such, rather than as a misspelled field."""
    if "knowledge_insulation" in raw and "objective" not in raw:
        raise InputError(
            f"{where}: written by an insula before 0.2, whose settings had other names. Read it with that version: if "
            "it has openpi's sizes, its `insula convert RUN OUT --to openpi` makes a checkpoint that this one reads; "
            "any other is trained again"
        )


def build(kind: type, raw: Any, where: str) -> Any:
    """A dataclass from plain values, strictly. Raises InputError for a missing or unknown field."""
    check_object(raw, where)

    # A field that is not known may be one that a newer version reads: to ignore it would be to build another model.
    known = {field.name for field in dataclasses.fields(kind)}
    for name in raw:
        if name not in known:
            raise InputError(f"{where}: unknown field {name!r}{did_you_mean(name, known)}")

    needed = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(needed - raw.keys()):
        raise InputError(f"{where}: no {', '.join(missing)}; expected the fields of {kind.__name__}")

    # JSON has no tuples, and a list in a frozen config could not be hashed.
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    hints = get_type_hints(kind)
    for name, value in values.items():
        if not is_a(value, hints[name]):
            raise InputError(f"{where}: {name} is {raw[name]!r:.80}, expected {name_of(hints[name])}")

    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def check_object(raw: Any, where: str) -> None:
    """Raises InputError unless `raw` is what JSON calls an object."""
    if not isinstance(raw, dict):
        raise InputError(f"{where}: got {raw!r:.80}, expected an object of fields and values")
