"""A self test of an optimizer and its groups (`schatten.self_test.core`)."""

from schatten.self_test.core import self_test
from schatten.self_test.report import Check, Report, SelfTestError

__all__ = ["Check", "Report", "SelfTestError", "self_test"]
