"""The command `llmembed-audit`."""

from __future__ import annotations

from llmembed.common.console import answer, command
from llmembed.train.cli import let_waiting_threads_sleep
from llmembed.train.config import AuditConfig

EXAMPLES = (
    "llmembed-audit --cache r8.zarr",
    "llmembed-audit --cache r8.zarr --fusion mean --layers last:4 --defuse-formulas",
)


@command(AuditConfig, examples=EXAMPLES)
def audit_main(config: AuditConfig, *, as_json: bool, quiet: bool) -> None:
    """List rows that look wrong: labels, texts of several labels, outliers, classes to merge."""
    let_waiting_threads_sleep()
    from llmembed.train.reports.audit import audit_table
    from llmembed.train.verbs.auditing import run_audit

    document = run_audit(config)
    table = f"{audit_table(document)}\ntable and page: {config.output_path}"
    answer(document, table, as_json=as_json, quiet=quiet)
