"""What is wrong with a checkpoint is said at once and before anything is written; what stops half way goes on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r4b_core.models.convert import ConversionError, files, find_like, read_config, to_huggingface, to_megatron
from r4b_core.models.convert.files import OnProgress, Stream, workplace
from r4b_core.parallel.manifest import CheckpointError
from r4b_core.telemetry.locate import locate
from tests.models.convert_cases import all_tensors, edit_config, no_disk_waits, rewrite, write_theirs  # noqa: F401

INDEX = "model.safetensors.index.json"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return write_theirs(tmp_path / "theirs", "qwen3_vl", tie=False)


def export(folder: Path, target: Path, **options: Any) -> Path:
    model = read_config(folder)
    to_huggingface(locate(folder)[0], model, find_like(folder, model), target, **options)
    return target


def refused(theirs: Path, *patterns: str) -> str:
    """The error of a conversion that writes nothing."""
    target = theirs.parent / "megatron"
    before = sorted(theirs.parent.iterdir())
    with pytest.raises(ConversionError) as caught:
        to_megatron(theirs, target)
    assert sorted(theirs.parent.iterdir()) == before
    for pattern in patterns:
        assert pattern in str(caught.value), f"{pattern!r} is not in:\n{caught.value}"
    return str(caught.value)


def test_missing_extra_misshapen_and_mistyped_tensors_are_listed_together(theirs: Path) -> None:
    lm = "model.language_model."

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors[lm + "norm.weight"], tensors["model.visual.blocks.3.attn.qkv.bias"]
        tensors[lm + "layers.2.mlp.up_proj.weight"] = torch.zeros(48, 80)
        tensors[lm + "layers.4.mlp.up_proj.weight"] = torch.zeros(80, 48)
        tensors["model.visual.merger.norm.weight"] = torch.zeros(24, dtype=torch.float16)

    rewrite(theirs, spoil)
    text = refused(
        theirs,
        "(5 problems)",
        f"{lm}norm.weight: missing, expected [48]",
        "model.visual.blocks.3.attn.qkv.bias: missing, expected [72]",
        f"{lm}layers.2.mlp.up_proj.weight: expected [80, 48], found [48, 80]",
        f"{lm}layers.4.mlp.up_proj.weight: extra, [80, 48]",
        "model.visual.merger.norm.weight: expected the type F32 of most tensors, found F16",
    )
    assert len(text.splitlines()) == 6


def test_types_that_models_do_not_have(theirs: Path) -> None:
    rewrite(theirs, lambda tensors: tensors.update({name: x.half() for name, x in tensors.items()}))
    refused(theirs, "lm_head.weight: the type F16 is neither F32 nor BF16")


def test_a_head_that_should_be_the_embeddings_and_is_not(theirs: Path) -> None:
    edit_config(theirs, lambda config: config.update(tie_word_embeddings=True))
    refused(theirs, "lm_head.weight: differs from model.language_model.embed_tokens.weight")


def test_a_head_of_nothing_but_nans_equals_itself(theirs: Path) -> None:
    table = torch.full((64, 48), float("nan"))
    edit_config(theirs, lambda config: config.update(tie_word_embeddings=True))
    names = ("lm_head.weight", "model.language_model.embed_tokens.weight")
    rewrite(theirs, lambda tensors: tensors.update({name: table.clone() for name in names}))
    to_megatron(theirs, theirs.parent / "megatron")


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def copy_a_tensor_to_another_shard(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    one, other = sorted(folder.glob("*.safetensors"))[:2]
    (folder / INDEX).rename(folder / "index")
    tensors = load_file(other) | {"lm_head.weight": all_tensors(folder)["lm_head.weight"]}
    save_file(tensors, other)
    save_file({"lm_head.weight": tensors["lm_head.weight"], **load_file(one)}, one)
    (folder / "index").rename(folder / INDEX)


def point_outside(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../theirs/" + first_shard(folder).name
    (folder / INDEX).write_text(json.dumps(index))


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard is missing": (lambda f: first_shard(f).unlink(), "the index names this file, and it is missing"),
    "a shard is cut": (lambda f: cut(first_shard(f), 9000), "9000 bytes, truncated or not a safetensors file"),
    "a shard is empty": (lambda f: cut(first_shard(f), 0), "0 bytes, truncated or not a safetensors file"),
    "a shard is text": (lambda f: first_shard(f).write_text("hello, hello"), "truncated or not a safetensors file"),
    "a tensor is there twice": (copy_a_tensor_to_another_shard, "lm_head.weight: the index says "),
    "the index points elsewhere": (point_outside, "is not a plain file name of the folder"),
    "the index is damaged": (lambda f: (f / INDEX).write_text("{"), f"{INDEX} cannot be read"),
    "the index has no table": (lambda f: (f / INDEX).write_text('{"weight_map": 3}'), "weight_map is not a table"),
    "the index is missing": (lambda f: (f / INDEX).unlink(), f"{INDEX} is missing"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing beside the weights"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders(case: str, theirs: Path) -> None:
    damage, message = DAMAGE[case]
    damage(theirs)
    refused(theirs, message)


def test_a_name_twice_in_one_spelling_and_another(theirs: Path) -> None:
    old = "visual.merger.norm.bias"
    rewrite(theirs, lambda tensors: tensors.update({old: tensors[f"model.{old}"].clone()}))
    refused(theirs, f"model.{old}: twice, as ", old)


def test_pickles_are_refused_with_the_reason(theirs: Path) -> None:
    for path in [*theirs.glob("*.safetensors"), theirs / INDEX]:
        path.unlink()
    torch.save({}, theirs / "pytorch_model.bin")
    refused(theirs, "pytorch_model.bin: refused, since a .bin file is a pickle, which can run code", "save_pretrained")


CONFIGURATIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "another architecture": (
        lambda c: c.update(architectures=["LlamaForCausalLM"], auto_map={"AutoModel": "evil.py"}),
        ("architectures = ['LlamaForCausalLM'] is not one that can be converted", "Qwen3VLForConditionalGeneration"),
    ),
    "several features that the model lacks": (
        lambda c: (
            c["text_config"].update(hidden_act="gelu", attention_bias=True),
            c["text_config"]["rope_parameters"].update(rope_type="yarn", mrope_interleaved=False),
            c["vision_config"].update(num_position_embeddings=26, num_heads=5, out_hidden_size=47),
        ),
        (
            "text_config.hidden_act = 'gelu'; the model is built for 'silu'",
            "text_config.attention_bias = True; the model is built for False",
            "text_config.rope_type = 'yarn'; the model is built for 'default'",
            "text_config.mrope_interleaved = False; the model is built for True",
            "vision_config.num_position_embeddings = 26 is not a square table",
            "vision_config.num_heads = 5 does not divide hidden_size = 24",
            "vision_config.out_hidden_size = 47; the model is built for 48",
        ),
    ),
    "nonsense": (
        lambda c: (c.update(vision_config=[]), c["text_config"].update(hidden_size="many", num_hidden_layers=10**9)),
        (
            "vision_config is not a table",
            "text_config.hidden_size = 'many' is not a whole number",
            "text_config.num_hidden_layers = 1000000000 is not a whole number from 1 to 1024",
        ),
    ),
    "a shape that contradicts itself": (
        lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[3, 3, 3]),
        ("mrope_sections",),
    ),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configurations_that_cannot_be_built(case: str, theirs: Path) -> None:
    change, messages = CONFIGURATIONS[case]
    edit_config(theirs, change)
    refused(theirs, *messages)


def test_a_target_that_is_something_else(theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    (tmp_path / "here.partial").mkdir()
    (tmp_path / "here.partial" / "notes").touch()
    for name, message in (
        ("full", "full exists and is not empty"),
        ("file", "file exists and is not a folder"),
        ("here", "here.partial is in the way and not an unfinished conversion"),
        ("theirs", "theirs exists and is not empty"),
    ):
        with pytest.raises(ConversionError, match=message):
            to_megatron(theirs, tmp_path / name)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    assert [path.name for path in (tmp_path / "here.partial").iterdir()] == ["notes"]
    (tmp_path / "empty").mkdir()
    to_megatron(theirs, tmp_path / "empty")
    with pytest.raises(ConversionError, match="empty exists and holds another conversion"):
        to_megatron(theirs, tmp_path / "empty", part_bytes=1)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with workplace(tmp_path / "out", {"of": 1}):
        with pytest.raises(ConversionError, match="being written by another process"):
            with workplace(tmp_path / "out", {"of": 1}):
                pass


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def identities(paths: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def killed_after(count: int, work: Callable[[OnProgress], Any]) -> None:
    """Do ``work`` in a child that kills itself when that many bytes were written."""

    def kill(what: str, done: int, total: int) -> None:
        if what == "writing" and done >= count:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            work(kill)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the work was over before it could be killed"


@pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
def test_kill_and_go_on(direction: str, theirs: Path, tmp_path: Path) -> None:
    """Killed at several places and started again: finished parts stay as they are, and the result is the same."""
    if direction == "to-megatron":

        def work(target: Path, on_progress: OnProgress | None = None) -> Any:
            return to_megatron(theirs, target, part_bytes=60_000, on_progress=on_progress)

        parts = "**/*.distcp"
    else:
        to_megatron(theirs, tmp_path / "megatron")

        def work(target: Path, on_progress: OnProgress | None = None) -> Any:
            return export(tmp_path / "megatron", target, shard_bytes=60_000, on_progress=on_progress)

        parts = "*.safetensors"
    seen: list[tuple[int, int]] = []
    # The name of the folder is written into a recipe.
    target = tmp_path / "out"
    work(target, lambda what, done, total: seen.append((done, total)) if what == "writing" else None)
    want = contents(target)
    total = seen[-1][0]
    assert len(list(target.glob(parts))) >= 5 and all(
        one[0] <= other[0] for one, other in zip(seen, seen[1:], strict=False)
    )
    target.rename(tmp_path / "uninterrupted")

    finished: dict[str, tuple[int, int]] = {}
    for share in (0.3, 0.6, 0.9):
        killed_after(int(share * total), lambda on_progress: work(target, on_progress))
        assert not target.exists()
        now = identities((tmp_path / "out.partial/content").glob(parts))
        assert len(now) > len(finished) and finished.items() <= now.items()
        finished = now
    work(target)
    assert {
        name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in target.glob(parts) if (name := p.name) in finished
    } == finished
    assert contents(target) == want
    assert not (tmp_path / "out.partial").exists()

    before = target.stat().st_mtime_ns
    work(target)
    assert target.stat().st_mtime_ns == before, "a finished conversion was done again"


def test_stopped_before_the_folder_got_its_name(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is written, the index as the last of it; the next start names it."""
    to_megatron(theirs, tmp_path / "megatron")
    target, rename = tmp_path / "out", os.rename

    def stop(old: Path, new: Path) -> None:
        if new == target:
            raise KeyboardInterrupt
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", stop)
        with pytest.raises(KeyboardInterrupt, match="out.partial, and the same command goes on"):
            export(tmp_path / "megatron", target, shard_bytes=60_000)
    content = tmp_path / "out.partial" / "content"
    newest = max(content.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == INDEX and not target.exists()
    want = contents(content)
    export(tmp_path / "megatron", target, shard_bytes=60_000)
    assert contents(target) == want and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
def test_ctrl_c_says_how_to_go_on(direction: str, theirs: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "writing" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="out.partial, and the same command goes on"):
        if direction == "to-megatron":
            to_megatron(theirs, tmp_path / "out", on_progress=stop)
        else:
            to_megatron(theirs, tmp_path / "megatron")
            export(tmp_path / "megatron", tmp_path / "out", on_progress=stop)
    assert not (tmp_path / "out").exists()


def test_killed_before_anything_was_noted(theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    for name in ("lock", ".conversion.json.tmp"):
        (tmp_path / "out.partial" / name).touch()
    to_megatron(theirs, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_what_was_begun_with_another_source_is_not_gone_on_with(theirs: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    killed_after(200_000, lambda on_progress: to_megatron(theirs, target, part_bytes=60_000, on_progress=on_progress))
    rewrite(theirs, lambda tensors: tensors.update({name: x + 1 for name, x in tensors.items()}))
    to_megatron(theirs, target, part_bytes=60_000)
    want = all_tensors(theirs)
    assert all(torch.equal(x, want[name]) for name, x in all_tensors(export(target, tmp_path / "back")).items())


def test_a_file_that_is_exchanged_while_it_is_read(theirs: Path, tmp_path: Path) -> None:
    def exchange(what: str, done: int, total: int) -> None:
        if done > total / 2 and first_shard(theirs).stat().st_size > 9:
            for path in theirs.glob("*.safetensors"):
                path.unlink()
                path.write_bytes(b"something")

    with pytest.raises(ConversionError, match=r"safetensors was changed while it was read .*: start again"):
        to_megatron(theirs, tmp_path / "out", part_bytes=60_000, on_progress=exchange)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Writing fails in the middle of a part."""
    write = Stream.write
    room = [150_000]

    def fails(self: Stream, data: Any) -> int:
        room[0] -= memoryview(data).nbytes
        if room[0] < 0:
            # As torch.save meets it: below its own code.
            self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise self.error
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "write", fails)
        yield


def test_a_full_disk_keeps_what_is_finished(theirs: Path, tmp_path: Path, full_disk: None) -> None:
    target = tmp_path / "out"
    with pytest.raises(ConversionError, match=r"not be written \(No space left on device\).*out.partial: free space"):
        to_megatron(theirs, target, part_bytes=60_000)
    assert not target.exists() and len(list(tmp_path.glob("out.partial/content/**/*.distcp"))) >= 1


def test_a_disk_without_room_is_seen_before(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(ConversionError, match=r"0.00 GB free, and 0.00 GB are to be written: free space"):
        to_megatron(theirs, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.partial/content/**/*.distcp"))


def test_an_altered_or_foreign_checkpoint_is_not_exported(theirs: Path, tmp_path: Path) -> None:
    to_megatron(theirs, tmp_path / "megatron")
    path, _ = locate(tmp_path / "megatron")
    config = read_config(tmp_path / "megatron")
    other = config.model_copy(update={"shape": {**config.shape, "num_layers": 5}})
    with pytest.raises(ConversionError, match="num_layers = 4 instead of 5.*give the folder of the same model"):
        to_huggingface(path, other, theirs, tmp_path / "back")
    edit_config(theirs, lambda values: values["text_config"].update(num_hidden_layers=5))
    with pytest.raises(ConversionError, match=r"(?s)linear_qkv.weight: expected \[5, 128, 48\], found \[4, 128, 48\]"):
        to_huggingface(path, other, theirs, tmp_path / "back")
    part = path / "__0_0.distcp"
    raw = bytearray(part.read_bytes())
    raw[5000] ^= 1
    part.write_bytes(raw)
    with pytest.raises((ConversionError, CheckpointError), match="was changed since it was written"):
        to_huggingface(path, config, tmp_path / "megatron", tmp_path / "back")
    assert not (tmp_path / "back").exists() and not (tmp_path / "back.partial").exists()
