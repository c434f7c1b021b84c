"""Fourstroke: Stable Diffusion pictures in one to eight steps."""
