"""The seed of the kills is said before, and their number after."""

from tests.chaos.killing import KILLS, SEED


def pytest_report_header():
    return f"chaos: TLSCALE_CHAOS_SEED={SEED}"


def pytest_terminal_summary(terminalreporter):
    if KILLS:
        terminalreporter.section("kills")
        for what, count in sorted(KILLS.items()):
            terminalreporter.write_line(f"{count:4} {what}")
        terminalreporter.write_line(f"{sum(KILLS.values()):4} in all, with TLSCALE_CHAOS_SEED={SEED}")
