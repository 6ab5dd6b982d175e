"""Scores, their bootstrap intervals, and measures of code sharing between modalities."""
