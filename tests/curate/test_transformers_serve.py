"""generate against a server that is not ours: `transformers serve` with a tiny model that looks at images."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from r4b_core.curate.client import Background
from r4b_core.curate.endpoints import CallSettings
from r4b_core.curate.generate import GenerateSettings, open_generate
from r4b_core.curate.journal import Journal
from r4b_core.curate.wire import ServedModel
from tests.curate.served import picture, records

MISSING = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"transformers serve needs {', '.join(MISSING)}")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking %}<think>\n{% endif %}"
)


def save_toy(folder: Path) -> None:
    """A LLaVA of random weights that reads and writes bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    special = ["<|im_start|>", "<|im_end|>", "<image>"]
    words = {word: index for index, word in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *special])}
    made = Tokenizer(models.BPE(vocab=words, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=special[1], pad_token=special[1])
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = shape | dict(model_type="qwen2", vocab_size=len(words), num_key_value_heads=2, max_position_embeddings=8192)
    vision = shape | dict(model_type="clip_vision_model", image_size=28, patch_size=14, projection_dim=32)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=words["<image>"], vision_feature_layer=-1)
    )
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = words["<|im_end|>"]
    model.generation_config.do_sample = True
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(address, model) of a running server."""
    folder = tmp_path_factory.mktemp("toy")
    save_toy(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = folder / "serve.log"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        deadline = time.monotonic() + 90
        while not _answers(port):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def test_generate_with_images(server: tuple[str, str], tmp_path: Path) -> None:
    url, name = server
    model = ServedModel(model=name, endpoints=[{"url": url, "concurrency": 4}], max_tokens=12, thinking="on")
    rows = records(5)
    rows[1].images, rows[1].question = [], "What is 1 + 1?"
    rows[3].images = [picture(640, 480, "JPEG")]

    def run(settings: GenerateSettings) -> list[tuple[str | None, str | None, int | None]]:
        with (
            Background() as background,
            Journal(tmp_path / "journal") as journal,
            open_generate(settings, background, journal) as stage,
        ):
            outcome = stage(rows)
        assert [record.id for record in outcome.kept] == [record.id for record in rows], outcome.dropped
        return [(record.response, record.finish_reason, record.response_tokens) for record in outcome.kept]

    first = run(GenerateSettings(teacher=model, template="bare"))
    for response, finish, tokens in first:
        assert response and response.startswith("<think>\n")
        assert finish == "length" and tokens == 12 or finish == "stop" and tokens is not None and tokens <= 12
    assert run(GenerateSettings(teacher=model, template="bare")) == first
    streamed = model.model_copy(update={"calls": CallSettings(stream=True)})
    other_seed = run(GenerateSettings(teacher=streamed, template="bare", seed=1))
    assert other_seed != first and all(finish in ("length", "stop") for _, finish, _ in other_seed)


def test_its_refusals_are_told_in_its_words(server: tuple[str, str], tmp_path: Path) -> None:
    """It knows no top_k field, and serves one model alone."""
    url, name = server

    def run(**settings: object) -> list[str]:
        model = ServedModel.model_validate({"model": name, "endpoints": [url], "max_tokens": 4} | settings)
        with (
            Background() as background,
            Journal(tmp_path / "journal") as journal,
            open_generate(GenerateSettings(teacher=model), background, journal) as stage,
        ):
            return [f"{drop.reason}: {drop.detail}" for drop in stage(records(1)).dropped]

    assert "request refused: HTTP 422" in run(top_k=5)[0] and "top_k" in run(top_k=5)[0]
    assert "request refused: HTTP 400" in run(model="another")[0]
    assert run(extra={"generation_config": '{"top_k": 5, "max_new_tokens": 4, "do_sample": true}'}) == []
