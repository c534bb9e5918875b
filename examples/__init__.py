"""Runnable examples of din_fast."""
