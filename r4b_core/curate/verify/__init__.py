"""verify: form, then correctness, of distilled responses."""

from r4b_core.curate.verify.judge import Judge, JudgeReply, JudgeRequest
from r4b_core.curate.verify.stage import Verify, VerifySettings, open_verify, verify_batch

__all__ = ["Judge", "JudgeReply", "JudgeRequest", "Verify", "VerifySettings", "open_verify", "verify_batch"]
