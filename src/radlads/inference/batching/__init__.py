"""Answering many requests at the same time: who is next, where states lie, and how each row draws its tokens."""
