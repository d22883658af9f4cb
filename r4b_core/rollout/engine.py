"""The embedded engine: samples from the Megatron model itself, both modes in one continuous batch.

Every prompt (and its image) is computed once, whatever the number of its responses. Requests wait in line for a place
in the batch; a response that ends frees its place at once. Tensor-parallel ranks decode together, pipeline stages pass
the hidden states on, and every rank returns the same rollouts.

Shapes: G prompts, N active requests, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from r4b_core.data.encoding import EncodedPrompt
from r4b_core.models.r4b.model import R4BModel, vision_rows
from r4b_core.models.streams import pad_to_multiple
from r4b_core.modes import Mode, ModeTokens
from r4b_core.rollout.cache import PrefillStream, PromptCache, ResponseCache
from r4b_core.rollout.decode import DecodeLayers
from r4b_core.rollout.sampling import draw
from r4b_core.rollout.types import FinishReason, Request, Rollout, SamplingParams
from r4b_kernels import scatter_vision
from r4b_kernels.layout import PrefixLayout

_NOT_FORCED = -1
_END = object()


class EmbeddedEngine:
    """Draws responses from a model stage that the trainer owns; weights are read in place, never copied."""

    def __init__(self, model: R4BModel, mode_tokens: ModeTokens, vocab_size: int, batch: int = 128) -> None:
        """``vocab_size`` is the tokenizer's: padded rows of the head are never drawn. ``batch`` bounds N."""
        self.model = model
        self.mode_tokens = mode_tokens
        self.vocab_size = vocab_size
        self.batch = batch
        self.layers = DecodeLayers(model.decoder.layers, model.config, model.tp_group)
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
                if next(steps, _END) is _END:
                    return
            yield int(batch.tokens[0, batch.last_step])

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
        lengths = [len(prompt.tokens) for prompt in prompts]
        layout = PrefixLayout.from_lengths(lengths)
        starts = layout.offsets[:-1].long()
        total = sum(lengths)
        multiple = self.model.tp_group.size() if self.model.config.sequence_parallel else 1
        position = torch.arange(total) - starts.repeat_interleave(torch.tensor(lengths))
        columns = torch.arange(max(lengths))
        index = torch.where(columns < torch.tensor(lengths)[:, None], starts[:, None] + columns, 0)
        cache = PromptCache(lengths=torch.tensor(lengths))
        stream = PrefillStream(layout, pad_to_multiple(position, multiple).expand(3, -1), index, cache)
        embeddings = self._embed_prompts(prompts, multiple) if self.model.pre_process else None
        hidden = self._through_stages(
            lambda: self.model.decode(embeddings, stream), (total + -total % multiple) // multiple
        )
        last = layout.offsets[1:].long() - 1
        return cache, self._logits(hidden[last] if hidden is not None else None, len(prompts))

    def _embed_prompts(self, prompts: Sequence[EncodedPrompt], multiple: int) -> Tensor:
        model = self.model
        tokens = pad_to_multiple(torch.cat([prompt.tokens for prompt in prompts]), multiple)
        patches = torch.cat([prompt.patches for prompt in prompts])
        grid = torch.cat([prompt.image_grid for prompt in prompts])
        first_patch, vision_index = 0, []
        for prompt in prompts:
            index = prompt.vision_index
            vision_index.append(torch.where(index >= 0, index + first_patch, index))
            first_patch += len(prompt.patches)
        vision_index.append(torch.full((len(tokens) - sum(map(len, vision_index)),), -1))
        cu_patches = F.pad(grid.prod(dim=1).cumsum(0), (1, 0)).to(torch.int32)
        features = model.embed_images(patches, grid, cu_patches)
        return scatter_vision(model.embed_tokens(tokens), features, vision_rows(torch.cat(vision_index), features))

    def _through_stages(self, forward: Callable[[], Tensor], rows: int) -> Tensor | None:
        """Run one forward through all pipeline stages; its result on the last stage, None on the others."""
        model, shape = self.model, (rows, 1, self.model.config.hidden_size)
        if not model.pre_process:
            received = torch.empty(shape, dtype=model.config.params_dtype)
            torch.distributed.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank(), self.pipeline)
            model.set_input_tensor(received)
        out = forward()
        if model.post_process:
            return out
        torch.distributed.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), self.pipeline)
        return None

    def decode(self, tokens: Tensor, position: Tensor, cache: ResponseCache) -> Tensor:
        """Logits [N, V] after one more token int64 [N] per request, at positions int64 [N]."""
        model = self.model
        cache.step()

        def forward() -> Tensor:
            hidden = model.embed_tokens(tokens) if model.pre_process else model.decoder.input_tensor.squeeze(1)
            hidden = self.layers(hidden, position, cache)
            return model.decoder.final_layernorm(hidden) if model.post_process else hidden.unsqueeze(1)

        hidden = self._through_stages(forward, len(tokens))
        cache.advance()
        return self._logits(hidden, len(tokens))

    def _logits(self, hidden: Tensor | None, rows: int) -> Tensor:
        """Whole logits [N, V] on every rank: gathered over the vocabulary shards, sent back over the stages."""
        model = self.model
        if hidden is not None:
            logits = F.linear(hidden, model.head_weight()).float()
            if group := model.head_group():
                shards = [torch.empty_like(logits) for _ in range(group.size())]
                torch.distributed.all_gather(shards, logits.contiguous(), group=group)
                logits = torch.cat(shards, dim=-1)
            logits = logits[:, : self.vocab_size].contiguous()
        else:
            logits = torch.empty(rows, self.vocab_size)
        if self.pipeline.size() > 1:
            torch.distributed.broadcast(logits, parallel_state.get_pipeline_model_parallel_last_rank(), self.pipeline)
        return logits


@dataclass
class _Active:
    """The requests being decoded: row n of every tensor is one of them."""

    request: Tensor
    step: Tensor
    token: Tensor


class _ContinuousBatch:
    """The state of one `generate` call."""

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
        self.forced = torch.full((count, budget), _NOT_FORCED)
        for row, request in enumerate(requests):
            for place, token in enumerate(modes.forced(request.mode)):
                self.forced[row, place] = token
        self.thinking_probability = prompt_logits.softmax(-1)[:, modes.newline]
        self.tokens = torch.zeros(count, budget, dtype=torch.int64)
        self.logprobs = torch.zeros(count, budget)
        self.entropies = torch.zeros(count, budget)
        self.lengths = torch.zeros(count, dtype=torch.int64)
        self.stopped = torch.zeros(count, dtype=torch.bool)
        self.waiting = deque(range(count))
        self.prompt_lengths = prompts.lengths
        self.cache = ResponseCache(prompts, min(engine.batch, count), budget)
        self.last_step = 0

    def run(self) -> list[Rollout]:
        for _ in self.steps():
            pass
        return [self._rollout(row) for row in range(len(self.requests))]

    def steps(self) -> Iterator[None]:
        """One token for every active request per step, until none is left."""
        active, logits = self._admit(self.engine.batch)
        while len(active.request):
            self._draw(active, logits)
            yield
            active = self._retain(active)
            logits = self._continue(active)
            if self.waiting and len(active.request) < self.engine.batch:
                fresh, fresh_logits = self._admit(self.engine.batch - len(active.request))
                logits = torch.cat([logits, fresh_logits])
                active = _Active(
                    *(torch.cat(pair) for pair in zip(vars(active).values(), vars(fresh).values(), strict=True))
                )

    def _admit(self, places: int) -> tuple[_Active, Tensor]:
        taken = [self.waiting.popleft() for _ in range(min(places, len(self.waiting)))]
        request = torch.tensor(taken, dtype=torch.int64)
        prompt = self.prompt[request]
        self.cache.admit(prompt)
        zeros = torch.zeros_like(request)
        return _Active(request, zeros, zeros.clone()), self.prompt_logits[prompt]

    def _draw(self, active: _Active, logits: Tensor) -> None:
        request, step = active.request, active.step
        forced = self.forced[request, step]
        drawn = draw(logits, self.seed[request], step, forced, self.params.temperature, self.params.top_p)
        self.tokens[request, step] = drawn.token
        self.logprobs[request, step] = drawn.logprob
        self.entropies[request, step] = drawn.entropy
        self.lengths[request] = step + 1
        self.stopped[request] = drawn.token == self.engine.mode_tokens.turn_end
        active.token = drawn.token
        self.last_step = int(step[0])

    def _retain(self, active: _Active) -> _Active:
        ended = self.stopped[active.request] | (active.step + 1 == self.params.max_new_tokens)
        rows = (~ended).nonzero().squeeze(1)
        self.cache.retain(rows)
        return _Active(active.request[rows], active.step[rows] + 1, active.token[rows])

    def _continue(self, active: _Active) -> Tensor:
        if not len(active.request):
            return self.prompt_logits[:0]
        position = self.prompt_lengths[self.cache.prompt] + active.step - 1
        return self.engine.decode(active.token, position, self.cache)

    def _rollout(self, row: int) -> Rollout:
        request, length = self.requests[row], int(self.lengths[row])
        tokens = self.tokens[row, :length].tolist()
        modes = self.engine.mode_tokens
        return Rollout(
            tokens=tokens,
            logprobs=self.logprobs[row, :length].tolist(),
            entropies=self.entropies[row, :length].tolist(),
            mode=request.mode,
            taken=modes.mode_of(tokens),
            forced=len(modes.forced(request.mode)),
            finish=FinishReason.STOP if self.stopped[row] else FinishReason.LENGTH,
            seed=request.seed,
            thinking_probability=float(self.thinking_probability[request.prompt]),
        )


def bimode_requests(prompts: int, group_size: int, free: bool, seeds: Callable[[int, int], int]) -> list[Request]:
    """2g requests per prompt: g thinking then g direct (BPO), or 2g whose mode is free (GRPO).

    ``seeds(prompt, k)`` gives each its own.
    """
    modes = [Mode.AUTO] * (2 * group_size) if free else [Mode.THINKING] * group_size + [Mode.DIRECT] * group_size
    return [Request(prompt, mode, seeds(prompt, k)) for prompt in range(prompts) for k, mode in enumerate(modes)]
