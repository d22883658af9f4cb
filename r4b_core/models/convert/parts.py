"""R-4B before its first training: a SigLIP2 vision tower and a Qwen3 decoder with a new projector between them.

What the authors publish of R-4B does not say how the two were joined; LLaVA-OneVision's choices stand here: all vision
layers but the last, the output before the tower's last norm, and its grids of tiles.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from r4b_core.config.recipe import ModelConfig
from r4b_core.models.convert import files
from r4b_core.models.convert.files import OnProgress
from r4b_core.models.convert.huggingface import CONFIG, Source, check_tensors, model_of, read_json
from r4b_core.models.convert.run import PART_BYTES, Making, write_megatron
from r4b_core.models.convert.settings import ConversionError, Settings
from r4b_core.models.families import resolve
from r4b_core.models.r4b.config import R4BConfig
from r4b_core.models.r4b.convert import LANGUAGE, PROJECTOR, VISION, decoder_rules, rules, vision_rules
from r4b_core.modes import IMAGE

_VISION_MODELS = ("siglip", "siglip_vision_model")
_NEW_NORM, _NEW_VECTOR = PROJECTOR + "pre_norm.", "model.image_newline"
_TILES = range(1, 7)
_UNUSED_VISION = re.compile(
    r"vision_model\.(?:encoder\.layers\.\d+|head|post_layernorm)\..*|vision_model\.embeddings\.position_ids"
    r"|text_model\..*|logit_(?:scale|bias)"
)


def from_parts(
    vision: Path | str,
    language: Path | str,
    target: Path | str,
    *,
    seed: int = 0,
    dtype: str | None = None,
    part_bytes: int = PART_BYTES,
    on_progress: OnProgress | None = None,
) -> ModelConfig:
    """Write ``target``, a folder as :func:`to_megatron` writes it.

    Args:
        vision: SigLIP or fixed-resolution SigLIP2, whole or its vision model alone.
        language: Qwen3ForCausalLM with its tokenizer, which gets the token ``<image>`` if it has none; the table of
            embeddings keeps its size.
        seed: of the projector and the row separator, which start as ``build_model`` starts them with this seed.
        dtype: of all weights; the language model's if None.

    Raises:
        ConversionError: listing all that is wrong with a folder; or ``target`` cannot be written.
    """
    vision, language = Path(vision), Path(language)
    tokenizer, image_token = with_image_token(language)
    vision_values, text_values = _vision_settings(vision), _language_settings(language)
    config = joined_config(vision_values, text_values, image_token)
    model = model_of(config, Path("vision and language"))
    shape = cast(R4BConfig, resolve(model))
    if image_token >= shape.vocab_size:
        raise ConversionError(
            f"{language}: the tokenizer has no room for {IMAGE}: it would be token {image_token}, and vocab_size is "
            f"{shape.vocab_size}"
        )
    eyes, words = _vision_source(vision, shape), _language_source(language, shape)
    model = model.model_copy(update={"dtype": dtype or words.dtype})
    for section in (config, config["text_config"], config["vision_config"]):
        section["dtype"] = model.dtype

    expected = {name: dims for rule in rules(shape) for name, dims in rule.theirs.items()}

    def read(name: str) -> Tensor:
        if name.startswith(VISION):
            return eyes.read("vision_model." + name.removeprefix(VISION))
        if name.startswith(LANGUAGE):
            return words.read("model." + name.removeprefix(LANGUAGE))
        if name == "lm_head.weight":
            return words.read(name)
        return new_weight(name, expected[name], seed, shape.init_std)

    norm = {name: entry for name, entry in eyes.unused.items() if name.startswith("vision_model.post_layernorm.")}
    unused = {VISION + name.removeprefix("vision_model."): entry for name, entry in norm.items()}
    companions = {path.name: path.read_bytes() for path in files.companions(language)} | tokenizer
    companions[CONFIG] = _json(config)
    companions["preprocessor_config.json"] = _json(_image_settings(config))
    shards = sorted({entry.file for source in (eyes, words) for entry in source.entries.values()})
    stamp = [seed, [[str(path.parent.name), files.stamps([path])] for path in shards]]
    stamp.append(files.fingerprint([config, files.digests(files.companions(language))]))
    making = Making(model, rules(shape), read, unused, companions, stamp)
    return write_megatron(making, Path(target).resolve(), part_bytes, on_progress)


def new_weight(name: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
    """An initial value of the projector, as :func:`r4b_core.models.init.init_weights` draws it."""
    if name.startswith(_NEW_NORM) or name.endswith("bias"):
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    ours = "image_newline" if name == _NEW_VECTOR else "projector." + name.removeprefix(PROJECTOR)
    digest = hashlib.sha256(f"{seed}:{ours}".encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))) * std


def joined_config(vision: Mapping[str, Any], text: Mapping[str, Any], image_token: int) -> dict[str, Any]:
    """The ``config.json`` of the new model: what transformers calls LLaVA-OneVision, with R-4B's architecture.

    Raises:
        ConversionError: the vision tower's is nonsense.
    """
    eyes = Settings(vision)
    layers, side = eyes.size("num_hidden_layers", 12), eyes.size("image_size", 224)
    if layers == 1:
        eyes.refuse("num_hidden_layers = 1, and all layers but the last are used")
    if eyes.problems:
        raise ConversionError(f"--vision: {'; '.join(eyes.problems)}: give a SigLIP2 checkpoint of one resolution")
    return {
        "architectures": ["RForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_token_index": image_token,
        "image_grid_pinpoints": [[side * rows, side * columns] for rows in _TILES for columns in _TILES],
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        # Tiles are never scaled down to a number of tokens.
        "vision_aspect_ratio": "anyres_max_100000",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text_config": {**text, "model_type": "qwen3"},
        "vision_config": {
            **vision,
            "model_type": "siglip_vision_model",
            "num_hidden_layers": layers - 1,
            "vision_use_head": False,
        },
    }


def with_image_token(folder: Path) -> tuple[dict[str, bytes], int]:
    """The tokenizer files that have to change for ``<image>`` to be one token, and its id.

    Raises:
        ConversionError: there is no ``tokenizer.json``, or it is none.
    """
    path = folder / "tokenizer.json"
    values = read_json(path)
    try:
        added, vocabulary = values["added_tokens"], values["model"]["vocab"]
        known = {token["content"]: int(token["id"]) for token in added}
        if IMAGE in known:
            return {}, known[IMAGE]
        number = 1 + max([*vocabulary.values(), *known.values()])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConversionError(f"{path} is not a tokenizer of the kind that Qwen3 has ({error!r})") from error
    token = dict(content=IMAGE, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    values["added_tokens"] = [*added, {"id": number, **token}]
    changed = {"tokenizer.json": json.dumps(values, ensure_ascii=False).encode()}
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        found = read_json(settings)
        found["added_tokens_decoder"] = {**found.get("added_tokens_decoder", {}), str(number): token}
        changed["tokenizer_config.json"] = _json(found)
    return changed, number


def _vision_settings(folder: Path) -> dict[str, Any]:
    values = read_json(folder / CONFIG)
    if values.get("model_type") not in _VISION_MODELS:
        raise ConversionError(
            f"--vision {folder}: model_type = {values.get('model_type')!r}, expected {' or '.join(_VISION_MODELS)} "
            "(SigLIP2 of one resolution has these, too)"
        )
    found = values["vision_config"] if isinstance(values.get("vision_config"), dict) else values
    return _bare(found)


def _language_settings(folder: Path) -> dict[str, Any]:
    values = read_json(folder / CONFIG)
    if values.get("model_type") != "qwen3":
        raise ConversionError(f"--language {folder}: model_type = {values.get('model_type')!r}, expected 'qwen3'")
    return _bare(values)


def _bare(values: Mapping[str, Any]) -> dict[str, Any]:
    without = ("architectures", "transformers_version", "torch_dtype", "dtype", "auto_map", "_name_or_path")
    return {key: value for key, value in values.items() if key not in without}


def _vision_source(folder: Path, shape: R4BConfig) -> Source:
    return check_tensors(
        folder,
        vision_rules(shape, "vision_model."),
        lambda name: name if name.startswith(("vision_model.", "text_model.", "logit_")) else "vision_model." + name,
        lambda name: _UNUSED_VISION.fullmatch(name) is not None,
        {},
    )


def _language_source(folder: Path, shape: R4BConfig) -> Source:
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if shape.tie_embeddings else {}
    return check_tensors(folder, decoder_rules(shape, "model."), str, lambda name: False, copies)


def _image_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    side = config["vision_config"].get("image_size", 224)
    return {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
