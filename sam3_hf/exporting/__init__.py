"""Models for other runtimes: graphs of their parts, what lies beside them, and what runs them."""
