"""Scores, their bootstrap intervals, and measures of how far modalities share codes."""
