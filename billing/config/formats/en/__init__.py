"""Formats of English, which is the language of the admin."""
