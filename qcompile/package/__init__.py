"""Packages that judge themselves: the contest's zip, ModelArts' model folder and custom engine."""
