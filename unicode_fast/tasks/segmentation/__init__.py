"""Segmentation of pictures by queries: the task, its network and its backbones."""
