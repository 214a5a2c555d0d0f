"""Does it work? The questions (plan), the runs that answer them (run, pieces), and the results (data, page)."""
