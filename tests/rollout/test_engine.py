"""The embedded engine against the training forward, and what a rollout may and may not depend on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from r4b_core.data.encoding import EncodedPrompt
from r4b_core.data.schema import Sample
from r4b_core.models.r4b.model import R4BModel
from r4b_core.modes import Mode, ModeTokens
from r4b_core.parallel.runtime import Runtime
from r4b_core.rollout.cache import whole_vectors
from r4b_core.rollout.engine import EmbeddedEngine, _ContinuousBatch, bimode_requests
from r4b_core.rollout.gather import generate_groups
from r4b_core.rollout.sampling import request_seed
from r4b_core.rollout.types import FinishReason, Request, Rollout, SamplingParams
from r4b_kernels import dispatch, linear_logprob, native
from tests.models.build import SMALL, one_batch, random_prompt, small_model

VOCABULARY = 60  # of the tokenizer; the head has 64 rows
MODES = ModeTokens(think_open=3, think_close=4, newline=5, blank_line=6, turn_end=2)
ENDLESS = dataclasses.replace(MODES, turn_end=63)  # a token that is never drawn
RARE = dataclasses.replace(MODES, turn_end=8)  # one that is drawn seldom


@pytest.fixture(scope="module")
def model(runtime: Runtime) -> R4BModel:
    # Large weights make distributions uneven, so that a wrong key or position shows.
    return small_model(init_std=0.3)


@pytest.fixture(scope="module")
def prompts() -> list[EncodedPrompt]:
    generator = torch.Generator().manual_seed(1)
    return [
        random_prompt(generator, 2, [(2, 3), (3, 4)], 3),
        random_prompt(generator, 1),
        random_prompt(generator, 9),
        random_prompt(generator, 1, [(3, 2)], 2),
    ]


def requests_for(prompts: int, seed: int = 0) -> list[Request]:
    modes = [Mode.THINKING, Mode.THINKING, Mode.DIRECT, Mode.AUTO]
    return [Request(p, mode, request_seed(seed, p, k)) for p in range(prompts) for k, mode in enumerate(modes)]


def training_forward(
    model: R4BModel, prompt: EncodedPrompt, tokens: list[int], temperature: float
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) of a response over the tokenizer's vocabulary."""
    batch = one_batch(prompt, tokens)
    with torch.no_grad():
        return linear_logprob(model(batch), model.head_weight()[:VOCABULARY], batch.row_target, temperature=temperature)


def assert_same(got: list[Rollout], want: list[Rollout]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.tokens == b.tokens and a.finish == b.finish and a.taken == b.taken
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_entropies_are_those_of_the_training_forward(
    model: R4BModel, prompts: list[EncodedPrompt], temperature: float
) -> None:
    requests = requests_for(len(prompts))
    engine = EmbeddedEngine(model, MODES, VOCABULARY, batch=5)
    for request, rollout in zip(
        requests, engine.generate(prompts, requests, SamplingParams(20, temperature)), strict=True
    ):
        logprob, entropy = training_forward(model, prompts[request.prompt], rollout.tokens, temperature)
        # The bar is 1e-4; measured about 1e-6.
        torch.testing.assert_close(torch.tensor(rollout.logprobs), logprob, rtol=0, atol=2e-5)
        torch.testing.assert_close(torch.tensor(rollout.entropies), entropy, rtol=0, atol=2e-5)
        assert rollout.mode is request.mode and rollout.seed == request.seed


@pytest.mark.skipif(native.cpu_available(torch.device("cpu")) is not None, reason="the C++ backends are not built")
def test_composed_torch_serves_where_the_native_ops_are_missing(
    model: R4BModel, prompts: list[EncodedPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, params = requests_for(len(prompts)), SamplingParams(16, top_p=0.9)
    engine = EmbeddedEngine(model, MODES, VOCABULARY, batch=6)
    want = engine.generate(prompts, requests, params)
    for op in ("rms_norm", "qk_norm_mrope", "decode_attention", "draw_tokens"):
        assert dispatch._CHOSEN[op, "cpu"] == "native"
        monkeypatch.setitem(dispatch._CHOSEN, (op, "cpu"), "cpu")
    assert_same(engine.generate(prompts, requests, params), want)


def test_half_precision(prompts: list[EncodedPrompt]) -> None:
    model = small_model(dtype=torch.bfloat16)
    engine = EmbeddedEngine(model, MODES, VOCABULARY)
    for request, rollout in zip(
        requests_for(4), engine.generate(prompts, requests_for(4), SamplingParams(8)), strict=True
    ):
        logprob, _ = training_forward(model, prompts[request.prompt], rollout.tokens, 1.0)
        torch.testing.assert_close(torch.tensor(rollout.logprobs), logprob.float(), rtol=0, atol=0.05)


def test_the_engine_reads_the_weights_in_place(prompts: list[EncodedPrompt]) -> None:
    model = small_model(seed=7)
    engine = EmbeddedEngine(model, MODES, VOCABULARY)
    request, params = [Request(0, Mode.THINKING, 1)], SamplingParams(12)
    engine.generate(prompts, request, params)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    (rollout,) = engine.generate(prompts, request, params)
    logprob, _ = training_forward(model, prompts[0], rollout.tokens, 1.0)
    torch.testing.assert_close(torch.tensor(rollout.logprobs), logprob, rtol=0, atol=2e-5)


def test_a_rollout_depends_on_its_request_alone(model: R4BModel, prompts: list[EncodedPrompt]) -> None:
    requests, params = requests_for(len(prompts)), SamplingParams(16)
    want = EmbeddedEngine(model, MODES, VOCABULARY).generate(prompts, requests, params)
    assert len({len(rollout.tokens) for rollout in want}) > 2, "responses of different lengths leave at different times"
    for batch in (1, 3, 15):
        assert_same(EmbeddedEngine(model, MODES, VOCABULARY, batch=batch).generate(prompts, requests, params), want)
    engine = EmbeddedEngine(model, MODES, VOCABULARY, batch=4)
    assert_same(engine.generate(prompts, requests[::-1], params), want[::-1])
    alone = [engine.generate([prompts[r.prompt]], [dataclasses.replace(r, prompt=0)], params)[0] for r in requests[::3]]
    assert_same(alone, want[::3])
    assert_same(engine.generate(prompts, requests, params), want)


def test_other_seeds_draw_other_tokens(model: R4BModel, prompts: list[EncodedPrompt]) -> None:
    engine = EmbeddedEngine(model, ENDLESS, VOCABULARY)
    requests = [Request(0, Mode.AUTO, request_seed(0, k)) for k in range(16)]
    drawn = {tuple(rollout.tokens) for rollout in engine.generate(prompts, requests, SamplingParams(8))}
    assert len(drawn) == 16


def test_forced_tokens_stand_first_and_keep_their_logprob(model: R4BModel, prompts: list[EncodedPrompt]) -> None:
    requests = requests_for(len(prompts))
    for rollout in EmbeddedEngine(model, MODES, VOCABULARY).generate(prompts, requests, SamplingParams(8)):
        forced = {Mode.THINKING: [5], Mode.DIRECT: [6, 4], Mode.AUTO: []}[rollout.mode]
        assert rollout.forced == len(forced) and rollout.tokens[: len(forced)] == forced
        assert rollout.taken is (rollout.mode if forced else MODES.mode_of(rollout.tokens))
        assert all(value < 0 for value in rollout.logprobs)
        assert len(rollout.tokens) == len(rollout.logprobs) == len(rollout.entropies)


def test_auto_takes_the_mode_of_its_decision(model: R4BModel, prompts: list[EncodedPrompt]) -> None:
    first = [
        rollout.tokens[0]
        for rollout in EmbeddedEngine(model, MODES, VOCABULARY).generate(
            prompts, [Request(0, Mode.AUTO, k) for k in range(64)], SamplingParams(2)
        )
    ]
    think, direct = max(set(first), key=first.count), min(set(first), key=first.count)
    modes = dataclasses.replace(MODES, newline=think, blank_line=direct)
    rollouts = EmbeddedEngine(model, modes, VOCABULARY).generate(
        prompts, [Request(0, Mode.AUTO, k) for k in range(64)], SamplingParams(2)
    )
    expected = {think: Mode.THINKING, direct: Mode.DIRECT}
    assert [rollout.taken for rollout in rollouts] == [expected.get(token, Mode.AUTO) for token in first]
    assert len({rollout.taken for rollout in rollouts}) == 3


def test_stop_and_length(model: R4BModel, prompts: list[EncodedPrompt]) -> None:
    requests = [Request(p, Mode.THINKING, request_seed(9, p, k)) for p in range(4) for k in range(16)]
    rollouts = EmbeddedEngine(model, MODES, VOCABULARY, batch=20).generate(prompts, requests, SamplingParams(12))
    assert {rollout.finish for rollout in rollouts} == set(FinishReason)
    for rollout in rollouts:
        if rollout.finish is FinishReason.STOP:
            assert rollout.tokens.index(MODES.turn_end) == len(rollout.tokens) - 1
        else:
            assert len(rollout.tokens) == 12 and MODES.turn_end not in rollout.tokens


def test_a_turn_end_on_the_last_place_is_a_stop(model: R4BModel, prompts: list[EncodedPrompt]) -> None:
    engine, request = EmbeddedEngine(model, ENDLESS, VOCABULARY), [Request(0, Mode.THINKING, 4)]
    (endless,) = engine.generate(prompts, request, SamplingParams(8))
    place = next(i for i in range(2, 8) if endless.tokens.index(endless.tokens[i]) == i)
    modes = dataclasses.replace(MODES, turn_end=endless.tokens[place])
    (cut,) = EmbeddedEngine(model, modes, VOCABULARY).generate(prompts, request, SamplingParams(place + 1))
    assert cut.tokens == endless.tokens[: place + 1] and cut.finish is FinishReason.STOP


def test_a_response_that_never_stops_ends_at_the_budget(model: R4BModel, prompts: list[EncodedPrompt]) -> None:
    engine = EmbeddedEngine(model, ENDLESS, VOCABULARY, batch=3)
    for rollout in engine.generate(prompts, requests_for(len(prompts)), SamplingParams(9)):
        assert len(rollout.tokens) == 9 and rollout.finish is FinishReason.LENGTH
        assert max(rollout.tokens) < VOCABULARY, "padded rows of the head are never drawn"


def test_greedy_equals_repeated_full_forwards(model: R4BModel, prompts: list[EncodedPrompt]) -> None:
    requests = [Request(p, Mode.AUTO, 0) for p in range(len(prompts))]
    engine = EmbeddedEngine(model, ENDLESS, VOCABULARY)
    for request, rollout in zip(requests, engine.generate(prompts, requests, SamplingParams(10, 0.0)), strict=True):
        tokens: list[int] = []
        for _ in range(10):
            with torch.no_grad():
                hidden = model(one_batch(prompts[request.prompt], [*tokens, 0]))[-1]
            tokens.append(int((hidden @ model.head_weight()[:VOCABULARY].T).argmax()))
        assert rollout.tokens == tokens
        logprob, _ = training_forward(model, prompts[request.prompt], tokens, 1.0)
        torch.testing.assert_close(torch.tensor(rollout.logprobs), logprob, rtol=0, atol=2e-5)


def test_top_p_keeps_only_the_nucleus(model: R4BModel, prompts: list[EncodedPrompt]) -> None:
    requests = [Request(3, Mode.AUTO, request_seed(2, k)) for k in range(8)]
    engine = EmbeddedEngine(model, ENDLESS, VOCABULARY)
    for rollout in engine.generate(prompts, requests, SamplingParams(8, top_p=0.3)):
        batch = one_batch(prompts[3], rollout.tokens)
        with torch.no_grad():
            probability = (model(batch) @ model.head_weight()[:VOCABULARY].T).softmax(-1)
        drawn = probability.gather(1, batch.row_target[:, None])
        assert ((probability * (probability > drawn)).sum(-1) < 0.3 + 1e-5).all()
        torch.testing.assert_close(torch.tensor(rollout.logprobs), drawn.log().squeeze(1), rtol=0, atol=2e-5)


def test_thinking_probability(model: R4BModel, prompts: list[EncodedPrompt]) -> None:
    requests = requests_for(len(prompts))
    rollouts = EmbeddedEngine(model, MODES, VOCABULARY).generate(prompts, requests, SamplingParams(4))
    for request, rollout in zip(requests, rollouts, strict=True):
        logprob, _ = training_forward(model, prompts[request.prompt], [MODES.newline], 1.0)
        assert rollout.thinking_probability == pytest.approx(float(logprob.exp()), rel=1e-4)


def test_budgets_below_the_forced_tokens_are_refused(model: R4BModel, prompts: list[EncodedPrompt]) -> None:
    engine = EmbeddedEngine(model, MODES, VOCABULARY)
    with pytest.raises(ValueError, match="max_new_tokens=2: the forced tokens of a mode take 2"):
        engine.generate(prompts, [Request(0, Mode.DIRECT, 0)], SamplingParams(2))
    with pytest.raises(ValueError, match="max_new_tokens=1: the forced tokens of a mode take 1"):
        engine.stream(prompts[0], Request(0, Mode.THINKING, 0), SamplingParams(1))
    (rollout,) = engine.generate(prompts, [Request(0, Mode.AUTO, 0)], SamplingParams(1))
    assert len(rollout.tokens) == 1


def test_nothing_to_generate(model: R4BModel, prompts: list[EncodedPrompt]) -> None:
    engine = EmbeddedEngine(model, MODES, VOCABULARY)
    assert engine.generate(prompts, [], SamplingParams(4)) == []
    assert engine.generate([], [], SamplingParams(4)) == []


def test_prompts_that_nobody_asks_for_do_not_matter(model: R4BModel, prompts: list[EncodedPrompt]) -> None:
    engine, params = EmbeddedEngine(model, MODES, VOCABULARY), SamplingParams(10)
    last = engine.generate(prompts, [Request(3, Mode.THINKING, 5)], params)
    assert_same(last, engine.generate(prompts[3:], [Request(0, Mode.THINKING, 5)], params))


def test_a_prompt_is_stored_once_whatever_its_responses(model: R4BModel, prompts: list[EncodedPrompt]) -> None:
    engine = EmbeddedEngine(model, ENDLESS, VOCABULARY, batch=12)
    requests = [Request(k % 2, Mode.AUTO, k) for k in range(40)]
    batch = _ContinuousBatch(engine, prompts, requests, SamplingParams(6))
    with torch.no_grad():
        next(batch.steps())
    layers, heads, dim = SMALL["num_layers"], SMALL["num_kv_heads"], SMALL["head_dim"]
    # Only the two prompts in work are at hand, whatever the number of their rows, and a row holds its own tokens alone.
    longest, budget = whole_vectors(max(prompt.num_tokens for prompt in prompts[:2])), whole_vectors(6)
    held = (*batch.cache.prompts.keys, *batch.cache.prompts.values)
    assert sum(x.numel() for x in held) == 2 * layers * 2 * heads * dim * longest
    own = (*batch.cache.keys, *batch.cache.values)
    assert sum(x.numel() for x in own) == 2 * layers * engine.batch * heads * dim * budget


@pytest.mark.parametrize("prefill_tokens", [1, 24, 60])
def test_prompts_are_computed_when_their_turn_comes(
    model: R4BModel, prompts: list[EncodedPrompt], prefill_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some at a time, each once, however small the batch and whatever the order of the requests; none is kept."""
    chunks: list[list[int]] = []
    genuine = EmbeddedEngine.prefill

    def recorded(self: EmbeddedEngine, ids: list[int], *rest: Any) -> Any:
        chunks.append(ids)
        return genuine(self, ids, *rest)

    requests, params = requests_for(len(prompts)), SamplingParams(16)
    requests = [requests[k] for k in torch.randperm(16, generator=torch.Generator().manual_seed(3)).tolist()]
    want = EmbeddedEngine(model, MODES, VOCABULARY).generate(prompts, requests, params)
    monkeypatch.setattr(EmbeddedEngine, "prefill", recorded)
    engine = EmbeddedEngine(model, MODES, VOCABULARY, batch=2, prefill_tokens=prefill_tokens)
    batch = _ContinuousBatch(engine, prompts, requests, params)
    with torch.no_grad():
        assert_same(batch.run(), want)
    assert [prompt for chunk in chunks for prompt in chunk] == list(dict.fromkeys(r.prompt for r in requests))
    sizes = [[prompts[prompt].num_tokens for prompt in chunk] for chunk in chunks]
    assert all(len(chunk) == 1 or len(chunk) * max(chunk) <= prefill_tokens for chunk in sizes)
    assert (len(chunks) == 4) == (prefill_tokens == 1)
    assert not batch.first_logits and not batch.cache._ready


def test_the_cache_grows_with_the_responses(model: R4BModel, prompts: list[EncodedPrompt]) -> None:
    """Not with their budget; and what was drawn before it grew stays in sight."""
    engine, params = EmbeddedEngine(model, ENDLESS, VOCABULARY, batch=2), SamplingParams(150)
    requests = [Request(0, Mode.AUTO, 1), Request(1, Mode.DIRECT, 2), Request(3, Mode.THINKING, 3)]
    batch = _ContinuousBatch(engine, prompts, requests, params)
    columns = []
    with torch.no_grad():
        for _ in batch.steps():
            columns.append(batch.cache.keys[0].shape[3])
    assert sorted(set(columns)) == [128, whole_vectors(150)] and columns[127] == 128 < columns[140]
    assert columns[-1] == whole_vectors(150) and columns[151] == 128, "the next rows begin with few columns again"
    for request, rollout in zip(requests, (batch._rollout(row) for row in range(3)), strict=True):
        logprob, _ = training_forward(model, prompts[request.prompt], rollout.tokens, 1.0)
        torch.testing.assert_close(torch.tensor(rollout.logprobs), logprob, rtol=0, atol=3e-5)
    huge = EmbeddedEngine(model, MODES, VOCABULARY).generate(prompts, requests_for(4), SamplingParams(1_000_000))
    assert all(rollout.finish is FinishReason.STOP for rollout in huge)


@pytest.mark.parametrize("columns", [1, 520, 700, 1200])
def test_responses_are_put_back_where_the_cache_would_outgrow_its_bound(
    model: R4BModel, prompts: list[EncodedPrompt], columns: int
) -> None:
    """They are drawn again later, and nobody can tell; a lone response may have all it needs."""
    params = SamplingParams(300)
    requests = [Request(k % 4, [Mode.AUTO, Mode.DIRECT, Mode.THINKING][k % 3], 50 + k) for k in range(9)]
    want = EmbeddedEngine(model, RARE, VOCABULARY).generate(prompts, requests, params)
    assert len({rollout.finish for rollout in want}) == 2, "some end early, some at the budget"
    column_bytes = 2 * SMALL["num_layers"] * SMALL["num_kv_heads"] * SMALL["head_dim"] * 4
    engine = EmbeddedEngine(
        model, RARE, VOCABULARY, batch=6, prefill_tokens=40, cache_bytes=columns * column_bytes + 100
    )
    batch = _ContinuousBatch(engine, prompts, requests, params)
    assert batch.most_columns == columns
    steps, widest = 0, 0
    with torch.no_grad():
        for drawn in batch.steps():
            held = batch.cache.keys[0]
            assert len(drawn) == 1 or held.shape[1] * held.shape[3] <= columns
            steps, widest = steps + 1, max(widest, len(drawn))
    assert_same([batch._rollout(row) for row in range(len(requests))], want)
    assert widest == max(1, min(6, columns // 128)) and steps < sum(len(rollout.tokens) for rollout in want) + 300
    drawn_twice = {1: False, 520: True, 700: True, 1200: True}[columns]
    assert bool(batch.times_put_back) == drawn_twice


def test_stream_gives_the_same_tokens_and_disturbs_nobody(model: R4BModel, prompts: list[EncodedPrompt]) -> None:
    engine, request, params = EmbeddedEngine(model, ENDLESS, VOCABULARY), Request(0, Mode.DIRECT, 3), SamplingParams(7)
    (want,) = engine.generate(prompts[:1], [request], params)
    model.train()
    got = []
    for token in engine.stream(prompts[0], request, params):
        assert torch.is_grad_enabled() and model.training
        got.append(token)
    assert got == want.tokens
    engine.generate(prompts[:1], [request], params)
    assert model.training
    stream = engine.stream(prompts[0], request, params)
    assert stream.thinking_probability == want.thinking_probability
    logprob, _ = training_forward(model, prompts[0], [MODES.blank_line], 1.0)
    assert stream.direct_probability == pytest.approx(float(logprob.exp()), rel=1e-4)


def test_bimode_requests() -> None:
    requests = bimode_requests(2, 2, False, lambda prompt, k: 10 * prompt + k)
    assert [(r.prompt, r.mode.value, r.seed) for r in requests] == [
        (0, "thinking", 0),
        (0, "thinking", 1),
        (0, "direct", 2),
        (0, "direct", 3),
        (1, "thinking", 10),
        (1, "thinking", 11),
        (1, "direct", 12),
        (1, "direct", 13),
    ]
    free = bimode_requests(1, 2, True, lambda prompt, k: k)
    assert [r.mode for r in free] == [Mode.AUTO] * 4


def test_groups_come_in_the_order_of_the_requests(
    model: R4BModel, prompts: list[EncodedPrompt], runtime: Runtime
) -> None:
    engine, params = EmbeddedEngine(model, MODES, VOCABULARY), SamplingParams(6)
    requests = bimode_requests(len(prompts), 2, False, lambda prompt, k: request_seed(prompt, k))
    samples = [Sample(id=str(i), source="test", images=[], question="", answer="") for i in range(len(prompts))]
    groups = generate_groups(engine, runtime, samples, prompts, requests, params)
    assert [group.sample.id for group in groups] == ["0", "1", "2", "3"]
    drawn = engine.generate(prompts, requests, params)
    # By their text, since a reward that is not set yet is NaN.
    assert repr([rollout for group in groups for rollout in group.rollouts]) == repr(drawn)
