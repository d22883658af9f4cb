"""The embedded engine: samples from the Megatron model itself, both modes in one continuous batch.

Every prompt (and its images) is computed once, whatever the number of its responses, and not before its turn comes.
Requests wait in line for a place in the batch; a response that ends frees its place at once. Tensor-parallel ranks
decode together, pipeline stages pass the hidden states on, and every rank returns the same rollouts.

Shapes: G prompts, N active requests, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from r4b_core.data.encoding import EncodedPrompt
from r4b_core.models.decoder import DecoderModel
from r4b_core.modes import Mode, ModeTokens
from r4b_core.rollout.cache import PromptAttention, PromptCache, ResponseCache
from r4b_core.rollout.decode import DecoderLayers, DeepStack, embed_prompts
from r4b_core.rollout.sampling import Draw, draw, uniform
from r4b_core.rollout.types import FinishReason, Request, Rollout, SamplingParams

_NOT_FORCED = -1
# Rows of ended responses stay in the batch until they are this share of it: making room costs a copy of the cache.
_ENDED_SHARE = 0.25
# Points of the distribution are made for so many steps at once.
_POINTS = 64
# Of the free memory of a GPU: the rest is for prompts, for logits, and for the copy that makes room.
_CACHE_SHARE = 0.4


class EmbeddedEngine:
    """Draws responses from a model stage that the trainer owns; weights are read in place, never copied."""

    def __init__(
        self,
        model: DecoderModel | Sequence[DecoderModel],
        mode_tokens: ModeTokens,
        vocab_size: int,
        batch: int = 128,
        prefill_tokens: int = 16_384,
        cache_bytes: int | None = None,
    ) -> None:
        """An engine over this rank's stage.

        Args:
            model: the pipeline stage, or its chunks where the pipeline is interleaved.
            vocab_size: the tokenizer's: rows of the head beyond it are never drawn.
            batch: bounds N. A row holds keys and values for as many tokens as the longest of all rows has.
            prefill_tokens: prompts are computed some at a time, of so many tokens with each one as long as the longest;
                a longer prompt alone.
            cache_bytes: bounds the keys and values of the responses on this rank, the same on every rank. Where they
                would outgrow it, the shortest responses are put back and drawn anew later, which gives the same tokens;
                one response always goes on. None: a share of what is free on a GPU, no bound on a CPU.
        """
        self.chunks = [model] if isinstance(model, DecoderModel) else list(model)
        self.mode_tokens = mode_tokens
        self.vocab_size = vocab_size
        self.batch = batch
        self.prefill_tokens = prefill_tokens
        self.cache_bytes = cache_bytes
        self.pipeline = parallel_state.get_pipeline_model_parallel_group()
        weight = next(self.chunks[0].parameters())
        self.device, self.dtype = weight.device, weight.dtype

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
            batch = _ContinuousBatch(self, prompts, requests, params)
            drawn = batch.run()
            # The update that follows needs the memory, and the batch is part of a cycle.
            del batch.cache
            return drawn

    @torch.no_grad()
    def stream(self, prompt: EncodedPrompt, request: Request, params: SamplingParams) -> TokenStream:
        """One response (``request.prompt`` is 0) token by token; its prompt is computed now. Raises like `generate`."""
        self._check_budget([request], params)
        with self._eval_mode():
            batch = _ContinuousBatch(self, [prompt], [request], params)
            batch.prefill([0])
        return TokenStream(self, batch)

    def _check_budget(self, requests: Sequence[Request], params: SamplingParams) -> None:
        longest = max((len(self.mode_tokens.forced(request.mode)) for request in requests), default=0)
        if params.max_new_tokens <= longest:
            raise ValueError(
                f"max_new_tokens={params.max_new_tokens}: the forced tokens of a mode take {longest}; raise it"
            )

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        were_training = [chunk.training for chunk in self.chunks]
        try:
            for chunk in self.chunks:
                chunk.eval()
            yield
        finally:
            for chunk, was_training in zip(self.chunks, were_training, strict=True):
                chunk.train(was_training)

    def most_columns(self) -> int | None:
        """Columns of all rows together that `cache_bytes` allows; None: any number. The same on every rank."""
        room = self.cache_bytes
        if room is None:
            if self.device.type != "cuda":
                return None
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            free = torch.tensor(torch.cuda.mem_get_info(self.device)[0] + unused, device=self.device)
            for group in (self.chunks[0].tp_group, self.pipeline):
                if group.size() > 1:
                    torch.distributed.all_reduce(free, torch.distributed.ReduceOp.MIN, group)
            room = int(_CACHE_SHARE * int(free))
        config = self.chunks[0].config
        attention = self.chunks[0].decoder.layers[0].self_attention
        layers = sum(len(chunk.decoder.layers) for chunk in self.chunks)
        column = 2 * layers * attention.num_query_groups_per_partition * config.kv_channels * self.dtype.itemsize
        return max(1, room // column)

    def layers(self) -> list[DecoderLayers]:
        """The layers of each chunk."""
        made: list[DecoderLayers] = []
        for chunk in self.chunks:
            made.append(DecoderLayers(chunk, first=sum(len(before.layers) for before in made)))
        return made

    # What training caches (tables by content) may be made here too, so it must not be made in inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def prefill(
        self, ids: Sequence[int], prompts: Sequence[EncodedPrompt], layers: Sequence[DecoderLayers]
    ) -> tuple[PromptCache, Tensor]:
        """Keys and values of the prompts numbered ``ids``, and the logits [G, V] of each one's next token."""
        position_ids = torch.cat([prompt.position_ids for prompt in prompts], 1).to(self.device)
        cache = PromptCache(
            list(ids), [prompt.num_tokens for prompt in prompts], [prompt.next_position for prompt in prompts]
        )
        attention = PromptAttention(cache, position_ids, self.chunks[0].config)
        stack: list[DeepStack | None] = [None]

        def embed() -> Tensor:
            embeddings, stack[0] = embed_prompts(self.chunks[0], prompts, self.device)
            return embeddings

        def run(chunk: int, hidden: Tensor) -> Tensor:
            return layers[chunk](hidden, attention, stack[0] if chunk == 0 else None)

        hidden = self._through_stages(embed, run, position_ids.shape[1])
        last = attention.layout.offsets[1:].long() - 1
        return cache, self._logits(hidden[last] if hidden is not None else None, len(prompts))

    def _through_stages(
        self, embed: Callable[[], Tensor], run: Callable[[int, Tensor], Tensor], rows: int
    ) -> Tensor | None:
        """One forward [rows, H] through all pipeline stages; its result on the last stage, None on the others.

        ``run`` takes the number of one of this rank's chunks and the hidden states that go into it.
        """
        for number, chunk in enumerate(self.chunks):
            if chunk.pre_process:
                hidden = embed()
            else:
                hidden = torch.empty(rows, chunk.config.hidden_size, dtype=self.dtype, device=self.device)
                torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank(), self.pipeline)
            hidden = run(number, hidden)
            if chunk.post_process:
                return hidden
            following = parallel_state.get_pipeline_model_parallel_next_rank()
            torch.distributed.send(hidden.contiguous(), following, self.pipeline)
        return None

    def decode(
        self, tokens: Tensor, position: Tensor, longest: int, layers: Sequence[DecoderLayers], cache: ResponseCache
    ) -> Tensor:
        """Logits [N, V] after one more token int64 [N] per row, at positions int64 [N]; see `ResponseCache.step`."""
        cache.step(position, longest)
        hidden = self._through_stages(
            lambda: self._embed_tokens(tokens), lambda chunk, x: layers[chunk](x, cache), len(tokens)
        )
        return self._logits(hidden, len(tokens))

    def _embed_tokens(self, tokens: Tensor) -> Tensor:
        first = self.chunks[0]
        if first.tp_group.size() > 1:
            return first.embed_tokens(tokens)
        return F.embedding(tokens, first.embedding.word_embeddings.weight)

    def _logits(self, hidden: Tensor | None, rows: int) -> Tensor:
        """Whole logits [N, V] on every rank: gathered over the vocabulary shards, sent back over the stages."""
        if hidden is not None:
            last = self.chunks[-1]
            weight = last.head_weight()
            if group := last.head_group():
                shard = F.linear(hidden, weight).float()
                shards = [torch.empty_like(shard) for _ in range(group.size())]
                torch.distributed.all_gather(shards, shard, group=group)
                logits = torch.cat(shards, dim=-1)[:, : self.vocab_size].contiguous()
            else:
                logits = F.linear(hidden, weight[: self.vocab_size]).float()
        else:
            logits = torch.empty(rows, self.vocab_size, device=self.device)
        if self.pipeline.size() > 1:
            torch.distributed.broadcast(logits, parallel_state.get_pipeline_model_parallel_last_rank(), self.pipeline)
        return logits


class TokenStream:
    """The tokens of one response as they are drawn.

    Attributes:
        thinking_probability, direct_probability: the policy's, of the two decisions; known before the first token.
    """

    def __init__(self, engine: EmbeddedEngine, batch: _ContinuousBatch) -> None:
        self._engine, self._steps = engine, batch.steps()
        self.thinking_probability, self.direct_probability = batch.decisions[0]

    def __iter__(self) -> Iterator[int]:
        return self

    # Inside only: whoever reads the stream keeps gradients and the model's training mode.
    @torch.no_grad()
    def __next__(self) -> int:
        with self._engine._eval_mode():
            return next(self._steps)[0]


class _ContinuousBatch:
    """The state of one `generate` call.

    Row n of every tensor is one request being decoded. Rows change only between stretches: a stretch ends when enough
    of its responses have ended, and what it drew is then filed under its requests.
    """

    def __init__(
        self,
        engine: EmbeddedEngine,
        prompts: Sequence[EncodedPrompt],
        requests: Sequence[Request],
        params: SamplingParams,
    ) -> None:
        self.engine, self.prompts, self.requests, self.params = engine, prompts, requests, params
        forced = [engine.mode_tokens.forced(request.mode) for request in requests]
        self.num_forced = max(map(len, forced))
        self.forced = [[*tokens, *[_NOT_FORCED] * (self.num_forced + 1 - len(tokens))] for tokens in forced]
        self.decisions: dict[int, tuple[float, float]] = {}
        self.tokens: list[list[int]] = [[] for _ in requests]
        self.logprobs: list[list[float]] = [[] for _ in requests]
        self.entropies: list[list[float]] = [[] for _ in requests]
        self.stopped = [False] * len(requests)
        self.waiting = deque(range(len(requests)))
        # How many requests of each prompt wait, and the prompts to compute in the order in which they are asked for.
        self.waiting_of = Counter(request.prompt for request in requests)
        self.to_compute = deque(self.waiting_of)
        self.first_logits: dict[int, Tensor] = {}
        self.layers = engine.layers()
        self.cache = ResponseCache(params.max_new_tokens, engine.chunks[0].config)
        self.most_columns = engine.most_columns()
        self.times_put_back = 0

    def run(self) -> list[Rollout]:
        for _ in self.steps():
            pass
        return [self._rollout(row) for row in range(len(self.requests))]

    @torch.inference_mode()
    def steps(self) -> Iterator[list[int]]:
        """One token for every row per step, until no request is left. Yields the tokens drawn."""
        rows: list[int] = []
        begun: list[int] = []
        token: list[int] = []
        alive: list[bool] = []
        while self.waiting or any(alive):
            kept = self._keep([n for n, is_alive in enumerate(alive) if is_alive], rows, begun)
            longest = max((begun[n] for n in kept), default=0)
            fresh = self._admit(self._places(longest) - len(kept))
            order = self.cache.rearrange(kept, [self.requests[row].prompt for row in fresh], self.waiting_of, longest)
            rows, begun, token = (
                [joined[n] for n in order]
                for joined in (
                    [*(rows[n] for n in kept), *fresh],
                    [*(begun[n] for n in kept), *[0] * len(fresh)],
                    [*(token[n] for n in kept), *[0] * len(fresh)],
                )
            )
            alive = [True] * len(rows)
            token, taken = yield from self._stretch(rows, begun, token, alive)
            begun = [step + taken for step in begun]

    def _places(self, longest: int) -> int:
        """How many rows there may be while the longest has so many tokens and draws one more."""
        if self.most_columns is None:
            return self.engine.batch
        return min(self.engine.batch, max(1, self.most_columns // self.cache.room(longest + 1)))

    def _keep(self, alive: list[int], rows: list[int], begun: list[int]) -> list[int]:
        """Those of the rows that have places; the shortest of the others are put back in line."""
        shortest_first = sorted(alive, key=begun.__getitem__)
        places = self._places(begun[shortest_first[-1]]) if alive else 0
        put_back = shortest_first[: max(0, len(alive) - places)]
        for row in sorted((rows[n] for n in put_back), reverse=True):
            self.times_put_back += 1
            self.waiting.appendleft(row)
            self.waiting_of[self.requests[row].prompt] += 1
            self.tokens[row], self.logprobs[row], self.entropies[row] = [], [], []
        return [n for n in alive if n not in put_back]

    def _admit(self, places: int) -> list[int]:
        """The next requests in line, whose prompts are then at hand."""
        fresh = [self.waiting.popleft() for _ in range(min(places, len(self.waiting)))]
        prompts = [self.requests[row].prompt for row in fresh]
        self.prefill(prompts)
        self.waiting_of -= Counter(prompts)
        return fresh

    def prefill(self, prompts: Sequence[int]) -> None:
        """Compute those of the prompts that are not at hand, and as many of the next ones as fit with them."""
        missing = dict.fromkeys(prompt for prompt in prompts if prompt not in self.first_logits)
        # Those of responses that were put back may be gone.
        self.to_compute.extendleft(prompt for prompt in reversed(missing) if prompt in self.decisions)
        while missing:
            ids, longest = [], 0
            while self.to_compute:
                longest = max(longest, self.prompts[self.to_compute[0]].num_tokens)
                if ids and (len(ids) + 1) * longest > self.engine.prefill_tokens:
                    break
                ids.append(self.to_compute.popleft())
            missing = dict.fromkeys(prompt for prompt in missing if prompt not in ids)
            cache, logits = self.engine.prefill(ids, [self.prompts[prompt] for prompt in ids], self.layers)
            self.cache.add(cache)
            self.first_logits |= zip(ids, logits, strict=True)
            modes = self.engine.mode_tokens
            probability = logits.softmax(-1)[:, [modes.newline, modes.blank_line]]
            self.decisions |= zip(ids, map(tuple, probability.tolist()), strict=True)

    def _stretch(
        self, rows: list[int], begun: list[int], last: list[int], alive: list[bool]
    ) -> Generator[list[int], None, tuple[list[int], int]]:
        """Decode the rows until enough have ended, or all need more room than there is.

        Marks the ended ones; returns the last tokens and steps taken.
        """
        device, budget, turn_end = self.engine.device, self.params.max_new_tokens, self.engine.mode_tokens.turn_end
        step, token = torch.tensor(begun, device=device), torch.tensor(last, device=device)
        seed = torch.tensor([self.requests[row].seed for row in rows], device=device)
        start = torch.tensor([self.prompts[self.requests[row].prompt].next_position for row in rows], device=device)
        position = start + step - 1
        block = torch.arange(_POINTS, device=device)[:, None]
        limit = [budget] * len(rows)
        drawn: list[Draw] = []
        while len(rows) - sum(alive) < max(1, int(len(rows) * _ENDED_SHARE)):
            taken = len(drawn)
            if taken and self._places(max(begun) + taken) < len(rows):
                break
            logits = None
            if taken or max(begun):
                longest = max(begun) + taken
                logits = self.engine.decode(token, position + taken, longest, self.layers, self.cache)
            if not taken and not min(begun):
                logits = self._with_first(logits, rows, begun)
            if taken % _POINTS == 0:
                points = uniform(seed, step + taken + block)
            forced = None
            if min(begun) + taken < self.num_forced:
                places = [min(n + taken, self.num_forced) for n in begun]
                forced = torch.tensor(
                    [self.forced[row][place] for row, place in zip(rows, places, strict=True)], device=device
                )
            drawn.append(draw(logits, points[taken % _POINTS], forced, self.params.temperature, self.params.top_p))
            token = drawn[-1].token
            tokens = token.tolist()
            for n, drawn_token in enumerate(tokens):
                if alive[n] and (drawn_token == turn_end or begun[n] + taken + 1 == budget):
                    alive[n] = False
                    limit[n] = begun[n] + taken + 1
                    self.stopped[rows[n]] = drawn_token == turn_end
            yield tokens
        self._file(rows, [end - first for end, first in zip(limit, begun, strict=True)], drawn)
        return tokens, len(drawn)

    def _with_first(self, logits: Tensor | None, rows: list[int], begun: list[int]) -> Tensor:
        """The logits [N, V] of a first step: a new row's first token follows from its prompt.

        What was decoded for it went nowhere.
        """
        new = [n for n, steps in enumerate(begun) if not steps]
        prompts = [self.requests[rows[n]].prompt for n in new]
        first = torch.stack([self.first_logits[prompt] for prompt in prompts])
        for prompt in prompts:
            if not self.waiting_of[prompt]:
                self.first_logits.pop(prompt, None)
        if logits is None:
            return first
        logits[torch.tensor(new, device=logits.device)] = first
        return logits

    def _file(self, rows: list[int], counts: list[int], drawn: list[Draw]) -> None:
        """Write a stretch's draws to their requests; what was drawn after a row's end is not counted."""
        for name in Draw._fields:
            columns = torch.stack([getattr(each, name) for each in drawn], 1).tolist()
            filed = getattr(self, _FILED[name])
            for row, count, values in zip(rows, counts, columns, strict=True):
                filed[row] += values[:count]

    def _rollout(self, row: int) -> Rollout:
        request, modes = self.requests[row], self.engine.mode_tokens
        return Rollout(
            tokens=self.tokens[row],
            logprobs=self.logprobs[row],
            entropies=self.entropies[row],
            mode=request.mode,
            taken=modes.mode_of(self.tokens[row]),
            forced=len(modes.forced(request.mode)),
            finish=FinishReason.STOP if self.stopped[row] else FinishReason.LENGTH,
            seed=request.seed,
            thinking_probability=self.decisions[request.prompt][0],
        )


_FILED = {"token": "tokens", "logprob": "logprobs", "entropy": "entropies"}


def bimode_requests(prompts: int, group_size: int, free: bool, seeds: Callable[[int, int], int]) -> list[Request]:
    """2g requests per prompt: g thinking then g direct (BPO), or 2g whose mode is free (GRPO).

    ``seeds(prompt, k)`` gives each its own.
    """
    modes = [Mode.AUTO] * (2 * group_size) if free else [Mode.THINKING] * group_size + [Mode.DIRECT] * group_size
    return [Request(prompt, mode, seeds(prompt, k)) for prompt in range(prompts) for k, mode in enumerate(modes)]
