"""Experiments of a course on recurrent networks, one file a lesson: ``python -m bench lesson``."""
