"""Segmentation of pictures by queries: the task, its network and the picture features beneath."""
