"""Names of parameters that mean the same under every layout: what recipes, initial weights and comparisons go by."""

from __future__ import annotations

import re

from torch import nn

TABLE, TIED_HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def without_wrappers(name: str) -> str:
    """A parameter's name without the prefixes that wrappers (DDP, mixed precision) put before it."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def has_prefix(name: str, prefix: str) -> bool:
    """Whether ``prefix`` is ``name`` or a leading part of it, cut at a dot."""
    prefix = prefix.rstrip(".")
    return name == prefix or name.startswith(prefix + ".")


def global_name(name: str, layer_index: dict[str, int]) -> str:
    """A parameter's name with its layer's global index, whatever pipeline stage holds it."""
    for prefix, index in layer_index.items():
        if name.startswith(prefix + "."):
            return re.sub(r"\d+$", str(index), prefix) + name[len(prefix) :]
    return name


def global_names(model: nn.Module) -> dict[str, str]:
    """The name that all layouts use, by the name of a parameter of this chunk of the model (wrapped or not).

    Layers are counted over all stages, and the last stage's copy of tied embeddings has the name of the table.
    """
    layer_index = {
        without_wrappers(name): module.layer_number - 1
        for name, module in model.named_modules()
        if hasattr(module, "self_attention") and hasattr(module, "layer_number")
    }
    names = {}
    for name, parameter in model.named_parameters():
        plain = without_wrappers(name)
        is_copy = plain == TIED_HEAD and getattr(parameter, "shared_embedding", False)
        names[name] = TABLE if is_copy else global_name(plain, layer_index)
    return names
