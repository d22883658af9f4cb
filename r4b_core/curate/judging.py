"""The judge of `verify` behind an endpoint."""

from __future__ import annotations

from collections.abc import Sequence

from r4b_core.curate.client import ChatMany, ChatRequest
from r4b_core.curate.templates import BARE
from r4b_core.curate.verify import Judge, JudgeReply, JudgeRequest
from r4b_core.curate.wire import Prompt


def judge_by(chat: ChatMany) -> Judge:
    """A judge that asks a served model; where there is no answer, there is no reply."""

    def judge(requests: Sequence[JudgeRequest]) -> list[JudgeReply]:
        asked = [ChatRequest("judge", one.key, Prompt(BARE, one.prompt, []), seed=0) for one in requests]
        answers = chat(asked)
        return [JudgeReply(None if said.failure else said.text, said.finish_reason) for said in answers]

    return judge
