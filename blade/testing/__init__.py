"""For tests of plugins, ours and everybody's: fakes to run an engine on, and `check_*` kits that hold an object to its
contract. A kit raises AssertionError with what was broken. Importing this is cheap (no torch)."""

from blade.testing.attention import check_attention
from blade.testing.fakes import ByteTokenizer, FakeModel, TensorWeights
from blade.testing.ops import check_ops
from blade.testing.parsers import check_reasoning_parser, check_tool_parser
from blade.testing.plugin import check_plugin
from blade.testing.policies import check_drafter, check_logits_processor
from blade.testing.scheduler import check_scheduler
from blade.testing.tokenizer import check_tokenizer

__all__ = [
    "ByteTokenizer",
    "FakeModel",
    "TensorWeights",
    "check_attention",
    "check_drafter",
    "check_logits_processor",
    "check_ops",
    "check_plugin",
    "check_reasoning_parser",
    "check_scheduler",
    "check_tokenizer",
    "check_tool_parser",
]
