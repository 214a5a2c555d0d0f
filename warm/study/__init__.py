"""Does it work? The questions (plan), the runs that answer them (run, work, pieces), and the results (data, page)."""
