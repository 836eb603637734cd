"""Records → tables, and tables → CSV, LaTeX, Markdown. Nothing here trains or scores."""
