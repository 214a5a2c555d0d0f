"""`python -m warm.report` (warm/report/page.py)."""

from warm.report.page import main

main()
