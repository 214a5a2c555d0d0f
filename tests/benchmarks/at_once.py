"""A plugin of pytest that prints a failure at once: what is printed at the end is lost if time runs out before it."""


def pytest_runtest_logreport(report):
    """Print why a test has failed."""
    if report.failed:
        print(f'\nFAILED {report.nodeid}\n{report.longreprtext}', flush=True)
