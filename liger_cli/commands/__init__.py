"""One module a command; each exposes `command` and is imported when it runs."""
