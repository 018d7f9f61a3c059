"""Data that can be answered for: looked at, cleaned, and described, before anything is trained on it."""
