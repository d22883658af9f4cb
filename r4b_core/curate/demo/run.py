"""`r4b curate demo`: the whole data engine on this machine, against stand-in models, with its faults found or not.

Raw rows -> standardize -> generate -> verify -> score -> select -> a page, and a recipe that trains on the result.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from r4b_core.curate.demo.corpus import Corpus, build
from r4b_core.curate.demo.plan import JUDGE, STUDENT, TEACHER, TRIES, expected, stand_in_plan
from r4b_core.curate.demo.standin import serve
from r4b_core.curate.pipeline import Job, run_stages
from r4b_core.curate.recipe import StageName, load_curate_recipe, stage_folders
from r4b_core.curate.stats import write_stats
from r4b_core.curate.store import Counts, record_files
from r4b_core.data.records import read_records
from r4b_core.modes import BLANK_LINE, NEWLINE, THINK_CLOSE, THINK_OPEN, TURN_END, TURN_START
from r4b_core.telemetry.files import write_atomic

RECIPE, TRAIN = "recipe.yaml", "train.yaml"
_IMAGE_TAGS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|endoftext|>")
_VOCABULARY = 512


@dataclass(frozen=True)
class DemoResult:
    """What the demo left.

    Attributes:
        page: the page about the run.
        train: a recipe for `r4b train`.
        differences: where stages did not find what was planted; empty where all did.
        requests: sent to the stand-ins, and answered.
    """

    page: Path
    train: Path
    differences: list[str]
    requests: dict[str, int]


def run_demo(
    run: Path, told: Callable[[StageName, Counts], None] = lambda stage, counts: None, share: float = 1.0
) -> DemoResult:
    """Do all of it in a run folder, from where an earlier start stopped.

    Args:
        told: is given each stage's counts when it is done.
        share: of the two thousand rows.

    Raises:
        ValueError: if scikit-image is not installed, or the folder holds another run.
    """
    corpus = build(run / "raw", share=share)
    with serve(stand_in_plan(corpus.items)) as server:
        write_atomic(run / RECIPE, yaml.safe_dump(_recipe(run, corpus, server.url), sort_keys=False))
        resolved = load_curate_recipe(run / RECIPE)
        found: dict[StageName, Counts] = {}

        def tell(stage: StageName, counts: Counts) -> None:
            found[stage] = counts
            told(stage, counts)

        run_stages(resolved, Job(resolved.recipe, run), tell)
        counted = server.counts()
    planned = expected(corpus.items, list(found))
    differences = [f"{stage}: {text}" for stage, plan in planned.items() for text in plan.differences(found[stage])]
    selected = stage_folders(resolved.recipe, run)["select"]
    requests = {name: sum(counted[name].values()) for name in ("sent", "finished")}
    return DemoResult(write_stats(run), _write_training(run, selected), differences, requests)


def _recipe(run: Path, corpus: Corpus, url: str) -> dict[str, Any]:
    def served(model: str, **more: Any) -> dict[str, Any]:
        calls = {"backoff_s": 0.02, "total_timeout_s": 30}
        return {"model": model, "endpoints": [url], "max_tokens": 1024, "calls": calls, **more}

    return {
        "name": run.name,
        "inputs": [str(path) for path in corpus.files.values()],
        "standardize": {
            "partition_rows": 500,
            "decontaminate": {"files": [str(corpus.benchmark)]},
        },
        "generate": {"teacher": served(TEACHER), "regenerate": 1},
        "judge": served(JUDGE, temperature=0.0),
        "score": {"student": served(STUDENT), "k": TRIES},
        "select": {"pass_rate": "[0, 1)", "min_tries": TRIES, "modes": "r4b"},
    }


def _write_training(run: Path, selected: Path) -> Path:
    """A small tokenizer made of the selected text, and a recipe that trains a small Qwen3-VL on it."""
    folder = run / "processor"
    folder.mkdir(exist_ok=True)
    texts = [f"{r.question}\n{r.answer}\n{r.response}" for path in record_files(selected) for r in read_records(path)]
    _small_tokenizer(texts).save(str(folder / "tokenizer.json"))
    images = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 1024, "longest_edge": 16384}}
    write_atomic(folder / "preprocessor_config.json", json.dumps(images, indent=1))
    recipe = {
        "name": f"{run.name}-train",
        "model": {
            "family": "qwen3_vl",
            "size": "toy",
            "shape": {"vocab_size": _VOCABULARY},
            "processor": str(folder),
        },
        "data": {"task": "records", "train": [str(selected / "*.parquet")]},
        "packing": {"capacity": 2048},
        "pretrain": {"steps": 0},
        "anneal": {"steps": 0},
        "distill": {"steps": 30, "batch_size": 1, "optim": {"lr": 2e-3, "warmup_steps": 5, "schedule": "cosine"}},
        "bpo": {"steps": 0},
    }
    write_atomic(run / TRAIN, yaml.safe_dump(recipe, sort_keys=False))
    return run / TRAIN


def _small_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with Qwen's tags, in which a newline and two are one token each, as in Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tags = (TURN_START, TURN_END, *_IMAGE_TAGS, THINK_OPEN, THINK_CLOSE, BLANK_LINE)
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY - len(tags),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Pieces are of one line each, or a newline and what begins the next line would become one token.
    tokenizer.train_from_iterator((line for text in texts for line in text.split(NEWLINE)), trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    return tokenizer
