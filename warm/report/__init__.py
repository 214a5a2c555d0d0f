"""Tables and plots of any runs: what was measured (data), the paper's tables (tables), plots, and the page of both."""
