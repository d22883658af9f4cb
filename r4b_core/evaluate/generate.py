"""Ask a trained model about a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from r4b_core.data.encoding import encode_prompt
from r4b_core.data.images import open_image
from r4b_core.data.schema import Sample
from r4b_core.evaluate.load import trained_model
from r4b_core.modes import Mode
from r4b_core.rollout.types import Request, SamplingParams


@dataclass(frozen=True)
class Answer:
    """A greedy response, the mode it took and how sure the model was that it should think."""

    text: str
    mode: Mode
    thinking_probability: float
    finished: bool

    def __str__(self) -> str:
        cut = "" if self.finished else "\n(cut: the token budget ran out)"
        return f"{self.text}{cut}\n[{self.mode}; p(think) = {self.thinking_probability:.3f}]"


def generate(run: Path, *, image: Path, prompt: str, mode: Mode = Mode.AUTO) -> Answer:
    """Answer ``prompt`` about ``image`` with the newest checkpoint of ``run``.

    Raises:
        ValueError: for a missing run, an image that cannot be opened safely, or words the tokenizer does not know.
    """
    sample = Sample("generate", "user", [open_image(image)], prompt, answer="")
    with trained_model(run) as trained:
        encoded = encode_prompt(trained.tokenizer, sample)
        params = SamplingParams(trained.recipe.bpo.max_new_tokens, temperature=0.0)
        (rollout,) = trained.engine.generate([encoded], [Request(0, mode, 0)], params)
        text = trained.tokenizer.decode(rollout.tokens)
    return Answer(text, rollout.taken, rollout.thinking_probability, rollout.finish == "stop")
