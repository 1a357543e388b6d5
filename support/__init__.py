"""Plumbing that any project of this kind needs; nobody has to read it to understand the paper."""
