"""Does it work? What is asked (plan), how it is carried out (run, pieces), and what came out (data, page)."""
