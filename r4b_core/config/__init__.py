"""Recipes: their schema, how they are read, and whether their layout fits."""
