"""Tables and plots of any runs: the measurements (data), the paper's tables (tables), plots, and the page of both."""
