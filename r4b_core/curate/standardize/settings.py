"""The settings of `standardize`, and where its input comes from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from r4b_core.config.recipe import Settings

Format = Literal["auto", "records", "mmfinereason", "finevision", "llava", "jsonl"]
TextRule = Literal["control", "links", "watermarks", "numbering", "scores", "whitespace"]
TEXT_RULES: tuple[TextRule, ...] = ("control", "links", "watermarks", "numbering", "scores", "whitespace")


class InputSettings(Settings):
    """Files of one data set. A plain string stands for its path."""

    path: str = Field(description="a file, a folder, or a glob")
    format: Format = Field("auto", description="of the rows; auto: told by the columns")
    source: str | None = Field(None, description="name of rows that carry none; none: the file's, or its folder's")
    images: str | None = Field(None, description="folder that image paths start from; none: the file's own")

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given


class DuplicateSettings(Settings):
    """When two records are the same. The earlier one, by file and row, stays."""

    exact: bool = Field(True, description="same words and the same pictures")
    near: bool = Field(True, description="similar words and similar pictures")
    text_similarity: float = Field(0.8, gt=0, le=1, description="Jaccard similarity of word 3-grams, estimated")
    image_distance: int = Field(4, ge=0, le=16, description="bits of 64 by which perceptual hashes may differ")


class DecontaminateSettings(Settings):
    """What must not be trained on: the questions and pictures of benchmarks."""

    files: list[InputSettings] = Field(default_factory=list, description="the benchmarks, in any format read")
    ngram: int = Field(13, ge=3, description="a run of so many words in common with a benchmark's question")
    images: bool = Field(True, description="a benchmark's picture counts, whatever the question")
    image_distance: int = Field(2, ge=0, le=16, description="bits of 64 by which perceptual hashes may differ")


class StandardizeSettings(Settings):
    """Reading, cleaning and deduplication."""

    rules: list[TextRule] = Field(default_factory=lambda: list(TEXT_RULES), description="text rules to apply")
    answers: Literal["checkable", "any"] = Field("checkable", description="any: keep what has no short answer too")
    max_answer_chars: int = Field(400, ge=1, description="a longer answer cannot be checked")
    max_foreign: float = Field(1.0, ge=0, le=1, description="largest share of letters that are not Latin or Greek")
    min_images: int = Field(0, ge=0)
    max_images: int = Field(8, ge=0)
    max_side: int = Field(2048, ge=32, description="longest side of a picture; a larger one is scaled down")
    max_image_pixels: int = Field(40_000_000, ge=1, description="a larger picture is not decoded")
    max_image_bytes: int = Field(32_000_000, ge=1)
    max_text_chars: int = Field(200_000, ge=1, description="of any field; a longer one puts the row in quarantine")
    max_row_bytes: int = Field(96_000_000, ge=1, description="a longer JSON row is not read")
    partition_rows: int = Field(20_000, ge=1, description="rows of the input that make one partition, at most")
    duplicates: DuplicateSettings = DuplicateSettings()
    decontaminate: DecontaminateSettings = DecontaminateSettings()
