"""Foreign checkpoints: names and shapes at full size, bit-identical round trips, and everything that can be wrong."""

import dataclasses
import fnmatch
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file
from small import SMALL, model, transformer

from insula.checkpoints.formats import FORMATS, INSULA, recognize
from insula.checkpoints.hub import local
from insula.checkpoints.lerobot import LEROBOT
from insula.checkpoints.loading import load_params, open_weights, settle
from insula.checkpoints.openpi import OPENPI, OPENPI_TORCH
from insula.checkpoints.paligemma import BIG_VISION, HUGGING_FACE
from insula.checkpoints.pretrained import FOLDER, load_pretrained
from insula.checkpoints.sources import open_source
from insula.checkpoints.tensor_map import Format, paths, resolve
from insula.checkpoints.writing import (
    foreign_shapes,
    foreign_tensors,
    from_params,
    require_names,
    write_orbax,
    write_safetensors,
)
from insula.errors import CheckpointError
from insula.model.config import PI05, PRESETS, TINY, ModelConfig
from insula.model.params import Params, abstract_params, init_params, weight_table

PI0 = dataclasses.replace(SMALL, name="small-pi0", state_input="token", time_input="mlp")
MHA = dataclasses.replace(SMALL, name="small-mha", backbone=transformer(16, 4), expert=transformer(12, 4))
WHOLE = (INSULA, LEROBOT, OPENPI, OPENPI_TORCH)
HALF = (HUGGING_FACE, BIG_VISION)
by_name: Callable = pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)


def write(format: Format, config: ModelConfig, folder: Path, dtype: str = "float32") -> Path:
    """A random model in a foreign file."""
    read = from_params(model(config)[0])
    if format is OPENPI:
        write_orbax(folder / "params", format, config, read, dtype)
        return folder
    if format is BIG_VISION:
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {f"params/{name}": value for name, value in foreign_tensors(format, config, read, dtype)}
        np.savez(folder / "weights.npz", **arrays)
        return folder / "weights.npz"
    write_safetensors(folder / "model.safetensors", format, config, read, dtype)
    return folder


def fresh(format: Format) -> list[str]:
    return ["expert.*"] if format in HALF else []


def load(path: Path, config: ModelConfig, format: Format | None = None, **options: object) -> Params:
    return load_params(path, config, jax.random.key(1), fresh(format) if format else [], **options)[0]


def equal(a: Params, b: Params, skip: str = "-") -> bool:
    left, right = paths(a), paths(b)
    return all(np.array_equal(left[name], right[name]) for name in left if not name.startswith(skip))


# The full-size table, by shape


@by_name
@pytest.mark.parametrize("preset", ["pi05", "pi0"])
def test_every_weight_has_a_foreign_name_and_the_reverse(format: Format, preset: str) -> None:
    config = PRESETS[preset]
    tensors = resolve(format.table(config), config)
    weights = paths(weight_table(config))
    parts = [part for tensor in tensors.values() for part in tensor.parts]
    covered = {part.ours for part in parts}
    expected = {name for name in weights if not (format in HALF and name.startswith("expert."))}
    assert covered == expected
    stored = sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in tensors.values())
    assert stored == sum(int(np.prod(weights[name].shape, dtype=np.int64)) for name in expected)
    for name in expected:  # each layer once, or all at once
        layers = [part.layer for part in parts if part.ours == name]
        assert layers == [None] or layers == list(range(weights[name].shape[0]))


@pytest.mark.parametrize(
    ("format", "name", "shape"),
    [
        (OPENPI, "PaliGemma/llm/embedder/input_embedding", (257152, 2048)),
        (OPENPI, "PaliGemma/llm/layers/attn/q_einsum/w", (18, 8, 2048, 256)),
        (OPENPI, "PaliGemma/llm/layers/attn/kv_einsum/w", (18, 2, 1, 2048, 256)),
        (OPENPI, "PaliGemma/llm/layers/attn/attn_vec_einsum/w", (18, 8, 256, 2048)),
        (OPENPI, "PaliGemma/llm/layers/attn/q_einsum_1/w", (18, 8, 1024, 256)),
        (OPENPI, "PaliGemma/llm/layers/mlp/gating_einsum", (18, 2, 2048, 16384)),
        (OPENPI, "PaliGemma/llm/layers/mlp_1/linear", (18, 4096, 1024)),
        (OPENPI, "PaliGemma/llm/layers/pre_attention_norm/scale", (18, 2048)),
        (OPENPI, "PaliGemma/llm/layers/pre_attention_norm_1/Dense_0/kernel", (18, 1024, 3072)),
        (OPENPI, "PaliGemma/llm/layers/pre_ffw_norm_1/Dense_0/bias", (18, 3072)),
        (OPENPI, "PaliGemma/llm/final_norm_1/Dense_0/kernel", (1024, 3072)),
        (OPENPI, "PaliGemma/img/embedding/kernel", (14, 14, 3, 1152)),
        (OPENPI, "PaliGemma/img/pos_embedding", (1, 256, 1152)),
        (OPENPI, "PaliGemma/img/head/kernel", (1152, 2048)),
        (
            OPENPI,
            "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel",
            (27, 1152, 16, 72),
        ),
        (OPENPI, "PaliGemma/img/Transformer/encoderblock/MlpBlock_0/Dense_1/kernel", (27, 4304, 1152)),
        (OPENPI, "time_mlp_in/kernel", (1024, 1024)),
        (OPENPI, "action_in_proj/kernel", (32, 1024)),
        (BIG_VISION, "llm/layers/mlp/gating_einsum", (18, 2, 2048, 16384)),
        (HUGGING_FACE, "model.language_model.layers.17.mlp.down_proj.weight", (2048, 16384)),
        (HUGGING_FACE, "model.vision_tower.vision_model.embeddings.patch_embedding.weight", (1152, 3, 14, 14)),
        (
            LEROBOT,
            "model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers.26.self_attn."
            "out_proj.weight",
            (1152, 1152),
        ),
        (
            LEROBOT,
            "model.paligemma_with_expert.gemma_expert.model.layers.0.input_layernorm.dense.weight",
            (3072, 1024),
        ),
        (LEROBOT, "model.paligemma_with_expert.gemma_expert.model.norm.dense.bias", (3072,)),
        (LEROBOT, "model.paligemma_with_expert.paligemma.lm_head.weight", (257152, 2048)),
        (LEROBOT, "model.time_mlp_out.weight", (1024, 1024)),
        (OPENPI_TORCH, "action_out_proj.weight", (32, 1024)),
    ],
)
def test_names_and_shapes_of_the_published_checkpoints(format: Format, name: str, shape: tuple[int, ...]) -> None:
    assert foreign_shapes(format, PI05)[name] == shape


def test_pi0_has_its_own_names() -> None:
    shapes = foreign_shapes(OPENPI, PRESETS["pi0"])
    assert shapes["action_time_mlp_in/kernel"] == (2048, 1024)
    assert shapes["state_proj/kernel"] == (32, 1024)
    assert shapes["PaliGemma/llm/layers/pre_attention_norm_1/scale"] == (18, 1024)
    assert "time_mlp_in/kernel" not in shapes


# Round trips


@by_name
@pytest.mark.parametrize("config", [SMALL, PI0, MHA], ids=lambda config: config.name)
def test_import_export_import_is_bit_identical(format: Format, config: ModelConfig, tmp_path: Path) -> None:
    first = load(write(format, config, tmp_path / "a"), config, format)
    assert equal(first, model(config)[0], skip="expert." if format in HALF else "-")
    written = dict(foreign_tensors(format, config, from_params(first), "float32"))
    original = dict(foreign_tensors(format, config, from_params(model(config)[0]), "float32"))
    assert written.keys() == original.keys()
    assert all(np.array_equal(written[name], original[name]) for name in original)
    assert not equal(first, model(config, seed=1)[0])  # the control


def test_bfloat16_is_rounded_once_and_then_kept(tmp_path: Path) -> None:
    params = load(write(LEROBOT, SMALL, tmp_path / "a", "bfloat16"), SMALL)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32), model(SMALL)[0])
    assert equal(params, rounded) and not equal(params, model(SMALL)[0])
    assert all(x.dtype == "bfloat16" for x in jax.tree.leaves(load(tmp_path / "a", SMALL, dtype="bfloat16")))


@pytest.mark.parametrize("format", [LEROBOT, OPENPI_TORCH, HUGGING_FACE], ids=lambda format: format.name)
def test_files_are_valid_for_the_safetensors_library(format: Format, tmp_path: Path) -> None:
    path = write(format, SMALL, tmp_path)
    stored = load_file(path / "model.safetensors")
    assert {name: value.shape for name, value in stored.items()} == foreign_shapes(format, SMALL)
    expected = dict(foreign_tensors(format, SMALL, from_params(model(SMALL)[0]), "float32"))
    assert all(np.array_equal(stored[name], expected[name]) for name in expected)


def hugging_face(tmp_path: Path) -> dict[str, np.ndarray]:
    return load_file(write(HUGGING_FACE, SMALL, tmp_path / "new") / "model.safetensors")


def relayout(tensors: dict[str, np.ndarray], *pairs: tuple[str, str]) -> dict[str, np.ndarray]:
    renamed = {}
    for name, value in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        renamed[name] = value
    assert renamed.keys() != tensors.keys()
    return renamed


SHORT_TOWER = ("vision_tower.vision_model.", "vision_tower.")
OLD = [
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal", "multi_modal"),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
]


@pytest.mark.parametrize(
    "pairs",
    [OLD, [*OLD, SHORT_TOWER], [SHORT_TOWER]],
    ids=["transformers before 4.52", "save_pretrained of transformers 5", "state_dict of transformers 5"],
)
def test_layouts_of_paligemma(pairs: list[tuple[str, str]], tmp_path: Path) -> None:
    save_file(relayout(hugging_face(tmp_path), *pairs), tmp_path / "model.safetensors")
    assert equal(load(tmp_path, SMALL, HUGGING_FACE), model(SMALL)[0], skip="expert.")


def test_padded_embeddings_are_trimmed(tmp_path: Path) -> None:
    tensors = hugging_face(tmp_path)
    del tensors["lm_head.weight"]
    name = "model.language_model.embed_tokens.weight"
    tensors[name] = np.concatenate([tensors[name], np.full((64, 16), 7, np.float32)])
    save_file(tensors, tmp_path / "model.safetensors")
    assert equal(load(tmp_path, SMALL, HUGGING_FACE), model(SMALL)[0], skip="expert.")
    tensors[name] = tensors[name][:-1]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has shape \[111, 16\].*expects \[48, 16\]"):
        load(tmp_path, SMALL, HUGGING_FACE)


def test_a_tied_head_may_stand_alone_but_not_differ(tmp_path: Path) -> None:
    tensors = load_file(write(LEROBOT, SMALL, tmp_path / "a") / "model.safetensors")
    head, embedding = LEROBOT.tied[0]
    save_file({name: value for name, value in tensors.items() if name != embedding}, tmp_path / "model.safetensors")
    assert equal(load(tmp_path, SMALL), model(SMALL)[0])
    tensors[head] = tensors[head] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tied"):
        load(tmp_path, SMALL)


def test_tied_tensors_are_compared_over_rows_that_tokens_use(tmp_path: Path) -> None:
    tensors = load_file(write(LEROBOT, SMALL, tmp_path / "a") / "model.safetensors")
    head, embedding = LEROBOT.tied[0]
    padding = np.ones((64, 16), np.float32)
    for padded, other in ((head, embedding), (embedding, head)):
        longer = tensors | {padded: np.concatenate([tensors[padded], padding])}
        save_file(longer, tmp_path / "model.safetensors")
        assert equal(load(tmp_path, SMALL), model(SMALL)[0])
        save_file(longer | {other: np.concatenate([tensors[other], 2 * padding])}, tmp_path / "model.safetensors")
        assert equal(load(tmp_path, SMALL), model(SMALL)[0])
    rounded = tensors | {head: tensors[head].astype(ml_dtypes.bfloat16)}
    save_file(rounded, tmp_path / "model.safetensors")
    assert equal(load(tmp_path, SMALL), model(SMALL)[0])
    rounded[head][47, 3] += 1
    save_file(rounded, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tied"):
        load(tmp_path, SMALL)


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"weight_map": [3]}', '{"weight_map": {"a": 3}}', "{}", "\udcff"])
def test_a_damaged_index_of_shards_is_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CheckpointError, match=r"index\.json.*again") as caught:
        load(tmp_path, SMALL)
    assert "\n" not in str(caught.value)


def test_sharded_files(tmp_path: Path) -> None:
    tensors = hugging_face(tmp_path)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert equal(load(tmp_path, SMALL, HUGGING_FACE), model(SMALL)[0], skip="expert.")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        load(tmp_path, SMALL, HUGGING_FACE)
    index["weight_map"][names[0]] = "../new/model.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'\.\./new/model.safetensors'"):
        load(tmp_path, SMALL, HUGGING_FACE)


def test_openpi_leaves_may_end_in_value(tmp_path: Path) -> None:
    tree: dict = {}
    for name, value in foreign_tensors(OPENPI, SMALL, from_params(model(SMALL)[0]), "float32"):
        branch = tree
        for key in name.split("/"):
            branch = branch.setdefault(key, {})
        branch["value"] = value
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save((tmp_path / "params").absolute(), {"params": tree})
    assert equal(load(tmp_path, SMALL), model(SMALL)[0])
    assert equal(load(tmp_path / "params", SMALL), model(SMALL)[0])


@by_name
def test_formats_are_recognized(format: Format, tmp_path: Path) -> None:
    path = write(format, SMALL, tmp_path)
    assert recognize(open_source(path), SMALL) == (format, "")


def test_weights_go_where_they_are_sharded_to(tmp_path: Path) -> None:
    """Half of each leaf whose last axis is even on either of two devices; the rest on both."""
    path = write(INSULA, SMALL, tmp_path)
    mesh = jax.make_mesh((2,), ("shard",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def place(leaf: Any) -> jax.sharding.NamedSharding:
        last = "shard" if leaf.shape[-1] % 2 == 0 else None
        spec = jax.sharding.PartitionSpec(*[None] * (len(leaf.shape) - 1), last)
        return jax.sharding.NamedSharding(mesh, spec)

    params, _ = load_params(path, SMALL, jax.random.key(0), shardings=jax.tree.map(place, abstract_params(SMALL)))
    embedding = params.backbone.embedding
    assert [shard.data.shape for shard in embedding.addressable_shards] == [(48, 8), (48, 8)]
    np.testing.assert_array_equal(embedding, model(SMALL)[0].backbone.embedding)


def test_the_embedded_backbone_is_the_tiny_preset() -> None:
    """Its stem has several stages, which no foreign format knows."""
    params = load_pretrained(TINY, jax.random.key(0))
    fresh_expert = init_params(TINY, jax.random.key(0)).expert
    assert all(map(np.array_equal, jax.tree.leaves(params.expert), jax.tree.leaves(fresh_expert)))
    stored = load_file(FOLDER / "backbone.safetensors")
    assert all(np.array_equal(paths(params)[name], value.astype(np.float32)) for name, value in stored.items())
    with pytest.raises(CheckpointError, match=r"has no name for vision\.stem\.1\.kernel, .* of config 'tiny'"):
        require_names(OPENPI, TINY)
    with pytest.raises(CheckpointError, match="fits the sizes of the preset 'tiny' only"):
        load_pretrained(SMALL, jax.random.key(0))


# Partial loads


def test_a_missing_weight_is_named_and_must_be_asked_for(tmp_path: Path) -> None:
    path = write(HUGGING_FACE, SMALL, tmp_path)
    with pytest.raises(CheckpointError, match=r"missing \(\d+; .*--fresh[\s\S]*expert\.action_in\.kernel"):
        load(path, SMALL)
    params, report = load_params(path, SMALL, jax.random.key(1), ["expert.*"])
    assert report.fresh == [name for name in paths(params) if name.startswith("expert.")]
    assert report.loaded["backbone.norm"] == ["model.language_model.norm.weight"]
    fresh_expert = init_params(SMALL, jax.random.key(1)).expert
    assert all(map(np.array_equal, jax.tree.leaves(params.expert), jax.tree.leaves(fresh_expert)))


def test_a_leftover_tensor_is_named_and_must_be_asked_for(tmp_path: Path) -> None:
    tensors = load_file(write(LEROBOT, SMALL, tmp_path / "a") / "model.safetensors")
    tensors["model.value_head.weight"] = np.zeros((3, 3), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"left over \(1; .*--ignore[\s\S]*model\.value_head\.weight"):
        load(tmp_path, SMALL)
    _, report = load_params(tmp_path, SMALL, jax.random.key(0), ignore=["model.value_head.*"])
    assert report.leftover == ["model.value_head.weight"]
    assert "model.value_head.weight" in report.summary()


@pytest.mark.parametrize(("option", "near"), [("fresh", "expert.action_inn.kernel"), ("ignore", "expert.norm.kernal")])
def test_a_pattern_that_matches_nothing_is_refused(option: str, near: str, tmp_path: Path) -> None:
    reader = open_weights(write(INSULA, SMALL, tmp_path), SMALL)
    with pytest.raises(CheckpointError, match=f"{option} .*matches nothing.*did you mean"):
        settle(reader, **{option: [near]})


def test_fresh_is_not_judged(tmp_path: Path) -> None:
    """Another robot, another number of actions: the very weights that are to be fresh have other shapes."""
    path = write(OPENPI, SMALL, tmp_path)
    other = dataclasses.replace(SMALL, action_dim=5)
    with pytest.raises(
        CheckpointError, match=r"that do not fit \(3; .*--fresh 'expert.action_in.\*' 'expert.action_out"
    ):
        load(path, other)
    params, report = load_params(path, other, jax.random.key(1), ["expert.action_*"])
    assert set(report.fresh) == {f"expert.action_{end}.{leaf}" for end in ("in", "out") for leaf in ("kernel", "bias")}
    assert params.expert.action_in.kernel.shape == (5, 12) and not report.leftover
    assert np.array_equal(params.backbone.embedding, model(SMALL)[0].backbone.embedding)
    longer = dataclasses.replace(SMALL, horizon=9, max_prompt_len=30, max_fast_len=11)  # no weight knows these
    assert equal(load(path, longer), model(SMALL)[0])


def test_fresh_covers_a_tensor_of_another_kind_or_that_differs_from_its_twin(tmp_path: Path) -> None:
    tensors = load_file(write(LEROBOT, SMALL, tmp_path / "a") / "model.safetensors")
    tensors[LEROBOT.tied[0][0]] += 1
    tensors["model.action_in_proj.bias"] = np.zeros(12, np.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    load_params(tmp_path, SMALL, jax.random.key(1), ["backbone.embedding", "expert.action_in.bias"])
    with pytest.raises(CheckpointError, match=r"action_in_proj\.bias holds int8, .* expects one of float32"):
        load_params(tmp_path, SMALL, jax.random.key(1), ["backbone.embedding"])
    with pytest.raises(
        CheckpointError, match=r"tied embeddings.*--ignore 'model\.paligemma_with_expert\.paligemma\.lm"
    ):
        load_params(tmp_path, SMALL, jax.random.key(1), ["expert.action_in.bias"])
    head = LEROBOT.tied[0][0]
    load_params(tmp_path, SMALL, jax.random.key(1), ["expert.action_in.bias"], [head])


def test_whole_numbers_are_ordinary_leftovers(tmp_path: Path) -> None:
    """Position ids and counters of batches, as PyTorch stores its buffers; and kinds NumPy has no name for."""
    tensors = load_file(write(HUGGING_FACE, SMALL, tmp_path / "a") / "model.safetensors")
    tensors["model.vision_tower.vision_model.embeddings.position_ids"] = np.arange(4)[None]
    tensors["n_averaged"] = np.array(7, np.int64)
    tensors["is_ready"] = np.array([True])
    tensors["scales"] = np.zeros(3, ml_dtypes.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"left over \(4; [\s\S]*position_ids[\s\S]*n_averaged"):
        load(tmp_path, SMALL, HUGGING_FACE)
    buffers = ["*.position_ids", "n_averaged", "is_ready", "scales"]
    assert equal(load(tmp_path, SMALL, HUGGING_FACE, ignore=buffers), model(SMALL)[0], skip="expert.")


@pytest.mark.parametrize("kind", [np.int32, np.uint8, np.bool_, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_a_weight_of_another_kind_is_named(kind: type, tmp_path: Path) -> None:
    tensors = load_file(write(INSULA, SMALL, tmp_path / "a") / "model.safetensors")
    save_file(tensors | {"backbone.norm": np.zeros(16, kind)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"backbone\.norm holds \w+, config 'small' expects one of float32"):
        load(tmp_path, SMALL)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_floats_are_read(dtype: str, tmp_path: Path) -> None:
    tensors = load_file(write(INSULA, SMALL, tmp_path / "a") / "model.safetensors")
    save_file({name: value.astype(dtype) for name, value in tensors.items()}, tmp_path / "model.safetensors")
    expected = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), model(SMALL)[0])
    assert equal(load(tmp_path, SMALL), expected)


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "model.", "policy.", "ema_model.module.", "state_dict.model."]


@pytest.mark.parametrize("format", [OPENPI_TORCH, LEROBOT, HUGGING_FACE, INSULA], ids=lambda format: format.name)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_shared_by_all_names_is_taken_off(prefix: str, format: Format, tmp_path: Path) -> None:
    tensors = load_file(write(format, SMALL, tmp_path / "a") / "model.safetensors")
    save_file({prefix + name: value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    skip = "expert." if format is HUGGING_FACE else "-"
    assert equal(load(tmp_path, SMALL, format), model(SMALL)[0], skip=skip)


def test_wrappers_of_a_part_and_prefixes_of_trees(tmp_path: Path) -> None:
    tensors = load_file(write(OPENPI_TORCH, SMALL, tmp_path / "a") / "model.safetensors")
    wrapped = relayout(
        tensors, ("gemma_expert.model.", "gemma_expert._orig_mod.model."), (".layers.1.", ".layers.1.module.")
    )
    save_file(wrapped, tmp_path / "model.safetensors")
    assert equal(load(tmp_path, SMALL), model(SMALL)[0])
    arrays = dict(foreign_tensors(BIG_VISION, SMALL, from_params(model(SMALL)[0]), "float32"))
    np.savez(tmp_path / "weights.npz", **{f"opt/target/{name}": value for name, value in arrays.items()})
    assert equal(load(tmp_path / "weights.npz", SMALL, BIG_VISION), model(SMALL)[0], skip="expert.")


def test_a_running_average_beside_the_weights_must_be_chosen(tmp_path: Path) -> None:
    tensors = load_file(write(OPENPI_TORCH, SMALL, tmp_path / "a") / "model.safetensors")
    both = {f"model.{name}": value for name, value in tensors.items()}
    both |= {f"ema.{name}": value + 1 for name, value in tensors.items()}
    save_file(both, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"twice, under names like model\.action\S+ and ema\.\S+; .*'ema\.\*'"):
        load(tmp_path, SMALL)
    assert equal(load(tmp_path, SMALL, ignore=["ema.*"]), model(SMALL)[0])
    assert not equal(load(tmp_path, SMALL, ignore=["model.*"]), model(SMALL)[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(value: float, tmp_path: Path) -> None:
    path = write(LEROBOT, SMALL, tmp_path, "bfloat16")
    tensors = load_file(path / "model.safetensors")
    tensors["model.time_mlp_in.weight"][3, 4] = value
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"time_mlp_in\.weight holds NaN or infinite values"):
        load(path, SMALL)


# Bad files


def test_a_wrong_shape_is_one_clear_error(tmp_path: Path) -> None:
    path = write(OPENPI, SMALL, tmp_path)
    other = dataclasses.replace(SMALL, action_dim=5)
    with pytest.raises(CheckpointError, match=r"action_in_proj/kernel has shape \[3, 12\].*expects \[5, 12\]"):
        load(path, other)


@by_name
def test_a_truncated_file_is_one_clear_error(format: Format, tmp_path: Path) -> None:
    path = write(format, SMALL, tmp_path)
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"damaged or truncated|no weights"):
        load(path, SMALL, format)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", **{"params/llm/final_norm/scale": np.array([{}], object)}, allow_pickle=True)
    with pytest.raises(CheckpointError):
        load(tmp_path / "weights.npz", SMALL, BIG_VISION)


@pytest.mark.parametrize("name", ["absent", "empty", "other.bin", "pytorch_model.bin"])
def test_a_path_without_weights(name: str, tmp_path: Path) -> None:
    if name != "absent":
        (tmp_path / name).mkdir() if name == "empty" else (tmp_path / name).write_bytes(b"PK\3\4")
    with pytest.raises(CheckpointError, match=r"no such file|no weights of a known kind"):
        load(tmp_path / name, SMALL)


def test_names_of_no_known_format(tmp_path: Path) -> None:
    save_file({"bert.encoder": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"bert\.encoder belong to no known format"):
        load(tmp_path, SMALL)


def test_a_header_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"backbone.norm": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load(tmp_path, SMALL)


def safetensors_of(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def described(*ranges: tuple[int, int]) -> bytes:
    tensors = {
        f"backbone.{n}": {"dtype": "F32", "shape": [1], "data_offsets": [*span]} for n, span in enumerate(ranges)
    }
    return json.dumps(tensors).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\3\4",
        safetensors_of(b"{}", length=1 << 62),
        safetensors_of(b"[" * 100_000),
        safetensors_of(b'{"backbone.norm": 3}'),
        safetensors_of(described((0, 4), (0, 4)), data=bytes(8)),
        safetensors_of(described((0, 4), (2, 6)), data=bytes(8)),
        safetensors_of(described((4, 0)), data=bytes(8)),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n",
    ],
    ids=["empty", "zip", "endless header", "deep", "no tensor", "same place", "overlap", "backwards", "pointer"],
)
def test_a_hostile_file_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*damaged or truncated") as caught:
        load(tmp_path, SMALL)
    assert "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match="no weights of a known kind"):
            load(path, SMALL)


# The hub


def test_a_hub_address_is_fetched_without_anything_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict = {}

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert local(Path("hf://lerobot/pi05_base@v1")) == tmp_path
    assert (asked["name"], asked["revision"]) == ("lerobot/pi05_base", "v1")
    assert not any(
        fnmatch.fnmatch(f"model.{kind}", p) for p in asked["patterns"] for kind in ("py", "bin", "pt", "pkl")
    )
    assert local(Path("lerobot/pi05_base")) == Path("lerobot/pi05_base")  # a path is never looked up


@pytest.mark.parametrize(
    ("address", "message"), [("hf://lerobot", "expected hf://"), ("hf://lerobot/pi05_base", "cannot be fetched")]
)
def test_a_hub_that_cannot_be_reached_is_one_clear_error(address: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        local(Path(address))
