"""`python -m warm.study` (warm/study/run.py)."""

from warm.study.run import main

main()
