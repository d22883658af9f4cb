"""The embedded engine: samples from the Megatron model itself, both modes in one continuous batch.

Every prompt (and its image) is computed once, whatever the number of its responses. Requests wait in line for a place
in the batch; a response that ends frees its place at once. Tensor-parallel ranks decode together, pipeline stages pass
the hidden states on, and every rank returns the same rollouts.

Shapes: G prompts, N active requests, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from r4b_core.data.encoding import EncodedPrompt
from r4b_core.models.r4b.model import R4BModel, vision_rows
from r4b_core.modes import Mode, ModeTokens
from r4b_core.rollout.cache import PromptAttention, PromptCache, ResponseCache
from r4b_core.rollout.decode import DecoderLayers
from r4b_core.rollout.sampling import Draw, draw, uniform
from r4b_core.rollout.types import FinishReason, Request, Rollout, SamplingParams
from r4b_kernels import scatter_vision

_NOT_FORCED = -1
# Rows of ended responses stay in the batch until they are this share of it: making room costs a copy of the cache.
_ENDED_SHARE = 0.25


class EmbeddedEngine:
    """Draws responses from a model stage that the trainer owns; weights are read in place, never copied."""

    def __init__(self, model: R4BModel, mode_tokens: ModeTokens, vocab_size: int, batch: int = 128) -> None:
        """``vocab_size`` is the tokenizer's: padded rows of the head are never drawn. ``batch`` bounds N."""
        self.model = model
        self.mode_tokens = mode_tokens
        self.vocab_size = vocab_size
        self.batch = batch
        self.pipeline = parallel_state.get_pipeline_model_parallel_group()

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[EncodedPrompt], requests: Sequence[Request], params: SamplingParams
    ) -> list[Rollout]:
        """One rollout per request, in the order of the requests.

        Raises:
            ValueError: if the budget does not hold the forced tokens of a mode.
        """
        self._check_budget(requests, params)
        if not requests:
            return []
        with self._eval_mode():
            cache, prompt_logits = self._prefill(prompts)
            return _ContinuousBatch(self, cache, prompt_logits, requests, params).run()

    # As a decorator on a generator, no_grad holds inside only: whoever reads the stream keeps gradients.
    @torch.no_grad()
    def stream(self, prompt: EncodedPrompt, request: Request, params: SamplingParams) -> Iterator[int]:
        """The tokens of one response as they are drawn (``request.prompt`` is 0). Raises like `generate`."""
        self._check_budget([request], params)
        with self._eval_mode():
            cache, prompt_logits = self._prefill([prompt])
            batch = _ContinuousBatch(self, cache, prompt_logits, [request], params)
        steps = batch.steps()
        while True:
            with self._eval_mode():
                drawn = next(steps, None)
            if drawn is None:
                return
            yield drawn[0]

    def _check_budget(self, requests: Sequence[Request], params: SamplingParams) -> None:
        longest = max((len(self.mode_tokens.forced(request.mode)) for request in requests), default=0)
        if params.max_new_tokens <= longest:
            raise ValueError(
                f"max_new_tokens={params.max_new_tokens}: the forced tokens of a mode take {longest}; raise it"
            )

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def _prefill(self, prompts: Sequence[EncodedPrompt]) -> tuple[PromptCache, Tensor]:
        """Keys and values of all prompts, and the logits [G, V] of each prompt's next token."""
        layers = DecoderLayers(self.model)
        attention = PromptAttention([len(prompt.tokens) for prompt in prompts], self.model.config)
        hidden = self._through_stages(
            lambda: self._embed_prompts(prompts), lambda x: layers(x, attention), len(attention.position)
        )
        last = attention.layout.offsets[1:].long() - 1
        return attention.cache, self._logits(hidden[last] if hidden is not None else None, len(prompts))

    def _embed_prompts(self, prompts: Sequence[EncodedPrompt]) -> Tensor:
        model = self.model
        tokens = torch.cat([prompt.tokens for prompt in prompts])
        patches = torch.cat([prompt.patches for prompt in prompts])
        grid = torch.cat([prompt.image_grid for prompt in prompts])
        first_patch, vision_index = 0, []
        for prompt in prompts:
            index = prompt.vision_index
            vision_index.append(torch.where(index >= 0, index + first_patch, index))
            first_patch += len(prompt.patches)
        cu_patches = F.pad(grid.prod(dim=1).cumsum(0), (1, 0)).to(torch.int32)
        features = model.embed_images(patches, grid, cu_patches)
        return scatter_vision(model.embed_tokens(tokens), features, vision_rows(torch.cat(vision_index), features))

    def _through_stages(
        self, embed: Callable[[], Tensor], layers: Callable[[Tensor], Tensor], rows: int
    ) -> Tensor | None:
        """Run one forward [rows, H] through all pipeline stages; its result on the last stage, None on the others."""
        model = self.model
        if model.pre_process:
            hidden = embed()
        else:
            hidden = torch.empty(rows, model.config.hidden_size, dtype=model.config.params_dtype)
            torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank(), self.pipeline)
        out = layers(hidden)
        if model.post_process:
            return out
        torch.distributed.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), self.pipeline)
        return None

    def decode(self, tokens: Tensor, position: Tensor, layers: DecoderLayers, cache: ResponseCache) -> Tensor:
        """Logits [N, V] after one more token int64 [N] per row, at positions int64 [N]."""
        cache.step(position)
        hidden = self._through_stages(lambda: self._embed_tokens(tokens), lambda x: layers(x, cache), len(tokens))
        return self._logits(hidden, len(tokens))

    def _embed_tokens(self, tokens: Tensor) -> Tensor:
        if self.model.tp_group.size() > 1:
            return self.model.embed_tokens(tokens)
        return F.embedding(tokens, self.model.embedding.word_embeddings.weight)

    def _logits(self, hidden: Tensor | None, rows: int) -> Tensor:
        """Whole logits [N, V] on every rank: gathered over the vocabulary shards, sent back over the stages."""
        model = self.model
        if hidden is not None:
            weight = model.head_weight()
            if group := model.head_group():
                shard = F.linear(hidden, weight).float()
                shards = [torch.empty_like(shard) for _ in range(group.size())]
                torch.distributed.all_gather(shards, shard, group=group)
                logits = torch.cat(shards, dim=-1)[:, : self.vocab_size].contiguous()
            else:
                logits = F.linear(hidden, weight[: self.vocab_size]).float()
        else:
            logits = torch.empty(rows, self.vocab_size)
        if self.pipeline.size() > 1:
            torch.distributed.broadcast(logits, parallel_state.get_pipeline_model_parallel_last_rank(), self.pipeline)
        return logits


class _ContinuousBatch:
    """The state of one `generate` call.

    Row n of every tensor is one request being decoded. Rows change only between stretches: a stretch ends when enough
    of its responses have ended, and what it drew is then filed under its requests.
    """

    def __init__(
        self,
        engine: EmbeddedEngine,
        prompts: PromptCache,
        prompt_logits: Tensor,
        requests: Sequence[Request],
        params: SamplingParams,
    ) -> None:
        self.engine, self.params, self.requests = engine, params, requests
        self.prompt_logits = prompt_logits
        modes = engine.mode_tokens
        count, budget = len(requests), params.max_new_tokens
        self.prompt = torch.tensor([request.prompt for request in requests])
        self.seed = torch.tensor([request.seed for request in requests])
        forced = [modes.forced(request.mode) for request in requests]
        self.num_forced = max(map(len, forced))
        self.forced = torch.tensor(
            [[*tokens, *[_NOT_FORCED] * (self.num_forced + 1 - len(tokens))] for tokens in forced]
        )
        self.thinking_probability = prompt_logits.softmax(-1)[:, modes.newline]
        self.tokens = torch.zeros(count, budget, dtype=torch.int64)
        self.logprobs = torch.zeros(count, budget)
        self.entropies = torch.zeros(count, budget)
        self.lengths = [0] * count
        self.stopped = [False] * count
        self.waiting = deque(range(count))
        self.prompt_lengths = prompts.lengths
        self.cache = ResponseCache(prompts, budget, engine.model.config)
        self.layers = DecoderLayers(engine.model)

    def run(self) -> list[Rollout]:
        for _ in self.steps():
            pass
        columns = (x.tolist() for x in (self.tokens, self.logprobs, self.entropies))
        thinking = self.thinking_probability.tolist()
        return [
            self._rollout(row, *(values[: self.lengths[row]] for values in rows), thinking[self.requests[row].prompt])
            for row, rows in enumerate(zip(*columns, strict=True))
        ]

    @torch.inference_mode()
    def steps(self) -> Iterator[list[int]]:
        """One token for every row per step, until no request is left. Yields the tokens drawn."""
        none = torch.zeros(0, dtype=torch.int64)
        rows, step, token = none, none, none
        alive: list[bool] = []
        while self.waiting or any(alive):
            kept = torch.tensor([n for n, is_alive in enumerate(alive) if is_alive], dtype=torch.int64)
            fresh = self._admit(self.engine.batch - len(kept))
            order = self.cache.rearrange(kept, self.prompt[fresh], more_to_come=bool(self.waiting))
            rows = torch.cat([rows[kept], fresh])[order]
            step = torch.cat([step[kept], torch.zeros_like(fresh)])[order]
            token = torch.cat([token[kept], torch.zeros_like(fresh)])[order]
            alive = [True] * len(rows)
            token, taken = yield from self._stretch(rows, step, token, alive)
            step = step + taken

    def _admit(self, places: int) -> Tensor:
        return torch.tensor([self.waiting.popleft() for _ in range(min(places, len(self.waiting)))], dtype=torch.int64)

    def _stretch(
        self, rows: Tensor, step: Tensor, token: Tensor, alive: list[bool]
    ) -> Generator[list[int], None, tuple[Tensor, int]]:
        """Decode the rows until enough have ended. Marks the ended ones; returns the last tokens and steps taken."""
        requests, begun = rows.tolist(), step.tolist()
        budget, turn_end = self.params.max_new_tokens, self.engine.mode_tokens.turn_end
        points = uniform(self.seed[rows], step + torch.arange(budget)[:, None])
        prompt = self.prompt[rows]
        position = self.prompt_lengths[prompt] + step - 1
        limit = [budget] * len(rows)
        drawn: list[Draw] = []
        while len(rows) - sum(alive) < max(1, int(len(rows) * _ENDED_SHARE)):
            taken = len(drawn)
            if taken or max(begun):
                logits = self.engine.decode(token, position + taken, self.layers, self.cache)
            if not taken and not min(begun):
                # A new row's first token follows from its prompt; what was decoded for it went nowhere.
                first = self.prompt_logits[prompt]
                logits = torch.where((step == 0)[:, None], first, logits) if max(begun) else first
            forced = None
            if min(begun) + taken < self.num_forced:
                forced = self.forced[rows, (step + taken).clamp_(max=self.num_forced)]
            drawn.append(draw(logits, points[taken], forced, self.params.temperature, self.params.top_p))
            token = drawn[-1].token
            tokens = token.tolist()
            for n, drawn_token in enumerate(tokens):
                if alive[n] and (drawn_token == turn_end or begun[n] + taken + 1 == budget):
                    alive[n] = False
                    limit[n] = self.lengths[requests[n]] = begun[n] + taken + 1
                    self.stopped[requests[n]] = drawn_token == turn_end
            yield tokens
        self._file(rows, step, torch.tensor(limit), drawn)
        return token, len(drawn)

    def _file(self, rows: Tensor, step: Tensor, limit: Tensor, drawn: list[Draw]) -> None:
        """Write a stretch's draws to their requests; a row's places from its limit on were drawn after its end."""
        place = step + torch.arange(len(drawn))[:, None]
        counts = place < limit
        where = rows.expand_as(place)[counts], place[counts]
        self.tokens[where] = torch.stack([each.token for each in drawn])[counts]
        self.logprobs[where] = torch.stack([each.logprob for each in drawn])[counts]
        self.entropies[where] = torch.stack([each.entropy for each in drawn])[counts]

    def _rollout(
        self, row: int, tokens: list[int], logprobs: list[float], entropies: list[float], thinking: float
    ) -> Rollout:
        request, modes = self.requests[row], self.engine.mode_tokens
        return Rollout(
            tokens=tokens,
            logprobs=logprobs,
            entropies=entropies,
            mode=request.mode,
            taken=modes.mode_of(tokens),
            forced=len(modes.forced(request.mode)),
            finish=FinishReason.STOP if self.stopped[row] else FinishReason.LENGTH,
            seed=request.seed,
            thinking_probability=thinking,
        )


def bimode_requests(prompts: int, group_size: int, free: bool, seeds: Callable[[int, int], int]) -> list[Request]:
    """2g requests per prompt: g thinking then g direct (BPO), or 2g whose mode is free (GRPO).

    ``seeds(prompt, k)`` gives each its own.
    """
    modes = [Mode.AUTO] * (2 * group_size) if free else [Mode.THINKING] * group_size + [Mode.DIRECT] * group_size
    return [Request(prompt, mode, seeds(prompt, k)) for prompt in range(prompts) for k, mode in enumerate(modes)]
