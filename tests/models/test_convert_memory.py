"""The peak of resident memory while checkpoints of several large shards are converted."""

from __future__ import annotations

import ctypes
import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from r4b_core.models.convert import find_like, read_config, to_huggingface, to_megatron
from r4b_core.models.convert.huggingface import convert_module
from r4b_core.models.families import resolve
from r4b_core.telemetry.locate import locate
from tests.models.convert_cases import no_disk_waits, their_model  # noqa: F401

SHARD = 64 << 20
pytestmark = pytest.mark.skipif(
    not (Path("/proc/self/clear_refs").exists() and hasattr(ctypes.CDLL(None), "malloc_trim")),
    reason="the peak is read from /proc, and glibc gives free memory back",
)


def write_large(folder: Path) -> int:
    """A checkpoint of several shards of up to 64 MiB; the bytes of its largest layer."""
    config = their_model("qwen3_vl", tie=True).config.to_dict()
    config["architectures"] = ["Qwen3VLForConditionalGeneration"]
    config["text_config"] |= dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=10, vocab_size=8192)
    config["vision_config"]["out_hidden_size"] = 1024
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    shape = resolve(read_config(folder))
    shards: list[dict[str, Any]] = [{}]
    layers: dict[int, int] = {}
    for rule in convert_module("qwen3_vl").rules(shape):
        for name, size in rule.theirs.items():
            value = torch.randn(size, dtype=torch.bfloat16)
            if sum(x.nbytes for x in shards[-1].values()) + value.nbytes > SHARD:
                shards.append({})
            shards[-1][name] = value
            if rule.layer is not None and rule.name.startswith("decoder."):
                layers[rule.layer] = layers.get(rule.layer, 0) + value.nbytes
    names = [f"model-{number}.safetensors" for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert len(shards) >= 4
    return max(layers.values())


def peak(work: Callable[[], Any]) -> int:
    """Bytes by which resident memory rises at most, files that are mapped included, in a child of its own."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            # Memory that the allocator has free would be used again without a rise: it goes back first. The peak is
            # counted from here on.
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = status("VmRSS")
            work()
            os.write(write, str(status("VmHWM") - before).encode())
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    return int(os.read(read, 100))


def status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{key}:"))
    return int(line.split()[1]) << 10


def test_the_peak_is_below_one_shard_and_a_layer(tmp_path: Path) -> None:
    layer = write_large(tmp_path / "theirs")
    bound = 1.3 * SHARD + layer
    # What the measure is worth: reading all at once is seen.
    everything = peak(lambda: [p.read_bytes() for p in (tmp_path / "theirs").glob("*.safetensors")][0])
    assert everything > 1.5 * bound

    forth = peak(lambda: to_megatron(tmp_path / "theirs", tmp_path / "megatron", part_bytes=SHARD))
    model = read_config(tmp_path / "megatron")
    path, like = locate(tmp_path / "megatron")[0], find_like(tmp_path / "megatron", model)
    back = peak(lambda: to_huggingface(path, model, like, tmp_path / "back", shard_bytes=SHARD))
    print(f"shard {SHARD >> 20} MiB, layer {layer >> 20} MiB: peak {forth >> 20} and {back >> 20} MiB")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) >= 4
    assert forth <= bound and back <= bound
